"""A ``cuda`` engine from its files to the GPU: files read and checked, room counted, cubins loaded, weights streamed, programs
linked.

``plan.json`` and the cubins come from an artifact whose digests were verified; what is checked here is that they fit each other
and this GPU. Nothing is compiled or timed: cuBLASLt is asked for its choice when a product is first met.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError, IncompatibleError, ResourceError, UnavailableError
from zoo.resources import size_text
from zoo.runtime.abi import STEPS_AHEAD, EngineLimits
from zoo.runtime.cuda.checks import check_manifest, read_plan
from zoo.runtime.cuda.cublaslt import WORKSPACE, CublasLt
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.gemms import GemmMaker
from zoo.runtime.cuda.inputs import Inputs
from zoo.runtime.cuda.program import Function, Program, Symbols
from zoo.runtime.cuda.slots import Slots
from zoo.runtime.cuda.steps import input_bytes
from zoo.runtime.cuda.table import check_products, check_sources, read_scales, read_table
from zoo.runtime.cuda.weights import CHANNEL_SCALE, QUANTIZE, SOURCES, CompiledWeightKernels, arena_layout, load_weights
from zoo.weights.reader import NUMPY, Tensors
from zoo.weights.recipe import Weight

# Steps whose inputs and results are kept: a ticket's are valid until the next submit, and one more is under way.
SLOTS = STEPS_AHEAD + 2
SPARE = 256 << 20  # bytes of GPU memory that are left to graphs, modules and the driver
ADJUSTING = ("count", "listed", "penalized")  # parts of a plan that older engines lack: the host adjusts their logits
DRIVER = 13000  # the CUDA that a driver must know: what cuda-bindings and cuBLASLt are made for


def pool_block(manifest: EngineManifest) -> int:
    """Bytes of one block of all KV pools."""
    return sum(prod(cache.shape[1:]) * NUMPY[cache.dtype].itemsize for cache in manifest.abi.caches)


class Loaded:
    """Everything of an engine that is on the GPU.

    addresses   tensor -> address, or the cell that holds it
    adjusts     it has the kernels that adjust logits by what is in ``slots``
    """

    def __init__(
        self, device: Device, stream: int, plan: Mapping[str, Any], manifest: EngineManifest, limits: EngineLimits
    ) -> None:
        self._device, self._stream, self._plan = device, stream, plan
        self.limits = limits
        self.vocab_size = int(plan["vocab_size"])
        self.index_inputs = tuple(extra.name for extra in manifest.abi.index_inputs)
        self.kv_heads = min((cache.shape[3] for cache in manifest.abi.caches), default=1)
        self.symbols = Symbols()
        self.addresses: dict[str, Any] = {}
        self.programs: dict[str, Program] = {}
        self.functions: dict[str, Function] = {}
        self.inputs = Inputs(device, input_bytes(_shapes(manifest), self.limits), SLOTS)
        self.addresses |= self.inputs.cells
        self.arena_size = int(plan["arena"])
        self.arena = device.allocate(self.arena_size, "activations")
        self.logits = self.arena + int(plan["logits"])
        # what sampling reads and writes beside the graph
        self.addresses["logits"] = self.logits
        self.addresses["sampled"] = device.allocate(4 * self.limits.max_rows, "token ids")
        device.fill(self.addresses["sampled"], 0, 4 * self.limits.max_rows, stream)
        for name, size in plan["sampling_scratch"].items():
            self.addresses[name] = device.allocate(int(size), "sampling")
        self.adjusts = all(part in plan["sampling"] for part in ADJUSTING)
        self.slots = Slots(device, self.vocab_size, self.limits.max_sequences, SLOTS)
        self.addresses["slots"] = self.slots.table
        self.cublas = CublasLt(device)

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

    def load_weights(self, folder: Path, table: Sequence[Weight], checkpoint: Path | None) -> None:
        """The weight table, carried out over the checkpoint's files."""
        functions = {}
        for kind, expected in (("channel_scale", CHANNEL_SCALE), ("quantize", QUANTIZE)):
            for dtype, name in self._plan["weight_kernels"].get(kind, {}).items():
                if dtype not in SOURCES:
                    continue
                function = self.functions[name]
                if function.types[1:] != expected[1:]:
                    raise ArtifactError(f"plan.json: {name} is no kernel to {kind}; pull or rebuild the engine")
                functions[kind, dtype] = (function.handle, function.warps, function.shared)
        quantized = any(weight.recipe.op in ("quantize", "channel_scale") for weight in table)
        if quantized and len(functions) < 2 * len(SOURCES):
            raise ArtifactError("plan.json: it has no kernels to quantize weights of each dtype; pull or rebuild the engine")
        kernels = CompiledWeightKernels(self._device, functions)
        with _open_tensors(folder, checkpoint) as (where, tensors):
            scales = read_scales(folder if (folder / "scales.json").exists() or checkpoint is None else checkpoint)
            check_sources(table, tensors, scales, where)
            self.addresses |= load_weights(self._device, self._stream, table, tensors, scales, kernels)

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


