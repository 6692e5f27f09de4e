"""``ZooPagedAttention`` in one kernel, for TensorRT plugins: it writes a step's keys and values and attends, without scratch.

A plugin whose kernel TensorRT embeds in an engine has one launch and no workspace. So programs may not wait for one another:
none reads from the pool what another writes. A query sees two stretches of its context,

    positions 0 ... before - 1                   in the pool, where nothing is written in this step
    positions before ... before + count - 1      among ``k`` and ``v`` themselves

and the program of a tile of queries copies that tile's keys and values into the pool beside.

Tiles are counted without an index input: those of sequence b are numbered from query_starts[b] // TILE + b on, which leaves room
for each sequence's last, shorter tile; a program finds its sequence by bisection, and some find nothing to do.

The builder may time a plugin on made-up inputs, so every index that is read is clamped to what its tensor holds.

It is made to be right, not to be fast: contexts are not split, so that few sequences keep few multiprocessors busy, and a tile
of a decoding sequence multiplies mostly nothing. The kernels of ``zoo.plugins.cached_attention`` do better, in three launches
with scratch.

Shape legend: T tokens, B sequences, P blocks a sequence, H heads, K key/value heads, G = H / K, D head size, M rows of queries, a
row being one query of one head; N positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score, and finite
NOWHERE = tl.constexpr(2**31 - 1)  # a position that no query sees


@triton.jit
def _sequence_of(query_starts, tile, sequences, TILE: tl.constexpr):
    """The last sequence whose tiles begin at or before ``tile``."""
    low = sequences * 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(query_starts + middle) // TILE + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle - 1)
    return low


@triton.jit
def _places(table_row, position, blocks, BLOCK_SIZE: tl.constexpr, ROW: tl.constexpr):
    """Where the keys of positions [N] begin in a pool, for key/value head 0; ROW = K * D. Values: BLOCK_SIZE * ROW further."""
    block = tl.load(table_row + position // BLOCK_SIZE)
    block = tl.minimum(tl.maximum(block, 0), blocks - 1).to(tl.int64)
    return block * (2 * BLOCK_SIZE * ROW) + (position % BLOCK_SIZE) * ROW


@triton.jit
def _attend(
    sums, total, most, queries, keys, values, place, position,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One tile of an online softmax (Dao 2023, "FlashAttention-2"), in units of log2: sums [M, D], total and most [M, 1]."""
    scores = tl.dot(queries, tl.trans(keys)) * SCALE
    if SOFTCAP > 0:
        scores = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E / SOFTCAP))))
    seen = place[None, :] <= position[:, None]
    if WINDOW > 0:
        seen = seen & (place[None, :] > position[:, None] - WINDOW)
    scores = tl.where(seen, scores * LOG2E, float("-inf"))
    largest = tl.maximum(most, tl.max(scores, 1, keep_dims=True))
    weights = tl.exp2(scores - largest)
    fade = tl.exp2(most - largest)
    total = total * fade + tl.sum(weights, 1, keep_dims=True)
    sums = tl.dot(weights.to(values.dtype), values, sums * fade)
    return sums, total, largest


@triton.jit
def paged_attention(
    q, k, v, kv, block_table, query_starts, kv_lengths, tokens, sequences, table_width, blocks, out, kv_out,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (K, T // TILE + B). ``kv`` is read, ``kv_out``, the same memory, is written; tensors are those of the contract.

    TILE queries of one sequence and all G heads of a key/value head are the TILE * G rows of a program. BLOCK_T, BLOCK_M,
    BLOCK_D: powers of two, at least TILE, TILE * G and D.
    """
    G: tl.constexpr = H // K
    ROW: tl.constexpr = K * D
    head = tl.program_id(0)
    sequence = _sequence_of(query_starts, tl.program_id(1), sequences, TILE)
    start = tl.minimum(tl.maximum(tl.load(query_starts + sequence), 0), tokens)
    stop = tl.minimum(tl.maximum(tl.load(query_starts + sequence + 1), start), tokens)
    first = (tl.program_id(1) - start // TILE - sequence) * TILE
    if (first < 0) | (first >= stop - start):
        return
    length = tl.minimum(tl.maximum(tl.load(kv_lengths + sequence), 1), table_width * BLOCK_SIZE)
    before = length - (stop - start)  # below 0 for padding, whose tokens all stand at position 0
    behind = tl.minimum(first + TILE, stop - start)  # this tile's queries: first ... behind - 1 of the sequence
    table_row = block_table + sequence.to(tl.int64) * table_width
    d = tl.arange(0, BLOCK_D)

    written = first + tl.arange(0, BLOCK_T)
    fresh = ((start + written).to(tl.int64) * ROW + head * D)[:, None] + d[None, :]
    slot = _places(table_row, tl.maximum(before + tl.minimum(written, behind - 1), 0), blocks, BLOCK_SIZE, ROW) + head * D
    live = (written < behind)[:, None] & (d < D)[None, :]
    tl.store(kv_out + slot[:, None] + d[None, :], tl.load(k + fresh, mask=live, other=0.0), mask=live)
    tl.store(kv_out + (slot + BLOCK_SIZE * ROW)[:, None] + d[None, :], tl.load(v + fresh, mask=live, other=0.0), mask=live)

    row = tl.arange(0, BLOCK_M)
    nth = tl.minimum(first + row // G, behind - 1)  # rows behind the last repeat it
    position = tl.maximum(before + nth, 0)
    at = ((start + nth).to(tl.int64) * (H * D) + (head * G + row % G) * D)[:, None] + d[None, :]
    queries = tl.load(q + at, mask=(d < D)[None, :], other=0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    most = tl.full([BLOCK_M, 1], LOWEST, tl.float32)
    begin = tl.maximum(before + first - WINDOW + 1, 0) if WINDOW > 0 else before * 0

    pool = kv + head * D
    for n in tl.range(begin, before, BLOCK_N):
        place = n + tl.arange(0, BLOCK_N)
        # A pool may hold NaN where no token was written: places behind the last token read that one, and are masked.
        places = _places(table_row, tl.minimum(place, before - 1), blocks, BLOCK_SIZE, ROW)
        keys = tl.load(pool + places[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        values = tl.load(pool + (places + BLOCK_SIZE * ROW)[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        place = tl.where(place < before, place, NOWHERE)
        sums, total, most = _attend(sums, total, most, queries, keys, values, place, position, SCALE, WINDOW, SOFTCAP)

    begin = tl.maximum(first - WINDOW + 1, 0) if WINDOW > 0 else first * 0
    for n in tl.range(begin, behind, BLOCK_N):
        new = n + tl.arange(0, BLOCK_N)
        source = ((start + tl.minimum(new, behind - 1)).to(tl.int64) * ROW + head * D)[:, None] + d[None, :]
        keys = tl.load(k + source, mask=(d < D)[None, :], other=0.0)
        values = tl.load(v + source, mask=(d < D)[None, :], other=0.0)
        place = tl.where(new < behind, tl.maximum(before + new, 0), NOWHERE)
        sums, total, most = _attend(sums, total, most, queries, keys, values, place, position, SCALE, WINDOW, SOFTCAP)

    mean = (sums / total).to(out.dtype.element_ty)
    tl.store(out + at, mean, mask=(first + row // G < behind)[:, None] & (d < D)[None, :])
