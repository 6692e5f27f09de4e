"""Sampling kernels; ``zoo.plugins.sampling`` says how they work together.

R rows, V vocabulary, N groups of a row, C logits that are looked at together.

Probabilities are powers of two: y = (logit - largest) * log2(e) / temperature, and 2**y is 1 for the most likely token.
"""

from __future__ import annotations

import triton
import triton.language as tl

HOST = tl.constexpr(1)  # zoo.runtime.abi.HOST
WORDS = tl.constexpr(8)  # of 32 bits, of a SAMPLING record
LOG2E = tl.constexpr(1.4426950408889634)
HOTTEST = tl.constexpr(1e9)  # of temperatures: beyond it all tokens are equally likely anyway
LEAST = tl.constexpr(-126.0)  # y of the least probability that is not zero
STEPS = tl.constexpr(16)  # of the bisection for a bound: near enough
LONGEST = tl.constexpr(32)  # steps of a bisection for a filter: what then lies between are equals
NEAR = tl.constexpr(2.0**-17)  # parts of the whole that are not told apart in a nucleus
ENOUGH = tl.constexpr(1.0 + 2.0**-16)  # a sum over groups is compared with one in another order


@triton.jit
def nan_largest(x):
    """x, with NaN as infinity, which no row may hold either."""
    return tl.where(x == x, x, float("inf"))


@triton.jit
def is_finite(x):
    return (x > float("-inf")) & (x < float("inf"))


