"""How a mixture of experts looks in a graph: what ``zoo/graph_templates/moe.py`` writes, read from its end to its beginning.

``Walk`` follows tensors to the nodes that make them. A node that is not what the pattern has there raises ``Mismatch`` with
the reason, which becomes a miss of the pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zoo.graph import ModelGraph
from zoo.plugins.gated_activation import GELU, GELU_TANH, RELU, SILU
from zoo.plugins.moe import MAX, RELU2, SIGMOID, SOFTMAX, SWIGLU_CLAMPED, TOP2
from zoo.plugins.moe.experts import SWIGLU_ALPHA, SWIGLU_LIMIT
from zoo.plugins.moe.router import EPSILON
from zoo.weights.recipe import Weight


class Mismatch(Exception):
    """Why a graph is not the pattern."""


class Walk:
    """Follows a pattern upstream and keeps the nodes that it passed, each once."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.nodes: dict[int, gs.Node] = {}

    def made_by(self, tensor: gs.Tensor, *ops: str) -> bool:
        """Whether one of these operators makes a tensor."""
        return bool(tensor.inputs) and not tensor.inputs[0].domain and tensor.inputs[0].op in ops

    def back(self, tensor: gs.Tensor, op: str, **attrs: Any) -> gs.Node:
        """The node that makes a tensor; its operator and the attributes that matter are checked."""
        if not self.made_by(tensor, op):
            maker = tensor.inputs[0].op if tensor.inputs else "nothing"
            raise Mismatch(f"{tensor.name} is made by {maker}, not by {op}")
        node = tensor.inputs[0]
        for key, value in attrs.items():
            if node.attrs.get(key) != value:
                raise Mismatch(f"{node.name} has {key} {node.attrs.get(key)}, not {value}")
        self.nodes[id(node)] = node
        return node

    def over(self, tensor: gs.Tensor, op: str, axis: int, **attrs: Any) -> gs.Tensor:
        """The input of a node ``op`` with one constant axis."""
        node = self.back(tensor, op, **attrs)
        self.constant(node, 1, [axis])
        return node.inputs[0]

    def constant(self, node: gs.Node, place: int, wanted: list[int] | None = None) -> list[int]:
        """The numbers of a constant input."""
        tensor = node.inputs[place]
        if not isinstance(tensor, gs.Constant):
            raise Mismatch(f"{node.name} reads {tensor.name}, which is no constant")
        found = np.atleast_1d(tensor.values).tolist()
        if wanted is not None and found != wanted:
            raise Mismatch(f"{node.name} reads the constant {found[:8]}, not {wanted[:8]}")
        return [int(number) for number in found]

    def weight(self, node: gs.Node, place: int, axes: int) -> Weight:
        """A weight that nobody else reads."""
        tensor = node.inputs[place]
        weight = self.graph.weights.get(tensor.name)
        if weight is None or len(weight.shape) != axes:
            raise Mismatch(f"{node.name} reads {tensor.name}, which is not a weight of {axes} axes")
        if len(tensor.outputs) != 1:
            raise Mismatch(f"the weight {weight.name} is read by {len(tensor.outputs)} nodes")
        return weight

    def number(self, node: gs.Node, place: int, wanted: float | None = None) -> float:
        """The value of a number of the spec."""
        tensor = node.inputs[place]
        weight = self.graph.weights.get(tensor.name)
        if weight is None or weight.shape or weight.recipe.op != "computed" or weight.recipe["kind"] != "constant":
            raise Mismatch(f"{node.name} reads {tensor.name}, which is not a number of the spec")
        found = float(dict(weight.recipe["params"])["value"])
        if wanted is not None and not math.isclose(found, wanted, rel_tol=1e-6):
            raise Mismatch(f"{node.name} reads the number {found}, not {wanted}")
        return found

    def same(self, found: gs.Tensor, wanted: gs.Tensor, node: gs.Node) -> None:
        if found is not wanted:
            raise Mismatch(f"{node.name} reads {found.name}, not {wanted.name}")


@dataclass
class Router:
    """The choice: its attributes as ``ZooRouter`` has them, its input and its weights."""

    x: gs.Variable
    attrs: dict[str, Any]
    weight: Weight
    bias: Weight | None
    select: Weight | None


