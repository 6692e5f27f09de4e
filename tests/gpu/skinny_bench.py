"""The skinny GEMM on this GPU: every tiling of a sweep is checked, then timed. Part of gemm_bench.py.

Timed are launches that wait for each other, and launches that overlap as those of an engine do (``us +``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_tools import Compiled, compile_all, peak, seconds, table

from zoo.plugins.kernels import Launch, Scratch, Size, TensorRef
from zoo.plugins.skinny_gemm.cuda import COUNTERS, MULTIPROCESSORS, Tiling, counters_for, launches, tiling
from zoo.runtime.cuda.arguments import Arguments
from zoo.runtime.cuda.driver import Device

SHAPES = (
    (6144, 4096, "float8e4m3"),
    (4096, 4096, "float8e4m3"),
    (28672, 4096, "float8e4m3"),
    (4096, 14336, "float8e4m3"),
    (128256, 4096, "bfloat16"),
)
ROWS = (1, 16, 64)
COLD = 256 << 20
# (block_n, block_k in bytes, warps, stages)
FEW = ((128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 4, 6), (128, 128, 8, 4), (64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3),
       (64, 256, 4, 4), (128, 256, 4, 2), (128, 256, 8, 3))  # fmt: skip
MANY = ((128, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4), (64, 256, 4, 3), (128, 256, 8, 2))
WAVES = (1.5, 2, 3, 4)  # programs for each multiprocessor that K is split for
LIMITS = {"float8e4m3": 2**-8 + 2e-3, "bfloat16": 1e-5}  # of the largest value; y is bfloat16 and float32
CUDA = "cuda"
KINDS = {"bfloat16": torch.bfloat16, "float8e4m3": getattr(torch, "float8_e4m3fn")}  # noqa: B009


def sweep(m: int, n: int, k: int, dtype: str) -> list[Tiling]:
    """Tilings to try, the default first."""
    found = [tiling(m, n, k, dtype)]
    item = 1 if dtype == "float8e4m3" else 2
    for (block_n, size, warps, stages), wave in itertools.product(FEW if m <= 16 else MANY, WAVES):
        block_k = size // item
        steps, tiles = -(-k // block_k), -(-n // block_n)
        splits = [s for s in range(1, steps + 1) if steps % s == 0 and tiles * s <= wave * MULTIPROCESSORS and steps // s >= 2]
        one = Tiling(found[0].block_m, block_n, block_k, max(splits, default=1), warps, stages)
        if one not in found and stages * (block_n + one.block_m) * size <= 220 << 10:
            found.append(one)
    return found


def ways(m: int, n: int, k: int, dtype: str, tiles: Tiling) -> tuple[bool, ...]:
    """With counters; the default tiling also in two launches."""
    return (True, False) if tiles.splits > 1 and tiles == tiling(m, n, k, dtype) else (True,)


@dataclass
class Ready:
    """Launches of one tiling with addresses in them, for each copy of the weights."""

    calls: list[Callable[[bool], None]]  # whether it overlaps with the one before
    y: torch.Tensor


def refs(n: int, k: int, dtype: str) -> tuple[TensorRef, ...]:
    fp8 = dtype == "float8e4m3"
    y = TensorRef("y", "bfloat16" if fp8 else "float32", ("T", n))
    scales = (TensorRef("ws", "float32", (n,)), TensorRef("xs", "float32", ())) if fp8 else ()
    return TensorRef("x", dtype, ("T", k)), TensorRef("w", dtype, (n, k)), y, *scales


def plan(n: int, k: int, dtype: str, tiles: Tiling, counted: bool) -> list[Launch]:
    x, w, y, *scales = refs(n, k, dtype)
    return launches(x, w, y, tiles, *scales, counters="zeros" if counted else None)


def ready(
    device: Device,
    stream: int,
    made: list[Launch],
    functions: Mapping[Any, tuple[int, Compiled]],
    tensors: dict[str, torch.Tensor],
    weights: list[torch.Tensor],
) -> Ready:
    m = tensors["x"].shape[0]
    calls = []
    for w, one in itertools.product(weights, made):
        values: list[Any] = []
        for arg in one.args:
            if isinstance(arg, Scratch):
                values.append(tensors["scratch"].data_ptr())
            elif isinstance(arg, Size):
                values.append(arg.at({"T": m}))
            else:
                values.append((w if arg == "w" else tensors[str(arg)]).data_ptr())
        function, compiled = functions[one.kernel]
        params = Arguments([kind for _, kind in one.kernel.args], values)
        x, y, z = (side.at({"T": m}) for side in one.grid)

        def call(overlap: bool, function: int = function, compiled: Compiled = compiled, params: Arguments = params,
                 grid: tuple[int, int, int] = (x, y, z)) -> None:  # fmt: skip
            device.launch(function, grid, compiled.warps, compiled.shared, params, stream, overlap)

        calls.append(call)
    return Ready(calls, tensors["y"])


@dataclass
class Product:
    """Operands, several copies of the weights, and what float32 says of the first."""

    tensors: dict[str, torch.Tensor]
    weights: list[torch.Tensor]
    wanted: torch.Tensor
    limit: float


def random_weights(n: int, k: int, dtype: str) -> list[torch.Tensor]:
    """More than any cache holds."""
    item = 2 if dtype == "bfloat16" else 1
    generator = torch.Generator(CUDA).manual_seed(n + k)
    copies = max(2, min(16, -(-COLD // (n * k * item))))
    return [torch.randn(n, k, device=CUDA, generator=generator).to(KINDS[dtype]) for _ in range(copies)]


def product(m: int, weights: list[torch.Tensor], dtype: str, deferred: bool = False) -> Product:
    """x [M, K] and scales; a deferred product is not multiplied by those of w."""
    n, k = weights[0].shape
    generator = torch.Generator(CUDA).manual_seed(n + k + m)
    x = torch.randn(m, k, device=CUDA, generator=generator).to(KINDS[dtype])
    ws, xs = torch.rand(n, device=CUDA, generator=generator) + 0.5, torch.tensor(0.7, device=CUDA)
    wanted = x.float() @ weights[0].float().t()
    if dtype != "bfloat16":
        wanted = wanted * xs * (1 if deferred else ws)
    return Product({"x": x, "xs": xs, "ws": ws}, weights, wanted, LIMITS[dtype])


def measured(
    device: Device, stream: int, made: list[Launch], functions: Mapping[Any, tuple[int, Compiled]], given: Product, counters: int
) -> tuple[float, float, float]:
    """Seconds of launches that wait for each other and of those that overlap, and the error as a part of the largest value.

    Asserted are the error, the same bits twice, and that counters are left at zero.
    """
    scratch = max((arg.size.at({}) for one in made for arg in one.args if isinstance(arg, Scratch)), default=0)
    zeros = torch.zeros(max(counters, 1), dtype=torch.int32, device=CUDA)
    y = torch.float32 if given.tensors["x"].dtype == torch.bfloat16 else torch.bfloat16
    tensors = given.tensors | {
        "y": torch.full(given.wanted.shape, float("nan"), device=CUDA, dtype=y),
        "scratch": torch.full((scratch // 4,), float("nan"), device=CUDA),
        "zeros": zeros,
        COUNTERS: zeros,
    }
    copies = len(given.weights)
    queue = ready(device, stream, made, functions, tensors, given.weights)
    torch.cuda.synchronize()
    for call in queue.calls[: len(made)]:
        call(False)
    device.wait(stream)
    wrong = float((queue.y.float() - given.wanted).abs().max() / given.wanted.abs().max())
    assert wrong < given.limit, f"{made[0].kernel}: error {wrong:.1e} of the largest value"
    first = queue.y.clone()
    torch.cuda.synchronize()
    alone, spent = (seconds(device, stream, partial(one_by_one, queue.calls, way), copies) for way in (False, True))
    for call in queue.calls[: len(made)]:
        call(True)
    device.wait(stream)
    assert torch.equal(first, queue.y), f"{made[0].kernel}: not the same twice"
    assert not zeros.any(), f"{made[0].kernel}: counters are left behind"
    return alone, spent, wrong


def loaded(device: Device, compiled: Mapping[Any, Compiled]) -> dict[Any, tuple[int, Compiled]]:
    """Kernels on the GPU."""
    return {
        kernel: (device.function(device.load(made.cubin, made.entry), made.entry, made.shared), made)
        for kernel, made in compiled.items()
    }


def one_by_one(calls: list[Callable[[bool], None]], overlap: bool) -> None:
    for place, call in enumerate(calls):
        call(overlap and place > 0)


def skinny(device: Device, stream: int) -> list[Callable[[], Any]]:
    """Compile the sweep, check every tiling against torch in float32, time it; the best of each shape, and the default."""
    todo = [(m, n, k, dtype, tiles) for n, k, dtype in SHAPES for m in ROWS for tiles in sweep(m, n, k, dtype)]
    kernels = [
        one.kernel
        for m, n, k, dtype, tiles in todo
        for way in ways(m, n, k, dtype, tiles)
        for one in plan(n, k, dtype, tiles, way)
    ]
    functions = loaded(device, compile_all(kernels))
    most = peak(device)
    rows: list[tuple[Any, ...]] = []
    details: list[tuple[Any, ...]] = []
    for n, k, dtype in SHAPES:
        weights = random_weights(n, k, dtype)
        for m in ROWS:
            given = product(m, weights, dtype)
            timings = []
            for tiles in (one[4] for one in todo if one[:4] == (m, n, k, dtype)):
                for counted in ways(m, n, k, dtype, tiles):
                    made = plan(n, k, dtype, tiles, counted)
                    alone, spent, wrong = measured(device, stream, made, functions, given, counters_for(n, tiles))
                    timings.append((spent, counted, tiles, wrong, alone))
            default = next(one for one in timings if one[2] == tiling(m, n, k, dtype))
            moved = n * k * weights[0].itemsize
            best = min(timings, key=lambda one: one[0])
            for name, (spent, counted, tiles, wrong, alone) in (("default", default), ("best", best)):
                cut = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}/{tiles.splits} w{tiles.num_warps} s{tiles.num_stages}"
                times = f"{alone * 1e6:.1f}", f"{spent * 1e6:.1f}", f"{moved / spent / 1e12:.2f}", f"{moved / spent / most:.0%}"
                rows.append((f"{n}x{k} {dtype}", m, name, cut, "one" if counted else "two", *times, f"{wrong:.0e}"))
            for spent, _, tiles, _, alone in sorted(timings, key=lambda one: one[0])[:4]:
                details.append((f"{n}x{k}", m, tiles, f"{moved / alone / 1e12:.2f}", f"{moved / spent / 1e12:.2f}"))
        del weights
    head = ("shape", "M", "", "tile MxNxK/splits", "launches", "us", "us +", "TB/s +", "of peak", "error")
    return [
        lambda: (
            print("\nskinny, the four best of each: TB/s, and with launches that overlap"),
            [print(*one) for one in details],
        ),
        lambda: (print("\nskinny GEMM: weights read, TB/s"), table(head, rows)),
    ]
