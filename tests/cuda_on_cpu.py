"""A Hopper GPU on a CPU, for tests: the driver, Triton's kernels and cuBLASLt over host memory, so that a ``cuda`` session runs.

memory     host memory at its real addresses, full of NaN when it is fresh (``runtime.cuda_standin``)
cubins     ``compile_kernels`` writes what to run in the place of machine code; real cubins are known by their digests
launches   the kernel's Triton function in Triton's interpreter, rounding as SM 9.0 does, one program after the other. Every
           address that it reads or writes must lie inside one allocation
products   numpy in float64, rounded once: so they do not depend on how many rows stand beside a row
streams    in order, and as late as somebody waits; captured launches keep the arguments they were captured with
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cuda_interpreter import SCALARS, interpret
from runtime.cuda_standin import BAD_IMAGE, NO_MEMORY, NOT_FOUND, OK, Driver
from runtime.cuda_standin import Kernel as Function

from zoo.compilers.cuda.aot import to_json
from zoo.plugins.kernels import Kernel
from zoo.runtime.cuda import cublaslt
from zoo.runtime.cuda import driver as driver_module
from zoo.runtime.cuda.cublaslt import CONSTANTS as C
from zoo.weights.reader import NUMPY

ELF = b"\x7fELF"
TYPES = {0: NUMPY["float32"], 2: NUMPY["float16"], 14: NUMPY["bfloat16"], 28: NUMPY["float8e4m3"]}  # cudaDataType_t
WEIGHTS = "zoo.plugins.weight_kernels.kernels"
NOT_SUPPORTED = 15  # cublasStatus_t


def compile_kernels(
    kernels: Sequence[Kernel], sm: int, folder: Path, progress: Callable[[int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """In the place of ``zoo.compilers.cuda.aot.compile_kernels``: "cubins" that say which Triton function they would be."""
    made = {}
    for kernel in kernels:
        (folder / f"{kernel.name}.cubin").write_bytes(ELF + json.dumps(to_json(kernel)).encode())
        entry = kernel.source.partition(":")[2]
        made[kernel.name] = {"entry": entry, "warps": kernel.num_warps, "shared": 0, "hidden": 2}
    return made


class Gpu(Driver):
    """The driver of one GPU. Weights are quantized by numpy: row by row, the interpreter would take seconds.

    ran      how many launches of each function were carried out
    replays  how many graphs
    """

    def __init__(self, sms: tuple[int, ...] = (90,), room: int = 1 << 30, version: int = 13000) -> None:
        super().__init__(sms, room)
        self.version = version
        self.known: dict[str, dict[str, Any]] = {}  # digest of a real cubin -> its kernel in plan.json
        self.modules: dict[int, dict[str, Any]] = {}
        self.ran: collections.Counter[str] = collections.Counter()
        self.overlapping: dict[int, bool] = {}  # function -> whether its kernel waits for its inputs by itself
        self.replays = 0
        self.blas = Blas(self)

    def learn(self, plan: Path) -> None:
        """Know an engine's real cubins."""
        self.known |= {data["digest"]: data for data in json.loads(plan.read_text())["kernels"].values()}

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return OK, self.version

    def cuModuleLoadData(self, cubin: bytes) -> tuple[int, int | None]:
        data = self.known.get("sha256:" + hashlib.sha256(cubin).hexdigest())
        if data is None:
            try:
                data = json.loads(cubin[len(ELF) :])
            except ValueError:
                return BAD_IMAGE, None
        code, module = super().cuModuleLoadData(cubin)
        if module is not None:
            self.modules[module] = data
        return code, module

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, int | None]:
        assert self.handles[module] == "module"
        data = self.modules[module]
        function = data["source"].partition(":")[2]
        if name.decode() != data.get("entry", function):
            return NOT_FOUND, None
        types = tuple(ctypes.c_uint64 if kind.startswith("*") else SCALARS[kind][0] for _, kind in data["args"])

        def run(grid: tuple[int, int, int], *values: Any) -> None:
            self.ran[function] += 1
            if data["source"].startswith(WEIGHTS):
                self._quantize(function, data, grid[0], *values)
            else:
                interpret(data, grid, values, self.memory)

        self.kernels[data["name"]] = Function(types, run)
        handle = 1 + list(self.kernels).index(data["name"])
        self.overlapping[handle] = bool(data.get("overlaps"))
        return OK, handle

    def _quantize(
        self, function: str, data: dict[str, Any], rows: int, x: int, scale: int, to: int, columns: int, *limit: float
    ) -> None:
        kind = {"*fp32": NUMPY["float32"], "*fp16": NUMPY["float16"], "*bf16": NUMPY["bfloat16"]}[data["args"][0][1]]
        values = self.view(x, kind, rows * columns).reshape(rows, columns).astype(np.float32)
        scales = self.view(scale, np.float32, rows)
        if function == "channel_scale":
            peaks = np.abs(values).max(axis=1) / np.float32(limit[0])
            scales[:] = np.where(peaks > 0, peaks, np.float32(1))
            if not np.isfinite(values).all():
                self.view(to, np.int32, 1)[:] = 1
        else:
            rounded = np.clip(values / scales[:, None], -448, 448).astype(NUMPY["float8e4m3"])
            self.view(to, rounded.dtype, rows * columns)[:] = rounded.reshape(-1)

    def cuMemAlloc(self, size: int) -> tuple[int, int | None]:
        """Large fresh memory is not filled: nobody reads cuBLASLt's workspace, and it would take 64 MB for each session."""
        if size < 1 << 25:
            return super().cuMemAlloc(size)
        self._ready()
        if size > self.cuMemGetInfo()[1]:
            return NO_MEMORY, None
        block = np.empty(size + 256, np.uint8)
        start = -block.ctypes.data % 256
        self.memory[block.ctypes.data + start] = block[start : start + size]
        return OK, block.ctypes.data + start

    def cuLaunchKernelEx(self, config: Any, function: int, params: int, extra: int) -> tuple[int]:
        """A launch that may overlap the one before it, which here it does not."""
        assert self.overlapping[function], "its kernel does not wait for its inputs"
        return super().cuLaunchKernelEx(config, function, params, extra)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        self.replays += 1
        return super().cuGraphLaunch(graph, stream)


