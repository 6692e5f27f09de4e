"""RMS norm kernels: one program norms ROWS whole rows in registers.

Everything that a program reads is asked for before the sum of squares, whose barrier would otherwise stand between the
loads: at a few rows a norm is two trips to memory long and not three.

A sum is read, rounded to its dtype and only then normed, so that ``sum`` may share a buffer with ``x`` or ``residual``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.fp8_gemm.kernels import round8


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
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    values = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    normed = rms_normed(values, weights, epsilon, WIDTH)
    tl.store(y + first * WIDTH + at, normed.to(y.dtype.element_ty), mask)


@triton.jit
def rms_norm_fp8(
    x, weight, y_scale, y, epsilon, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = round8(norm(x) / y_scale): y float8e4m3."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    values = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    scale = tl.load(y_scale)
    normed = rms_normed(values, weights, epsilon, WIDTH)
    tl.store(y + first * WIDTH + at, round8(normed, scale), mask)


@triton.jit
def add_rms_norm(
    x, residual, weight, sum, y, epsilon, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum = x + residual, y = norm(sum): all [rows, WIDTH] but weight [WIDTH]."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    left = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    right = tl.load(residual + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    total = (left + right).to(sum.dtype.element_ty)
    tl.store(sum + first * WIDTH + at, total, mask)
    normed = rms_normed(total.to(tl.float32), weights, epsilon, WIDTH)
    tl.store(y + first * WIDTH + at, normed.to(y.dtype.element_ty), mask)


@triton.jit
def add_rms_norm_fp8(
    x, residual, weight, y_scale, sum, y, epsilon, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum = x + residual, y = round8(norm(sum) / y_scale): y float8e4m3."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    left = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    right = tl.load(residual + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    weights = tl.load(weight + col, col < WIDTH, other=0.0).to(tl.float32)
    scale = tl.load(y_scale)
    total = (left + right).to(sum.dtype.element_ty)
    tl.store(sum + first * WIDTH + at, total, mask)
    normed = rms_normed(total.to(tl.float32), weights, epsilon, WIDTH)
    tl.store(y + first * WIDTH + at, round8(normed, scale), mask)
