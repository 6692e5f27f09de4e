"""A Gluon kernel for float8 linear layers of few rows whose weights are on their way before x is there.

Shape legend as in ``kernels.py``: y[M, N] = x[M, K] · w[N, K]ᵀ, float8e4m3 operands, times what scales there are.

A program has BLOCK_N rows of w and all of K, so that no sums are shared between programs. It asks for its first steps of
weights, into registers or into a ring of STAGES steps in shared memory, and only then waits for the kernel that makes x
(``zoo.plugins.overlap``): while that one ends, memory goes on working. A step is SLICE bytes of each row for each warp; what the
warps have summed up is added at the end.

The tensor cores get what threads read, without a way through shared memory: which 4 bytes of K are multiplied when does not
matter as long as it is the same for w and x. So a thread reads 16 bytes in a row where the instruction (m16n8k32) wants four
times 4 bytes from places 16 bytes apart, and K is taken in that order. On SM 9.0 that instruction widens float8 to float16 and
adds in float32, so sums need no help as those of the warpgroup's instruction do.

Values are kept as words of four: Triton would carry each float8 through a loop in a register of its own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code=assignment

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language import constexpr
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# When the next kernel of the stream may start: before anything else, with the first weights asked for, when x is there, with the
# last weights asked for, with the last weights used.
FIRST, ASKED, WAITED, ALL_ASKED, READ = (constexpr(number) for number in range(5))


@gluon.constexpr_function
def _fragments(rows, warps, slice_words):
    """Where words [rows, warps * slice_words] are in registers: 16 bytes in a row for a thread, 64 for four threads."""
    registers = [[0, 1], [0, 2]]
    registers += [[0, 16 << bit] for bit in range((slice_words // 16).bit_length() - 1)]
    registers += [[8 << bit, 0] for bit in range((rows // 8).bit_length() - 1)]
    over = [[0, slice_words << bit] for bit in range(warps.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, over, [], [rows, warps * slice_words])


@gluon.constexpr_function
def _copies(warps, step_words):
    """Whole lines of a row for each warp's copy into shared memory, 16 bytes for a thread."""
    lanes = min(32, step_words // 4)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def _sums(warps):
    """Of [warps, BLOCK_N, BLOCK_M]: each warp has its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.jit
def _operand(words, PLACE: constexpr, ROWS: constexpr, WARPS: constexpr, SLICE: constexpr, SUMS: constexpr):
    """Words [ROWS, WARPS * SLICE / 4] as the tensor cores' operand: no instruction comes of it."""
    even = gl.join(words.to(gl.int8), (words >> 16).to(gl.int8))
    odd = gl.join((words >> 8).to(gl.int8), (words >> 24).to(gl.int8))
    parts = gl.reshape(gl.join(even, odd), [ROWS, WARPS, SLICE // 64, 4, 2, 2, 4])  # warp, 64 bytes, thread, half, step, byte
    if PLACE == 0:
        values = gl.reshape(gl.permute(parts, [1, 0, 2, 4, 5, 3, 6]), [WARPS, ROWS, SLICE])
    else:
        values = gl.reshape(gl.permute(parts, [1, 2, 4, 5, 3, 6, 0]), [WARPS, SLICE, ROWS])
    layout: constexpr = gl.DotOperandLayout(PLACE, SUMS, 4)
    return gl.convert_layout(values.to(gl.float8e4nv, bitcast=True), layout, assert_trivial=True)


@gluon.jit
def _weights(places, there, BYPASS: constexpr):
    if BYPASS:
        return gl.load(places, mask=there, cache_modifier=".cg")
    else:
        return gl.load(places, mask=there, eviction_policy="evict_first")


@gluon.jit
def _bring(places, BYTES: constexpr):
    """Ask for BYTES from each of ``places`` on to be brought into the L2 cache, and do not wait."""
    gl.static_assert(BYTES == 128 or BYTES == 256 or BYTES == 512)
    if BYTES == 128:
        gl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 128; mov.b32 $0, 0;", "=r,l", [places], gl.int32, False, 1
        )
    elif BYTES == 256:
        gl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 256; mov.b32 $0, 0;", "=r,l", [places], gl.int32, False, 1
        )
    else:
        gl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 512; mov.b32 $0, 0;", "=r,l", [places], gl.int32, False, 1
        )


