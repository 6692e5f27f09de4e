"""Fusion of linear layers that read the same input: q, k, v become ``layer.{i}.qkv``; gate, up become ``layer.{i}.gate_up``.

    x ── MatMul q ─ Add ─▶            x ── MatMul qkv ── Add ── Split ─▶ q
    x ── MatMul k ─ Add ─▶    becomes                              ├───▶ k
    x ── MatMul v ─ Add ─▶                                         └───▶ v

One wide GEMM instead of three narrow ones; quantization later gives it one activation scale. Weights are joined as recipes
in the [out, in] form of checkpoints and transposed once, so that a lowering which transposes back reads them as stored.
A group is fused whole or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import ONNX_TYPES, Miss, ModelGraph, PassReport
from zoo.passes.frame import Pass, PassContext
from zoo.passes.linears import GROUPS, Linear, keep_weight_order, read_linear
from zoo.weights.recipe import Recipe, Weight, concat, slice_, transpose


class FuseLinears(Pass):
    """Join linear layers that share their input. Counts: ``qkv``, ``gate_up``."""

    name = "fuse_linears"
    phase = "fusion"

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return fuse_linears(graph)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        read = {tensor.name for node in graph.graph.nodes for tensor in node.inputs}
        if unread := sorted(set(graph.weights) - read):
            raise PassError(f"weights that no node reads are left behind: {', '.join(unread[:5])}")


def fuse_linears(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(FuseLinears.name)
    nodes = {node.name: node for node in graph.graph.nodes}
    place = {id(node): number for number, node in enumerate(graph.graph.nodes)}
    instead: dict[int, list[gs.Node]] = {}  # the first MatMul of a group -> the nodes that stand in its place
    gone: set[int] = set()
    order: dict[str, str] = {}
    for layer, (fused, roles) in itertools.product(range(len(graph.layers)), GROUPS.items()):
        where, names = f"layer.{layer}.{fused}", [f"layer.{layer}.{role}" for role in roles]
        if names[0] not in nodes:
            continue  # fused already, or a plain MLP
        parts = read_group(graph, nodes, names)
        if isinstance(parts, str):
            report.misses.append(Miss(where, parts))
            continue
        gone |= {id(node) for part in parts for node in (part.matmul, part.add) if node is not None}
        order[where] = parts[0].weight.name
        if parts[0].bias:
            order[f"{where}.bias"] = parts[0].bias.name
        instead[min((id(part.matmul) for part in parts), key=place.__getitem__)] = _fuse(graph, where, parts)
        report.counts[fused] = report.counts.get(fused, 0) + 1
    if report.changed:
        kept: list[gs.Node] = []
        for node in graph.graph.nodes:
            kept += instead.get(id(node), []) if id(node) in gone else [node]
        graph.graph.nodes = kept
        keep_weight_order(graph, order)
        graph.drop_unused_weights()
    return report


def read_group(graph: ModelGraph, nodes: dict[str, gs.Node], names: Sequence[str]) -> list[Linear] | str:
    """The linear layers of a group, or the reason why they cannot become one."""
    parts: list[Linear] = []
    for name in names:
        part = read_linear(graph, nodes[name]) if name in nodes else f"there is no node {name}"
        if isinstance(part, str):
            return part
        parts.append(part)
    first = parts[0]
    for part in parts[1:]:
        if part.input is not first.input:
            return f"{part.name} reads {part.input.name}, {first.name} reads {first.input.name}"
        if part.weight.dtype != first.weight.dtype:
            return f"{part.name} is {part.weight.dtype}, {first.name} is {first.weight.dtype}"
        if (part.bias is None) != (first.bias is None):
            return f"of {first.name} and {part.name} only one has a bias"
    return parts


def _fuse(graph: ModelGraph, name: str, parts: Sequence[Linear]) -> list[gs.Node]:
    """The nodes that replace a group: they read new weights and write the old outputs."""
    x, dtype, outputs = parts[0].input, parts[0].weight.dtype, [part.output for part in parts]
    weight = graph.add_weight(Weight(name, dtype, join([part.weight.recipe for part in parts])))
    biases = [part.bias.recipe for part in parts if part.bias]
    for part in parts:
        for node in (part.matmul, part.add):
            if node is not None:
                node.inputs.clear()
                node.outputs.clear()
    shape = [*x.shape[:-1], weight.shape[1]] if x.shape else None
    y = gs.Variable(f"{name}.out", dtype=ONNX_TYPES[dtype], shape=shape)
    nodes = [gs.Node("MatMul", name, inputs=[x, weight], outputs=[y])]
    if biases:
        bias = graph.add_weight(Weight(f"{name}.bias", dtype, join_along(biases, 0)))
        product, y = y, gs.Variable(f"{name}.bias.out", dtype=ONNX_TYPES[dtype], shape=shape)
        nodes.append(gs.Node("Add", f"{name}.bias", inputs=[product, bias], outputs=[y]))
    sizes = gs.Constant(f"{name}.split.sizes", np.array([part.weight.shape[1] for part in parts], dtype=np.int64))
    return [*nodes, gs.Node("Split", f"{name}.split", attrs={"axis": -1}, inputs=[y, sizes], outputs=outputs)]


def join(parts: Sequence[Recipe]) -> Recipe:
    """Linear weights [in, out] side by side, joined in the form that the checkpoint stores: [out, in], or slices of [in, out]."""
    if all(part.op == "slice" for part in parts):
        return join_along(parts, 1)
    return transpose(join_along([transpose(part, (1, 0)) for part in parts], 0), (1, 0))


def join_along(parts: Sequence[Recipe], axis: int) -> Recipe:
    """``concat``, but neighbouring slices of one recipe become one slice, or the recipe itself."""
    source = parts[0].inputs
    slices = all(part.op == "slice" and part["axis"] == axis and part.inputs == source for part in parts)
    if not slices or any(left["stop"] != right["start"] for left, right in itertools.pairwise(parts)):
        return concat(parts, axis)
    start, stop = parts[0]["start"], parts[-1]["stop"]
    return source[0] if (start, stop) == (0, source[0].shape[axis]) else slice_(source[0], axis, start, stop)
