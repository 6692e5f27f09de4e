"""A ``cuda`` engine from its files to the GPU: plan read and checked, cubins loaded, weights streamed, programs linked.

``plan.json`` and the cubins come from an artifact whose digests were verified; what is checked here is that they fit each other
and this GPU. Nothing is compiled or timed: cuBLASLt is asked for its choice when a product is first met.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError, IncompatibleError
from zoo.runtime.abi import EngineLimits
from zoo.runtime.cuda.cublaslt import CublasLt
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.gemms import GemmMaker
from zoo.runtime.cuda.inputs import Inputs
from zoo.runtime.cuda.program import Function, Program, Symbols
from zoo.runtime.cuda.steps import input_bytes
from zoo.runtime.cuda.weights import CompiledWeightKernels, load_weights
from zoo.weights.reader import NUMPY, Tensors
from zoo.weights.recipe import Weight

SCHEMA = 1
SLOTS = 3  # pinned copies of a step's inputs


def item_size(dtype: str) -> int:
    return NUMPY[dtype].itemsize


class Loaded:
    """Everything of an engine that is on the GPU. ``addresses``: tensor -> address, or the cell that holds it."""

    def __init__(self, device: Device, stream: int, plan: Mapping[str, Any], manifest: EngineManifest) -> None:
        self._device, self._stream, self._plan = device, stream, plan
        self.limits = EngineLimits(**{key: int(value) for key, value in manifest.limits.items()})
        self.vocab_size = int(plan["vocab_size"])
        self.index_inputs = tuple(extra.name for extra in manifest.abi.index_inputs)
        self.kv_heads = min((cache.shape[3] for cache in manifest.abi.caches), default=1)
        self.symbols = Symbols()
        self.addresses: dict[str, Any] = {}
        self.programs: dict[str, Program] = {}
        self.functions: dict[str, Function] = {}
        shapes = {one.name: tuple(map(str, one.shape)) for one in (*manifest.abi.inputs, *manifest.abi.index_inputs)}
        self.inputs = Inputs(device, input_bytes(shapes, self.limits), SLOTS)
        self.addresses |= self.inputs.cells
        self.cublas = CublasLt(device)
        self.arena_size = int(plan["arena"])
        self.arena = device.allocate(self.arena_size, "activations")
        self.logits = self.arena + int(plan["logits"])
        # what sampling reads and writes beside the graph
        self.addresses["logits"] = self.logits
        self.addresses["sampled"] = device.allocate(4 * self.limits.max_rows, "token ids")
        device.fill(self.addresses["sampled"], 0, 4 * self.limits.max_rows, stream)
        for name, size in plan["sampling_scratch"].items():
            self.addresses[name] = device.allocate(int(size), "sampling")

    def load_kernels(self, folder: Path) -> None:
        """Every cubin, compared with the digest in the plan."""
        for name, data in self._plan["kernels"].items():
            path = folder / "kernels" / f"{name}.cubin"
            try:
                cubin = path.read_bytes()
            except OSError:
                raise ArtifactError(f"{path}: missing; pull or rebuild the engine") from None
            if "sha256:" + hashlib.sha256(cubin).hexdigest() != data["digest"]:
                raise ArtifactError(f"{path}: it is not the cubin that plan.json was written for; pull or rebuild the engine")
            shared = int(data["shared"])
            handle = self._device.function(self._device.load(cubin, name), str(data["entry"]), shared)
            types = tuple(str(kind) for _, kind in data["args"])
            self.functions[name] = Function(handle, int(data["warps"]), shared, types)

    def load_weights(self, folder: Path, checkpoint: Path | None) -> None:
        """The weight table, carried out over the checkpoint's files."""
        table = [Weight.from_json(row) for row in _json(folder / "weights.json")["weights"]]
        scales = _scales(folder if (folder / "scales.json").exists() or checkpoint is None else checkpoint)
        named = self._plan["weight_kernels"]
        functions = {
            (kind, dtype): (self.functions[name].handle, self.functions[name].warps, self.functions[name].shared)
            for kind, by_dtype in named.items()
            for dtype, name in by_dtype.items()
        }
        kernels = CompiledWeightKernels(self._device, functions)
        with _open_tensors(folder, checkpoint) as tensors:
            self.addresses |= load_weights(self._device, self._stream, table, tensors, scales, kernels)
        self._shapes = {weight.name: weight.shape for weight in table}

    def link(self) -> None:
        """Programs, once pools have their addresses."""
        gemms = GemmMaker(self._device, self.cublas, self._stream, self.limits, self.functions, self.symbols, self.addresses)

        def program(steps: list[Any], make_gemm: Callable[..., Any] | None = None) -> Program:
            return Program(self._device, steps, self.functions, self.symbols, self.addresses, self.arena, make_gemm)

        self.programs["graph"] = program(self._plan["steps"], gemms.make)
        for name, steps in self._plan["sampling"].items():
            self.programs[name] = program(steps)

    def close(self) -> None:
        self.cublas.close()


def load_engine(device: Device, stream: int, folder: Path, manifest: EngineManifest, checkpoint: Path | None) -> Loaded:
    """Read, check and load; pools are the caller's to place, then ``link``."""
    plan = _json(folder / "plan.json")
    if plan.get("schema") != SCHEMA:
        raise ArtifactError(f"plan.json: schema is {plan.get('schema')!r}; this version reads {SCHEMA}; rebuild the engine")
    if plan.get("sm") != device.sm:
        raise IncompatibleError(f"plan.json is for SM {plan.get('sm')}, the GPU has {device.sm}; choose another profile")
    try:
        loaded = Loaded(device, stream, plan, manifest)
        loaded.load_kernels(folder)
        loaded.load_weights(folder, checkpoint)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"plan.json does not fit engine.json ({error!r}); pull or rebuild the engine") from error
    return loaded


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; pull or rebuild the engine") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: malformed ({error}); pull or rebuild the engine") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: expected an object; pull or rebuild the engine")
    return data


def _scales(folder: Path) -> dict[str, float]:
    path = folder / "scales.json"
    if not path.exists():
        return {}
    try:
        return {str(name): float(value) for name, value in _json(path).items()}
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: malformed ({error}); rebuild the engine") from None


@contextlib.contextmanager
def _open_tensors(folder: Path, checkpoint: Path | None) -> Iterator[Tensors | None]:
    """The checkpoint files that travel with the engine, or those of the folder that it is served with."""
    where = folder / "checkpoint" if (folder / "checkpoint").is_dir() else checkpoint
    if where is None:
        raise ArtifactError(
            f"{folder}: the engine was built without a checkpoint; name its folder, as `zoo serve REF --checkpoint FOLDER` does"
        )
    with Tensors.open(where) if where == checkpoint else Tensors.from_files(sorted(where.glob("*.safetensors"))) as tensors:
        yield tensors


def fetch_float32(device: Device, stream: int, place: int, count: int) -> np.ndarray[Any, Any]:
    """A vector from the GPU."""
    out: np.ndarray[Any, Any] = np.empty(count, np.float32)
    device.fetch(out, place, stream)
    device.wait(stream)
    return out
