"""Rounding to float8e4m3 on a GPU, as ONNX's QuantizeLinear rounds. ``ZooFp8Gemm`` has no kernel here: cuBLASLt runs it."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs


@triton.jit
def round8(x, scale):
    """x / scale, correctly rounded to float32, then to float8e4m3: to nearest even, saturating; NaN stays NaN.

    An IEEE division of each element costs ten instructions and a branch. Dividing 1 by the scale once, and correcting each
    product by its own remainder, gives the same quotient in three (Markstein 1990, "Computation of elementary functions on
    the IBM RISC System/6000 processor"); only for a scale whose 24 bits are all ones may the last bit be off. A quotient
    beyond ±512 stays beyond ±448 and saturates, which is the conversion's own doing (PTX: cvt.rn.satfinite.e4m3x2.f32);
    clamping it first keeps infinities out of the remainder. A zero's sign is lost.
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = tl.clamp(x * inverse, -512.0, 512.0, propagate_nan=tl.PropagateNan.ALL)
    remainder = tl.fma(-quotient, scale, x)
    return tl.fma(remainder, inverse, quotient).to(tl.float8e4nv)


@triton.jit
def quantize_fp8(
    x, x_scale, y, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = round8(x / x_scale): x [rows, WIDTH], x_scale one float32."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows - first) & (col < WIDTH)
    at = row * WIDTH + col
    scale = tl.load(x_scale)
    wait_for_inputs()
    values = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    tl.store(y + first * WIDTH + at, round8(values, scale), mask)
