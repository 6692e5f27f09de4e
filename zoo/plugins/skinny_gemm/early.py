"""``skinny_gemm`` with weights in registers before x is there; shapes and arguments as in ``kernels.py``.

A program's share of K is a few steps, all written out. The weights of the first AHEAD steps are loaded before the wait for the
kernel that makes x (``zoo.plugins.overlap``), and go on to shared memory, from where the warpgroup's instruction takes them.

The compiler moves them there as soon as they have come, which is before the wait. So the next kernel may start before the weights
are asked for, or when they have come, but not in between; ``stream.py`` has no such limit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs
from zoo.plugins.skinny_gemm.kernels import finish_share, scales_of

# When the next kernel of the stream may start: before anything else, with the first weights there, with all of them used.
FIRST: tl.constexpr = tl.constexpr(0)
THERE: tl.constexpr = tl.constexpr(1)
READ: tl.constexpr = tl.constexpr(4)


@triton.jit
def early_gemm(
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
    AHEAD: tl.constexpr,
    SIGNAL: tl.constexpr,
):
    """Grid: (ceil(N / BLOCK_N), SPLITS, ceil(M / BLOCK_M)). BLOCK_K * SPLITS divides K; AHEAD is at most the steps of a share."""
    STEPS: tl.constexpr = K // (BLOCK_K * SPLITS)
    tl.static_assert(STEPS * BLOCK_K * SPLITS == K and AHEAD <= STEPS)
    if SIGNAL == FIRST:
        start_dependents()
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.arange(0, BLOCK_N)
    n = tile * BLOCK_N + rows
    if N % BLOCK_N != 0:
        rows = tl.minimum(rows, N - 1 - tile * BLOCK_N)  # rows that are not there: the last one again, for nobody
    k = split * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    # the tile's first weight is found in 64 bits, what lies inside a tile in 32
    w_places = w + (tile.to(tl.int64) * BLOCK_N * K) + (rows[:, None] * K + k[None, :])
    x_places = x + m[:, None] * K + k[None, :]
    inside = m[:, None] < M
    scales = scales_of(w_scale, x_scale, n, N, X_SCALED, W_SCALED)
    ws = ()
    for step in tl.static_range(AHEAD):
        ws += (tl.load(w_places + step * BLOCK_K, eviction_policy="evict_first"),)
    if SIGNAL == THERE:
        start_dependents()
    wait_for_inputs()
    xs = ()
    for step in tl.static_range(AHEAD):
        xs += (tl.load(x_places + step * BLOCK_K, mask=inside, other=0.0),)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.static_range(STEPS):
        if PROMOTE > 0:
            total = tl.dot(ws[step], tl.trans(xs[step]), total, max_num_imprecise_acc=PROMOTE)
        else:
            total = tl.dot(ws[step], tl.trans(xs[step]), total)
        if step + AHEAD < STEPS:
            ws += (tl.load(w_places + (step + AHEAD) * BLOCK_K, eviction_policy="evict_first"),)
            xs += (tl.load(x_places + (step + AHEAD) * BLOCK_K, mask=inside, other=0.0),)
    if SIGNAL == READ:
        start_dependents()
    finish_share(
        total, scales, y, partial, counters, tile, split, block, m, n, M, N, BLOCK_M, BLOCK_N, SPLITS, COUNTED
    )  # fmt: skip
