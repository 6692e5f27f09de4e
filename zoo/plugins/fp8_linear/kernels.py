"""``ZooFp8Linear`` in one kernel, for TensorRT plugins: activations are quantized on their way into the product.

    y[M, N] = (round8(x[M, K] / x_scale) · weight[N, K]ᵀ) * x_scale * weight_scale[N]

One launch and no workspace is what TensorRT embeds in an engine. The price: each tile of columns rounds all of its rows of x
anew, N / BLOCK_N times over. ``ZooFp8Gemm``, cuBLASLt after one rounding, is the faster way, and the ``cuda`` target takes it.

Shape legend: M rows of x, N outputs, K inputs; rows are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.fp8_gemm.kernels import round8


@triton.jit
def fp8_linear(
    x, weight, weight_scale, x_scale, rows, y,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BLOCK_N), ceil(M / BLOCK_M)). FP8 tensor cores of SM 9.0 add with few bits: every PROMOTE products their
    sum moves on to float32.
    """
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.arange(0, BLOCK_K)
    scale = tl.load(x_scale)
    x_at = x + m[:, None] * K + inside[None, :]
    weight_at = weight + n.to(tl.int64)[:, None] * K + inside[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            exact = tl.load(x_at, mask=(m < rows)[:, None], other=0.0)
            weights = tl.load(weight_at, mask=(n < N)[:, None], other=0.0)
        else:
            along = first + inside < K
            exact = tl.load(x_at, mask=(m < rows)[:, None] & along[None, :], other=0.0)
            weights = tl.load(weight_at, mask=(n < N)[:, None] & along[None, :], other=0.0)
        rounded = round8(exact.to(tl.float32), scale)
        total = tl.dot(rounded, tl.trans(weights), total, max_num_imprecise_acc=PROMOTE)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    scales = scale * tl.load(weight_scale + n, mask=n < N, other=0.0)
    y_at = y + m[:, None] * N + n[None, :]
    tl.store(y_at, (total * scales[None, :]).to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :])