@gluon.jit
def stream_gemm(
    x,
    w,
    w_scale,
    x_scale,
    y,
    M,
    N: constexpr,
    K: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    SLICE: constexpr,
    TILES: constexpr,
    STAGES: constexpr,
    WINDOW: constexpr,
    SIGNAL: constexpr,
    BRING: constexpr,
    BYPASS: constexpr,
    X_SCALED: constexpr,
    W_SCALED: constexpr,
):
    """Grid: (ceil(N / (BLOCK_N * TILES)), 1, ceil(M / BLOCK_M)).

    SLICE    bytes of K of a step for each warp, 64 or a multiple; SLICE * warps divides K, WINDOW the number of steps
    TILES    of BLOCK_N rows of w, one after the other; K is read again for each
    STAGES   steps of weights in shared memory, or 0: WINDOW steps of them in registers
    WINDOW   steps of x in registers
    SIGNAL   when the next kernel may start
    BRING    bytes of each row beyond the ring that are brought into the L2 cache before the wait: 0, or 128, 256 or 512 a warp
    BYPASS   whether weights on their way to registers leave the L1 cache alone
    """
    WARPS: constexpr = gl.num_warps()
    SUMS: constexpr = _sums(WARPS)
    WORDS: constexpr = K // 4  # of a row
    STEP: constexpr = WARPS * SLICE // 4  # words of a row
    STEPS: constexpr = WORDS // STEP
    TOTAL: constexpr = STEPS * TILES
    W: constexpr = _copies(WARPS, STEP) if STAGES else _fragments(BLOCK_N, WARPS, SLICE // 4)
    X: constexpr = _fragments(BLOCK_M, WARPS, SLICE // 4)
    FRAGMENTS: constexpr = _fragments(BLOCK_N, WARPS, SLICE // 4)
    gl.static_assert(STEPS * STEP == WORDS and STEPS % WINDOW == 0 and STAGES <= TOTAL)
    if SIGNAL == FIRST:
        gdc_launch_dependents()
    first_row = gl.program_id(0) * (BLOCK_N * TILES)
    words = w.to(gl.pointer_type(gl.int32), bitcast=True)
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, W))
    if N % (BLOCK_N * TILES) != 0:
        gl.static_assert(TILES == 1)
        rows = gl.minimum(rows, N - 1 - first_row)  # rows that are not there: the last one again, for nobody
    # the first weight is found in 64 bits, what lies inside a tile in 32
    w_places = (
        words + first_row.to(gl.int64) * WORDS + (rows[:, None] * WORDS + gl.arange(0, STEP, gl.SliceLayout(0, W))[None, :])
    )
    m = gl.program_id(2) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X))
    x_words = x.to(gl.pointer_type(gl.int32), bitcast=True)
    x_places = x_words + (m[:, None] * WORDS + gl.arange(0, STEP, gl.SliceLayout(0, X))[None, :])
    inside = (m < M)[:, None]
    asked = 0  # steps of weights
    if STAGES > 0:
        swizzle: constexpr = gl.SwizzledSharedLayout(16, 1, 2, [1, 0])
        ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, STEP], swizzle)
        for stage in gl.static_range(STAGES):
            async_copy.async_copy_global_to_shared(ring.index(stage), w_places)
            async_copy.commit_group()
            w_places += STEP
            if (stage + 1) % STEPS == 0:
                w_places += (BLOCK_N - 1) * WORDS
        if BRING > 0:
            chunk: constexpr = BRING // WARPS
            spread: constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, WARPS], [0, 1])
            away = gl.arange(0, BLOCK_N, gl.SliceLayout(1, spread))[:, None] * K
            away += gl.arange(0, WARPS, gl.SliceLayout(0, spread))[None, :] * chunk + STAGES * STEP * 4
            _bring((w + first_row.to(gl.int64) * K + away).to(gl.int64), chunk)
        asked += STAGES
    else:
        ws = ()
        for step in gl.static_range(WINDOW):
            ws += (_weights(w_places + step * STEP, True, BYPASS),)
        asked += WINDOW
    if SIGNAL == ASKED:
        gdc_launch_dependents()
    gdc_wait()
    if SIGNAL == WAITED:
        gdc_launch_dependents()
    xs = ()
    for step in gl.static_range(WINDOW):
        xs += (gl.load(x_places + step * STEP, mask=inside, other=0),)
    stage = 0
    out_m = gl.program_id(2) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(0, SUMS)))
    row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(0, SUMS)))
    for tile in range(TILES):
        n = first_row + tile * BLOCK_N + row
        scales = gl.full([BLOCK_N], 1.0, gl.float32, gl.SliceLayout(1, gl.SliceLayout(0, SUMS)))
        if W_SCALED:
            scales = gl.load(w_scale + n, mask=n < N, other=0.0)
        if X_SCALED:
            scales = scales * gl.load(x_scale)
        sums = gl.zeros([WARPS, BLOCK_N, BLOCK_M], gl.float32, SUMS)
        for first in range(0, STEPS, WINDOW):
            more = (tile + 1 < TILES) | (first + WINDOW < STEPS)
            if first + WINDOW < STEPS:
                x_places += WINDOW * STEP
            else:
                x_places -= WORDS - WINDOW * STEP
            next_xs = ()
            if STAGES > 0:
                for step in gl.static_range(WINDOW):
                    async_copy.wait_group(STAGES - 1)
                    w_step = ring.index(stage).load(FRAGMENTS)
                    sums = mma_v2(
                        _operand(w_step, 0, BLOCK_N, WARPS, SLICE, SUMS), _operand(xs[step], 1, BLOCK_M, WARPS, SLICE, SUMS), sums
                    )
                    next_xs += (gl.load(x_places + step * STEP, mask=inside & more, other=0),)
                    if asked < TOTAL:
                        async_copy.async_copy_global_to_shared(ring.index(stage), w_places)
                    async_copy.commit_group()
                    asked += 1
                    w_places += STEP
                    if TILES > 1:  # noqa: SIM102
                        if asked % STEPS == 0:
                            w_places += (BLOCK_N - 1) * WORDS
                    if SIGNAL == ALL_ASKED:  # noqa: SIM102
                        if asked == max(TOTAL, STAGES + 1):
                            gdc_launch_dependents()
                    stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            else:
                if SIGNAL == ALL_ASKED:  # noqa: SIM102
                    if more == 0:
                        gdc_launch_dependents()
                w_places += WINDOW * STEP
                if first + WINDOW >= STEPS:
                    w_places += (BLOCK_N - 1) * WORDS
                next_ws = ()
                for step in gl.static_range(WINDOW):
                    sums = mma_v2(
                        _operand(ws[step], 0, BLOCK_N, WARPS, SLICE, SUMS),
                        _operand(xs[step], 1, BLOCK_M, WARPS, SLICE, SUMS),
                        sums,
                    )
                    next_ws += (_weights(w_places + step * STEP, more, BYPASS),)
                    next_xs += (gl.load(x_places + step * STEP, mask=inside & more, other=0),)
                ws = next_ws
            xs = next_xs
        if SIGNAL == READ:  # noqa: SIM102
            if tile == TILES - 1:
                gdc_launch_dependents()
        total = gl.sum(sums, 0) * scales[:, None]
        places = y + out_m[None, :].to(gl.int64) * N + n[:, None]
        gl.store(places, total.to(y.dtype.element_ty), mask=(out_m[None, :] < M) & (n[:, None] < N))
