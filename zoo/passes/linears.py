"""What the linear passes share: how a linear layer looks in a graph, and how weights keep the order they are used in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from zoo.graph import ModelGraph
from zoo.weights.recipe import Weight

# Linear layers that a fused one stands for.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    "shared.gate_up": ("shared.gate", "shared.up"),
}
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")


@dataclass
class Linear:
    """MatMul by a weight [in, out], and the Add of a bias weight [out] if there is one."""

    matmul: gs.Node
    add: gs.Node | None
    weight: Weight
    bias: Weight | None

    @property
    def name(self) -> str:
        return str(self.matmul.name)

    @property
    def input(self) -> gs.Variable:
        return self.matmul.inputs[0]

    @property
    def output(self) -> gs.Variable:
        """What the layer gives: the sum where there is a bias."""
        return (self.add or self.matmul).outputs[0]


def read_linear(graph: ModelGraph, node: gs.Node) -> Linear | str:
    """A node as a linear layer, with its bias if it has one, or the reason why it is none."""
    if node.op != "MatMul":
        return f"{node.name} is {node.op}, not MatMul"
    weight = graph.weights.get(node.inputs[1].name)
    if weight is None or len(weight.shape) != 2:
        return f"{node.name} multiplies by {node.inputs[1].name}, which is not a weight of two axes"
    if len(node.inputs[1].outputs) != 1:
        return f"the weight {weight.name} is read by {len(node.inputs[1].outputs)} nodes"
    product = node.outputs[0]
    if len(product.outputs) == 1 and product.outputs[0].op == "Add" and not any(product is out for out in graph.graph.outputs):
        add = product.outputs[0]
        others = [tensor for tensor in add.inputs if tensor is not product]
        bias = graph.weights.get(others[0].name) if len(others) == 1 else None
        if bias is not None and bias.shape == weight.shape[1:] and len(others[0].outputs) == 1:
            return Linear(node, add, weight, bias)
    return Linear(node, None, weight, None)


def linears(graph: ModelGraph) -> Iterator[Linear]:
    """Every linear layer that is still a MatMul, in graph order."""
    for node in graph.graph.nodes:
        if node.op == "MatMul" and not isinstance(linear := read_linear(graph, node), str):
            yield linear


def activation_names(graph: ModelGraph) -> dict[str, str]:
    """Linear layer -> the name of the activation that it reads: ``{first layer that reads it}.x``.

    Calibration asks the same function, so that what it measures is what the FP8 pass asks for, whatever is skipped.
    """
    first: dict[int, str] = {}
    return {linear.name: first.setdefault(id(linear.input), f"{linear.name}.x") for linear in linears(graph)}


def role_of(name: str) -> str:
    """The role in a node's name: ``qkv`` of ``layer.3.qkv``."""
    return name.rpartition(".")[2]


def keep_weight_order(graph: ModelGraph, takes_place_of: Mapping[str, str]) -> None:
    """Let each new weight stand where, or right behind where, the old weight stands that it is mapped to.

    Weights stay in the order they are used in, so that a packed file is read from front to back. Data inputs stay first.
    """
    rank = {name: place for place, name in enumerate(graph.weights)}
    table = sorted(graph.weights, key=lambda name: rank[takes_place_of.get(name, name)])
    variables = {variable.name: variable for variable in graph.graph.inputs}
    graph.graph.inputs = [*graph.data_inputs, *(variables[name] for name in table)]
    graph.weights = {name: graph.weights[name] for name in table}
