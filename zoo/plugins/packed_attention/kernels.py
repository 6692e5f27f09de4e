"""Rotation of queries and keys, and attention over packed texts: tiles of rows, each of which sees its own text (Dao 2023,
"FlashAttention-2": online softmax).

A tile is so many rows of the step, whatever texts they belong to: short texts share one, and their scores with each other are
masked. So a step needs no list of tiles, and many short texts fill tensor cores as well as a long one does.

Shape legend: T tokens, B texts, H heads, K key/value heads, D head size, M rows of a tile, N rows that they see.

Scores are kept in units of log2: softmax is exp2(score * factor - largest), factor = scale * log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: rows that have seen nothing yet stay free of NaN


@triton.jit
def _texts(query_starts, row, first_row, last_row, tokens, sequences, BLOCK_B: tl.constexpr):
    """Where the text of each row [M] begins and where it ends; how many texts begin up to the first row, and up to the last.

    Rows behind the last text are one of their own.
    """
    begin = row * 0
    end = begin + tokens
    up_to_first = 0
    up_to_last = 0
    for b in tl.range(0, sequences + 1, BLOCK_B):
        at = b + tl.arange(0, BLOCK_B)
        starts = tl.load(query_starts + at, mask=at <= sequences, other=2147483647)
        up_to_first += tl.sum((starts <= first_row).to(tl.int32), 0)
        up_to_last += tl.sum((starts <= last_row).to(tl.int32), 0)
        before = starts[None, :] <= row[:, None]
        begin = tl.maximum(begin, tl.max(tl.where(before, starts[None, :], 0), 1))
        end = tl.minimum(end, tl.min(tl.where(before, 2147483647, starts[None, :]), 1))
    return begin, end, up_to_first, up_to_last


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    """Rows of heads. WHOLE: the head size is a power of two, so that all of a row is ``inside`` and no mask is spent on it."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _attend(
    state, queries, row, begin, end, keys_at, values_at, first, stop,
    ROW: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Let queries [M, D] see rows first to stop - 1.

    state   sums of values [M, D], sums of weights [M, 1], largest scores [M, 1]
    MASKED  some query does not see some of these rows; rows from ``stop`` on read the last one. Values that are not finite then
            count as 0: times a weight of 0, a text's NaN would reach those that share its tile. Its own scores are NaN anyway
    """
    sums, total, most = state
    d = tl.arange(0, BLOCK_D)[None, :]
    for n in tl.range(first, stop, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        at = (tl.minimum(column, stop - 1) if MASKED else column).to(tl.int64)[:, None] * ROW + d
        keys = _load(keys_at + at, d < D, D == BLOCK_D)
        values = _load(values_at + at, d < D, D == BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys)) * (SCALE * LOG2E)
        if SOFTCAP > 0:
            power = tl.exp2(scores * (2.0 / SOFTCAP))
            scores = (1.0 - 2.0 / (1.0 + power)) * (SOFTCAP * LOG2E)
        if MASKED:
            seen = (column[None, :] >= begin[:, None]) & (column[None, :] < end[:, None])
            if WINDOW > 0:
                seen = seen & (tl.abs(row[:, None] - column[None, :]) <= WINDOW // 2)
            scores = tl.where(seen, scores, float("-inf"))
            values = tl.where(tl.abs(values.to(tl.float32)) < float("inf"), values, 0.0)
        largest = tl.maximum(most, tl.max(scores, 1, keep_dims=True))
        weights = tl.exp2(scores - largest)
        fade = tl.exp2(most - largest)
        most = largest
        total = total * fade + tl.sum(weights, 1, keep_dims=True)
        sums = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), sums * fade)
    return sums, total, most


@triton.jit
def rotate(
    x, cos, sin, positions, y, rows,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotary embedding (Su et al. 2021) of x [rows, HEADS * D], pairs apart by HALF or neighbours; the rest of a head is copied.

    Grid (ceil(rows / ROWS), HEADS). Tables are [positions, HALF].
    """
    start_dependents()
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    head = row.to(tl.int64) * (HEADS * D) + tl.program_id(1) * D
    place = tl.load(positions + row, mask=live, other=0).to(tl.int64) * HALF
    c = tl.load(cos + place + col, mask=live & (col < HALF), other=0.0).to(tl.float32)
    s = tl.load(sin + place + col, mask=live & (col < HALF), other=0.0).to(tl.float32)
    if INTERLEAVED:
        first, second = head + 2 * col, head + 2 * col + 1
    else:
        first, second = head + col, head + HALF + col
    left = tl.load(x + first, mask=live & (col < HALF), other=0.0).to(tl.float32)
    right = tl.load(x + second, mask=live & (col < HALF), other=0.0).to(tl.float32)
    tl.store(y + first, (left * c - right * s).to(y.dtype.element_ty), mask=live & (col < HALF))
    tl.store(y + second, (right * c + left * s).to(y.dtype.element_ty), mask=live & (col < HALF))
    if D > 2 * HALF:
        rest = head + 2 * HALF + col
        inside = live & (col < D - 2 * HALF)
        tl.store(y + rest, tl.load(x + rest, mask=inside), mask=inside)


@triton.jit
def packed(
    q, k, v, query_starts, out, tokens, sequences,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (H, ceil(T / BLOCK_M))."""
    start_dependents()
    wait_for_inputs()
    head = tl.program_id(0)
    first_row = tl.program_id(1) * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, tokens) - 1
    nth = first_row + tl.arange(0, BLOCK_M)
    row = tl.minimum(nth, last_row)
    begin, end, up_to_first, up_to_last = _texts(query_starts, row, first_row, last_row, tokens, sequences, BLOCK_B)
    d = tl.arange(0, BLOCK_D)[None, :]
    at = row.to(tl.int64)[:, None] * (H * D) + head * D + d
    queries = _load(q + at, d < D, D == BLOCK_D)
    head_at = head // (H // K) * D
    nothing = tl.zeros([BLOCK_M, 1], tl.float32)
    state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), nothing, nothing + LOWEST)

    # Loaded, not taken from begin and end: Triton 3.6 pipelines no loop whose bounds are reduced from a tensor.
    first = tl.load(query_starts + up_to_first - 1)
    stop = tl.load(query_starts + up_to_last, mask=up_to_last <= sequences, other=0)
    stop = tl.where(up_to_last <= sequences, stop, tokens)
    if WINDOW > 0:
        first = tl.maximum(first, first_row - WINDOW // 2)
        stop = tl.minimum(stop, last_row + 1 + WINDOW // 2)
        whole = first
    else:  # a tile of one text sees all of it but for what does not fill a block
        whole = first + tl.where(up_to_first == up_to_last, stop - first, 0) // BLOCK_N * BLOCK_N
        state = _attend(
            state, queries, row, begin, end, k + head_at, v + head_at, first, whole,
            K * D, D, SCALE, WINDOW, SOFTCAP, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    sums, total, _ = _attend(
        state, queries, row, begin, end, k + head_at, v + head_at, whole, stop,
        K * D, D, SCALE, WINDOW, SOFTCAP, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    tl.store(out + at, (sums / total).to(out.dtype.element_ty), mask=(nth < tokens)[:, None] & (d < D))