@contextlib.contextmanager
def gpu_on_cpu(gpu: Gpu | None = None) -> Iterator[Gpu]:
    """What ``Device`` and ``CublasLt`` find while this lasts."""
    gpu = gpu or Gpu()
    with (
        mock.patch.object(driver_module, "bindings", lambda: gpu),
        mock.patch.object(cublaslt, "library", lambda: gpu.blas),
    ):
        yield gpu


class Blas:
    """libcublasLt. ``alpha``: whether it scales float8 products by a vector of alphas, which Hopper's does not.

    It thinks in columns: A is our w, B our x, and D, which is N x M, our y.
    """

    def __init__(self, gpu: Gpu, alpha: bool = False) -> None:
        self.gpu, self.alpha, self.counted = gpu, alpha, 0
        self.things: dict[int, Any] = {}
        self.starts, self.asked = 0, 0
        self.status = 0  # of cublasLtCreate

    def __getattribute__(self, name: str) -> Any:
        """Functions whose types may be set, as those of a ctypes library."""
        if not name.startswith("cublasLt"):
            return object.__getattribute__(self, name)
        if name not in self.__dict__:
            method = getattr(self, "_" + name.removeprefix("cublasLt"))

            def call(*args: Any) -> Any:
                assert len(args) == len(call.argtypes)  # type: ignore[attr-defined]
                return method(*[getattr(arg, "_obj", arg) for arg in args])

            self.__dict__[name] = call
        return self.__dict__[name]

    def _new(self, out: ctypes.c_void_p, thing: Any) -> int:
        self.counted += 8
        out.value = self.counted
        self.things[self.counted] = thing
        return 0

    def _gone(self, handle: ctypes.c_void_p) -> int:
        del self.things[handle.value]
        return 0

    def _GetVersion(self) -> int:
        return 130100

    def _GetStatusString(self, status: int) -> bytes:
        return b"status %d" % status

    def _Create(self, out: ctypes.c_void_p) -> int:
        return self.status or self._new(out, "handle")

    def _MatrixLayoutCreate(self, out: ctypes.c_void_p, kind: int, rows: int, columns: int, ld: int) -> int:
        assert ld == rows
        return self._new(out, (TYPES[kind], rows, columns))

    def _MatmulDescCreate(self, out: ctypes.c_void_p, compute: int, scale: int) -> int:
        assert (compute, scale) == (C["COMPUTE_32F"], 0)
        return self._new(out, {})

    def _MatmulPreferenceCreate(self, out: ctypes.c_void_p) -> int:
        return self._new(out, {})

    _Destroy = _MatrixLayoutDestroy = _MatmulDescDestroy = _MatmulPreferenceDestroy = _gone

    def _MatmulDescSetAttribute(self, what: ctypes.c_void_p, attribute: int, value: Any, size: int) -> int:
        assert size == ctypes.sizeof(value)
        self.things[what.value][attribute] = value.value
        return 0

    _MatmulPreferenceSetAttribute = _MatmulDescSetAttribute

    def _MatmulAlgoGetHeuristic(self, *args: Any) -> int:
        _, desc, at_w, at_x, at_y, _, _, _, results, found = args
        told, (kind, k, n), (other, _, _) = (self.things[one.value] for one in (desc, at_w, at_x))
        self.asked += 1
        if kind == NUMPY["float8e4m3"]:
            by_alpha = told.get(C["MATMUL_DESC_POINTER_MODE"]) == C["POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO"]
            if k % 16 or n % 16 or not told[C["MATMUL_DESC_TRANSA"]] or (by_alpha and not self.alpha):
                return NOT_SUPPORTED
        assert kind == other and at_y.value in self.things
        found.value, results[0].workspace, results[0].waves = 1, 64, 0.5
        return 0

    def _Matmul(self, *args: Any) -> int:
        _, desc, alpha, w, at_w, x, at_x, beta, c, at_c, y, at_y, _, workspace, size, stream = args
        told = dict(self.things[desc.value])
        layouts = [self.things[one.value] for one in (at_w, at_x, at_y)]
        assert (c, at_c.value) == (y, at_y.value) and not (w % 16 or x % 16 or y % 16)
        assert ctypes.c_float.from_address(beta).value == 0
        self.gpu._inside(workspace, size)
        by_alpha = told.get(C["MATMUL_DESC_POINTER_MODE"]) == C["POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO"]
        assert by_alpha or ctypes.c_float.from_address(alpha).value == 1
        self.starts += 1
        self.gpu._queue(stream, lambda: self._multiply(told, layouts, (w, x, y), alpha if by_alpha else 0))
        return 0

    def _multiply(self, told: dict[int, Any], layouts: list[Any], places: tuple[int, int, int], alphas: int) -> None:
        w, x, y = (
            self.gpu.view(place, kind, rows * columns).reshape(columns, rows)
            for place, (kind, rows, columns) in zip(places, layouts, strict=True)
        )
        w = w if told.get(C["MATMUL_DESC_TRANSA"]) else w.T  # [N, K]
        with np.errstate(all="ignore"):
            made = x.astype(np.float64) @ w.astype(np.float64).T
            for name, axis in (("A", 1), ("B", 0)):
                if place := told.get(C[f"MATMUL_DESC_{name}_SCALE_POINTER"]):
                    outer = told.get(C[f"MATMUL_DESC_{name}_SCALE_MODE"], 0) == C["MATMUL_MATRIX_SCALE_OUTER_VEC_32F"]
                    scales = self.gpu.view(place, np.float32, made.shape[axis] if outer else 1).astype(np.float64)
                    made = made * (scales[None, :] if axis == 1 or not outer else scales[:, None])
            if alphas:
                made = made * self.gpu.view(alphas, np.float32, made.shape[1])[None, :]
            if told.get(C["MATMUL_DESC_EPILOGUE"], 1) == C["EPILOGUE_BIAS"]:
                kind = TYPES[told[C["MATMUL_DESC_BIAS_DATA_TYPE"]]]
                made = made + self.gpu.view(told[C["MATMUL_DESC_BIAS_POINTER"]], kind, made.shape[1]).astype(np.float64)
            y[...] = made.astype(np.float32).astype(y.dtype)
