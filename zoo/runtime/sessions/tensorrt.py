"""Sessions on TensorRT-RTX and TensorRT: a plan on a GPU, logits out.

NOT YET RUN ON A GPU. It follows NVIDIA's documentation; every name it uses is checked against both libraries, and its
handling of batches, profiles and pools runs in tests on a stand-in for the library that executes the same graph on a CPU
(tests/compilers/test_tensorrt_session.py).

A step is run in parts (``zoo.runtime.sessions.parts``). Every call reads one copy of the pools and writes the other,
because updating a pool in place is unproven for this target. R rows of logits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from zoo.artifacts.manifest import EngineManifest
from zoo.artifacts.select import check_compatible, describe_machine
from zoo.errors import ArtifactError, IncompatibleError, ResourceError, UnavailableError
from zoo.runtime.abi import Batch, EngineLimits, Float32, Int32, StepResult
from zoo.runtime.indices import INDEX_BUILDERS
from zoo.runtime.sessions.cudart import Cuda
from zoo.runtime.sessions.parts import DECODE, PREFILL, Part, split

PLAN_FILE = "engine.plan"
EXTRAS = {"tensorrt_rtx": "rtx", "tensorrt": "trt"}
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8e4m3": 1, "int32": 4, "int64": 8, "bool": 1}
CUDA = "install it with `pip install 'cuda-bindings>=13,<14'`"


class TensorRtSession:
    """One plan on the first visible GPU that it is for.

    Raises UnavailableError without a GPU, its driver or a package, IncompatibleError for another GPU or another version of
    the library (both before the plan is read), ArtifactError for a plan that does not load, ResourceError when GPU memory
    is short. ``step`` may be called from another thread than the one that opened it, but from one at a time.
    """

    def __init__(self, folder: Path, manifest: EngineManifest) -> None:
        self._open = False
        trt, cudart = _libraries(manifest)
        self._trt, self._cuda = trt, Cuda(cudart, int(manifest.needs["sm"]))
        self._abi, self._name = manifest.abi, f"{manifest.model}:{manifest.version}@{manifest.profile}"
        try:
            self.limits = EngineLimits(**manifest.limits)
            self.rope_tables = manifest.abi.rope_tables
            self.vocab_size = next(int(out.shape[1]) for out in manifest.abi.outputs if out.name == "logits")
        except (TypeError, ValueError, StopIteration, IndexError) as error:
            raise ArtifactError(f"engine.json: limits or outputs are malformed ({error}); rebuild the engine") from None
        self._open = True
        self._errors: list[str] = []
        self._cache = _cache_path(manifest) if manifest.compiler["name"] == "tensorrt_rtx" else None
        self._runtime_cache: Any = None
        self._runtime: Any = None
        self._engine: Any = None
        self._contexts: list[Any] = []
        try:
            self._load(folder / PLAN_FILE)
            self._allocate()
        except BaseException:
            self.close()
            raise

    def step(self, batch: Batch) -> StepResult:
        """Run one batch; logits [R, vocab] float32 are a new array. R may be 0."""
        assert self._open, "the session is closed"
        self._cuda.use()
        logits = np.empty((len(batch.logit_rows), self.vocab_size), np.float32)
        for part in split(batch, self._prefill_sequences, self.limits.block_size):
            found = self._call(part)
            logits[part.rows] = found[: len(part.rows)]
        return StepResult(logits=logits)

    def close(self) -> None:
        """Free the engine and its memory, and keep the kernels that TensorRT-RTX compiled. Calling it twice is allowed."""
        if not self._open:
            return
        self._open = False
        self._cuda.use()
        if self._runtime_cache is not None and self._cache is not None:
            rtx_save_cache(self._runtime_cache, self._cache)
        self._contexts = []
        self._runtime_cache = self._engine = self._runtime = None
        self._cuda.close()

    def _load(self, plan: Path) -> None:
        trt = self._trt
        runtime = trt.Runtime(_logger(trt, self._errors))
        with _mapped(plan) as data:
            if self._cache is not None:
                rtx_check_plan(trt, runtime, data, self._name)
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise ArtifactError(f"{plan}: the library cannot load it{self._said()}; rebuild or pull the engine again")
        self._runtime, self._engine = runtime, engine
        self._names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        expected = {cache.name for cache in self._abi.caches} | {"logits"}
        if missing := sorted(expected - set(self._names)):
            raise ArtifactError(f"{plan}: it has no {', '.join(missing)}, which engine.json names; rebuild the engine")
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._cache is not None:
            self._runtime_cache = rtx_open_cache(runtime_config, self._cache)
        for profile in (DECODE, PREFILL):
            context = engine.create_execution_context(runtime_config)
            if context is None or not context.set_optimization_profile_async(profile, self._cuda.stream):
                raise ResourceError(f"engine {self._name}: the GPU gives no context for profile {profile}{self._said()}")
            self._contexts.append(context)
        self._cuda.wait()
        self._prefill_sequences = int(self._most("kv_lengths", PREFILL)[0])

    def _most(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape of an input under a profile."""
        engine = self._engine
        return tuple(engine.get_tensor_profile_shape(name, profile)[2])

    def _allocate(self) -> None:
        """Scratch for one call at a time, inputs and logits at their largest, two copies of every pool."""
        engine, cuda = self._engine, self._cuda
        scratch = int(engine.device_memory_size_v2)
        place = cuda.allocate(scratch)
        for context in self._contexts:
            context.set_device_memory(place, scratch)
        self._inputs: dict[str, int] = {}
        for tensor in (*self._abi.inputs, *self._abi.index_inputs):
            if tensor.name in self._names:  # the builder drops inputs that nothing reads
                most = max(prod(self._most(tensor.name, profile)) for profile in (DECODE, PREFILL))
                self._inputs[tensor.name] = cuda.allocate(most * ITEM_SIZES[tensor.dtype])
        self._logits = cuda.allocate(self.limits.max_rows * self.vocab_size * 4)
        self._pools = {
            cache.name: [cuda.allocate(prod(cache.shape) * ITEM_SIZES[cache.dtype]) for _ in range(2)]
            for cache in self._abi.caches
        }

    def _call(self, part: Part) -> Float32:
        context, cuda, batch = self._contexts[part.profile], self._cuda, part.batch
        sent = []  # arrays must outlive the copies
        for name, place in self._inputs.items():
            array = INDEX_BUILDERS[name](batch, self.limits) if name in INDEX_BUILDERS else _data(batch, name)
            sent.append(array)
            if not context.set_input_shape(name, array.shape):
                raise AssertionError(f"{name} of shape {array.shape} is outside profile {part.profile}{self._said()}")
            cuda.send(place, array)
            context.set_tensor_address(name, place)
        for name, (old, new) in self._pools.items():
            context.set_tensor_address(name, old)
            context.set_tensor_address(name.replace("kv.", "kv_out."), new)
        context.set_tensor_address("logits", self._logits)
        if not context.execute_async_v3(cuda.stream):
            raise ResourceError(f"engine {self._name}: a step failed on the GPU{self._said()}")
        logits = np.empty((len(batch.logit_rows), self.vocab_size), np.float32)
        cuda.fetch(logits, self._logits)
        cuda.wait()
        for pools in self._pools.values():
            pools.reverse()
        return logits

    def _said(self) -> str:
        return f": {'; '.join(self._errors[-3:])}" if self._errors else ""


