"""Kernels of the router and of the gate of a shared expert.

    router_logits   parts of x · routerᵀ over shares of E: few tokens still keep many multiprocessors busy
    route           adds the parts in order; scores, groups, the best experts, their weights: all in registers

Shape legend: M tokens, E hidden, X experts, G groups of I = X / G, k chosen, S shares of E.

A token whose scores are NaN still gets k different experts, the first ones: what it gives is NaN, and nobody else's is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.gated_activation.kernels import sigmoid
from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs

NEVER = tl.constexpr(-(2**31))  # below the key of every score


@triton.jit
def router_logits(
    x, router, parts, tokens,
    E: tl.constexpr, X: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [S, M, X] float32, of x [M, E] and router [X, E]. Grid (ceil(X / BLOCK_N), S, ceil(M / BLOCK_M)).

    Rows of the router are the M side of the tensor cores, which is 64 wide at least; tokens may be 16.
    """
    STEPS: tl.constexpr = (E + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    EVEN: tl.constexpr = E % (BLOCK_K * SPLITS) == 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = split * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    x_places = x + m[:, None].to(tl.int64) * E + k[None, :]
    w_places = router + n[:, None] * E + k[None, :]
    wait_for_inputs()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(STEPS):
        w_inside, x_inside = n[:, None] < X, m[:, None] < tokens
        if not EVEN:
            known = k[None, :] + step * BLOCK_K < E
            w_inside, x_inside = w_inside & known, x_inside & known
        w_tile = tl.load(w_places, mask=w_inside, other=0.0)
        x_tile = tl.load(x_places, mask=x_inside, other=0.0)
        total = tl.dot(w_tile, tl.trans(x_tile), total)
        w_places += BLOCK_K
        x_places += BLOCK_K
    start_dependents()
    places = parts + (split.to(tl.int64) * tokens + m[None, :]) * X + n[:, None]
    tl.store(places, total, mask=(m[None, :] < tokens) & (n[:, None] < X))


@triton.jit
def _key(score):
    """An int32 that orders as float32 scores do; NaN below all numbers."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), NEVER + 1)


@triton.jit
def _best(key, number, MOST: tl.constexpr):
    """The number of the largest key of each row [R, 1]; of equal keys the lowest number."""
    largest = tl.max(key, axis=1, keep_dims=True)
    return tl.min(tl.where(key == largest, number, MOST), axis=1, keep_dims=True)


@triton.jit
def _best_groups(
    choice, known, G: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Which of the groups [ROWS, GROUPS] are among the best, of scores [ROWS, GROUPS, INSIDE]."""
    low = float("-inf")
    inside = tl.arange(0, INSIDE)[None, None, :]
    scores = tl.where(known & (choice == choice), choice, low)
    most = tl.max(scores, axis=2, keep_dims=True)
    if TOP2:
        first = tl.min(tl.where(scores == most, inside, INSIDE), axis=2, keep_dims=True)
        second = tl.max(tl.where(inside == first, low, scores), axis=2, keep_dims=True)
        most += second
    group = tl.arange(0, GROUPS)[None, :]
    key = tl.where(group < G, _key(tl.reshape(most, (ROWS, GROUPS))), NEVER)
    kept = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = _best(key, group, GROUPS)
        kept = tl.where(group == best, 1, kept)
        key = tl.where(group == best, NEVER, key)
    return kept


@triton.jit
def route(
    parts, bias, select, chosen, weights, tokens,
    X: tl.constexpr, G: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, SCALE: tl.constexpr, BIASED: tl.constexpr, SELECTED: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, INSIDE: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """chosen [M, k] int32 and weights [M, k] float32, of parts [S, M, X]. Grid (ceil(M / ROWS)).

    bias [X] and select [X] are read if BIASED and SELECTED. GROUPS, INSIDE, CHOICES: powers of two, at least G, X / G, k.
    """
    start_dependents()
    EACH: tl.constexpr = X // G
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    group, inside = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, INSIDE)[None, None, :]
    known, expert = (group < G) & (inside < EACH), group * EACH + inside
    live = (row < tokens) & known
    wait_for_inputs()
    logits = tl.zeros((ROWS, GROUPS, INSIDE), tl.float32)
    for split in tl.static_range(SPLITS):
        logits += tl.load(parts + (split * tokens.to(tl.int64) + row) * X + expert, mask=live, other=0.0)
    if BIASED:
        logits += tl.load(bias + expert, mask=known, other=0.0).to(tl.float32)
    if SIGMOID:
        scores = sigmoid(logits)
    else:
        logits = tl.where(known, logits, float("-inf"))
        numbers = tl.where(logits == logits, logits, float("-inf"))
        most = tl.max(tl.max(numbers, axis=2, keep_dims=True), axis=1, keep_dims=True)
        scores = tl.exp(logits - most)
        scores = scores / tl.sum(tl.sum(scores, axis=2, keep_dims=True), axis=1, keep_dims=True)
    choice = scores
    if SELECTED:
        choice += tl.load(select + expert, mask=known, other=0.0)
    able = known & (row >= 0)
    if TOP_GROUPS < G:
        kept = _best_groups(choice, known, G, TOP_GROUPS, TOP2, ROWS, GROUPS, INSIDE)
        able = able & (kept[:, :, None] > 0)
    key = tl.reshape(tl.where(able, _key(choice), NEVER), (ROWS, GROUPS * INSIDE))
    scores = tl.reshape(scores, (ROWS, GROUPS * INSIDE))
    place = tl.arange(0, GROUPS * INSIDE)[None, :]
    number = place // INSIDE * EACH + place % INSIDE

    nth = tl.arange(0, CHOICES)[None, :]
    found = tl.zeros((ROWS, CHOICES), tl.int32)
    picked = tl.zeros((ROWS, CHOICES), tl.float32)
    for n in tl.static_range(TOP_K):
        best = _best(key, tl.where(key > NEVER, number, X - 1), X)
        here = (number == best) & (key > NEVER)
        score = tl.sum(tl.where(here, scores, 0.0), axis=1, keep_dims=True)
        found = tl.where(nth == n, best, found)
        picked = tl.where(nth == n, score, picked)
        key = tl.where(here, NEVER, key)
    if NORMALIZE:
        picked = picked / (tl.sum(picked, axis=1, keep_dims=True) + 1e-20)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    places = token.to(tl.int64) * TOP_K + nth
    inside_rows = (token < tokens) & (nth < TOP_K)
    tl.store(chosen + places, found, mask=inside_rows)
    tl.store(weights + places, picked * SCALE, mask=inside_rows)


@triton.jit
def shared_gate(
    x, gate, shared, experts, y, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = experts + sigmoid(x · gateᵀ) * shared: all [rows, WIDTH] but gate [WIDTH]. Grid (ceil(rows / ROWS))."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows - first) & (col < WIDTH), row * WIDTH + col
    column = tl.load(gate + col, col < WIDTH, other=0.0).to(tl.float32)
    wait_for_inputs()
    values = tl.load(x + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    other = tl.load(shared + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    base = tl.load(experts + first * WIDTH + at, mask, other=0.0).to(tl.float32)
    part = sigmoid(tl.sum(values * column, axis=1, keep_dims=True))
    tl.store(y + first * WIDTH + at, (base + part * other).to(y.dtype.element_ty), mask)
