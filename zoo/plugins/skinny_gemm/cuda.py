"""Launches of the skinny GEMM: which tiles for which shape, and the kernels with their arguments.

Reading at full bandwidth takes some megabytes in flight all the time. So there is one wave of programs, two or three for each
multiprocessor, all resident at once; where N alone has too few tiles for that, K is split.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.plugins.kernels import Arg, Kernel, Launch, Scratch, Size, TensorRef, fixed

KERNELS = "zoo.plugins.skinny_gemm.kernels"
MOST_ROWS = 64
MULTIPROCESSORS = 132  # of H100 SXM and H200
PROGRAMS = 3 * MULTIPROCESSORS  # of one wave, at the shared memory that the tilings below take
LEAST_STEPS = 4  # of a program along K: fewer are over before reading is under way
SUM_BLOCK = 512
# Products of float8e4m3 that the tensor cores add before the sum moves on to float32; what DeepSeek-V3 (2024) found enough.
PROMOTE = 128


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: 16, 32 or 64 rows of x, ``block_n`` rows of w, ``block_k`` of K a step, K in ``splits`` shares."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def tiling(m: int, n: int, k: int, dtype: str) -> Tiling:
    """A tiling for up to ``m`` rows. NOT YET TUNED ON A GPU: tests/gpu/gemm_bench.py sweeps around it."""
    assert 0 < m <= MOST_ROWS, f"{m} rows are not few"
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    block_n = 128
    block_k = 128 if dtype == "float8e4m3" else 64  # rows of 128 bytes
    steps = -(-k // block_k)
    tiles = -(-n // block_n)
    fitting = [s for s in range(1, steps + 1) if steps % s == 0 and tiles * s <= PROGRAMS and steps // s >= LEAST_STEPS]
    return Tiling(block_m, block_n, block_k, max(fitting, default=1), 8 if block_m == 64 else 4, 4 if block_m < 64 else 3)


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
    """y [M, N] = x [M, K] · w [N, K]ᵀ, times the scales of float8e4m3 operands; one launch, or two.

    counters   a tensor of int32 zeros, one for each tile of the result (``counters_for``), that launches on one stream share:
               they find and leave it zero. Without it, split sums are added by a second launch
    most_rows  the most rows that M will ever be, ``tiles.block_m`` if left out; decides the scratch for split sums
    """
    n, k = w.shape
    assert isinstance(n, int) and isinstance(k, int) and x.dtype == w.dtype and x.shape[-1] == k and y.shape[-1] == n
    scaled = w.dtype == "float8e4m3"
    assert scaled == (w_scale is not None) == (x_scale is not None)
    item = 1 if scaled else 4 if w.dtype == "float32" else 2
    assert k * item % 16 == 0, f"{w.name}: rows of {k} {w.dtype} do not begin at multiples of 16 bytes"
    rows, split = x.rows, tiles.splits > 1
    counted = split and counters is not None
    parts = Scratch("skinny.partial", fixed(max(1, tiles.splits * (most_rows or tiles.block_m) * n * 4)))
    # What a variant does not read has a place in its argument list all the same: y stands there.
    scales: tuple[Arg, Arg] = (w_scale.name, x_scale.name) if w_scale and x_scale else (y.name, y.name)
    kernel = Kernel(
        f"{KERNELS}:skinny_gemm",
        (
            ("x", x.pointer),
            ("w", w.pointer),
            ("w_scale", "*fp32"),
            ("x_scale", "*fp32"),
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
            ("SCALED", scaled),
            ("COUNTED", counted),
            ("PROMOTE", min(PROMOTE, tiles.block_k) if scaled else 0),
        ),
        tiles.num_warps,
        tiles.num_stages,
    )
    grid = fixed(-(-n // tiles.block_n)), fixed(tiles.splits), Size(rows.symbol, rows.times, rows.over * tiles.block_m)
    args: tuple[Arg, ...] = (
        x.name,
        w.name,
        *scales,
        y.name,
        parts if split else y.name,
        counters if counted and counters else y.name,
        rows,
    )
    made = [Launch(kernel, grid, args)]
    if split and not counted:
        adder = Kernel(
            f"{KERNELS}:sum_partials",
            (("partial", "*fp32"), ("w_scale", "*fp32"), ("x_scale", "*fp32"), ("y", y.pointer), ("M", "i32")),
            (("N", n), ("BLOCK_N", SUM_BLOCK), ("SPLITS", tiles.splits), ("SCALED", scaled)),
        )
        made.append(Launch(adder, (fixed(-(-n // SUM_BLOCK)), rows, fixed(1)), (parts, *scales, y.name, rows)))
    return made


def counters_for(n: int, tiles: Tiling, most_rows: int = 0) -> int:
    """How many int32 of zeros a product needs to add its split sums in one launch."""
    return -(-n // tiles.block_n) * -(-(most_rows or tiles.block_m) // tiles.block_m)
