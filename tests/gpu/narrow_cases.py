"""What ``narrow_bench.py`` measures: tilings of float8 products of few rows, and their kernels, compiled for SM 9.0 anywhere.

M rows, N outputs, K inputs. Names of candidates read as: kernel, rows of x, rows of w and bytes of K of a step, warps, steps of
weights in shared memory (s) or registers (r), steps of x in registers (x), when the next kernel may start (@).
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

from gpu_tools import Compiled

from zoo.plugins.kernels import Kernel, Launch, TensorRef
from zoo.plugins.skinny_gemm.cuda import COUNTERS, Early, Streamed, Tiling, launches, tiling

FP8 = "float8e4m3"
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
PROFILE = {"qkv": Tiling(16, 64, 128, 4, 4, 6), "down": Tiling(16, 64, 128, 4, 4, 4)}  # conf/hardware/h200-sxm.yaml
# What an engine has for more than 16 rows, there or by default.
MORE_ROWS = {"qkv": (), "o": (32,), "gate_up": (32, 64), "down": (32,)}
MORE = {("down", 32): Tiling(32, 64, 128, 4, 8, 6)}
ROWS = (1, 8, 16)
SIGNALS = {0: "first", 1: "asked", 2: "waited", 3: "all asked", 4: "read"}
Job = tuple[Kernel, int]  # and the most registers of a thread, or 0


@dataclass(frozen=True)
class Candidate:
    """A tiling of one product, with a limit for registers, which no plan can state yet, or 0."""

    shape: str
    tiles: Tiling
    registers: int = 0

    @cached_property
    def name(self) -> str:
        t = self.tiles
        block = f"{t.block_m}x{t.block_n}x{t.block_k}"
        if isinstance(t, Streamed):
            held = f"s{t.num_stages} x{t.window}" if t.num_stages else f"r{t.window}"
            more = (f" tiles{t.tiles}" * (t.tiles > 1)) + f" bring{t.bring}" * (t.bring > 0) + " bypass" * t.bypass
            limit = f" limit{self.registers}" * (self.registers > 0)
            return f"stream {block} w{t.num_warps} {held}{more}{limit} @{SIGNALS[t.signal]}"
        if isinstance(t, Early):
            signal = "there" if t.signal == 1 else SIGNALS[t.signal]
            return f"early {block}/{t.splits} w{t.num_warps} r{t.num_stages} @{signal}"
        return f"skinny {block}/{t.splits} w{t.num_warps} s{t.num_stages}"

    @cached_property
    def key(self) -> str:
        return f"{self.shape}: {self.name}"

    @cached_property
    def launches(self) -> list[Launch]:
        """As an engine has them; whoever reads y multiplies by the scales of w."""
        n, k = SHAPES[self.shape]
        problem = self.tiles.problem(n, k, FP8)
        assert not problem, f"{self.key}: {problem}"
        x, w = TensorRef("x", FP8, ("T", k)), TensorRef("w", FP8, (n, k))
        y, scale = TensorRef("y", "bfloat16", ("T", n)), TensorRef("xs", "float32", ())
        return launches(x, w, y, self.tiles, None, scale, COUNTERS, 16)

    @property
    def jobs(self) -> list[Job]:
        return [(one.kernel, self.registers) for one in self.launches]

    @property
    def numbers(self) -> list[int]:
        """For a hardware profile."""
        return list(astuple(self.tiles))

    def fits(self, m: int) -> bool:
        """Whether it is for M rows: what is made for 16 is not asked to do 8 where there is one for 8."""
        return not isinstance(self.tiles, Streamed) or (m <= 8) == (self.tiles.block_m == 8)


def baseline(shape: str) -> Candidate:
    """What an engine has today."""
    return Candidate(shape, PROFILE.get(shape) or tiling(16, *SHAPES[shape], FP8))


def candidates(shape: str) -> list[Candidate]:
    n, k = SHAPES[shape]
    found = [baseline(shape), Candidate(shape, tiling(16, n, k, FP8))]
    found += [Candidate(shape, one) for one in early(shape)]
    for block_m in (8, 16):
        found += [Candidate(shape, one) for one in streamed(shape, block_m)]
    for block_m in (8, 16):  # so that two programs have room in the registers of a multiprocessor
        for tiles in streamed(shape, block_m):
            plain = (tiles.block_n, tiles.num_warps, tiles.tiles, tiles.bring, tiles.bypass) == (32, 8, 1, 0, 0)
            if plain and tiles.window >= 4 and tiles.num_stages in ((0, 6) if block_m == 16 else (0,)):
                found.append(Candidate(shape, tiles, 128))
    return list(dict.fromkeys(one for one in found if not one.tiles.problem(n, k, FP8)))


def early(shape: str) -> Iterator[Tiling]:
    """Weights of a share of K before x, in registers and by Triton's own means."""
    cuts: tuple[tuple[int, int, int, int, int], ...]  # rows of w, bytes of K, splits, warps, steps before x
    if shape == "down":
        cuts = ((64, 512, 7, 4, 1), (64, 512, 7, 4, 2), (64, 1024, 7, 4, 1), (128, 512, 7, 8, 2))
    elif shape == "gate_up":
        cuts = ((64, 512, 1, 4, 2), (64, 1024, 1, 4, 1), (128, 512, 1, 8, 2))
    else:
        cuts = ((64, 512, 8, 4, 1), (64, 1024, 4, 4, 1), (64, 512, 4, 4, 2), (64, 512, 2, 4, 3), (128, 512, 8, 8, 1))
        cuts += ((128, 512, 4, 8, 2),)
    for block_n, block_k, splits, warps, ahead in cuts:
        for signal in (0, 1, 4):
            yield Early(16, block_n, block_k, splits, warps, ahead, 1, signal)


