"""Kernels of standard operators. All compute in float32 and round once, to the dtype of the output.

Shape legend: ``rows`` at run time, WIDTH columns; a program makes a tile [ROWS, BLOCK].
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.gated_activation.kernels import activate, sigmoid
from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs


@triton.jit
def tanh(x):
    """To 2e-7: (1 - e) / (1 + e) with e = e⁻²ˣ of the size of x, which cannot overflow."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # 2 * log2(e)
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def unary(
    x, y, rows,
    OP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = f(x), both [rows, WIDTH]. OP: cast, sigmoid, tanh, or the kind of an activation as a number (``activate``)."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    wait_for_inputs()
    values = tl.load(x + first * WIDTH + at, mask, other=0)
    if OP == "sigmoid":
        values = sigmoid(values.to(tl.float32))
    elif OP == "tanh":
        values = tanh(values.to(tl.float32))
    elif OP != "cast":
        values = activate(values.to(tl.float32), OP)
    tl.store(y + first * WIDTH + at, values.to(y.dtype.element_ty), mask)


@triton.jit
def binary(
    a, b, a_scale, y, rows,
    OP: tl.constexpr, PERIOD: tl.constexpr, SCALED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = a + b, a * b or a / b: a, y [rows, WIDTH], b by PERIOD. OP: add, multiply, divide.

    PERIOD: of b's rows, [PERIOD, WIDTH], which the rows of a take in turns; 0: b has a row for each; -1: b is one number.
    SCALED: a comes from a float8 GEMM that left its columns' scale [WIDTH], float32, to be multiplied in here.
    """
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    wait_for_inputs()
    left = tl.load(a + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    if PERIOD < 0:
        right = tl.load(b).to(tl.float32)
    elif PERIOD == 0:
        right = tl.load(b + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    elif PERIOD == 1:
        right = tl.load(b + col, col < WIDTH, other=0.0).to(tl.float32)
    else:
        right = tl.load(b + (first + row) % PERIOD * WIDTH + col, mask, other=0.0).to(tl.float32)
    if SCALED:
        left *= tl.load(a_scale + col, col < WIDTH, other=0.0)
    if OP == "add":
        result = left + right
    elif OP == "multiply":
        result = left * right
    else:
        tl.static_assert(OP == "divide")
        result = left / right
    tl.store(y + first * WIDTH + at, result.to(y.dtype.element_ty), mask)


@triton.jit
def clip(
    x, low, high, y, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x, but at least ``low`` and at most ``high``, one number each; NaN stays NaN."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    wait_for_inputs()
    values = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    values = tl.maximum(values, tl.load(low).to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    values = tl.minimum(values, tl.load(high).to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + first * WIDTH + at, values.to(y.dtype.element_ty), mask)


@triton.jit
def copy_columns(
    x, y, rows,
    FROM: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x[:, START : START + WIDTH]: x [rows, FROM], y [rows, WIDTH]."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows - first) & (col < WIDTH)
    wait_for_inputs()
    values = tl.load(x + first * FROM + START + row * FROM + col, mask)
    tl.store(y + first * WIDTH + row * WIDTH + col, values, mask)


@triton.jit
def paste_columns(
    x, y, rows,
    TO: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[:, START : START + WIDTH] = x: x [rows, WIDTH], y [rows, TO]."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows - first) & (col < WIDTH)
    wait_for_inputs()
    values = tl.load(x + first * WIDTH + row * WIDTH + col, mask)
    tl.store(y + first * TO + START + row * TO + col, values, mask)


@triton.jit
def gather_rows(
    data, indices, y, height, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = data[indices]: data [height, WIDTH], indices [rows] int32 or int64, negative ones from the end, y [rows, WIDTH].

    An index beyond the data reads what is not there: ONNX calls it an error, and nobody checks it here.
    """
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows - first) & (col < WIDTH)
    wait_for_inputs()
    index = tl.load(indices + first + row, row < rows - first, other=0).to(tl.int64)
    index = tl.where(index < 0, index + height, index)
    tl.store(y + first * WIDTH + row * WIDTH + col, tl.load(data + index * WIDTH + col, mask), mask)


@triton.jit
def layer_norm(
    x, weight, bias, y, epsilon, rows,
    BIASED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) / sqrt(var + epsilon) * weight + bias (Ba et al. 2016): x, y [rows, WIDTH], weight, bias [WIDTH].

    Without BIASED the bias is not read.

    The variance is taken of the differences in registers, a second sum: E[x²] - E[x]² would cancel. The bias is asked for
    early, as all else, unless a row leaves no registers for it.
    """
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    wait_for_inputs()
    values = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    if BIASED and BLOCK <= 16384:
        biases = tl.load(bias + col, col < WIDTH, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1, keep_dims=True) * (1.0 / WIDTH)
    centered = tl.where(col < WIDTH, values - mean, 0.0)
    variance = tl.sum(centered * centered, axis=1, keep_dims=True) * (1.0 / WIDTH)
    normed = centered * tl.rsqrt(variance + epsilon) * weights
    if BIASED:
        if BLOCK > 16384:
            biases = tl.load(bias + col, col < WIDTH, other=0.0).to(tl.float32)
        normed += biases
    tl.store(y + first * WIDTH + at, normed.to(y.dtype.element_ty), mask)
