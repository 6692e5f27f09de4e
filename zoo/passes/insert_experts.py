"""Mixture of experts: the dense form, in which every expert computes every token, becomes zoo ops that need not.

    x ─ MatMul ─ scores ─ TopK ─ weights            becomes   x ─ ZooRouter ─ chosen, weights
    x ─ experts [B, X, S, E] ─ Mul ─ ReduceSum ─▶   becomes   x, chosen, weights ─ ZooExperts ─▶
    + sigmoid(x @ shared_gate) * shared ─▶          becomes   ─ ZooSharedGate ─▶

A layer is found by the name of its last node, ``layer.{i}.experts``, and read from there (``expert_nodes.py``); it is rewritten
whole or not at all. Matrices of experts become [out, in], gate before up: what most checkpoints store, so that their bytes move
as they lie. Routers, and the gate of a shared expert, are no linear layers any more: quantization leaves them alone.

``zoo/passes/lower_experts.py`` gives the ops the form that a target runs.

B batch, S sequence, E hidden, F intermediate, X experts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import ONNX_TYPES, Miss, ModelGraph, PassReport
from zoo.passes.clean import detach
from zoo.passes.cuda_fp8 import output_ids, replace_nodes
from zoo.passes.expert_nodes import Mismatch, Router, Walk, read_gate, read_one_hot, read_router
from zoo.passes.frame import Pass, PassContext
from zoo.passes.fuse_linears import join_along
from zoo.passes.linears import keep_weight_order
from zoo.plugins.moe import EXPERTS, ROUTERS, SHARED_GATE
from zoo.spec import BuildSpec
from zoo.targets import Target
from zoo.weights.recipe import Recipe, Weight, concat, transpose

LAYER = re.compile(r"(layer\.\d+)\.experts")
SWAPPED = (0, 2, 1)


class InsertExperts(Pass):
    """Insert ZooRouter, ZooExperts and ZooSharedGate. Counts: the op types it writes."""

    name = "insert_experts"
    phase = "fusion"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return build.model.moe.experts > 0

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return any(build.model.has_experts(layer) for layer in range(build.model.num_layers))

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        report = insert_experts(graph)
        if ctx.build.quant.method != "none":
            ops = {plugin.op for plugin in EXPERTS.values()}
            reason = f"quant {ctx.build.quant.method} has no kernels for experts: they stay in {graph.dtype}"
            report.misses += [Miss(node.name, reason) for node in graph.graph.nodes if node.op in ops]
        return report

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        kept = output_ids(graph)
        left = [
            node.name
            for node in graph.graph.nodes
            if LAYER.fullmatch(node.name) and not isinstance(match(graph, node, kept), str)
        ]
        if left:
            raise PassError(f"experts that could be inserted are left: {', '.join(left[:5])}")


@dataclass
class Linears:
    """The same linear layer of every expert: a weight [X, in, out], a bias [X, out] or none."""

    weight: Weight
    bias: Weight | None


@dataclass
class Layer:
    """A dense mixture of experts: what it is made of, the nodes that go, and the tensor that it ends in."""

    name: str
    x: gs.Variable
    router: Router
    kind: int
    gate: Linears
    up: Linears
    down: Linears
    y: gs.Variable
    nodes: list[gs.Node] = field(default_factory=list)


def insert_experts(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(InsertExperts.name)
    kept = output_ids(graph)
    instead: dict[int, list[gs.Node]] = {}
    gone: set[int] = set()
    order: dict[str, str] = {}
    for node in [node for node in graph.graph.nodes if LAYER.fullmatch(node.name) and not node.domain]:
        layer = match(graph, node, kept)
        if isinstance(layer, str):
            report.misses.append(Miss(node.name, layer))
            continue
        gone |= {id(each) for each in layer.nodes}
        last = layer.y.inputs[0]
        detach(layer.nodes)
        instead[id(last)] = _inserted(graph, layer, order, report)
    if report.changed:
        replace_nodes(graph, instead, gone)
        keep_weight_order(graph, order)
        graph.drop_unused_weights()
    _insert_shared_gates(graph, report)
    return report


def match(graph: ModelGraph, node: gs.Node, kept: set[int]) -> Layer | str:
    """A node called ``layer.{i}.experts`` as the end of a dense mixture, or why it is none.

    kept  ``output_ids`` of the graph
    """
    if node.domain:
        return f"{node.name} is {node.op} already"
    walk = Walk(graph)
    try:
        layer = _read(walk, node)
    except Mismatch as reason:
        return str(reason)
    layer.nodes = [each for each in graph.graph.nodes if id(each) in walk.nodes]
    for tensor in (tensor for each in layer.nodes for tensor in each.outputs if tensor is not layer.y):
        if id(tensor) in kept:
            return f"{tensor.name} is an output of the graph"
        if others := [reader.name for reader in tensor.outputs if id(reader) not in walk.nodes]:
            return f"{others[0]} reads {tensor.name}, too"
    return layer


def _read(walk: Walk, node: gs.Node) -> Layer:
    y = node.outputs[0]
    weighted = walk.back(walk.over(y, "ReduceSum", 1, keepdims=0), "Mul")
    each, column = weighted.inputs
    if walk.made_by(each, "Cast"):
        each = walk.back(each, "Cast").inputs[0]
        if len(y.outputs) != 1 or y.outputs[0].op != "Cast":
            raise Mismatch(f"the sum {y.name} is not rounded by one Cast")
        y = y.outputs[0].outputs[0]
        walk.back(y, "Cast")
    down, product = _linears(walk, each)
    gate = read_gate(walk, product)
    (gates, x_gate), (ups, x_up) = _linears(walk, gate.gate), _linears(walk, gate.up)
    x = walk.over(x_gate, "Unsqueeze", 1)
    walk.same(x_up, x_gate, node)
    chosen, weights = _read_spread(walk, column, down.weight.shape[0])
    router = read_router(walk, chosen, weights)
    walk.same(router.x, x, node)
    layer = Layer(node.name, x, router, gate.kind, gates, ups, down, y)
    _check(layer)
    return layer


def _linears(walk: Walk, y: gs.Tensor) -> tuple[Linears, gs.Tensor]:
    """What makes y [B, X, S, out] by a matrix for each expert, and its input."""
    bias = None
    if walk.made_by(y, "Add"):
        added = walk.back(y, "Add")
        walk.over(added.inputs[1], "Unsqueeze", 1)
        bias, y = walk.weight(walk.back(added.inputs[1], "Unsqueeze"), 0, 2), added.inputs[0]
    product = walk.back(y, "MatMul")
    return Linears(walk.weight(product, 1, 3), bias), product.inputs[0]


def _read_spread(walk: Walk, column: gs.Tensor, experts: int) -> tuple[gs.Tensor, gs.Tensor]:
    """chosen, weights [B, S, k], from the weight of each expert for each token [B, X, S, 1]."""
    by_expert = walk.back(walk.over(column, "Unsqueeze", -1), "Transpose", perm=list(SWAPPED))
    shares = walk.back(walk.over(by_expert.inputs[0], "ReduceSum", -2, keepdims=0), "Mul")
    marks, share = shares.inputs
    return read_one_hot(walk, marks, experts), walk.over(share, "Unsqueeze", -1)


def _check(layer: Layer) -> None:
    """Mismatch unless all sizes and dtypes fit each other."""
    experts, size, wide = layer.gate.weight.shape
    if layer.up.weight.shape != (experts, size, wide) or layer.down.weight.shape != (experts, wide, size):
        shapes = ", ".join(str(list(part.weight.shape)) for part in (layer.gate, layer.up, layer.down))
        raise Mismatch(f"matrices of gate, up and down are {shapes}: not [X, E, F] twice and [X, F, E]")
    if layer.router.weight.shape != (size, experts):
        raise Mismatch(f"the router is {list(layer.router.weight.shape)}, not [{size}, {experts}]")
    parts = (layer.gate, layer.up, layer.down)
    if len({part.bias is None for part in parts}) > 1:
        raise Mismatch("of gate, up and down not all have a bias")
    if len({part.weight.dtype for part in parts} | {layer.router.weight.dtype}) > 1:
        raise Mismatch("gate, up, down and the router are not of one dtype")


def _inserted(graph: ModelGraph, layer: Layer, order: dict[str, str], report: PassReport) -> list[gs.Node]:
    """ZooRouter and ZooExperts in the place of a layer's nodes, which are detached; ``order`` says where new weights stand."""
    router, name, x = layer.router, layer.name, layer.x
    where = name.removesuffix(".experts") + ".router"
    shape = [*x.shape[:-1], router.attrs["top_k"]] if x.shape else None
    chosen = gs.Variable(f"{where}.chosen", ONNX_TYPES["int32"], shape)
    weights = gs.Variable(f"{where}.weights", ONNX_TYPES["float32"], shape)
    extra = [graph.variable(one.name) for one in (router.bias, router.select) if one is not None]
    chooser = ROUTERS[router.bias is not None, router.select is not None]
    first = chooser.node(where, [x, _turned(graph, router.weight, (1, 0)), *extra], [chosen, weights], **router.attrs)

    dtype, parts = layer.gate.weight.dtype, (layer.gate, layer.up)
    recipe = stack_gate_up(*(transpose(part.weight.recipe, SWAPPED) for part in parts))
    order[f"{name}.gate_up"] = layer.gate.weight.name
    inputs = [
        x,
        chosen,
        weights,
        graph.add_weight(Weight(f"{name}.gate_up", dtype, recipe)),
        _turned(graph, layer.down.weight, SWAPPED),
    ]
    if layer.down.bias is not None:
        biases = [part.bias for part in parts if part.bias is not None]
        order[f"{name}.gate_up.bias"] = biases[0].name
        joined = join_along([bias.recipe for bias in biases], 1)
        inputs += [graph.add_weight(Weight(f"{name}.gate_up.bias", dtype, joined)), graph.variable(layer.down.bias.name)]
    plugin = EXPERTS[layer.down.bias is not None]
    second = plugin.node(name, inputs, [layer.y], kind=layer.kind, top_k=router.attrs["top_k"])
    for one in (chooser, plugin):
        graph.functions[one.op] = one.body
        report.counts[one.op] = report.counts.get(one.op, 0) + 1
    return [first, second]