def load_engine(
    device: Device, stream: int, folder: Path, manifest: EngineManifest, checkpoint: Path | None, blocks: int = 0
) -> Loaded:
    """Read, check and load; pools are the caller's to place, then ``link``. ``blocks``: of the pools that will be placed, at
    least; 0: as many as one context takes.
    """
    if device.driver_version < DRIVER:
        raise UnavailableError(
            f"the driver of {device.name} knows CUDA {_cuda(device.driver_version)}, and the engine needs {_cuda(DRIVER)}; "
            "update the driver to 580 or newer"
        )
    plan, limits, table = read_plan(folder), check_manifest(manifest), read_table(folder)
    if plan["sm"] != device.sm:
        raise IncompatibleError(f"plan.json is for SM {plan['sm']}, the GPU has {device.sm}; choose another profile")
    check_products(plan, table)
    _check_room(device, plan, manifest, limits, table, blocks)
    loaded = Loaded(device, stream, plan, manifest, limits)
    try:
        loaded.load_kernels(folder)
        loaded.load_weights(folder, table, checkpoint)
    except BaseException:
        loaded.close()
        raise
    return loaded


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _shapes(manifest: EngineManifest) -> dict[str, tuple[str, ...]]:
    return {one.name: tuple(map(str, one.shape)) for one in (*manifest.abi.inputs, *manifest.abi.index_inputs)}


def _check_room(
    device: Device,
    plan: Mapping[str, Any],
    manifest: EngineManifest,
    limits: EngineLimits,
    table: Sequence[Weight],
    blocks: int,
) -> None:
    """Count what will be allocated before a byte of a weight is read: tens of gigabytes come first, and pools last."""
    inputs = input_bytes(_shapes(manifest), limits)
    context = 1 + -(-limits.max_context // limits.block_size)
    least = min(blocks, limits.max_blocks) or context
    pools = f"KV pools of {least} blocks" if blocks else f"KV pools of one context of {limits.max_context} tokens"
    parts = {
        "weights": arena_layout(table)[1],
        "activations": plan["arena"] + WORKSPACE + sum(inputs.values()) + sum(plan["sampling_scratch"].values()),
        pools: least * pool_block(manifest),
    }
    free, total = device.memory()
    needed = sum(parts.values()) + SPARE
    if needed <= free:
        return
    left = (free - needed) // max(pool_block(manifest), 1) + least
    ways = [f"stop what else runs on it ({size_text(total - free)} are taken)"] if total - free > SPARE else []
    if blocks and left > 1:
        ways.append(f"give max_blocks={left} or less")
    elif left > 1:
        ways.append(f"build the engine with limits.max_context={(left - 1) * limits.block_size} or less")
    ways.append("use a GPU with more memory")
    said = ", ".join(f"{what} {size_text(size)}" for what, size in parts.items())
    raise ResourceError(
        f"{device.name} has {size_text(free)} of memory free, and {manifest.model} {manifest.profile} needs {size_text(needed)} "
        f"({said}, spare {size_text(SPARE)}), {size_text(needed - free)} more: {', or '.join(ways)}"
    )


@contextlib.contextmanager
def _open_tensors(folder: Path, checkpoint: Path | None) -> Iterator[tuple[Path, Tensors]]:
    """The checkpoint files that travel with the engine, or those of the folder that it is served with; and where they are."""
    own = folder / "checkpoint"
    if own.is_dir():
        with Tensors.from_files(sorted(own.glob("*.safetensors"))) as tensors:
            yield own, tensors
    elif checkpoint is not None:
        with Tensors.open(checkpoint) as tensors:
            yield checkpoint, tensors
    else:
        raise ArtifactError(
            f"{folder}: the engine was built without a checkpoint; name its folder, as `zoo serve REF --checkpoint FOLDER` does"
        )