def rtx_check_plan(trt: Any, runtime: Any, plan: Any, name: str) -> None:
    """Ask TensorRT-RTX from the plan's head whether it fits this GPU, driver and version. IncompatibleError if not."""
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity == trt.EngineValidity.INVALID:
        known = (trt.EngineInvalidityDiagnostics.VERSION_MISMATCH, trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC,
                 trt.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER, trt.EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME,
                 trt.EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY, trt.EngineInvalidityDiagnostics.CUDA_ERROR,
                 trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)  # fmt: skip
        reasons = [one.name.lower().replace("_", " ") for one in known if int(diagnostics) & int(one.value)]
        raise IncompatibleError(f"engine {name} cannot run here: TensorRT-RTX says {', '.join(reasons) or 'it is invalid'}")


def rtx_open_cache(runtime_config: Any, path: Path) -> Any:
    """TensorRT-RTX's cache of compiled kernels, filled from an earlier run; the library refuses one that does not fit."""
    runtime_cache = runtime_config.create_runtime_cache()
    with contextlib.suppress(OSError):
        runtime_cache.deserialize(path.read_bytes())
    runtime_config.set_runtime_cache(runtime_cache)
    return runtime_cache


def rtx_save_cache(runtime_cache: Any, path: Path) -> None:
    """Keep compiled kernels for the next start. Failing to costs time then, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                file.write(bytes(runtime_cache.serialize()))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _cache_path(manifest: EngineManifest) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "engine-zoo" / "tensorrt_rtx" / f"{manifest.build.removeprefix('sha256:')}.cache"


def _libraries(manifest: EngineManifest) -> tuple[Any, Any]:
    """The TensorRT module and cuda-python's runtime module, after GPU and versions were compared with the manifest."""
    name = manifest.compiler["name"]
    machine = describe_machine()
    if not machine.gpus:
        raise UnavailableError(
            f"engine {manifest.model}:{manifest.version}@{manifest.profile} needs a GPU of SM {int(manifest.needs['sm']) / 10}, "
            "and this machine has none, or no driver for it; choose a profile for the CPU, or a machine with such a GPU"
        )
    if not machine.package(name):
        raise UnavailableError(f"the engine needs {name}; install it with `pip install 'engine-zoo[{EXTRAS[name]}]'`")
    check_compatible(manifest, machine)
    try:
        from cuda.bindings import runtime as cudart
    except ImportError as error:
        raise UnavailableError(f"the engine needs cuda-python ({error}); {CUDA}") from None
    try:
        if name == "tensorrt_rtx":
            import tensorrt_rtx as trt
        else:
            import tensorrt as trt
    except (ImportError, OSError) as error:
        raise UnavailableError(f"{name} cannot be imported: {error}") from None
    return trt, cudart


def _logger(trt: Any, errors: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                errors.append(msg)

    return Logger()


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (FileNotFoundError, ValueError):
        raise ArtifactError(f"{path}: missing or empty; rebuild or pull the engine again") from None


def _data(batch: Batch, name: str) -> Int32:
    """The batch's array for an input of the ABI."""
    return batch.block_tables[name.removeprefix("block_table.")] if "." in name else getattr(batch, name)