def read_router(walk: Walk, chosen: gs.Tensor, weights: gs.Tensor) -> Router:
    """The router that ends in these two tensors."""
    attrs: dict[str, Any] = {"normalize": 0, "scale": 1.0}
    if walk.made_by(weights, "Mul"):
        scale = walk.back(weights, "Mul")
        attrs["scale"], weights = walk.number(scale, 1), scale.inputs[0]
    if walk.made_by(weights, "Div"):
        share = walk.back(weights, "Div")
        some = walk.back(share.inputs[1], "Add")
        walk.number(some, 1, EPSILON)
        weights = walk.over(some.inputs[0], "ReduceSum", -1, keepdims=1)
        walk.same(weights, share.inputs[0], share)
        attrs["normalize"] = 1
    picked = walk.back(weights, "GatherElements", axis=-1)
    walk.same(picked.inputs[1], chosen, picked)
    scores = picked.inputs[0]
    top = walk.back(chosen, "TopK", axis=-1)
    if top.outputs[1] is not chosen or top.attrs.get("largest", 1) != 1 or top.attrs.get("sorted", 1) != 1:
        raise Mismatch(f"{top.name} does not give the places of the largest in order")
    (attrs["top_k"],) = walk.constant(top, 1)
    choice, select = top.inputs[0], None
    if walk.made_by(choice, "Reshape"):
        choice, groups = _read_groups(walk, choice)
        attrs |= groups
    if choice is not scores:
        added = walk.back(choice, "Add")
        walk.same(added.inputs[0], scores, added)
        select = walk.weight(added, 1, 1)
    attrs["score"] = SIGMOID if walk.made_by(scores, "Sigmoid") else SOFTMAX
    logits = (walk.back(scores, "Sigmoid") if attrs["score"] == SIGMOID else walk.back(scores, "Softmax", axis=-1)).inputs[0]
    if walk.made_by(logits, "Cast"):
        logits = walk.back(logits, "Cast").inputs[0]
    bias = None
    if walk.made_by(logits, "Add"):
        added = walk.back(logits, "Add")
        bias, logits = walk.weight(added, 1, 1), added.inputs[0]
    product = walk.back(logits, "MatMul")
    return Router(product.inputs[0], attrs, walk.weight(product, 1, 2), bias, select)


def _read_groups(walk: Walk, kept: gs.Tensor) -> tuple[gs.Tensor, dict[str, int]]:
    """The choice among experts of the best groups: what it starts from, and the attributes of groups."""
    masked = walk.back(walk.back(kept, "Reshape").inputs[0], "Where")
    lowest = walk.number(masked, 2)
    if lowest > -1e38:
        raise Mismatch(f"{masked.name} gives experts of other groups the score {lowest}, which may be chosen")
    by_group = masked.inputs[1]
    split = walk.back(by_group, "Reshape")
    *_, groups, size = walk.constant(split, 1)
    mask = walk.over(walk.back(masked.inputs[0], "Cast").inputs[0], "Unsqueeze", -1)
    kept_groups = read_one_hot(walk, walk.over(mask, "ReduceMax", -2, keepdims=0), groups)
    top = walk.back(kept_groups, "TopK", axis=-1)
    (top_groups,) = walk.constant(top, 1)
    best, score = top.inputs[0], MAX
    if walk.made_by(best, "ReduceSum"):
        two = walk.back(walk.over(best, "ReduceSum", -1, keepdims=0), "TopK", axis=-1)
        walk.constant(two, 1, [2])
        source, score, reader = two.inputs[0], TOP2, two
    else:
        source, reader = walk.over(best, "ReduceMax", -1, keepdims=0), walk.back(best, "ReduceMax")
    walk.same(source, by_group, reader)
    if split.inputs[0].shape and split.inputs[0].shape[-1] != groups * size:
        raise Mismatch(f"{split.name} makes {groups} groups of {size} of {split.inputs[0].shape[-1]} experts")
    return split.inputs[0], {"groups": groups, "top_groups": top_groups, "group_score": score}


def read_one_hot(walk: Walk, marks: gs.Tensor, count: int) -> gs.Tensor:
    """The ids whose columns are marked."""
    same = walk.back(walk.back(marks, "Cast").inputs[0], "Equal")
    walk.constant(same, 1, list(range(count)))
    return walk.over(same.inputs[0], "Unsqueeze", -1)


@dataclass
class Gate:
    """A gate: its kind as ``ZooExperts`` numbers them, and its two inputs."""

    kind: int
    gate: gs.Tensor
    up: gs.Tensor


def read_gate(walk: Walk, product: gs.Tensor) -> Gate:
    """The activation of a gate, times up."""
    node = walk.back(product, "Mul")
    act, up = node.inputs
    if walk.made_by(act, "Gelu"):
        gelu = walk.back(act, "Gelu")
        return Gate(GELU_TANH if gelu.attrs.get("approximate", "none") == "tanh" else GELU, gelu.inputs[0], up)
    if walk.made_by(act, "Relu"):
        return Gate(RELU, walk.back(act, "Relu").inputs[0], up)
    times = walk.back(act, "Mul")
    left, right = times.inputs
    if walk.made_by(left, "Relu"):
        walk.same(right, left, times)
        return Gate(RELU2, walk.back(left, "Relu").inputs[0], up)
    inner = walk.back(right, "Sigmoid").inputs[0]
    if inner is left:
        return Gate(SILU, left, up)
    steep = walk.back(inner, "Mul")
    walk.same(steep.inputs[0], left, steep)
    walk.number(steep, 1, SWIGLU_ALPHA)
    cut = walk.back(left, "Min")
    walk.number(cut, 1, SWIGLU_LIMIT)
    one = walk.back(up, "Add")
    walk.number(one, 1, 1.0)
    clip = walk.back(one.inputs[0], "Clip")
    walk.number(clip, 1, -SWIGLU_LIMIT)
    walk.number(clip, 2, SWIGLU_LIMIT)
    return Gate(SWIGLU_CLAMPED, cut.inputs[0], clip.inputs[0])
