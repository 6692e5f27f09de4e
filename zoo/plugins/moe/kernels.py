"""Kernels of ``ZooExperts``: pairs of a token and an expert are sorted by expert, then multiplied group by group.

    count_experts  how often each expert is chosen in each chunk of pairs
    place_pairs    a counting sort: where each expert's pairs begin, and which pair stands where; of one expert in their order
    gate_up        h = act(gate) * up of each pair, in sorted order
    down           what each pair's expert gives, back in the order of pairs
    combine        y = the weighted sum of a token's k pairs, in the order of its choices

Nothing here waits for the host, nothing depends on timing, and no atomic adds to a result: the same step gives the same bits.
How many tiles of rows there are is only known on the GPU, so the two products run a fixed number of programs, each of which takes
every so many'th tile. Few pairs go in tiles of few rows, and then what takes the time is reading the weights of experts that
somebody chose, once; many go in large tiles.

As in ``zoo.plugins.skinny_gemm`` a tile of weights is the M side of the tensor cores, which is at least 64 wide, and rows of
pairs are the N side, which may be 16.

Shape legend: P pairs, k a token, X experts, E hidden, F intermediate; C chunks.

    chosen     [P]        int32     pair p is token p // k
    counts     [C, X]     int32
    starts     [X + 1]    int32     expert e's pairs stand at starts[e] to starts[e + 1]
    tile_ends  [X]        int32     tiles of rows of experts 0 to e
    order      [P]        int32     the pair at each place
    h          [P, F]     T, sorted
    parts      [P, E]     T, by pair
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.gated_activation.kernels import activate, sigmoid
from zoo.plugins.overlap.kernels import start_dependents, wait_for_inputs


@triton.jit
def count_experts(chosen, counts, pairs, X: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """Grid (ceil(P / CHUNK)). EXPERTS: a power of two, more than X: what is behind the last pair counts as expert X."""
    start_dependents()
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    wait_for_inputs()
    expert = tl.load(chosen + at, mask=at < pairs, other=X)
    found = tl.histogram(expert, EXPERTS)
    number = tl.arange(0, EXPERTS)
    tl.store(counts + chunk.to(tl.int64) * X + number, found, mask=number < X)


@triton.jit
def place_pairs(
    chosen, counts, starts, tile_ends, order, pairs,
    X: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    FEW: tl.constexpr, FEW_ROWS: tl.constexpr, MANY_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(P / CHUNK)): a program places its chunk, PART pairs at a time. Up to FEW pairs tiles have FEW_ROWS rows."""
    start_dependents()
    chunk = tl.program_id(0)
    number = tl.arange(0, EXPERTS)
    wait_for_inputs()
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    chunks = (pairs + CHUNK - 1) // CHUNK
    first = 0
    while first < chunks:
        row = first + tl.arange(0, ROWS)[:, None]
        known = (row < chunks) & (number[None, :] < X)
        some = tl.load(counts + row.to(tl.int64) * X + number[None, :], mask=known, other=0)
        total += tl.sum(some, axis=0)
        before += tl.sum(tl.where(row < chunk, some, 0), axis=0)
        first += ROWS
    begin = tl.cumsum(total, axis=0) - total
    if chunk == 0:
        tl.store(starts + number, begin, mask=number <= X)
        rows = tl.where(pairs <= FEW, FEW_ROWS, MANY_ROWS)
        tl.store(tile_ends + number, tl.cumsum((total + rows - 1) // rows, axis=0), mask=number < X)
    place = begin + before  # of the next pair of each expert
    nth = tl.arange(0, PART)
    first = chunk * CHUNK
    stop = tl.minimum(first + CHUNK, pairs)
    while first < stop:
        pair = first + nth
        expert = tl.load(chosen + pair, mask=pair < stop, other=X)
        earlier = (expert[:, None] == expert[None, :]) & (nth[None, :] < nth[:, None])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        tl.store(order + tl.gather(place, expert, axis=0) + rank, pair, mask=pair < stop)
        place += tl.histogram(expert, EXPERTS)
        first += PART


@triton.jit
def _place(item, tiles, COLUMNS: tl.constexpr):
    """The tile of rows and of columns of a piece of work: down GROUP tiles of rows, then on to the next columns.

    So a tile of weights is read from memory once for all of them.
    """
    GROUP: tl.constexpr = 8
    above = item // (GROUP * COLUMNS) * GROUP
    height = tl.minimum(tiles - above, GROUP)
    inside = item % (GROUP * COLUMNS)
    return above + inside % height, inside // height


@triton.jit
def _find(tile, starts, tile_ends, X: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a tile, its first place, and where the expert's places stop."""
    number = tl.arange(0, EXPERTS)
    ends = tl.load(tile_ends + number, mask=number < X, other=2**31 - 1)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    before = tl.max(tl.where(ends <= tile, ends, 0), axis=0)
    start, stop = tl.load(starts + expert), tl.load(starts + expert + 1)
    return expert, start + (tile - before) * ROWS, stop


@triton.jit
def _gated(gate, up, KIND: tl.constexpr):
    """act(gate) * up in float32, by ``zoo.plugins.moe``'s kinds."""
    if KIND == 5:
        cut = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
        bounded = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL)
        return cut * sigmoid(1.702 * cut) * (bounded + 1.0)
    elif KIND == 4:
        half = activate(gate, 3)
        return half * half * up
    else:
        return activate(gate, KIND) * up


@triton.jit
def _gate_up_tiles(
    x, w, bias, h, order, starts, tile_ends,
    E: tl.constexpr, F: tl.constexpr, X: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    k = tl.arange(0, BLOCK_K)[None, :]
    tiles = tl.load(tile_ends + X - 1)
    for item in range(tl.program_id(0), tiles * COLUMNS, tl.num_programs(0)):
        tile, column = _place(item, tiles, COLUMNS)
        expert, first, stop = _find(tile, starts, tile_ends, X, EXPERTS, BLOCK_M)
        m = first + tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.load(order + m, mask=m < stop, other=0) // TOP_K
        x_places = x + token[:, None].to(tl.int64) * E + k
        w_places = w + expert.to(tl.int64) * (2 * F * E) + n[:, None] * E + k
        x_live, w_live = m[:, None] < stop, n[:, None] < F
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for step in tl.range(0, (E + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
            x_inside, w_inside = x_live, w_live
            if E % BLOCK_K != 0:
                known = step * BLOCK_K + k < E
                x_inside, w_inside = x_live & known, w_live & known
            x_tile = tl.trans(tl.load(x_places, mask=x_inside, other=0.0))
            gate_tile = tl.load(w_places, mask=w_inside, other=0.0)
            up_tile = tl.load(w_places + F * E, mask=w_inside, other=0.0)
            gate = tl.dot(gate_tile, x_tile, gate)
            up = tl.dot(up_tile, x_tile, up)
            x_places += BLOCK_K
            w_places += BLOCK_K
        if BIASED:
            at = bias + expert * (2 * F) + n
            gate += tl.load(at, mask=n < F, other=0.0).to(tl.float32)[:, None]
            up += tl.load(at + F, mask=n < F, other=0.0).to(tl.float32)[:, None]
        made = tl.trans(_gated(gate, up, KIND)).to(h.dtype.element_ty)
        tl.store(h + m[:, None].to(tl.int64) * F + n[None, :], made, mask=x_live & (n[None, :] < F))


@triton.jit
def gate_up(
    x, w, bias, h, order, starts, tile_ends, pairs,
    E: tl.constexpr, F: tl.constexpr, X: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, BIASED: tl.constexpr, FEW: tl.constexpr,
    FEW_M: tl.constexpr, FEW_N: tl.constexpr, FEW_K: tl.constexpr, FEW_STAGES: tl.constexpr,
    MANY_M: tl.constexpr, MANY_N: tl.constexpr, MANY_K: tl.constexpr, MANY_STAGES: tl.constexpr,
):  # fmt: skip
    """h [P, F], of x [M, E], w [X, 2F, E] and bias [X, 2F], which is read if BIASED. Any grid."""
    wait_for_inputs()
    if pairs <= FEW:
        _gate_up_tiles(
            x, w, bias, h, order, starts, tile_ends, E, F, X, EXPERTS, TOP_K, KIND, BIASED, FEW_M, FEW_N, FEW_K, FEW_STAGES,
        )  # fmt: skip
    else:
        _gate_up_tiles(
            x, w, bias, h, order, starts, tile_ends, E, F, X, EXPERTS, TOP_K, KIND, BIASED, MANY_M, MANY_N, MANY_K, MANY_STAGES,
        )  # fmt: skip


@triton.jit
def _down_tiles(
    h, w, bias, parts, order, starts, tile_ends,
    E: tl.constexpr, F: tl.constexpr, X: tl.constexpr, EXPERTS: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    k = tl.arange(0, BLOCK_K)[None, :]
    tiles = tl.load(tile_ends + X - 1)
    for item in range(tl.program_id(0), tiles * COLUMNS, tl.num_programs(0)):
        tile, column = _place(item, tiles, COLUMNS)
        expert, first, stop = _find(tile, starts, tile_ends, X, EXPERTS, BLOCK_M)
        m = first + tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        pair = tl.load(order + m, mask=m < stop, other=0)
        h_places = h + m[:, None].to(tl.int64) * F + k
        w_places = w + expert.to(tl.int64) * (E * F) + n[:, None] * F + k
        h_live, w_live = m[:, None] < stop, n[:, None] < E
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for step in tl.range(0, (F + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
            h_inside, w_inside = h_live, w_live
            if F % BLOCK_K != 0:
                known = step * BLOCK_K + k < F
                h_inside, w_inside = h_live & known, w_live & known
            h_tile = tl.trans(tl.load(h_places, mask=h_inside, other=0.0))
            w_tile = tl.load(w_places, mask=w_inside, other=0.0)
            total = tl.dot(w_tile, h_tile, total)
            h_places += BLOCK_K
            w_places += BLOCK_K
        if BIASED:
            total += tl.load(bias + expert * E + n, mask=n < E, other=0.0).to(tl.float32)[:, None]
        made = tl.trans(total).to(parts.dtype.element_ty)
        tl.store(parts + pair[:, None].to(tl.int64) * E + n[None, :], made, mask=h_live & (n[None, :] < E))


@triton.jit
def down(
    h, w, bias, parts, order, starts, tile_ends, pairs,
    E: tl.constexpr, F: tl.constexpr, X: tl.constexpr, EXPERTS: tl.constexpr, BIASED: tl.constexpr, FEW: tl.constexpr,
    FEW_M: tl.constexpr, FEW_N: tl.constexpr, FEW_K: tl.constexpr, FEW_STAGES: tl.constexpr,
    MANY_M: tl.constexpr, MANY_N: tl.constexpr, MANY_K: tl.constexpr, MANY_STAGES: tl.constexpr,
):  # fmt: skip
    """parts [P, E], of h [P, F], w [X, E, F] and bias [X, E], which is read if BIASED. Any grid."""
    wait_for_inputs()
    if pairs <= FEW:
        _down_tiles(h, w, bias, parts, order, starts, tile_ends, E, F, X, EXPERTS, BIASED, FEW_M, FEW_N, FEW_K, FEW_STAGES)
    else:
        _down_tiles(h, w, bias, parts, order, starts, tile_ends, E, F, X, EXPERTS, BIASED, MANY_M, MANY_N, MANY_K, MANY_STAGES)


@triton.jit
def combine(
    parts, weights, y, rows,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, WIDTH] of parts [M * k, WIDTH] and weights [M, k]: summed in float32. Grid (ceil(M / ROWS), ceil(WIDTH / BLOCK))."""
    start_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = row < rows - first
    mask = live & (col < WIDTH)
    wait_for_inputs()
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for n in tl.static_range(TOP_K):
        share = tl.load(weights + (first + row) * TOP_K + n, mask=live, other=0.0)
        total += share * tl.load(parts + ((first + row) * TOP_K + n) * WIDTH + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + first * WIDTH + row * WIDTH + col, total.to(y.dtype.element_ty), mask=mask)