def _turned(graph: ModelGraph, weight: Weight, perm: Sequence[int]) -> gs.Variable:
    """A weight's input, its axes in another order from now on."""
    variable = graph.variable(weight.name)
    graph.replace_weight(variable, Weight(weight.name, weight.dtype, transpose(weight.recipe, perm)))
    return variable


def stack_gate_up(gate: Recipe, up: Recipe) -> Recipe:
    """[X, 2F, E] of two [X, F, E], so that bytes which a checkpoint has in this order are not moved.

    Tensors of single experts are joined expert by expert: whole tensors, one behind the other.
    """
    if all(part.op == "concat" and part["axis"] == 0 for part in (gate, up)):
        pairs = list(zip(gate.inputs, up.inputs, strict=True))
        if all(one.shape[0] == 1 for one in itertools.chain(*pairs)):
            return concat([concat(pair, 1) for pair in pairs], 0)
    return join_along([gate, up], 1)


def _insert_shared_gates(graph: ModelGraph, report: PassReport) -> None:
    """Sums of experts and a gated shared expert, behind a ZooExperts."""
    ops = {plugin.op for plugin in EXPERTS.values()}
    kept = output_ids(graph)
    instead: dict[int, list[gs.Node]] = {}
    gone: set[int] = set()
    for total in [node for node in graph.graph.nodes if node.op == "Add" and not node.domain]:
        experts, gated = total.inputs
        if not experts.inputs or experts.inputs[0].op not in ops or not gated.inputs or gated.inputs[0].op != "Mul":
            continue
        walk = Walk(graph)
        try:
            shared, gate = walk.back(gated, "Mul").inputs
            product = walk.back(walk.back(gate, "Sigmoid").inputs[0], "MatMul")
            weight = walk.weight(product, 1, 2)
            if weight.shape[1] != 1:
                raise Mismatch(f"the gate of the shared expert has {weight.shape[1]} columns")
            for tensor in (tensor for node in walk.nodes.values() for tensor in node.outputs):
                if len(tensor.outputs) != 1 or id(tensor) in kept:
                    raise Mismatch(f"something else reads {tensor.name}, too")
        except Mismatch as reason:
            report.misses.append(Miss(total.name, str(reason)))
            continue
        x, y = product.inputs[0], total.outputs[0]
        old = [*walk.nodes.values(), total]
        detach(old)
        gone |= {id(node) for node in old}
        instead[id(total)] = [SHARED_GATE.node(total.name, [x, _turned(graph, weight, (1, 0)), shared, experts], [y])]
        graph.functions[SHARED_GATE.op] = SHARED_GATE.body
        report.counts[SHARED_GATE.op] = report.counts.get(SHARED_GATE.op, 0) + 1
    replace_nodes(graph, instead, gone)
