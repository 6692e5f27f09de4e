"""Lowering of ``ZooPagedAttention`` and its variants, and of ``ZooPackedAttention``, to what the target runs well:
``Target.attention`` names it.

    q, k, v, kv, tables ─ ZooPagedAttention ─▶   becomes   q, k, v, kv, index inputs ─ ZooPagedAttentionLoop ─▶

The lowered node has its own op type and ONNX function; index inputs become graph inputs behind the pools.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import ONNX_TYPES, ModelGraph, PassReport
from zoo.passes.clean import detach
from zoo.passes.frame import Pass, PassContext
from zoo.plugins.contract import DOMAIN, Lowering
from zoo.plugins.packed_attention import PLUGIN as PACKED
from zoo.plugins.paged_attention import PLUGIN
from zoo.plugins.paged_attention import PLUGINS as PAGED
from zoo.spec import BuildSpec
from zoo.targets import Target

PLUGINS = {**PAGED, PACKED.op: PACKED}


class LowerAttention(Pass):
    """Replace every node of these ops by the target's lowering. Count: the op types it writes."""

    name = "lower_attention"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return target.attention != "plugin"

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return True

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        assert ctx.target.attention in PLUGIN.lowerings, f"no lowering {ctx.target.attention!r} of {PLUGIN.op}"
        if not graph.ragged:
            raise PassError("it starts from a graph with paged attention")

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return lower_attention(graph, ctx.target.attention)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if left := [node for node in graph.graph.nodes if node.op in PLUGINS]:
            raise PassError(f"{left[0].op} nodes are left: {', '.join(node.name for node in left)}")


def lower_attention(graph: ModelGraph, kind: str) -> PassReport:
    """The pass itself. ``kind``: which of the lowerings."""
    report = PassReport(LowerAttention.name)
    index: dict[str, gs.Variable] = {}
    for place, node in enumerate(graph.graph.nodes):
        if node.op not in PLUGINS:
            continue
        plugin = PLUGINS[node.op]
        lowering = plugin.lowerings[kind]
        if not index:
            index = _index_inputs(graph, lowering)
        given = dict(zip((port.name for port in plugin.inputs), node.inputs, strict=True)) | index
        function = lowering.function(node.attrs)
        assert list(function.input) == list(lowering.inputs)
        lowered = gs.Node(
            op=function.name,
            name=node.name,
            attrs=dict(node.attrs),
            inputs=[given[name] for name in lowering.inputs],
            domain=DOMAIN,
        )
        outputs = list(node.outputs)
        detach([node])
        lowered.outputs = outputs
        graph.graph.nodes[place] = lowered
        graph.functions.setdefault(function.name, function)
        report.counts[function.name] = report.counts.get(function.name, 0) + 1
    if report.changed:
        graph.functions = {op: function for op, function in graph.functions.items() if op not in PLUGINS}
        _import_domains(graph, PLUGIN.lowerings[kind].domains)
    return report


def _index_inputs(graph: ModelGraph, lowering: Lowering) -> dict[str, gs.Variable]:
    """Declare the lowering's index inputs, between the pools and the weights."""
    variables = {
        extra.name: gs.Variable(extra.name, ONNX_TYPES[extra.dtype], list(extra.shape)) for extra in lowering.index_inputs
    }
    weights = [variable for variable in graph.graph.inputs if variable.name in graph.weights]
    graph.graph.inputs = [*graph.data_inputs, *variables.values(), *weights]
    graph.index_inputs += lowering.index_inputs
    return variables


def _import_domains(graph: ModelGraph, domains: tuple[str, ...]) -> None:
    known = {entry.domain for entry in graph.graph.import_domains}
    graph.graph.import_domains = [
        *graph.graph.import_domains,
        *(onnx.helper.make_opsetid(domain, 1) for domain in domains if domain not in known),
    ]
