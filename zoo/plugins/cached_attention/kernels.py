"""Attention over a paged pool: tiles of queries, single queries over parts of their context, and the merge of those parts.

    prefill   sequences with several new tokens. A program takes BLOCK_M rows of a tile, a row being one query of one head: the
              G heads that share a key/value head stand side by side, so that they share what is read (Dao 2023,
              "FlashAttention-2": online softmax; Ainslie et al. 2023: grouped heads)
    decode    sequences with one new token, split along their context (Dao et al. 2023, "Flash-Decoding")
    merge     the softmax over the parts of such a context (Milakov and Gimelshein 2018)

Shape legend: T tokens, B sequences, H heads, K key/value heads, G = H / K, D head size, M rows of queries, N positions.

A pool may hold NaN wherever no token was written, and NaN times a weight of 0 is NaN. So positions behind the last visible one
read the last visible one, which is as finite as the sequence is; no load needs a mask, and scores alone are masked.

Scores are kept in units of log2: softmax is exp2(score * factor - largest), factor = scale * log2(e).

EXTRA says what ``extra`` [H] is, and so which variant a kernel is:

    ""        nothing; not an argument at all
    "sinks"   one more score for each head. It only enters the sum of weights, once: behind the loop, or in the merge
    "slopes"  float32; a head's score falls by it for each position of distance, which is counted in whole numbers

Float8 pools are multiplied in float16, which holds every float8e4m3 exactly and converts in one instruction for two values;
bfloat16 would take four. Queries are divided by a power of two on the way, so that none is too large for float16.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from zoo.plugins.fp8_gemm.kernels import round8
from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: rows that have seen nothing yet stay free of NaN
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _places(pages, position, BLOCK_SIZE: tl.constexpr, ROW: tl.constexpr):
    """Where the keys of positions [N] begin in a pool, for key/value head 0; ROW = K * D. Values: BLOCK_SIZE * ROW further."""
    block = tl.load(pages + position // BLOCK_SIZE).to(tl.int64)
    return block * (2 * BLOCK_SIZE * ROW) + (position % BLOCK_SIZE) * ROW


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    """Keys or values. WHOLE: head sizes are powers of two, so that all of a tile is ``inside`` and no mask is spent on it."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _unit(queries, axis: tl.constexpr):
    """The power of two next below each query's largest value."""
    most = tl.max(tl.abs(queries), axis, keep_dims=True)
    exponent = tl.maximum(most.to(tl.int32, bitcast=True) & 0x7F800000, 0x08000000)
    return exponent.to(tl.float32, bitcast=True)


