"""Lowering of embeddings for targets that compute in a wider type than the checkpoint holds: rows are widened when looked up.

    embed float32 ─ Gather ─▶   becomes   embed bfloat16 ─ Gather ─ Cast ─▶

Widening is exact, so the numbers stay the same, and a table of which a step reads a few rows takes half the memory and disk.
It matters where files are mapped in large pages: two thousand random rows of a 1 GB table then make nearly all of it resident.
A compiler that finds another dtype in the checkpoint than the model says widens the table again (``Cast`` takes either).
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zoo.graph import ONNX_TYPES, Miss, ModelGraph, PassReport
from zoo.passes.frame import Pass, PassContext
from zoo.spec import BuildSpec
from zoo.targets import Target
from zoo.weights.recipe import Recipe, Weight

HALVES = ("bfloat16", "float16")


class NarrowLookups(Pass):
    """Keep looked-up tables in the checkpoint's dtype. Count: ``tables``."""

    name = "narrow_lookups"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return target.narrow_lookups and build.dtype == "float32" and build.model.dtype in HALVES

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return narrow_lookups(graph, ctx.build.model.dtype)


def narrow_lookups(graph: ModelGraph, stored: str) -> PassReport:
    """The pass itself; ``stored`` is the dtype that the checkpoint holds."""
    report = PassReport(NarrowLookups.name)
    nodes: list[gs.Node] = []
    for node in graph.graph.nodes:
        nodes.append(node)
        table = graph.weights.get(node.inputs[0].name) if node.op == "Gather" and node.attrs.get("axis", 0) == 0 else None
        if table is None or table.dtype == stored:
            continue
        if not _as_stored(table.recipe):
            report.misses.append(Miss(node.name, f"{table.name} is computed, not read as it is stored"))
            continue
        if len(node.inputs[0].outputs) != 1:
            report.misses.append(Miss(node.name, f"{len(node.inputs[0].outputs)} nodes read {table.name}"))
            continue
        graph.replace_weight(node.inputs[0], Weight(table.name, stored, table.recipe))
        wide = node.outputs[0]
        narrow = gs.Variable(f"{node.name}.stored", ONNX_TYPES[stored], wide.shape)
        node.outputs = [narrow]
        nodes.append(gs.Node("Cast", f"{node.name}.widen", {"to": ONNX_TYPES[table.dtype]}, [narrow], [wide]))
        report.counts["tables"] = report.counts.get("tables", 0) + 1
    graph.graph.nodes = nodes
    return report


def _as_stored(recipe: Recipe) -> bool:
    return recipe.op == "tensor" or (recipe.op == "slice" and _as_stored(recipe.inputs[0]))
