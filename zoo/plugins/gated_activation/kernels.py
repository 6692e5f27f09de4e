"""Activations in float32, and the gate of an MLP: one program makes [ROWS, BLOCK] of the product.

SCALED: gate_up comes from a float8 GEMM that left its columns' scale [2 * WIDTH], float32, to be multiplied in here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.fp8_gemm.kernels import round8
from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ) to 4e-7.

    In the three functions that SM 9.0 has in one instruction: a division, and e to a power, cost it six and four.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # log2(e)
    return root * root


@triton.jit
def activate(x, KIND: tl.constexpr):
    """0 SiLU, 1 GELU by erf, 2 GELU by tanh, 3 ReLU of a float32 tensor.

    (1 + tanh z) / 2 = sigmoid(2 z): no tanh is needed, and nothing cancels where z is far below 0.
    """
    if KIND == 0:
        y = x * sigmoid(x)
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 * sqrt(2 / pi)
    else:
        tl.static_assert(KIND == 3)
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y


@triton.jit
def gated_product(gate_up, x_scale, first, row, col, mask, WIDTH: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr):
    """act(gate) * up in float32, of gate_up [rows, 2 * WIDTH]. Waits for it."""
    if SCALED:
        gate_scale = tl.load(x_scale + col, col < WIDTH, other=0.0)
        up_scale = tl.load(x_scale + WIDTH + col, col < WIDTH, other=0.0)
    wait_for_inputs()
    at = gate_up + first * (2 * WIDTH) + row * (2 * WIDTH) + col
    gate = tl.load(at, mask, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask, other=0.0).to(tl.float32)
    if SCALED:
        gate *= gate_scale
        up *= up_scale
    return activate(gate, KIND) * up


@triton.jit
def gated_activation(
    gate_up, x_scale, y, rows,
    KIND: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(gate) * up: gate_up [rows, 2 * WIDTH], y [rows, WIDTH]."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows - first) & (col < WIDTH)
    product = gated_product(gate_up, x_scale, first, row, col, mask, WIDTH, KIND, SCALED)
    tl.store(y + first * WIDTH + row * WIDTH + col, product.to(y.dtype.element_ty), mask)


@triton.jit
def gated_activation_fp8(
    gate_up, y_scale, x_scale, y, rows,
    KIND: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = round8(act(gate) * up / y_scale): y float8e4m3."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows - first) & (col < WIDTH)
    scale = tl.load(y_scale)
    product = gated_product(gate_up, x_scale, first, row, col, mask, WIDTH, KIND, SCALED)
    tl.store(y + first * WIDTH + row * WIDTH + col, round8(product, scale), mask)