@triton.jit
def _weigh(
    scores, apart, slope, seen, factor, most, axis: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """Weights of scores, not yet divided by their sum; by how much earlier weights fade; the largest score so far.

    ``factor`` takes scores to log2 units. A soft cap bends them: cap * tanh(score / cap). ``apart``: how far positions lie behind
    their query, below 0; ``slope``: by how much scores fall for each of these, in log2 units.
    """
    if SOFTCAP > 0:
        power = tl.exp2(scores * factor * (2.0 / SOFTCAP))
        scores = (1.0 - 2.0 / (1.0 + power)) * (SOFTCAP * LOG2E)
    if EXTRA == "slopes":
        if SOFTCAP == 0:
            scores = scores * factor
        scores += apart.to(tl.float32) * slope
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    largest = tl.max(scores, axis, keep_dims=True)
    if (SOFTCAP > 0) | (EXTRA == "slopes"):
        largest = tl.maximum(most, largest)
        weights = tl.exp2(scores - largest)
    else:
        largest = tl.maximum(most, largest * factor)
        weights = tl.exp2(scores * factor - largest)
    return weights, tl.exp2(most - largest), largest


@triton.jit
def _unpack(pairs):
    """Neighbours of float8e4m3, two in an int16, as two tensors of float16: low bytes, high bytes.

    In assembly because two conversions and one permutation for four values is what it should take, and Triton's own way is
    three times that: it takes int16 apart into bytes one by one.
    """
    if INTERPRETED:
        low = (pairs & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        high = ((pairs >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes;
            .reg .b16 low, high;
            prmt.b32 bytes, $2, 0, 0x3120;
            mov.b32 {low, high}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return low, high


@triton.jit
def _per_head(extra, heads):
    """Sinks or slopes of ``heads``, in log2 units."""
    return tl.load(extra + heads).to(tl.float32) * LOG2E


@triton.jit
def _store(at, values, live, scale):
    """Store an output: as it is, or as round8(values / scale)."""
    if at.dtype.element_ty == tl.float8e4nv:
        tl.store(at, round8(values, tl.load(scale)), mask=live)
    else:
        tl.store(at, values.to(at.dtype.element_ty), mask=live)


@triton.jit
def _attend(
    state, queries, factor, slope, position, pool, pages, first, stop, last,
    ROW: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Let queries [M, D] at ``position`` [M] see positions first to stop - 1; ``last`` is the last that any of them sees.

    state   sums of values [M, D], sums of weights [M, 1], largest scores [M, 1]
    MASKED  some query does not see some of these positions
    """
    sums, total, most = state
    d = tl.arange(0, BLOCK_D)[None, :]
    for n in tl.range(first, stop, BLOCK_N):
        place = n + tl.arange(0, BLOCK_N)
        start = _places(pages, tl.minimum(place, last) if MASKED else place, BLOCK_SIZE, ROW)
        keys = _load(pool + start[:, None] + d, d < D, D == BLOCK_D)
        values = _load(pool + (start + BLOCK_SIZE * ROW)[:, None] + d, d < D, D == BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)))
        seen = place[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (place[None, :] > position[:, None] - WINDOW)
        apart = place[None, :] - position[:, None]
        weights, fade, most = _weigh(scores, apart, slope, seen, factor, most, 1, SOFTCAP, MASKED, EXTRA)
        total = total * fade + tl.sum(weights, 1, keep_dims=True)
        sums = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), sums * fade)
    return sums, total, most


@triton.jit
def prefill(
    q, kv, block_table, prefill_tiles, kv_scale, out_scale, out, table_width, extra,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid (K * PARTS, W): PARTS programs share the rows of a tile and key/value head. A tile without queries is passed over."""
    G: tl.constexpr = H // K
    ROW: tl.constexpr = K * D
    FP8: tl.constexpr = kv.dtype.element_ty == tl.float8e4nv
    start_dependents()
    wait_for_inputs()
    head = tl.program_id(0) // PARTS
    first_row = tl.program_id(0) % PARTS * BLOCK_M
    tile = prefill_tiles + tl.program_id(1) * 4
    queries = tl.load(tile + 2)
    if first_row >= queries * G:
        return
    pages = block_table + tl.load(tile).to(tl.int64) * table_width
    first_token = tl.load(tile + 1)
    first_position = tl.load(tile + 3)

    row = first_row + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    nth = tl.minimum(row // G, queries - 1)
    position = first_position + nth
    at = ((first_token + nth).to(tl.int64) * (H * D) + (head * G + row % G) * D)[:, None] + d[None, :]
    q_tile = tl.load(q + at, mask=(d < D)[None, :], other=0.0)
    factor = tl.full([BLOCK_M, 1], SCALE * LOG2E, tl.float32)
    if FP8:
        exact = q_tile.to(tl.float32)
        unit = _unit(exact, 1)
        q_tile = (exact / unit).to(tl.float16)
        factor *= unit * tl.load(kv_scale)
    per_head = factor
    if EXTRA != "":
        per_head = _per_head(extra, head * G + row % G)[:, None]

    # Positions up to ``whole`` are seen by all rows; with a window, those from ``early`` on are still seen by all.
    last = first_position + tl.minimum((first_row + BLOCK_M - 1) // G, queries - 1)
    whole = (first_position + first_row // G + 1) // BLOCK_N * BLOCK_N
    pool = kv + head * D
    nothing = tl.zeros([BLOCK_M, 1], tl.float32)
    state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), nothing, nothing + LOWEST)
    if WINDOW > 0:
        begin = tl.maximum(first_position + first_row // G - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        early = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        whole = tl.maximum(whole, early)
        state = _attend(
            state, q_tile, factor, per_head, position, pool, pages, begin, tl.minimum(early, last + 1), last,
            ROW, D, BLOCK_SIZE, WINDOW, SOFTCAP, EXTRA, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    else:
        early = 0
    state = _attend(
        state, q_tile, factor, per_head, position, pool, pages, early, whole, last,
        ROW, D, BLOCK_SIZE, WINDOW, SOFTCAP, EXTRA, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    sums, total, most = _attend(
        state, q_tile, factor, per_head, position, pool, pages, whole, last + 1, last,
        ROW, D, BLOCK_SIZE, WINDOW, SOFTCAP, EXTRA, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    if EXTRA == "sinks":
        total += tl.exp2(per_head - most)
    mean = sums / total
    if FP8:
        mean *= tl.load(kv_scale + 1)
    _store(out + at, mean, (row < queries * G)[:, None] & (d < D)[None, :], out_scale)


@triton.jit
def _part(context, splits, SLOTS: tl.constexpr, sequences, BLOCK_N: tl.constexpr, LEAST: tl.constexpr):
    """Positions of one part of a context that ``splits`` programs share: whole tiles, LEAST or more.

    Scratch has room for SLOTS parts of one key/value head, sequences * splits of which are used: more are not made.
    """
    splits = tl.minimum(splits, tl.maximum(SLOTS // sequences, 1))
    return tl.maximum(tl.cdiv(tl.cdiv(context, splits), BLOCK_N) * BLOCK_N, LEAST), splits


@triton.jit
def decode(
    q, kv, block_table, query_starts, kv_lengths, kv_scale, out_scale, out, partials, stats, table_width, splits, extra,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXTRA: tl.constexpr,
    COLS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (K, S, B): a program takes one part of one sequence's context for the G heads that share a key/value head.

    Products are turned around, positions or values being the rows: scores [N, COLS], sums [D, COLS]. Tensor cores take
    rows by sixteens and columns by eights, and G is often 4 or 8, so this way little of them is spent on nothing.

    A sequence of one part is written to ``out``. Otherwise part s of sequence b goes to slot b * splits + s of ``partials``
    [SLOTS, H, D], its mean, and ``stats`` [SLOTS, H], log2 of its sum of weights.
    """
    G: tl.constexpr = H // K
    ROW: tl.constexpr = K * D
    FP8: tl.constexpr = kv.dtype.element_ty == tl.float8e4nv
    start_dependents()
    wait_for_inputs()
    head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    token = tl.load(query_starts + sequence)
    length = tl.load(kv_lengths + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    begin = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    part, splits = _part(length - begin, splits, SLOTS, tl.num_programs(2), BLOCK_N, LEAST)
    first = begin + split * part
    if first >= length:
        return
    last = tl.minimum(first + part, length) - 1

    row, along = tl.arange(0, COLS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at_queries = q + token.to(tl.int64) * (H * D) + (head * G + row) * D + along
    queries = tl.trans(tl.load(at_queries, mask=(row < G) & (along < D), other=0.0))
    factor = tl.full([1, COLS], SCALE * LOG2E, tl.float32)
    if FP8:
        exact = queries.to(tl.float32)
        unit = _unit(exact, 0)
        queries = (exact / unit).to(tl.float16)
        factor *= unit * tl.load(kv_scale)

    per_head = factor
    if EXTRA != "":
        per_head = _per_head(extra, head * G + tl.minimum(tl.arange(0, COLS), G - 1))[None, :]

    pages = block_table + sequence.to(tl.int64) * table_width
    pool = kv + head * D
    d = tl.arange(0, BLOCK_D)[:, None]
    half = tl.arange(0, BLOCK_D // 2)[:, None]
    most = tl.full([1, COLS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N, COLS], tl.float32)  # by position within a tile: summed once, behind the loop
    if FP8:
        pairs_pool = pool.to(tl.pointer_type(tl.int16), bitcast=True)
        even = tl.zeros([BLOCK_D // 2, COLS], tl.float32)
        odd = tl.zeros([BLOCK_D // 2, COLS], tl.float32)
    else:
        sums = tl.zeros([BLOCK_D, COLS], tl.float32)
    for n in tl.range(first, last + 1, BLOCK_N):
        place = n + tl.arange(0, BLOCK_N)
        start = _places(pages, tl.minimum(place, last), BLOCK_SIZE, ROW)
        keys = _load(pool + start[:, None] + along, along < D, D == BLOCK_D)
        scores = tl.dot(keys.to(queries.dtype), queries)
        apart = (place - length + 1)[:, None]
        weights, fade, most = _weigh(scores, apart, per_head, (place <= last)[:, None], factor, most, 0, SOFTCAP, True, EXTRA)
        total = total * fade + weights
        if FP8:
            pairs = _load(pairs_pool + ((start + BLOCK_SIZE * ROW) >> 1)[None, :] + half, half < D // 2, D == BLOCK_D)
            low, high = _unpack(pairs)
            even = tl.dot(low, weights.to(tl.float16), even * fade)
            odd = tl.dot(high, weights.to(tl.float16), odd * fade)
        else:
            values = _load(pool + (start + BLOCK_SIZE * ROW)[None, :] + d, d < D, D == BLOCK_D)
            sums = tl.dot(values, weights.to(values.dtype), sums * fade)

    whole = tl.sum(total, 0, keep_dims=True)
    if FP8:
        sums = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (BLOCK_D, COLS)) * tl.load(kv_scale + 1)
    if EXTRA == "sinks":
        whole += tl.where(part >= length - begin, tl.exp2(per_head - most), 0.0)
    mean = sums / whole
    col = tl.arange(0, COLS)[None, :]
    live = (d < D) & (col < G)
    if part >= length - begin:
        _store(out + token.to(tl.int64) * (H * D) + (head * G + col) * D + d, mean, live, out_scale)
    else:
        slot = sequence * splits + split
        tl.store(partials + (slot * H + head * G + col) * D + d, mean, mask=live)
        tl.store(stats + slot * H + head * G + col, most + tl.log2(whole), mask=col < G)


@triton.jit
def merge(
    partials, stats, query_starts, kv_lengths, out_scale, out, splits, extra,
    H: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (H, B): the parts of one context become one; BLOCK_N, LEAST and SLOTS as in ``decode``, BLOCK_S parts at a time."""
    start_dependents()
    wait_for_inputs()
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(query_starts + sequence)
    length = tl.load(kv_lengths + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    context = tl.minimum(length, WINDOW) if WINDOW > 0 else length
    part, splits = _part(context, splits, SLOTS, tl.num_programs(1), BLOCK_N, LEAST)
    if part >= context:
        return
    parts = tl.cdiv(context, part)
    d = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    most = LOWEST
    for first in range(0, parts, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = (sequence * splits + s) * H + head
        size = tl.load(stats + at, mask=s < parts, other=float("-inf"))
        means = tl.load(partials + at[:, None] * D + d[None, :], mask=(s < parts)[:, None] & (d < D)[None, :], other=0.0)
        largest = tl.maximum(most, tl.max(size, 0))
        weights = tl.exp2(size - largest)
        fade = tl.exp2(most - largest)
        sums = sums * fade + tl.sum(means * weights[:, None], 0)
        total = total * fade + tl.sum(weights, 0)
        most = largest
    if EXTRA == "sinks":
        total += tl.exp2(_per_head(extra, head) - most)
    _store(out + token.to(tl.int64) * (H * D) + head * D + d, sums / total, d < D, out_scale)
