"""Triton kernels that quantize weights when an engine is loaded, bit for bit as ``zoo.weights.evaluate`` does on a CPU.

Shape legend: N rows (output channels), K columns, a multiple of 16; rows are contiguous.

    x      [N, K]   bfloat16, float16 or float32
    scale  [N]      float32: max|x[n]| / limit, and 1 for a row of zeros
    y      [N, K]   float8e4m3: x / scale, clamped to ±448, to the nearest even
    bad    [1]      int32, set to 1 when x holds NaN or infinity; the caller clears it

Both divisions are IEEE's (``div.rn``): Triton's ``/`` is an approximation on a GPU and would differ in the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_scale(x, scale, bad, columns, limit, BLOCK: tl.constexpr):
    """Grid: (N, 1, 1)."""
    row = tl.program_id(0)
    columns = columns // 16 * 16  # a product is known to be a multiple, which makes loads wide; a hint on an argument is lost
    start = x + row.to(tl.int64) * columns
    peak = tl.zeros((BLOCK,), tl.int32)
    k = tl.arange(0, BLOCK)
    first = 0
    while first < columns:
        value = tl.load(start + first + k, mask=first + k < columns, other=0.0).to(tl.float32)
        # magnitudes of floats order as their bits do, infinity and NaN above all others
        peak = tl.maximum(peak, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        first += BLOCK
    most = tl.max(peak, axis=0)
    if most >= 0x7F800000:
        tl.store(bad, 1)
    made = tl.div_rn(most.to(tl.float32, bitcast=True), limit)
    tl.store(scale + row, tl.where(made > 0, made, 1.0))


@triton.jit
def quantize(x, scale, y, columns, BLOCK: tl.constexpr):
    """Grid: (N, 1, 1)."""
    row = tl.program_id(0)
    columns = columns // 16 * 16  # a product is known to be a multiple, which makes loads wide; a hint on an argument is lost
    start = row.to(tl.int64) * columns
    divisor = tl.load(scale + row)
    k = tl.arange(0, BLOCK)
    first = 0
    while first < columns:
        value = tl.load(x + start + first + k, mask=first + k < columns, other=0.0).to(tl.float32)
        value = tl.div_rn(value, divisor)
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
        tl.store(y + start + first + k, value.to(y.dtype.element_ty), mask=first + k < columns)
        first += BLOCK
