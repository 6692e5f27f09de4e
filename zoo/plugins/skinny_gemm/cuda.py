"""Launches of the skinny GEMM: which tiles for which shape, and the kernels with their arguments.

Reading at full bandwidth takes some megabytes in flight all the time. So there is one wave of programs, one to three for each
multiprocessor, all resident at once; where N alone has too few tiles for that, K is split.

M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from zoo.errors import CompileError
from zoo.plugins.kernels import Arg, Kernel, Launch, Scratch, Size, TensorRef, fixed

KERNELS = "zoo.plugins.skinny_gemm.kernels"
EARLY_KERNELS = "zoo.plugins.skinny_gemm.early"
STREAM_KERNELS = "zoo.plugins.skinny_gemm.stream"
BUCKETS = (16, 32, 64)  # rows that an engine has a kernel of its own for
MOST_ROWS = 128
MULTIPROCESSORS = 132  # of H100 SXM and H200
WAVE = 1.9  # programs for each multiprocessor that K is split for, at least
RESIDENT = 4  # and at most; as many run at once
MOST_STEPS = 8  # of a share of K whose steps are all written out
SHARED = 227 << 10  # bytes of a multiprocessor that programs share
SUM_BLOCK = 512
COUNTERS = "gemm.counters"  # zeros on the GPU that the session keeps for split sums
# Products of float8e4m3 that the tensor cores add before the sum moves on to float32; what DeepSeek-V3 (2024) found enough.
PROMOTE = 128
# Bytes of a weight below which cuBLASLt is as fast for more than 32 rows.
NARROW = 32 << 20
ITEMS = {"float8e4m3": 1, "float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: 16 to 128 rows of x, ``block_n`` rows of w, ``block_k`` of K a step, K in ``splits`` shares."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int

    def shared(self, dtype: str) -> int:
        """Bytes of shared memory that a program takes, about."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * ITEMS[dtype]

    def problem(self, n: int, k: int, dtype: str) -> str:
        """Why no kernel has this tiling for w [n, k]; "" if one has."""
        sizes = (self.block_m, self.block_n, self.block_k, self.num_warps)
        least = self.block_m >= 16 and self.block_n >= 64 and self.block_k * ITEMS[dtype] >= 32
        if min(sizes) < 1 or any(one & (one - 1) for one in sizes) or not least:
            return "blocks are powers of two, of 16, 64 and 32 bytes at least"
        if self.shared(dtype) > SHARED or min(self.splits, self.num_stages) < 1:
            return f"its stages, 1 at least, fit in {SHARED:,} bytes"
        return ""


@dataclass(frozen=True)
class Early(Tiling):
    """For ``early.py``: ``num_stages`` steps of weights are in registers before x is waited for; ``signal`` as it is there."""

    kind: int = 1
    signal: int = 0

    def problem(self, n: int, k: int, dtype: str) -> str:
        problem = super().problem(n, k, dtype)
        if problem:
            return problem
        steps, rest = divmod(k, self.block_k * self.splits)
        if rest or not self.num_stages <= steps <= MOST_STEPS or self.signal not in (0, 1, 4):
            return f"splits of whole steps, {MOST_STEPS} at most and no fewer than stages, make up K; signal is 0, 1 or 4"
        return ""


