"""The gate of a gated MLP as one node, for targets with kernels, with the rounding to float8 behind it.

                    ┌ gate ─ act ─┐
    gate_up ─ Split ┤             Mul ─▶    becomes    gate_up ─ ZooGatedActivation ─▶
                    └ up ─────────┘

act is x * sigmoid(x), Gelu or Relu. If one ZooQuantizeFp8 alone reads the product: ZooGatedActivationFp8. What is read by
others, too, is kept. An activation without a gate stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import Miss, ModelGraph, PassReport
from zoo.passes.clean import detach
from zoo.passes.cuda_fp8 import output_ids, replace_nodes, rounding_of
from zoo.passes.frame import Pass, PassContext
from zoo.plugins.gated_activation import GATED_ACTIVATION, GATED_ACTIVATION_FP8, GELU, GELU_TANH, RELU, SILU
from zoo.spec import BuildSpec
from zoo.targets import Target


class FuseActivation(Pass):
    """Fuse gates. Counts: the op types it writes."""

    name = "fuse_activation"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return target.kernels

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return fuse_activations(graph)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        kept = output_ids(graph)
        if left := [node.name for node in graph.graph.nodes if isinstance(match(node, kept), Gate)]:
            raise PassError(f"gates that could be fused are left: {', '.join(left[:5])}")


@dataclass
class Activation:
    """An activation of one tensor: its kind, its input, the nodes that make it up."""

    kind: int
    x: gs.Variable
    nodes: list[gs.Node]


@dataclass
class Gate:
    """A gate that can become one node: ``nodes`` from the Split to the Mul."""

    kind: int
    gate_up: gs.Variable
    nodes: list[gs.Node]


def fuse_activations(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(FuseActivation.name)
    kept = output_ids(graph)
    instead: dict[int, list[gs.Node]] = {}
    gone: set[int] = set()
    for node in [node for node in graph.graph.nodes if node.op == "Mul"]:
        gate = match(node, kept)
        if isinstance(gate, str):
            report.misses.append(Miss(node.name, gate))
        if not isinstance(gate, Gate):
            continue
        rounding = rounding_of(graph, node.outputs[0], kept)
        if isinstance(rounding, str):
            report.misses.append(Miss(node.name, rounding))
            rounding = None
        plugin = GATED_ACTIVATION_FP8 if rounding is not None else GATED_ACTIVATION
        inputs, outputs = [gate.gate_up], list(node.outputs)
        if rounding is not None:
            inputs, outputs = [gate.gate_up, rounding.inputs[1]], list(rounding.outputs)
        old = [*gate.nodes, *([rounding] if rounding is not None else [])]
        detach(old)
        gone |= {id(each) for each in old}
        instead[id(node)] = [plugin.node(node.name, inputs, outputs, kind=gate.kind)]
        graph.functions[plugin.op] = plugin.body
        report.counts[plugin.op] = report.counts.get(plugin.op, 0) + 1
    if report.changed:
        replace_nodes(graph, instead, gone)
    return report


def match(node: gs.Node, kept: set[int]) -> Gate | str | None:
    """A Mul as a gate; None if no factor is an activation; the reason why it is no gate that one op stands for."""
    if node.op != "Mul" or node.domain:
        return None
    left, right = node.inputs
    act, up = _activation(left), right
    if act is None:
        act, up = _activation(right), left
    if act is None:
        return None
    split = act.x.inputs[0] if act.x.inputs else None
    if split is None or split.op != "Split":
        return f"its gate {act.x.name} is not a part of a Split"
    if len(split.outputs) != 2 or split.outputs[0] is not act.x or split.outputs[1] is not up:
        return f"{act.x.name} and {up.name} are not the first and the second of two parts of {split.name}"
    if reason := _uneven(split):
        return reason
    inner = [tensor for each in (split, *act.nodes) for tensor in each.outputs]
    members = {id(each) for each in (*act.nodes, node)}
    for tensor in inner:
        if id(tensor) in kept:
            return f"{tensor.name} is an output of the graph"
        if others := [reader.name for reader in tensor.outputs if id(reader) not in members]:
            return f"{others[0]} reads {tensor.name}, too"
    return Gate(act.kind, split.inputs[0], [split, *act.nodes, node])


def _activation(tensor: gs.Variable) -> Activation | None:
    """What makes a tensor, if that is an activation."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.domain:
        return None
    if node.op == "Gelu":
        return Activation(GELU_TANH if node.attrs.get("approximate", "none") == "tanh" else GELU, node.inputs[0], [node])
    if node.op == "Relu":
        return Activation(RELU, node.inputs[0], [node])
    if node.op == "Mul":
        for x, other in (node.inputs, reversed(node.inputs)):
            sigmoid = other.inputs[0] if other.inputs else None
            if sigmoid is not None and sigmoid.op == "Sigmoid" and sigmoid.inputs[0] is x:
                return Activation(SILU, x, [sigmoid, node])
    return None


def _uneven(split: gs.Node) -> str:
    """Why a Split does not halve the last axis; "" if it does."""
    rank = len(split.inputs[0].shape or ())
    if split.attrs.get("axis", 0) not in (-1, rank - 1):
        return f"{split.name} splits axis {split.attrs.get('axis', 0)}, not the last"
    sizes = split.inputs[1] if len(split.inputs) > 1 else None
    if not isinstance(sizes, gs.Constant):
        return f"{split.name} has no constant sizes"
    first, second = sizes.values.tolist()
    return "" if first == second else f"{split.name} makes parts of {first} and {second}"