@triton.jit
def greedy_partial(logits, best, place, VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The largest of BLOCK logits and where it is: logits [R, V]; best, place [R, BLOCKS]."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    x = nan_largest(tl.load(logits + row * VOCAB + column, column < VOCAB, other=float("-inf")))
    value, index = tl.max(x, axis=0, return_indices=True)
    tl.store(best + row * BLOCKS + block, value)
    tl.store(place + row * BLOCKS + block, block * BLOCK + index)


@triton.jit
def greedy_combine(best, place, sampled, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """The largest of a row's blocks, the first among equals: best, place [R, BLOCKS]; sampled [R]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PADDED)
    values = tl.load(best + row * BLOCKS + block, block < BLOCKS, other=float("-inf"))
    value, index = tl.max(values, axis=0, return_indices=True)
    token = tl.load(place + row * BLOCKS + index)
    tl.store(sampled + row, tl.where(is_finite(value), token, -1))


@triton.jit
def rate_of(record):
    """What logits are multiplied by to become exponents of 2; log2(e) for a greedy row."""
    temperature = tl.load(record).to(tl.float32, bitcast=True)
    return LOG2E / tl.where(temperature > 0, tl.minimum(temperature, HOTTEST), 1.0)


@triton.jit
def group_rows(
    logits, sampling, largest, sums,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each group of logits, the largest and the sum of 2**(y - its y): logits [R, V]; largest, sums [R, N]."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    record = sampling + row * WORDS
    if tl.load(record + 7) & HOST == 0:
        group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = nan_largest(tl.load(logits + row * VOCAB + column, column < VOCAB, other=float("-inf")))
        peak = tl.max(x, axis=1)
        base = tl.where(is_finite(peak), peak, 0.0)
        total = tl.sum(tl.exp2((x - base[:, None]) * rate_of(record)), axis=1)
        tl.store(largest + row * GROUPS + group, peak, group < GROUPS)
        tl.store(sums + row * GROUPS + group, total, group < GROUPS)


@triton.jit
def philox(counter, low, high):
    """Two numbers in [0, 1), of 24 bits, of a 64-bit seed and a counter: Philox 4x32-10."""
    a = counter
    b = counter ^ counter
    c = b
    d = b
    for _ in tl.static_range(10):
        above, below = tl.umulhi(a, 0xD2511F53), tl.umulhi(c, 0xCD9E8D57)
        a, b, c, d = below ^ b ^ low, c * 0xCD9E8D57, above ^ d ^ high, a * 0xD2511F53
        low += 0x9E3779B9
        high += 0xBB67AE85
    return (a >> 8).to(tl.float32) * 2.0**-24, (b >> 8).to(tl.float32) * 2.0**-24


@triton.jit
def uniforms(record):
    """The two random numbers of a row."""
    low = tl.load(record + 4).to(tl.uint32, bitcast=True)
    high = tl.load(record + 5).to(tl.uint32, bitcast=True)
    return philox(tl.load(record + 6).to(tl.uint32, bitcast=True), low, high)


@triton.jit
def invert(weights, index, target, NONE: tl.constexpr):
    """The first index at which the running sum of weights exceeds the target, among those with a weight; NONE if none."""
    over = (tl.cumsum(weights, axis=0) > target) & (weights > 0)
    return tl.min(tl.where(over, index, NONE), axis=0)


@triton.jit
def draw(weights, index, uniform, NONE: tl.constexpr):
    """An index, each as likely as its weight says."""
    found = invert(weights, index, uniform * tl.sum(weights, axis=0), NONE)
    last = tl.max(tl.where(weights > 0, index, 0), axis=0)
    return tl.minimum(found, last)


@triton.jit
def choose_rows(
    logits, sampling, largest, sums, sampled, peaks, bounds, counts, listed,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The token of a row that is greedy or has no filter; else what ``filter_rows`` needs to know.

    logits [R, V]; largest, sums [R, N]; sampled [R]. For filter_rows: peaks [R] the largest logit; bounds [R, 2] a y below
    which nothing is kept, and the sum of 2**y; counts [R] of groups that reach the bound, 0 for a row that is done; listed
    [R, N] those groups, rising.
    """
    row = tl.program_id(0).to(tl.int64)
    record = sampling + row * WORDS
    logits += row * VOCAB
    temperature, top_k, top_p, min_p = filters(record, VOCAB)
    tl.store(counts + row, 0)
    if tl.load(record + 7) & HOST == 0:
        group, inside = tl.arange(0, PADDED), tl.arange(0, GROUP)
        tops = tl.load(largest + row * GROUPS + group, group < GROUPS, other=float("-inf"))
        peak = tl.max(tops, axis=0)
        if is_finite(peak):
            rate = rate_of(record)
            y = (tops - peak) * rate
            if temperature <= 0:
                best = tl.min(tl.where(tops == peak, group, PADDED), axis=0)
                column = best * GROUP + inside
                x = tl.load(logits + column, column < VOCAB, other=float("-inf"))
                tl.store(sampled + row, tl.min(tl.where(x == peak, column, VOCAB), axis=0))
            else:
                weights = tl.load(sums + row * GROUPS + group, group < GROUPS, other=0.0) * tl.exp2(y)
                if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
                    total = tl.sum(weights, axis=0)
                    bound = group_bound(y, top_k, top_p, min_p, total)
                    reach = (y >= bound).to(tl.int32)
                    slot = tl.cumsum(reach, axis=0) - 1
                    tl.store(listed + row * GROUPS + slot, group, reach > 0)
                    tl.store(counts + row, tl.sum(reach, axis=0))
                    tl.store(peaks + row, peak)
                    tl.store(bounds + row * 2, bound)
                    tl.store(bounds + row * 2 + 1, total)
                else:
                    first, second = uniforms(record)
                    column = draw(weights, group, first, PADDED) * GROUP + inside
                    x = tl.load(logits + column, column < VOCAB, other=float("-inf"))
                    tl.store(sampled + row, draw(tl.exp2((x - peak) * rate), column, second, VOCAB))
        else:
            tl.store(sampled + row, -1)


@triton.jit
def filters(record, VOCAB: tl.constexpr):
    """temperature, top_k (0: none), top_p, min_p of a record."""
    temperature = tl.load(record).to(tl.float32, bitcast=True)
    top_k = tl.load(record + 1)
    top_p = tl.load(record + 2).to(tl.float32, bitcast=True)
    min_p = tl.load(record + 3).to(tl.float32, bitcast=True)
    return temperature, tl.where(top_k < VOCAB, top_k, 0), top_p, min_p


@triton.jit
def group_bound(y, top_k, top_p, min_p, total):
    """A y below which no filter keeps anything, from the y of each group's largest logit.

    At least k logits are no less than the k-th largest of the groups' largest; and where those of the groups' largest that
    are no less than some y have together what a nucleus is to have, the nucleus has nothing below that y.
    """
    low, high = LEAST, 0.0
    if (top_k > 0) | (top_p < 1.0):
        mass = top_p * total * ENOUGH
        for _ in range(STEPS):
            middle = (low + high) * 0.5
            over = y >= middle
            if top_k > 0:
                enough = tl.sum(over.to(tl.int32), axis=0) >= top_k
            else:
                enough = tl.sum(tl.where(over, tl.exp2(y), 0.0), axis=0) >= mass
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    if (top_k == 0) | (top_p >= 1.0):  # with both, the nucleus is one of all top_k tokens
        low = tl.maximum(low, tl.log2(min_p))
    return low


@triton.jit
def chunk(logits, listed, start, count, peak, rate, VOCAB: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr):
    """y of SLOTS listed groups from ``start`` on: [SLOTS, GROUP]; minus infinity where there is none."""
    slot = start + tl.arange(0, SLOTS)
    group = tl.load(listed + slot, slot < count, other=0)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + column, (slot < count)[:, None] & (column < VOCAB), other=float("-inf"))
    return (x - peak) * rate


@triton.jit
def measure(
    bound, logits, listed, count, peak, rate,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """How many logits of the listed groups have a y of at least ``bound``, and the sum of their 2**y."""
    number = tl.zeros([SLOTS, GROUP], tl.int32)
    mass = tl.zeros([SLOTS, GROUP], tl.float32)
    start = 0
    while start < count:
        y = chunk(logits, listed, start, count, peak, rate, VOCAB, GROUP, SLOTS)
        number += (y >= bound).to(tl.int32)
        mass += tl.where(y >= bound, tl.exp2(y), 0.0)
        start += SLOTS
    return tl.sum(number), tl.sum(mass)


@triton.jit
def filter_rows(
    logits, sampling, sampled, peaks, bounds, counts, listed,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The token of a row with filters, after ``choose_rows``, whose arguments these are.

    Bisection keeps a ``low`` that keeps enough tokens and a ``high`` that does not, until there is one token between them.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    if count > 0:
        record = sampling + row * WORDS
        logits += row * VOCAB
        listed += row * GROUPS
        _, top_k, top_p, min_p = filters(record, VOCAB)
        peak, rate = tl.load(peaks + row), rate_of(record)
        low, total = tl.load(bounds + row * 2), tl.load(bounds + row * 2 + 1)
        number, mass = measure(low, logits, listed, count, peak, rate, VOCAB, GROUP, SLOTS)
        if top_k > 0:
            high = 1.0
            step = 0
            while (number > top_k) & (step < LONGEST):
                middle = (low + high) * 0.5
                inside, part = measure(middle, logits, listed, count, peak, rate, VOCAB, GROUP, SLOTS)
                enough = inside >= top_k
                step = tl.where((low < middle) & (middle < high), step + 1, LONGEST)
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
                number, mass = tl.where(enough, inside, number), tl.where(enough, part, mass)
        if top_p < 1.0:
            target = top_p * tl.where(top_k > 0, mass, total)
            high = 1.0
            beyond, rest = 0, 0.0  # what ``high`` keeps
            step = 0
            while (number - beyond > 1) & (mass - rest > total * NEAR) & (mass >= target) & (step < LONGEST):
                middle = (low + high) * 0.5
                inside, part = measure(middle, logits, listed, count, peak, rate, VOCAB, GROUP, SLOTS)
                enough = (part >= target) & (inside > 0)
                step = tl.where((low < middle) & (middle < high), step + 1, LONGEST)
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
                number, mass = tl.where(enough, inside, number), tl.where(enough, part, mass)
                beyond, rest = tl.where(enough, beyond, inside), tl.where(enough, rest, part)
        low = tl.maximum(low, tl.log2(min_p))
        _, mass = measure(low, logits, listed, count, peak, rate, VOCAB, GROUP, SLOTS)
        first, second = uniforms(record)
        target = first * mass
        found = GROUPS
        last = 0
        start = 0
        while (start < count) & (found == GROUPS):
            y = chunk(logits, listed, start, count, peak, rate, VOCAB, GROUP, SLOTS)
            weights = tl.sum(tl.where(y >= low, tl.exp2(y), 0.0), axis=1)
            slot = start + tl.arange(0, SLOTS)
            found = invert(weights, slot, target, GROUPS)
            last = tl.maximum(last, tl.max(tl.where(weights > 0, slot, 0), axis=0))
            target -= tl.sum(weights, axis=0)
            start += SLOTS
        group = tl.load(listed + tl.where(found < GROUPS, found, last))
        column = group * GROUP + tl.arange(0, GROUP)
        y = (tl.load(logits + column, column < VOCAB, other=float("-inf")) - peak) * rate
        tl.store(sampled + row, draw(tl.where(y >= low, tl.exp2(y), 0.0), column, second, VOCAB))


@triton.jit
def resolve(token_ids, sampled, tokens, BLOCK: tl.constexpr):
    """In place of -(r + 1), the token sampled in row r of the step before; 0 where that is -1: token_ids [T], sampled [R]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + at, at < tokens, other=0)
    named = token < 0
    there = tl.load(sampled + tl.where(named, -1 - token, 0), named, other=0)
    tl.store(token_ids + at, tl.maximum(there, 0), named)
