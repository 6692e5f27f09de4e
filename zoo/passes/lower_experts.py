"""Lowering of ``ZooRouter`` and ``ZooExperts`` to what the target runs well: ``Target.experts`` names it.

    x, router ─ ZooRouter ─▶                    becomes   ─ ZooRouterSoftmaxNormalize ─▶
    x, chosen, weights, ... ─ ZooExperts ─▶     becomes   ─ ZooExpertsSparseSilu ─▶

A lowered node has its own op type, and an ONNX function made for its attributes. Where the function wants the rows of gate and up
in turns, their weight is woven anew; it is a recipe, and nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import ModelGraph, PassReport
from zoo.passes.clean import detach
from zoo.passes.frame import Pass, PassContext
from zoo.plugins.contract import DOMAIN, Plugin
from zoo.plugins.moe import EXPERTS, ROUTERS
from zoo.plugins.moe.experts import takes_turns
from zoo.spec import BuildSpec
from zoo.targets import Target
from zoo.weights.recipe import Recipe, Weight, concat, slice_, weave

LOWERED: dict[str, Plugin] = {plugin.op: plugin for plugin in (*ROUTERS.values(), *EXPERTS.values())}
GATE_UP = ("gate_up", "gate_up_bias")  # inputs whose axis 1 is gate, then up


class LowerExperts(Pass):
    """Replace every ZooRouter and ZooExperts by the target's lowering. Count: the op types it writes."""

    name = "lower_experts"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return target.experts != "plugin" and build.model.moe.experts > 0

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        assert all(ctx.target.experts in plugin.lowerings for plugin in LOWERED.values()), f"no lowering {ctx.target.experts!r}"

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return lower_experts(graph, ctx.target.experts)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if left := [node.name for node in graph.graph.nodes if node.op in LOWERED]:
            raise PassError(f"nodes without a lowering are left: {', '.join(left[:5])}")


def lower_experts(graph: ModelGraph, kind: str) -> PassReport:
    """The pass itself. ``kind``: a lowering's name."""
    report = PassReport(LowerExperts.name)
    for place, node in enumerate(graph.graph.nodes):
        if node.op not in LOWERED:
            continue
        plugin = LOWERED[node.op]
        lowering = plugin.lowerings[kind]
        function = lowering.function(node.attrs)
        assert list(function.input) == list(lowering.inputs) == [port.name for port in plugin.inputs]
        inputs, outputs = list(node.inputs), list(node.outputs)
        if "gate_up" in lowering.inputs and kind == "chosen" and takes_turns(node.attrs):
            for name in set(GATE_UP) & set(lowering.inputs):
                _weave(graph, inputs[lowering.inputs.index(name)])
        detach([node])
        graph.graph.nodes[place] = gs.Node(function.name, node.name, dict(node.attrs), inputs, outputs, domain=DOMAIN)
        graph.functions.setdefault(function.name, function)
        graph.functions.pop(plugin.op, None)
        _import_domains(graph, lowering.domains)
        report.counts[function.name] = report.counts.get(function.name, 0) + 1
    return report


def _weave(graph: ModelGraph, variable: gs.Variable) -> None:
    weight = graph.weights[variable.name]
    graph.replace_weight(variable, Weight(weight.name, weight.dtype, woven(weight.recipe)))


def woven(recipe: Recipe) -> Recipe:
    """Rows of gate and up in turns: gate 0, up 0, gate 1, ...; of ``recipe`` [X, 2F, ...], which has gate, then up, on axis 1."""
    if recipe.op == "concat" and recipe["axis"] == 0:
        return concat([woven(part) for part in recipe.inputs], 0)
    size = recipe.shape[1] // 2
    parts: Sequence[Recipe] = recipe.inputs
    if recipe.op != "concat" or recipe["axis"] != 1 or [part.shape[1] for part in parts] != [size, size]:
        parts = [slice_(recipe, 1, 0, size), slice_(recipe, 1, size, 2 * size)]
    return weave(parts, 1)


def _import_domains(graph: ModelGraph, domains: tuple[str, ...]) -> None:
    known = {entry.domain for entry in graph.graph.import_domains}
    graph.graph.import_domains = [
        *graph.graph.import_domains,
        *(onnx.helper.make_opsetid(domain, 1) for domain in domains if domain not in known),
    ]
