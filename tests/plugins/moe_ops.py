"""Experts and routers by themselves: references in torch, and launches in Triton's interpreter over guarded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from cuda_interpreter import interpret

from zoo.compilers.cuda.aot import to_json
from zoo.plugins.contract import Plugin
from zoo.plugins.kernels import CudaNode, Launch, Scratch, Size, TensorRef
from zoo.plugins.moe.cuda import LOWERS
from zoo.weights.reader import NUMPY

Array = np.ndarray[Any, Any]
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped")


def gate(kind: str, g: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act(g) * up by torch's own functions."""
    functional = torch.nn.functional
    match kind:
        case "silu":
            return functional.silu(g) * up
        case "gelu" | "gelu_tanh":
            return functional.gelu(g, approximate="tanh" if kind == "gelu_tanh" else "none") * up
        case "relu":
            return functional.relu(g) * up
        case "relu2":
            return functional.relu(g) ** 2 * up
    cut = g.clamp(max=7.0)
    return cut * torch.sigmoid(1.702 * cut) * (up.clamp(-7.0, 7.0) + 1)


def experts_reference(kind: str, given: Mapping[str, Array], sizes: bool = False) -> Array:
    """Token by token, expert by expert, in float64. ``sizes``: sums of magnitudes instead, which errors are a part of."""
    values = {name: torch.from_numpy(array.astype(np.float64)) for name, array in given.items()}
    chosen, out = given["chosen"], torch.zeros_like(values["x"])
    for token, picks in enumerate(chosen):
        for nth, expert in enumerate(picks):
            both = values["gate_up"][expert] @ values["x"][token]
            both = both + values["gate_up_bias"][expert] if "gate_up_bias" in values else both
            h, down = gate(kind, *both.chunk(2)), values["down"][expert]
            y = down.abs() @ h.abs() if sizes else down @ h
            bias = values["down_bias"][expert] if "down_bias" in values else torch.zeros(1)
            y = y + (bias.abs() if sizes else bias)
            out[token] += values["weights"][token, nth] * y
    return out.numpy()


def random_experts(
    tokens: int, experts: int, top_k: int, size: int = 24, inner: int = 20, bias: bool = False, seed: int = 0, spread: str = "any"
) -> dict[str, Array]:
    """Inputs of ZooExperts. spread: "any" experts, the "same" for all tokens, or "two": the first two for all but one token."""
    rng = np.random.default_rng(seed)
    given = {
        "x": rng.standard_normal((tokens, size)),
        "weights": rng.random((tokens, top_k)) + 0.05,
        "gate_up": rng.standard_normal((experts, 2 * inner, size)) * 1.5 * size**-0.5,
        "down": rng.standard_normal((experts, size, inner)) * inner**-0.5,
    }
    if bias:
        given |= {"gate_up_bias": rng.standard_normal((experts, 2 * inner)), "down_bias": rng.standard_normal((experts, size))}
    picks = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    if spread != "any":
        picks[1 if spread == "two" else 0 :] = np.arange(experts)[-top_k:] if spread == "same" else np.arange(top_k)
    return {name: array.astype(np.float32) for name, array in given.items()} | {"chosen": picks.astype(np.int32)}


def cuda_node(
    plugin: Plugin, given: Mapping[str, Array], dtype: str, outputs: Mapping[str, Sequence[int]], **attrs: Any
) -> CudaNode:
    """The node as the compiler hands it over: activations are [1, T, n]."""
    weights = [port.name for port in plugin.inputs if "..." not in port.shape]

    def ref(name: str, kind: str, shape: Sequence[int]) -> TensorRef:
        return TensorRef(name, dtype if kind == "T" else kind, tuple(shape) if name in weights else (1, "T", shape[-1]))

    inputs = tuple(ref(port.name, port.dtype, given[port.name].shape) for port in plugin.inputs)
    made = tuple(ref(port.name, port.dtype, outputs[port.name]) for port in plugin.outputs)
    return CudaNode(plugin.op, "n", plugin.attrs("n", attrs), inputs, made, 90, {"max_tokens": 64})


def run_kernels(
    node: CudaNode, given: Mapping[str, Array], outputs: Mapping[str, Sequence[int]], memory_fill: int = 0xFF
) -> dict[str, Array]:
    """Outputs of a node's launches; fresh memory is full of NaN, or of ``memory_fill``."""
    refs = {ref.name: ref for ref in (*node.inputs, *node.outputs) if ref}
    arrays = {name: aligned(given[name].astype(NUMPY[refs[name].dtype])) for name in given}
    for name, shape in outputs.items():
        kind = NUMPY[refs[name].dtype]
        arrays[name] = fresh(int(np.prod(shape)) * kind.itemsize, memory_fill).view(kind).reshape(shape)
    sizes = {"T": len(given["x"])}
    launches = LOWERS[node.op](node)
    for one in (arg for launch in launches for arg in launch.args if isinstance(arg, Scratch)):
        if one.name not in arrays:
            arrays[one.name] = fresh(one.size.at(sizes), memory_fill)
    memory = {array.ctypes.data: array.reshape(-1).view(np.uint8) for array in arrays.values()}
    for launch in launches:
        run_launch(launch, arrays, sizes, memory)
    return {name: arrays[name] for name in outputs}


def run_launch(launch: Launch, arrays: Mapping[str, Array], sizes: Mapping[str, int], memory: dict[int, Array]) -> None:
    values = []
    for arg in launch.args:
        if isinstance(arg, str | Scratch):
            values.append(arrays[arg if isinstance(arg, str) else arg.name].ctypes.data)
        else:
            values.append(arg.at(sizes) if isinstance(arg, Size) else arg)
    x, y, z = (side.at(sizes) for side in launch.grid)
    interpret(to_json(launch.kernel), (x, y, z), values, memory)


def fresh(size: int, fill: int) -> Array:
    """Memory that starts at a multiple of 256."""
    block = np.full(size + 256, fill, np.uint8)
    start = -block.ctypes.data % 256
    return block[start : start + size]


def aligned(array: Array) -> Array:
    made = fresh(array.nbytes, 0)
    made[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return made.view(array.dtype).reshape(array.shape)
