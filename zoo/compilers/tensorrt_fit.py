"""Whether a TensorRT build can be done at all: hardware, dtype, quantization, cache, and the memory of the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.compilers.base import PROCESS
from zoo.errors import CompileError, ResourceError
from zoo.graph import ONNX_TYPES, ModelGraph
from zoo.resources import size_text
from zoo.spec import BuildSpec, HardwareSpec
from zoo.targets import TARGETS

if TYPE_CHECKING:
    from zoo.weights.reader import Tensors

HEAD_STEP = 8  # seen with TensorRT-RTX 1.7.1: 8, 16, 24, 40, 72, 80, 96 and 256 build; 10, 12 and 20 end in an internal error
POOL_COPIES = 2  # in-place update of a pool that is both input and output is unproven: one pool is read, one written


def supports(compiler: str, hardware: HardwareSpec) -> str:
    """Empty when the compiler's library knows the hardware, else why not and what to use."""
    target = TARGETS[compiler]
    others = [name for name in hardware.compilers if name != compiler]
    instead = f"; for {hardware.name} use compiler={' or '.join(others)}" if others else ""
    if hardware.kind != "gpu":
        return f"it builds for GPUs, and {hardware.name!r} is a {hardware.kind}{instead}"
    if hardware.sm not in target.sms:
        return f"it builds for SM {', '.join(map(sm_text, target.sms))}, not {sm_text(hardware.sm)}{instead}"
    if not set(target.dtypes) & set(hardware.dtypes):
        return f"it computes in {', '.join(target.dtypes)}, and {hardware.name!r} in {', '.join(hardware.dtypes)}{instead}"
    return ""


def sm_text(sm: int) -> str:
    """89 as people write it: 8.9."""
    return f"{sm // 10}.{sm % 10}"


def check(graph: ModelGraph, build: BuildSpec, tensors: Tensors | None) -> None:
    """Raise CompileError for what no TensorRT build can do, before anything is read."""
    target = TARGETS[build.compiler]
    hardware = build.hardware
    if graph.dtype not in target.dtypes or graph.dtype not in hardware.dtypes:
        both = [dtype for dtype in hardware.dtypes if dtype in target.dtypes]
        raise CompileError(f"{build.compiler} cannot compute in {graph.dtype} on {hardware.name}; pick dtype={' or '.join(both)}")
    if build.quant.method not in hardware.quants:
        allowed = ", ".join(hardware.quants)
        raise CompileError(f"{hardware.name} does not run quant {build.quant.name!r}; pick one of method {allowed}")
    if build.parallel.tp * build.parallel.pp != 1:
        raise CompileError(
            f"{build.compiler} engines are for one GPU; parallel {build.parallel.name!r} asks for more: pick parallel=tp1"
        )
    if build.model.template == "encoder":
        raise CompileError(
            f"{build.model.name!r} is an encoder, and {build.compiler} engines of encoders have nothing that runs them yet; use "
            "hardware=cpu, or hardware that compiler=cuda builds for"
        )
    if odd := sorted({layer.head_dim for layer in graph.layers if layer.head_dim % HEAD_STEP}):
        raise CompileError(
            f"{build.compiler} builds attention for head sizes that are multiples of {HEAD_STEP}, and {build.model.name!r} has "
            f"{', '.join(map(str, odd))}; use compiler=onnxruntime or compiler=cuda"
        )
    caches = {f"kv.{layer.index}" for layer in graph.layers}
    for variable in graph.data_inputs:
        if variable.name in caches and variable.dtype == ONNX_TYPES["float8e4m3"] and not target.float8_pool:
            raise CompileError(f"{build.compiler} refuses a float8 cache ({variable.name}): keep the cache in {graph.dtype}")
    leaves = (leaf for weight in graph.weights.values() for leaf in weight.recipe.leaves("tensor"))
    if tensors is None and next(leaves, None):
        raise CompileError(
            f"{build.compiler} engines hold their weights, and model {build.model.name!r} names no checkpoint: "
            "set model.checkpoint=FOLDER, or use `zoo plan` and `zoo graph`, which need shapes only"
        )


def check_device(build: BuildSpec, weights: int, pools: int, scratch: int) -> None:
    """Raise ResourceError unless weights, both copies of the pools and scratch fit the hardware's memory."""
    needed = device_bytes(weights, pools, scratch)
    memory = build.hardware.memory
    if needed <= memory:
        return
    limits = build.limits.resolve(build.model)
    room = memory - (needed - POOL_COPIES * pools)
    blocks = room * limits.max_blocks // (POOL_COPIES * pools) if pools else 0
    least = 1 + limits.blocks_per_sequence
    if blocks >= least:
        advice = f"lower limits.max_blocks to {blocks} (now {limits.max_blocks})"
    elif room > 0:
        context = max(0, blocks - 1) * limits.block_size
        advice = f"lower limits.max_context to {context} and limits.max_blocks to {blocks}" if context else "take a larger GPU"
    else:
        advice = "take a larger GPU" + (
            ", or quant=fp8" if build.quant.method == "none" and "fp8" in build.hardware.quants else ""
        )
        if scratch > weights:
            advice = "lower limits.max_tokens or limits.max_context, which scratch grows with; or " + advice
    raise ResourceError(
        f"{build.model.name} {build.profile} needs {size_text(needed)} on the GPU: weights {size_text(weights)}, KV pools "
        f"{POOL_COPIES} x {size_text(pools)} (this target reads one copy and writes another), scratch "
        f"{size_text(scratch) if scratch else 'not known yet'}, the process {size_text(PROCESS)}; {build.hardware.name} has "
        f"{size_text(memory)}: {advice}"
    )


def device_bytes(weights: int, pools: int, scratch: int) -> int:
    """GPU memory of a running engine: weights, both copies of the pools, scratch, and what the process itself takes."""
    return weights + POOL_COPIES * pools + scratch + PROCESS