def streamed(shape: str, block_m: int) -> Iterator[Streamed]:
    """All of K in each program."""
    _, k = SHAPES[shape]
    wide, whole = (8, 8) if k == 4096 else (4, 7)  # windows that divide the steps
    window = wide if block_m == 8 else 4

    def one(block_n: int, block_k: int, warps: int, stages: int, x: int, *signals: int, **more: int) -> Iterator[Streamed]:
        for signal in signals:
            yield Streamed(block_m, block_n, block_k, 1, warps, stages, 2, x, signal, **more)

    yield from one(32, 512, 8, 6, window, 0, 1, 2, 3, 4)
    for x in {2, 4, whole} - {window}:
        yield from one(32, 512, 8, 6, x, 1)
    for stages in (4, 7):
        yield from one(32, 512, 8, stages, window, 1, 3)
    yield from one(32, 512, 8, 8 if k == 4096 else 12, window, 1, 3)
    for block_n, stages in ((32, 2), (32, 3), (16, 3), (16, 4), (16, 6)):  # little room, for kernels beside them
        yield from one(block_n, 512, 8, stages, window, 1, 2, 3, 4)
    yield from one(32, 256, 4, 6, 4, 1, 3)
    yield from one(32, 256, 4, 12, 4, 1, 3)
    yield from one(32, 1024, 16, 3, 4 if k == 4096 else 2, 1, 3)
    yield from one(64, 256, 4, 6, 4, 1, 3)
    yield from one(64, 512, 8, 3, 4, 1, 3)
    yield from one(64, 512, 8, 6, 4, 1, 3)
    yield from one(16, 512, 8, 8, window, 1, 3)
    if shape in ("gate_up", "qkv"):
        yield from one(128, 256, 4, 3, 4, 1, 3)
        yield from one(128, 256, 4, 6, 4, 1, 3)
        yield from one(64, 256, 4, 3, 4, 1, 3)
    tiles = {"qkv": (16, 3), "gate_up": (32, 7)}
    if shape in tiles:
        block_n, count = tiles[shape]
        yield from one(block_n, 512, 8, 6 * 32 // block_n, 4, 1, 3, tiles=count)
    for stages, bring in ((6, 1024), (4, 2048)) if k == 4096 else ((6, 2048), (6, 4096), (4, 2048)):
        yield from one(32, 512, 8, stages, window, 1, 3, bring=bring)
    for x in (2, 4, whole):
        yield from one(32, 512, 8, 0, x, 1, 3)
    yield from one(32, 512, 8, 0, 4, 1, 3, bypass=1)
    yield from one(16, 512, 8, 0, 4, 1, 3)
    yield from one(16, 512, 8, 0, whole, 1)
    yield from one(32, 1024, 16, 0, 2, 1, 3)


# ------------------------------------------------------------------------------------------------------------- compiling


def build(job: Job) -> tuple[Compiled, str] | str:
    """A cubin and the PTX it comes from, as ``zoo.compilers.cuda.aot`` makes them, or why there is none."""
    try:
        import gpu_tools  # noqa: F401  # rooms of zoo without their lists of ops
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        kernel, registers = job
        module, _, name = kernel.source.partition(":")
        function = getattr(importlib.import_module(module), name)
        kinds, constants = dict(kernel.args), dict(kernel.constants)
        names = list(function.arg_names)
        source = (GluonASTSource if function.is_gluon() else ASTSource)(
            function,
            {one: kinds.get(one, "constexpr") for one in names},
            {(place,): constants[one] for place, one in enumerate(names) if one in constants},
            {(place,): [["tt.divisibility", 16]] for place, one in enumerate(names) if kinds.get(one, "").startswith("*")},
        )
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages} | ({"maxnreg": registers} if registers else {})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = made.asm["ptx"]
        parameters = ptx.split(".entry", 1)[1].split(")", 1)[0].count(".param")
        assert ("griddepcontrol.wait" in ptx) == kernel.overlaps
        return Compiled(made.asm["cubin"], made.metadata.name, made.metadata.num_warps, made.metadata.shared, parameters), ptx
    except Exception as error:  # whatever it is, the others are compiled
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1][:200]}"


def build_all(jobs: Sequence[Job]) -> dict[Job, tuple[Compiled, str] | str]:
    """All of them on all cores; one that ends its process is tried alone."""
    distinct = list(dict.fromkeys(jobs))
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton-"))
    workers = max(1, min(len(os.sched_getaffinity(0)), len(distinct), 16))
    done: dict[Job, tuple[Compiled, str] | str] = {}
    for size, chosen in ((workers, distinct), (1, distinct)):
        missing = [job for job in chosen if job not in done]
        groups = [missing] if size > 1 else [[job] for job in missing]
        for group in groups:
            with ProcessPoolExecutor(size, mp_context=get_context("spawn")) as pool:
                waiting = {job: pool.submit(build, job) for job in group}
                for job, future in waiting.items():
                    try:
                        done[job] = future.result(timeout=300)
                    except BrokenProcessPool:
                        if size == 1:
                            done[job] = "the compiler ended its process"
                    except TimeoutError:
                        done[job] = "not compiled after 300 s"
    return done


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, spills among them, as cuobjdump of Triton's package says."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
