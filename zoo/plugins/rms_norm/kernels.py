"""RMS norm kernels: one program norms ROWS whole rows in registers.

Everything that a program reads is asked for before the sum of squares, whose barrier would otherwise stand between the
loads: at a few rows a norm is two trips to memory long and not three.

A sum is read, rounded to its dtype and only then normed, so that ``sum`` may share a buffer with ``x`` or ``residual``.

The zoo ops' kernels read weights and scales before they wait for their inputs (``zoo.plugins.overlap``). SCALED: x comes from
a float8 GEMM that left its columns' scale [WIDTH], float32, to be multiplied in here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.fp8_gemm.kernels import round8
from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs


@triton.jit
def rms_normed(x, weight, epsilon, WIDTH: tl.constexpr):
    """x / sqrt(mean(x²) + epsilon) * weight over the last axis, in float32. Columns beyond WIDTH hold 0."""
    square = tl.sum(x * x, axis=1, keep_dims=True) * (1.0 / WIDTH)
    return x * tl.rsqrt(square + epsilon) * weight


@triton.jit
def rms_norm(
    x, weight, y, epsilon, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = norm(x): x, y [rows, WIDTH], weight [WIDTH]."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    wait_for_inputs()
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    values = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    normed = rms_normed(values, weights, epsilon, WIDTH)
    tl.store(y + first * WIDTH + at, normed.to(y.dtype.element_ty), mask)


@triton.jit
def rms_norm_fp8(
    x, weight, y_scale, y, epsilon, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = round8(norm(x) / y_scale): y float8e4m3."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    scale = tl.load(y_scale)
    wait_for_inputs()
    values = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    normed = rms_normed(values, weights, epsilon, WIDTH)
    tl.store(y + first * WIDTH + at, round8(normed, scale), mask)


@triton.jit
def add_rms_norm(
    x, residual, weight, x_scale, sum, y, epsilon, rows,
    SCALED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum = x + residual, y = norm(sum): all [rows, WIDTH] but weight [WIDTH]; SCALED: sum = x * x_scale + residual."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    if SCALED:
        factor = tl.load(x_scale + col, col < WIDTH, other=0.0)
    wait_for_inputs()
    left = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    right = tl.load(residual + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    if SCALED:
        left *= factor
    total = (left + right).to(sum.dtype.element_ty)
    tl.store(sum + first * WIDTH + at, total, mask)
    normed = rms_normed(total.to(tl.float32), weights, epsilon, WIDTH)
    tl.store(y + first * WIDTH + at, normed.to(y.dtype.element_ty), mask)


@triton.jit
def add_rms_norm_fp8(
    x, residual, weight, y_scale, x_scale, sum, y, epsilon, rows,
    SCALED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum = x + residual, y = round8(norm(sum) / y_scale): y float8e4m3."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    scale = tl.load(y_scale)
    if SCALED:
        factor = tl.load(x_scale + col, col < WIDTH, other=0.0)
    wait_for_inputs()
    left = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    right = tl.load(residual + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    if SCALED:
        left *= factor
    total = (left + right).to(sum.dtype.element_ty)
    tl.store(sum + first * WIDTH + at, total, mask)
    normed = rms_normed(total.to(tl.float32), weights, epsilon, WIDTH)
    tl.store(y + first * WIDTH + at, round8(normed, scale), mask)
