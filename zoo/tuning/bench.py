"""One GPU on which variants of kernels are run: compiled as for an engine, launched as a session launches them, compared, timed.

Timed work is captured as a CUDA graph and replayed; it rotates through copies of its operands that together exceed the L2 cache,
as weights and caches do from layer to layer.
"""

from __future__ import annotations

import collections
import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import CompileError, ZooError
from zoo.plugins.kernels import Kernel, Launch, Scratch, Size
from zoo.runtime.abi import EngineLimits
from zoo.runtime.cuda.cublaslt import CublasLt
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.gemms import GemmMaker
from zoo.runtime.cuda.program import Function, Program, Symbols
from zoo.weights.reader import NUMPY

Array = np.ndarray[Any, Any]
Compile = Callable[[Sequence[Kernel], int, Path], dict[str, dict[str, Any]]]

COLD = 256 << 20  # bytes that a rotation goes through: five times an H100's L2 cache
MOST_COPIES = 64
PATTERN = (1 << 20) - 3  # random values that larger tensors repeat: no tile is as long
REPEATS = 7


class Bench:
    """``compile_kernels`` as ``zoo.compilers.cuda.aot`` has it; ``folder`` gets the cubins."""

    def __init__(self, device: Device, limits: EngineLimits, folder: Path, compile_kernels: Compile) -> None:
        self.device, self.limits, self.folder = device, limits, folder
        self.stream = device.stream()
        self.cublas = CublasLt(device)
        self.failed: dict[str, str] = {}  # kernel -> why it cannot be used
        self._compile = compile_kernels
        self._functions: dict[str, Function] = {}
        self._shared: dict[str, Any] = {}  # what the products of all programs share
        self._maker = GemmMaker(device, self.cublas, self.stream, limits, self._functions, Symbols(), self._shared)
        self._owned: list[int] | None = None
        self._start, self._stop = device.event(timing=True), device.event(timing=True)

    # kernels

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Compile and load what is not there yet; what cannot be used is in ``failed``."""
        wanted = {one.name: one for one in kernels if one.name not in self._functions and one.name not in self.failed}
        for name, made in self._compiled(list(wanted.values())).items():
            try:
                cubin = (self.folder / f"{name}.cubin").read_bytes()
                module = self.device.load(cubin, name)
                handle = self.device.function(module, str(made["entry"]), int(made["shared"]))
            except ZooError as error:  # more shared memory than there is
                self.failed[name] = str(error)
                continue
            types = tuple(kind for _, kind in wanted[name].args)
            self._functions[name] = Function(handle, int(made["warps"]), int(made["shared"]), types)

    def _compiled(self, kernels: list[Kernel]) -> dict[str, dict[str, Any]]:
        """All that compile: where one does not, halves are tried."""
        if not kernels:
            return {}
        try:
            return self._compile(kernels, self.device.sm, self.folder)
        except CompileError as error:
            if len(kernels) == 1:
                self.failed[kernels[0].name] = str(error)
                return {}
            middle = len(kernels) // 2
            return self._compiled(kernels[:middle]) | self._compiled(kernels[middle:])

    # memory

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """What is allocated while this lasts is freed at its end."""
        assert self._owned is None
        self._owned = []
        try:
            yield
        finally:
            self.device.wait(self.stream)
            for place in self._owned:
                self.device.free(place)
            self._owned = None

    def allocate(self, size: int) -> int:
        """An address on the GPU, of bytes that mean nothing."""
        place = self.device.allocate(size, "what is tuned")
        assert self._owned is not None
        self._owned.append(place)
        return place

    def send(self, array: Array) -> int:
        """An array on the GPU."""
        place = self.allocate(array.nbytes)
        self.device.send(place, np.ascontiguousarray(array), self.stream)
        self.device.wait(self.stream)
        return place

    def random(self, dtype: str, count: int, scale: float = 1.0, seed: int = 0) -> int:
        """So many normal values times ``scale``, in a pattern that repeats."""
        kind = NUMPY[dtype]
        values = np.random.default_rng(seed).standard_normal(min(count, PATTERN)).astype(np.float32) * np.float32(scale)
        raw = np.ascontiguousarray(values.astype(kind)).view(np.uint8)
        size = count * kind.itemsize
        place, done = self.allocate(size), len(raw)
        self.device.send(place, raw, self.stream)
        while done < size:
            part = min(done, size - done)
            self.device.copy(place + done, place, part, self.stream)
            done += part
        self.device.wait(self.stream)
        return place

    def constant(self, value: float, count: int = 1) -> int:
        """float32 of one value."""
        place = self.allocate(4 * count)
        self.device.fill_float(place, value, count, self.stream)
        return place

    def fetch(self, place: int, dtype: str, count: int) -> Array:
        """Values from the GPU, as float32."""
        out: Array = np.empty(count * NUMPY[dtype].itemsize, np.uint8)
        self.device.fetch(out, place, self.stream)
        self.device.wait(self.stream)
        return out.view(NUMPY[dtype]).astype(np.float32)

    def poison(self, place: int, dtype: str, count: int) -> None:
        """NaN of every float: what a kernel leaves unwritten is seen."""
        self.device.fill(place, 0xFF, count * NUMPY[dtype].itemsize, self.stream)

    # running

    def program(
        self, steps: Sequence[Mapping[str, Any]], addresses: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> Callable[[], None]:
        """What queues these steps of a plan for sizes that stay as they are."""
        symbols, known = Symbols(), collections.ChainMap(dict(addresses), self._shared)
        program = Program(self.device, steps, self._functions, symbols, known, 0, self._maker.make)
        numbers = dict(symbols.set(sizes))
        return lambda: program.run(numbers, self.stream)

    def now(self, calls: Sequence[Callable[[], None]]) -> None:
        """Run and wait."""
        for call in calls:
            call()
        self.device.wait(self.stream)

    def seconds(self, calls: Sequence[Callable[[], None]]) -> float:
        """Of one of the calls: all of them in a graph, the median of its replays."""
        device, stream = self.device, self.stream
        self.now(calls)  # what is loaded on first use is there before the capture

        def all_of_them() -> None:
            for call in calls:
                call()

        graph = device.capture(stream, all_of_them)
        times = []
        for _ in range(REPEATS + 1):
            device.record(self._start, stream)
            device.replay(graph, stream)
            device.record(self._stop, stream)
            device.wait_event(self._stop)
            times.append(device.elapsed(self._start, self._stop))
        device.free(graph)
        return statistics.median(times[1:]) / 1e3 / len(calls)

    def close(self) -> None:
        """Let go of cuBLASLt; the device is the caller's."""
        self.cublas.close()


def copies(size: int) -> int:
    """How many copies of operands of so many bytes a rotation goes through."""
    return max(1, min(MOST_COPIES, -(-COLD // max(size, 1))))


def step_json(launch: Launch) -> dict[str, Any]:
    """A launch as a plan has it, with scratch by name (``scratch_of`` says how large)."""
    args: list[dict[str, Any]] = []
    for arg in launch.args:
        if isinstance(arg, Size):
            args.append({"size": [arg.symbol, arg.times, arg.over]})
        elif isinstance(arg, float):
            args.append({"float": arg})
        else:
            args.append({"tensor": arg.name if isinstance(arg, Scratch) else arg})
    grid = [[side.symbol, side.times, side.over] for side in launch.grid]
    return {"op": "launch", "kernel": launch.kernel.name, "grid": grid, "args": args, "overlap": launch.kernel.overlaps}


def scratch_of(launches: Iterable[Launch], sizes: Mapping[str, int]) -> dict[str, int]:
    """Scratch that launches share, by name: bytes."""
    found: dict[str, int] = {}
    for launch in launches:
        for arg in launch.args:
            if isinstance(arg, Scratch):
                found[arg.name] = max(found.get(arg.name, 0), arg.size.at(sizes))
    return found
