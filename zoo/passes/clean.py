"""Clean-up: Identity nodes, nodes that no output needs, weights that no node reads.

    x ── Identity ─▶ y        becomes   x ─▶

A rewriting pass calls ``remove_dead`` on what it left behind.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import Miss, ModelGraph, PassReport
from zoo.passes.frame import Pass, PassContext


class Clean(Pass):
    """Remove what does nothing. Counts: ``dead_nodes``, ``identities``, ``unused_weights``."""

    name = "clean"
    phase = "clean"

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return clean(graph)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if unused := [v.name for v in graph.graph.inputs if v.name in graph.weights and not v.outputs]:
            raise PassError(f"weights that no node reads are left behind: {', '.join(unused[:5])}")


def clean(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(Clean.name)
    report.counts["dead_nodes"] = remove_dead(graph)
    report.counts["identities"] = _remove_identities(graph, report)
    report.counts["unused_weights"] = graph.drop_unused_weights()
    return report


def remove_dead(graph: ModelGraph) -> int:
    """Remove the nodes that no graph output depends on; says how many."""
    live: set[int] = set()
    ahead = [node for output in graph.graph.outputs for node in output.inputs]
    while ahead:
        node = ahead.pop()
        if id(node) not in live:
            live.add(id(node))
            ahead += [producer for tensor in node.inputs for producer in tensor.inputs]
    dead = [node for node in graph.graph.nodes if id(node) not in live]
    detach(dead)
    if dead:
        graph.graph.nodes = [node for node in graph.graph.nodes if id(node) in live]
    return len(dead)


def detach(nodes: list[gs.Node]) -> None:
    """Cut nodes off from their tensors. Taking them out of the graph's node list is the caller's."""
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()


def _remove_identities(graph: ModelGraph, report: PassReport) -> int:
    gone: set[int] = set()
    for node in graph.graph.nodes:
        if node.op != "Identity" or node.domain:
            continue
        source, copy = node.inputs[0], node.outputs[0]
        if any(copy is output for output in graph.graph.outputs):
            report.misses.append(Miss(node.name, f"it names the graph output {copy.name}"))
            continue
        for reader in list(copy.outputs):
            for place, tensor in enumerate(reader.inputs):
                if tensor is copy:
                    reader.inputs[place] = source
        detach([node])
        gone.add(id(node))
    if gone:
        graph.graph.nodes = [node for node in graph.graph.nodes if id(node) not in gone]
    return len(gone)