@dataclass(frozen=True)
class Streamed(Tiling):
    """For ``stream.py``: a program has ``tiles`` times ``block_n`` rows of w and all of K, in steps of ``block_k``.

    num_stages       steps of weights in shared memory, or 0: ``window`` steps of them in registers
    window           steps of x in registers
    signal, bring    as they are there
    bypass           1: as there
    """

    kind: int = 2
    window: int = 4
    signal: int = 1
    tiles: int = 1
    bring: int = 0
    bypass: int = 0

    def shared(self, dtype: str) -> int:
        sums = self.num_warps * self.block_m * self.block_n * 4
        ring = self.num_stages * self.block_n * self.block_k
        return ring + sums if self.tiles > 1 else max(ring, sums)

    def problem(self, n: int, k: int, dtype: str) -> str:
        sizes = (self.block_m, self.block_n, self.block_k, self.num_warps)
        least = self.block_m >= 8 and self.block_n >= 16 and self.block_k >= 64 * self.num_warps
        if min(sizes) < 1 or any(one & (one - 1) for one in sizes) or not least:
            return "blocks are powers of two, of 8, 16 and 64 bytes for each warp at least"
        if dtype != "float8e4m3" or self.splits != 1 or self.tiles < 1 or (self.tiles > 1 and n % (self.block_n * self.tiles)):
            return "it is for float8e4m3, without splits, and several tiles divide N"
        steps, rest = divmod(k, self.block_k)
        if rest or self.window < 1 or steps % self.window or not 0 <= self.num_stages <= steps * self.tiles:
            return "steps divide K, the window divides the steps, and there are as many as stages"
        if self.bring and not (
            self.num_stages
            and self.bring in [self.num_warps * size for size in (128, 256, 512)]
            and self.bring + self.num_stages * self.block_k <= k
        ):
            return "what is brought is 128, 256 or 512 bytes for each warp, behind a ring and inside K"
        if self.signal not in range(5) or self.bypass not in (0, 1) or self.shared(dtype) > SHARED:
            return f"signal is 0 to 4, bypass 0 or 1, and its ring fits in {SHARED:,} bytes"
        return ""


KINDS: dict[int, type[Tiling]] = {1: Early, 2: Streamed}  # by the seventh number of a tiling; Tiling has six


@dataclass(frozen=True)
class Few:
    """Launches for up to ``most`` rows. ``counters``: how many zeros (``COUNTERS``) they need."""

    most: int
    launches: list[Launch]
    counters: int


