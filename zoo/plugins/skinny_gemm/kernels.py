"""Triton kernels for linear layers of few rows: y[M, N] = x[M, K] · w[N, K]ᵀ, as fast as the weights can be read.

Shape legend: M rows of x (tokens), N outputs, K inputs; S splits of K. Strides follow the shapes: rows are contiguous.

    x         [M, K]      float8e4m3, bfloat16 or float16; as is w
    w         [N, K]
    x_scale   []          float32, one for all of x        (only if X_SCALED)
    w_scale   [N]         float32, one a row of w          (only if W_SCALED; else whoever reads y multiplies by it)
    y         [M, N]      any float
    partial   [S, M, N]   float32                          (only if S > 1)
    counters  [tiles]     int32, zero before and after     (only if COUNTED)

Operands are swapped: a tile of the weights is the tensor core's M side, which is at least 64 wide, and the few rows of x are
its N side, which may be 16. Each program reads BLOCK_N rows of w over its share of K. With S > 1 the shares are added in the
order of their numbers, whoever finishes last, so that results do not depend on timing: by the last program of a tile to
arrive (COUNTED), or by ``sum_partials`` as a launch of its own, which needs no counters.

The next kernel of a stream may start once K is read (``zoo.plugins.overlap``). Earlier, its programs take room that others still
read weights in: a decode step of Llama-3.1-8B took 2.89 ms on an H200 without overlap, 3.07 with it from the start, 2.64 late.
Bringing the first weights into the L2 cache while waiting for x cost 0.1 ms or more, whichever instruction did it.

FP8 tensor cores of SM 9.0 add with few bits; every ``PROMOTE`` products the sum moves on to float32 registers. That costs
nothing where reading the weights is what takes the time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs


@triton.jit
def scales_of(w_scale, x_scale, n, N: tl.constexpr, X_SCALED: tl.constexpr, W_SCALED: tl.constexpr):
    """What sums of rows n of w are multiplied by, as n is shaped."""
    scale = tl.full(n.shape, 1.0, tl.float32)
    if W_SCALED:
        scale = tl.load(w_scale + n, mask=n < N, other=0.0)
    if X_SCALED:
        scale = scale * tl.load(x_scale)
    return scale


@triton.jit
def _finish(total, scales, y, m, n, M, N: tl.constexpr):
    """Scale sums [BLOCK_N, BLOCK_M] and write them to y, transposed."""
    total = total * scales[:, None]
    places = y + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(places, tl.trans(total).to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def finish_share(
    total, scales, y, partial, counters, tile, split, block, m, n, M,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_N, BLOCK_M] of a share of K: to y if there is no other, else to ``partial``; the last of COUNTED adds them."""
    if SPLITS == 1:
        _finish(total, scales, y, m, n, M, N)
    else:
        inside = (m[None, :] < M) & (n[:, None] < N)
        places = partial + m[None, :].to(tl.int64) * N + n[:, None]
        stride = M.to(tl.int64) * N
        tl.store(places + split * stride, total, mask=inside, cache_modifier=".cg")
        if COUNTED:
            tl.debug_barrier()  # every thread's part is written before one of them says so
            counter = counters + block * tl.num_programs(0) + tile
            if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
                total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for part in tl.range(0, SPLITS, num_stages=1, loop_unroll_factor=1):
                    total += tl.load(places + part * stride, mask=inside, other=0.0, cache_modifier=".cg")
                _finish(total, scales, y, m, n, M, N)
                tl.store(counter, 0)


@triton.jit
def skinny_gemm(
    x,
    w,
    w_scale,
    x_scale,
    y,
    partial,
    counters,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
    COUNTED: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    """Grid: (ceil(N / BLOCK_N), SPLITS, ceil(M / BLOCK_M))."""
    STEPS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    EVEN_K: tl.constexpr = K % (BLOCK_K * SPLITS) == 0
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.arange(0, BLOCK_N)
    n = tile * BLOCK_N + rows
    k = split * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    # the tile's first weight is found in 64 bits, what lies inside a tile in 32
    w_places = w + (tile.to(tl.int64) * BLOCK_N * K) + (rows[:, None] * K + k[None, :])
    x_places = x + m[:, None] * K + k[None, :]
    scales = scales_of(w_scale, x_scale, n, N, X_SCALED, W_SCALED)
    wait_for_inputs()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(STEPS):
        if EVEN_K and EVEN_N:
            w_tile = tl.load(w_places, eviction_policy="evict_first")
        else:
            inside = (n[:, None] < N) & (k[None, :] + step * BLOCK_K < K)
            w_tile = tl.load(w_places, mask=inside, other=0.0, eviction_policy="evict_first")
        if EVEN_K:
            x_tile = tl.load(x_places, mask=m[:, None] < M, other=0.0)
        else:
            x_tile = tl.load(x_places, mask=(m[:, None] < M) & (k[None, :] + step * BLOCK_K < K), other=0.0)
        if PROMOTE > 0:
            total = tl.dot(w_tile, tl.trans(x_tile), total, max_num_imprecise_acc=PROMOTE)
        else:
            total = tl.dot(w_tile, tl.trans(x_tile), total)
        w_places += BLOCK_K
        x_places += BLOCK_K
    start_dependents()
    finish_share(
        total, scales, y, partial, counters, tile, split, block, m, n, M, N, BLOCK_M, BLOCK_N, SPLITS, COUNTED
    )  # fmt: skip


@triton.jit
def sum_partials(
    partial,
    w_scale,
    x_scale,
    y,
    M,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
):
    """Add the parts of a row that ``skinny_gemm`` left, in order. Grid: (ceil(N / BLOCK_N), M, 1)."""
    start_dependents()
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = partial + row * N + n
    scales = scales_of(w_scale, x_scale, n, N, X_SCALED, W_SCALED)
    wait_for_inputs()
    total = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(places + part * (M.to(tl.int64) * N), mask=n < N, other=0.0)
    tl.store(y + row * N + n, (total * scales).to(y.dtype.element_ty), mask=n < N)
