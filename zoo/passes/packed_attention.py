"""Packed attention insertion: an encoder's plain graph [batch, sequence] becomes the engine's, texts one behind the other.

    token_ids [T] int32 ─ Cast ─ Unsqueeze ─▶ [1, T]           positions the same
    q, k, v (, mask) ─ Attention ─▶      becomes   q, k, v, query_starts ─ ZooPackedAttention ─▶ out
    hidden [B, S, E] ─▶                  becomes   [1, T, E] ─ Squeeze ─▶ hidden [T, E]

Windows and soft caps come from the layer table; an Attention node that disagrees with its row is a miss, and with any miss
nothing is rewritten. Masks fall away with the nodes that made them. There is no cache, so no pools, tables or lengths.

T tokens, B texts, E hidden.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import LayerInfo, Miss, ModelGraph, PassReport
from zoo.passes.attention_nodes import attributes_differ, given, mask_differs, match_layers, weights_behind
from zoo.passes.clean import detach, remove_dead
from zoo.passes.frame import Pass, PassContext
from zoo.passes.paged_attention import INT32, RaggedInputs, lengthen_rotary_tables
from zoo.plugins.packed_attention import PLUGIN
from zoo.spec import BuildSpec
from zoo.targets import Target

INPUTS, OUTPUT = ["token_ids", "positions", "query_starts"], "hidden"


class InsertPackedAttention(Pass):
    """Give an encoder's graph the engine's inputs and output. Counts: ``ZooPackedAttention``, ``masks``."""

    name = "packed_attention"
    phase = "paged attention"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return build.model.template == "encoder"

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return True

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        if graph.ragged:
            return
        names, made = [one.name for one in graph.data_inputs], [one.name for one in graph.graph.outputs]
        if names not in (["token_ids", "positions"], ["token_ids"]) or made != [OUTPUT]:
            raise PassError(
                f"it starts from inputs token_ids, positions and the output {OUTPUT}, not from {', '.join(names)} and "
                f"{', '.join(made)}"
            )
        model = ctx.build.model
        if model.position == "rope" and model.rope.by_length:
            raise PassError(f"rope.kind {model.rope.kind} goes by a sequence's length, which engines of encoders do not look at")

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        report = self.report()
        if graph.ragged:
            return report
        matches, report.misses = match(graph)
        if report.misses:
            return report
        inputs = PackedInputs()
        inputs.add_tokens(graph)
        for node, layer in matches:
            _replace(graph, node, layer, inputs)
        _flatten(graph)
        lengthen_rotary_tables(graph, ctx.build.limits.max_tokens)
        report.counts = {PLUGIN.op: len(matches), "masks": sum(bool(layer.window) for layer in graph.layers)}
        graph.functions[PLUGIN.op] = PLUGIN.body
        remove_dead(graph)
        inputs.order(graph)
        for node in graph.graph.nodes:
            for tensor in node.outputs:
                if tensor.shape is not None:
                    tensor.shape = [{"batch": 1, "sequence": "T"}.get(size, size) for size in tensor.shape]
        graph.ragged = True
        return report

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if not graph.ragged:
            return
        if left := [node.name for node in graph.graph.nodes if node.op == "Attention"]:
            raise PassError(f"Attention nodes are left: {', '.join(left)}")
        names = [output.name for output in graph.graph.outputs]
        if names != [OUTPUT]:
            raise PassError(f"the outputs are {', '.join(names)}, not {OUTPUT} alone")


class PackedInputs(RaggedInputs):
    """The inputs of an encoder engine: those of ``RaggedInputs`` that name no cache and no rows of logits."""

    def __init__(self) -> None:
        self.token_ids = gs.Variable("token_ids", INT32, ["T"])
        self.positions = gs.Variable("positions", INT32, ["T"])
        self.query_starts = gs.Variable("query_starts", INT32, ["B+1"])

    def order(self, graph: ModelGraph) -> None:
        """Put the inputs before the weights, in ABI order."""
        graph.graph.inputs = [self.token_ids, self.positions, self.query_starts, *graph.graph.inputs]


def match(graph: ModelGraph) -> tuple[list[tuple[gs.Node, LayerInfo]], list[Miss]]:
    """Each layer's Attention node, in order of the table, and what disagrees with the table."""
    return match_layers(graph, lambda node, layer: disagreement(graph, node, layer) or (node, layer))


def disagreement(graph: ModelGraph, node: gs.Node, layer: LayerInfo) -> str:
    """How an Attention node differs from its row of the layer table, or what packed attention does not have; "" if nothing."""
    if layer.sinks or layer.alibi:
        return f"the layer table says {'sinks' if layer.sinks else 'alibi'}, which packed attention does not have"
    if reason := attributes_differ(node, layer, 0, "an encoder of this layer table has", "packed attention"):
        return reason
    if reason := mask_differs(node, f"window {layer.window}" if layer.window else "", "window"):
        return reason
    if layer.window and (weights := weights_behind(given(node)[3], graph)):
        return f"its mask is made from {', '.join(sorted(weights))}, by the layer table from no weight"
    return ""


def _replace(graph: ModelGraph, attention: gs.Node, layer: LayerInfo, inputs: PackedInputs) -> None:
    place = next(place for place, node in enumerate(graph.graph.nodes) if node is attention)
    heads, outputs = list(attention.inputs[:3]), list(attention.outputs)
    detach([attention])
    graph.graph.nodes[place] = PLUGIN.node(
        attention.name,
        [*heads, inputs.query_starts],
        outputs,
        num_heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        scale=layer.scale,
        window=layer.window,
        softcap=layer.softcap,
    )


def _flatten(graph: ModelGraph) -> None:
    """Squeeze the output [1, T, E]: a row for each token."""
    (row,) = graph.graph.outputs
    flat = gs.Variable(OUTPUT, row.dtype, ["T", row.shape[-1]])
    row.name = f"{OUTPUT}.row"
    axis = gs.Constant(f"{OUTPUT}.axis", np.array([0], np.int64))
    graph.graph.nodes.append(gs.Node("Squeeze", f"{OUTPUT}.squeeze", inputs=[row, axis], outputs=[flat]))
    graph.graph.outputs = [flat]