def tiling(m: int, n: int, k: int, dtype: str, multiprocessors: int = MULTIPROCESSORS) -> Tiling:
    """A tiling for up to ``m`` rows, near the best of what tests/gpu/skinny_bench.py and step_check.py measured on Hopper.

    Tiles of 64 rows of w; for more than 16 rows of x, where they fill the GPU twice already, float8e4m3 has 128. K is split
    until there are enough programs, but not so far that partial sums, 8 bytes a split, row and output, come near the bytes of w.
    A step reads 128 bytes of each row; of 16-bit weights 256, and for more than 16 rows of x, if a program has eight such steps.
    """
    assert 0 < m <= MOST_ROWS, f"{m} rows are not few"
    item = ITEMS[dtype]
    block_m = next(size for size in (16, 32, 64, 128) if m <= size)
    block_n = 128 if item == 1 and block_m > 16 and n >= 128 * WAVE * multiprocessors else 64
    tiles = -(-n // block_n)
    whole = k * item // 128  # steps of 128 bytes
    able = [s for s in range(1, whole // 4 + 1) if k * item % (128 * s) == 0 and s * block_m * 32 <= k * item] or [1]
    able = [s for s in able if s == 1 or tiles * s <= RESIDENT * multiprocessors]
    splits = next((s for s in able if tiles * s >= WAVE * multiprocessors), able[-1])
    share = k * item // splits
    size = 256 if share % 256 == 0 and share >= 2048 and (item > 1 or block_m > 16) else 128
    stages = 3 if size == 256 else 4
    if block_n == 128:
        stages = 2
    return Tiling(block_m, block_n, size // item, splits, block_n // 16, stages)


def alternatives(
    x: TensorRef, w: TensorRef, y: TensorRef, x_scale: TensorRef | None, w_scale: TensorRef | None, tuning: Mapping[str, Any]
) -> list[Few]:
    """Launches for few rows, in the order of rows; none for a product that the kernel cannot do. Scales as in ``launches``.

    Tuning: ``skinny``: {"NxK": {most rows: [block_m, block_n, block_k, splits, warps, stages]}} takes the place of the defaults
    of that shape ("NxK.dtype" where two dtypes have it), so that {} leaves it to cuBLASLt. A seventh number is another kernel's
    kind, 1 for ``Early`` and 2 for ``Streamed``, whose other fields may follow.
    """
    n, k = w.shape
    assert isinstance(n, int) and isinstance(k, int)
    if w.dtype != x.dtype or w.dtype not in ITEMS or w.dtype == "float32" or k * ITEMS[w.dtype] % 16:
        return []
    narrow = n * k * ITEMS[w.dtype] < NARROW
    found = {most: tiling(most, n, k, w.dtype) for most in (BUCKETS[:-1] if narrow else BUCKETS)}
    chosen = tuning.get("skinny", {})
    name = next((name for name in (f"{n}x{k}.{w.dtype}", f"{n}x{k}") if name in chosen), None)
    if name is not None:
        found = {int(most): _tuned(name, most, numbers, n, k, w.dtype) for most, numbers in chosen[name].items()}
    made = []
    for most, tiles in sorted(found.items()):
        few = launches(x, w, y, tiles, w_scale, x_scale, COUNTERS, most)
        made.append(Few(most, few, counters_for(n, tiles, most) if tiles.splits > 1 else 0))
    return made


def _tuned(name: str, most: Any, numbers: Any, n: int, k: int, dtype: str) -> Tiling:
    """A tiling as a hardware profile has it. CompileError for one that no kernel has."""
    try:
        given = [int(number) for number in numbers]
        kind = KINDS[given[6]] if len(given) > 6 else Tiling
        tiles = kind(*given)
    except (TypeError, ValueError, KeyError):
        others = "; ".join(f"kind {one}: {', '.join(f.name for f in fields(kind)[7:])}" for one, kind in KINDS.items())
        raise CompileError(
            f"tuning.skinny.{name}.{most} is {numbers!r}, not [block_m, block_n, block_k, splits, warps, stages], which a kind "
            f"and its own numbers may follow ({others})"
        ) from None
    problem = tiles.problem(n, k, dtype) if int(most) >= 1 else "there is one row at least"
    if problem:
        raise CompileError(f"tuning.skinny.{name}.{most}: {tiles} is no tiling for {dtype}: {problem}")
    return tiles


def launches(
    x: TensorRef,
    w: TensorRef,
    y: TensorRef,
    tiles: Tiling,
    w_scale: TensorRef | None = None,
    x_scale: TensorRef | None = None,
    counters: str | None = None,
    most_rows: int = 0,
) -> list[Launch]:
    """y [M, N] = x [M, K] · w [N, K]ᵀ, times what scales there are; one launch, or two.

    x_scale     scalar, of float8e4m3 operands
    w_scale     [N], of float8e4m3 operands; without it, whoever reads y multiplies by it
    counters    a tensor of int32 zeros, one for each tile of the result (``counters_for``), that launches on one stream share:
                they find and leave it zero. Without it, split sums are added by a second launch
    most_rows   the most rows that M will ever be, ``tiles.block_m`` if left out; decides the scratch for split sums
    """
    n, k = w.shape
    assert isinstance(n, int) and isinstance(k, int) and x.dtype == w.dtype and x.shape[-1] == k and y.shape[-1] == n
    fp8 = w.dtype == "float8e4m3"
    assert fp8 == (x_scale is not None) and (fp8 or w_scale is None)
    assert k * ITEMS[w.dtype] % 16 == 0, f"{w.name}: rows of {k} {w.dtype} do not begin at multiples of 16 bytes"
    # What a variant does not read has a place in its argument list all the same: y stands there.
    scales = tuple((name, one.name if one else y.name) for name, one in (("w_scale", w_scale), ("x_scale", x_scale)))
    scaled: tuple[tuple[str, bool], ...] = (("X_SCALED", x_scale is not None), ("W_SCALED", w_scale is not None))
    if isinstance(tiles, Streamed):
        return [_streamed(x, w, y, tiles, scales, scaled)]
    rows, split = x.rows, tiles.splits > 1
    counted = split and counters is not None
    parts = Scratch("skinny.partial", fixed(max(1, tiles.splits * (most_rows or tiles.block_m) * n * 4)))
    early = (("AHEAD", tiles.num_stages), ("SIGNAL", tiles.signal)) if isinstance(tiles, Early) else ()
    kernel = Kernel(
        f"{EARLY_KERNELS}:early_gemm" if early else f"{KERNELS}:skinny_gemm",
        (
            ("x", x.pointer),
            ("w", w.pointer),
            *((name, "*fp32") for name, _ in scales),
            ("y", y.pointer),
            ("partial", "*fp32"),
            ("counters", "*i32"),
            ("M", "i32"),
        ),
        (
            ("N", n),
            ("K", k),
            ("BLOCK_M", tiles.block_m),
            ("BLOCK_N", tiles.block_n),
            ("BLOCK_K", tiles.block_k),
            ("SPLITS", tiles.splits),
            *scaled,
            ("COUNTED", counted),
            ("PROMOTE", min(PROMOTE, tiles.block_k) if fp8 else 0),
            *early,
        ),
        tiles.num_warps,
        1 if early else tiles.num_stages,
        overlaps=True,
    )
    grid = fixed(-(-n // tiles.block_n)), fixed(tiles.splits), Size(rows.symbol, rows.times, rows.over * tiles.block_m)
    args: tuple[Arg, ...] = (
        x.name,
        w.name,
        *(name for _, name in scales),
        y.name,
        parts if split else y.name,
        counters if counted and counters else y.name,
        rows,
    )
    made = [Launch(kernel, grid, args)]
    if split and not counted:
        adder = Kernel(
            f"{KERNELS}:sum_partials",
            (("partial", "*fp32"), *((name, "*fp32") for name, _ in scales), ("y", y.pointer), ("M", "i32")),
            (("N", n), ("BLOCK_N", SUM_BLOCK), ("SPLITS", tiles.splits), *scaled),
            overlaps=True,
        )
        args = (parts, *(name for _, name in scales), y.name, rows)
        made.append(Launch(adder, (fixed(-(-n // SUM_BLOCK)), rows, fixed(1)), args))
    return made


def _streamed(
    x: TensorRef,
    w: TensorRef,
    y: TensorRef,
    tiles: Streamed,
    scales: tuple[tuple[str, str], ...],
    scaled: tuple[tuple[str, bool], ...],
) -> Launch:
    """The launch of ``stream.py``."""
    n, k = w.shape
    assert isinstance(n, int) and isinstance(k, int)
    kernel = Kernel(
        f"{STREAM_KERNELS}:stream_gemm",
        (("x", x.pointer), ("w", w.pointer), *((name, "*fp32") for name, _ in scales), ("y", y.pointer), ("M", "i32")),
        (
            ("N", n),
            ("K", k),
            ("BLOCK_M", tiles.block_m),
            ("BLOCK_N", tiles.block_n),
            ("SLICE", tiles.block_k // tiles.num_warps),
            ("TILES", tiles.tiles),
            ("STAGES", tiles.num_stages),
            ("WINDOW", tiles.window),
            ("SIGNAL", tiles.signal),
            ("BRING", tiles.bring),
            ("BYPASS", bool(tiles.bypass)),
            *scaled,
        ),
        tiles.num_warps,
        1,
        overlaps=True,
    )
    rows = x.rows
    grid = fixed(-(-n // (tiles.block_n * tiles.tiles))), fixed(1), Size(rows.symbol, rows.times, rows.over * tiles.block_m)
    return Launch(kernel, grid, (x.name, w.name, *(name for _, name in scales), y.name, rows))


def counters_for(n: int, tiles: Tiling, most_rows: int = 0) -> int:
    """How many int32 of zeros a product needs to add its split sums in one launch."""
    return -(-n // tiles.block_n) * -(-(most_rows or tiles.block_m) // tiles.block_m)
