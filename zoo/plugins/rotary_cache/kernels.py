"""One kernel for all variants: a program takes TOKENS tokens and HEADS neighbouring heads, all queries, all keys or all values.

    rows of qkv      | q0 q1 q2 q3 | k0 k1 | v0 v1 |        H = 4, K = 2, HEADS = 2: four groups of heads
    pool             [block][0 or 1][place][head][D]        K * D neighbours of a token lie together

It reads every value once and writes it once. All of a tile's loads are asked for before the first of them is needed, so that
a step of few tokens waits for memory twice: for its slots and positions, and for everything else.

SCALED: qkv comes from a float8 GEMM that left its columns' scale [(H + 2K) * D], float32, to be multiplied in here.

Shape legend: T tokens, H heads, K key/value heads, D head size, R rotary size; a tile is [TOKENS, HEADS, values].
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.fp8_gemm.kernels import round8
from zoo.plugins.overlap.kernels import prefetch, start_dependents, wait_for_inputs


@triton.jit
def _put(at, values, live, scale):
    """Store float32 values as what ``at`` points to; float8 divided by ``scale`` first."""
    if at.dtype.element_ty == tl.float8e4nv:
        tl.store(at, round8(values, scale), mask=live)
    else:
        tl.store(at, values.to(at.dtype.element_ty), mask=live)


@triton.jit
def _load_pairs(at, live, TOKENS: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, LACED: tl.constexpr):
    """First and second values of the R/2 pairs at ``at`` [TOKENS, HEADS, 1], as float32 [TOKENS, HEADS, PAIRS]."""
    if LACED:
        value = tl.arange(0, 2 * PAIRS)[None, None, :]
        both = tl.load(at + value, mask=live & (value < R), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (TOKENS, HEADS, PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)[None, None, :]
        first = tl.load(at + pair, mask=live & (pair < R // 2), other=0.0).to(tl.float32)
        second = tl.load(at + R // 2 + pair, mask=live & (pair < R // 2), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _rotate(
    source, columns, weight, cos, sin, to, scale, live,
    D: tl.constexpr, R: tl.constexpr, LACED: tl.constexpr, NORM: tl.constexpr, EPSILON: tl.constexpr, SCALED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Scale, norm, if any, and rotate the heads at ``source``, store them at ``to``; both [TOKENS, HEADS, 1].

    ``columns`` [1, HEADS, 1]: where their columns' scales are.
    """
    whole = tl.full([1, 1, 1], True, tl.int1)
    first, second = _load_pairs(source, live, TOKENS, HEADS, R, PAIRS, LACED)
    if SCALED:
        first_scale, second_scale = _load_pairs(columns, whole, 1, HEADS, R, PAIRS, LACED)
        first *= first_scale
        second *= second_scale
    if REST > 0:
        tail = R + tl.arange(0, REST)[None, None, :]
        rest = tl.load(source + tail, mask=live & (tail < D), other=0.0).to(tl.float32)
        if SCALED:
            rest *= tl.load(columns + tail, mask=tail < D, other=0.0)
    if NORM:
        weights = weight + tl.zeros([1, 1, 1], tl.int32)
        first_weight, second_weight = _load_pairs(weights, whole, 1, 1, R, PAIRS, LACED)
        square = tl.sum(first * first + second * second, axis=2, keep_dims=True)
        if REST > 0:
            rest_weight = tl.load(weights + tail, mask=tail < D, other=0.0).to(tl.float32)
            square += tl.sum(rest * rest, axis=2, keep_dims=True)
        inverse = tl.rsqrt(square * (1.0 / D) + EPSILON)
        if REST > 0:
            rest = rest * inverse * rest_weight
        first = first * inverse * first_weight
        second = second * inverse * second_weight
    turned = first * cos - second * sin
    second = second * cos + first * sin
    if LACED:
        value = tl.arange(0, 2 * PAIRS)[None, None, :]
        both = tl.reshape(tl.join(turned, second), (TOKENS, HEADS, 2 * PAIRS))
        _put(to + value, both, live & (value < R), scale)
    else:
        pair = tl.arange(0, PAIRS)[None, None, :]
        _put(to + pair, turned, live & (pair < R // 2), scale)
        _put(to + R // 2 + pair, second, live & (pair < R // 2), scale)
    if REST > 0:
        _put(to + tail, rest, live & (tail < D), scale)


@triton.jit
def _copy(source, columns, to, scale, live, D: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr):
    """Store the heads at ``source`` at ``to`` as they are, but for their columns' scales; both [TOKENS, HEADS, 1]."""
    value = tl.arange(0, WIDTH)[None, None, :]
    values = tl.load(source + value, mask=live & (value < D), other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(columns + value, mask=value < D, other=0.0)
    _put(to + value, values, live & (value < D), scale)


@triton.jit
def rotary_cache(
    qkv, qkv_scale, cos, sin, positions, q_norm, k_norm, token_slots, kv_scale, q, kv, tokens,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    R: tl.constexpr, LACED: tl.constexpr, NORM: tl.constexpr, EPSILON: tl.constexpr, SCALED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T / TOKENS), (H + 2K) / HEADS). HEADS divides H and K.

    R is 0 without a rotation; then cos, sin and positions are not read, nor q_norm and k_norm without NORM, nor kv_scale
    with a pool that is not float8, nor qkv_scale unless SCALED. PAIRS, REST, WIDTH: powers of two, at least R/2, D - R (0 if
    that is 0), D.
    """
    start_dependents()
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    first_head = tl.program_id(1) * HEADS
    head = tl.arange(0, HEADS)[None, :, None]
    live = token < tokens
    source = qkv + token.to(tl.int64) * ((H + 2 * K) * D) + (first_head + head) * D
    columns = qkv_scale + (first_head + head) * D
    if SCALED and D % 128 == 0:
        prefetch(columns + tl.arange(0, 16)[None, None, :] * (D // 16))
    wait_for_inputs()
    if R > 0:
        pair = tl.arange(0, PAIRS)[None, None, :]
        if first_head < H + K:
            known = live & (pair < R // 2)
            row = tl.load(positions + token, mask=live, other=0).to(tl.int64) * (R // 2)
            cosine = tl.load(cos + row + pair, mask=known, other=0.0).to(tl.float32)
            sine = tl.load(sin + row + pair, mask=known, other=0.0).to(tl.float32)
        else:
            cosine = tl.zeros([TOKENS, 1, PAIRS], tl.float32)
            sine = cosine
    if first_head < H:
        to_q = q + token.to(tl.int64) * (H * D) + (first_head + head) * D
        if R > 0:
            _rotate(
                source, columns, q_norm, cosine, sine, to_q, 1.0, live,
                D, R, LACED, NORM, EPSILON, SCALED, TOKENS, HEADS, PAIRS, REST,
            )  # fmt: skip
        else:
            _copy(source, columns, to_q, 1.0, live, D, WIDTH, SCALED)
    else:
        slot = tl.load(token_slots + token, mask=live, other=0)
        values = first_head >= H + K
        half = values.to(tl.int32)
        block = (slot // BLOCK_SIZE).to(tl.int64)
        start = (block * 2 + half) * (BLOCK_SIZE * K * D) + (slot % BLOCK_SIZE) * (K * D)
        to_kv = kv + start + (first_head - H - half * K + head) * D
        scale = 1.0
        if kv.dtype.element_ty == tl.float8e4nv:
            scale = tl.load(kv_scale + half)
        if R > 0:
            if values:
                _copy(source, columns, to_kv, scale, live, D, WIDTH, SCALED)
            else:
                _rotate(
                    source, columns, k_norm, cosine, sine, to_kv, scale, live,
                    D, R, LACED, NORM, EPSILON, SCALED, TOKENS, HEADS, PAIRS, REST,
                )  # fmt: skip
        else:
            _copy(source, columns, to_kv, scale, live, D, WIDTH, SCALED)
