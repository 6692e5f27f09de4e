"""Paged attention insertion: the plain graph [batch, sequence] becomes the engine's ragged one.

    token_ids [T] int32 ─ Cast ─ Unsqueeze ─▶ [1, T]              positions the same
    q, k, v (, mask) ─ Attention ─▶      becomes   q, k, v, kv.{i}, tables ─ ZooPagedAttention ─▶ out, kv_out.{i}
    x ─ final norm ─ lm_head ─▶          becomes   x ─ Squeeze ─ Gather logit_rows ─ final norm ─ lm_head ─▶ logits [R, V]

Windows, soft caps, sinks and slopes come from the layer table (``zoo.passes.attention_nodes``); an Attention node that disagrees
with its row of the table is a miss, and with any miss nothing is rewritten. Masks fall away with the nodes that made them.

T tokens, B sequences, P blocks a sequence, R rows of logits, V vocabulary, E hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import ONNX_TYPES, LayerInfo, Miss, ModelGraph, PassReport
from zoo.passes.attention_nodes import LayerAttention, match
from zoo.passes.clean import detach, remove_dead
from zoo.passes.frame import Pass, PassContext
from zoo.spec import BuildSpec, Limits
from zoo.targets import Target
from zoo.weights.recipe import Recipe, Weight

NORMS = ("RMSNormalization", "LayerNormalization")
BEHIND_HEAD = ("Cast", "Add", "Mul", "Div", "Tanh")  # what may stand between the head and the logits: a row's result is its own
INT32 = ONNX_TYPES["int32"]


class InsertPagedAttention(Pass):
    """Give the graph the engine's inputs and outputs. Counts: the ops it writes, ``masks``."""

    name = "paged_attention"
    phase = "paged attention"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return build.model.template == "decoder"  # encoders: ``zoo.passes.packed_attention``

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return True

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        if graph.ragged:
            return
        names, made = [one.name for one in graph.data_inputs], [one.name for one in graph.graph.outputs]
        if names not in (["token_ids", "positions"], ["token_ids"]) or made != ["logits"]:
            raise PassError(f"it starts from inputs token_ids, positions and the output logits, not from {', '.join(names)}")

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        report = self.report()
        if graph.ragged:
            return report
        matches, report.misses = match(graph)
        head, reason = find_head(graph)
        if head is None:
            report.misses.append(Miss("logits", reason))
        if report.misses or head is None:
            return report
        inputs = RaggedInputs(graph, ctx.build.limits)
        inputs.add_tokens(graph)
        for one in matches:
            _replace(graph, one, inputs)
        _gather_rows(graph, head, inputs.logit_rows)
        lengthen_rotary_tables(graph, ctx.build.limits.max_tokens)
        ops = [one.plugin.op for one in matches]
        masks = sum(bool(layer.window or layer.sinks or layer.alibi) for layer in graph.layers)
        report.counts = {op: ops.count(op) for op in dict.fromkeys(ops)} | {"masks": masks}
        graph.functions |= {one.plugin.op: one.plugin.body for one in matches}
        remove_dead(graph)
        inputs.order(graph)
        _reshape(graph, head)
        graph.ragged = True
        return report

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if not graph.ragged:
            return
        if left := [node.name for node in graph.graph.nodes if node.op == "Attention"]:
            raise PassError(f"Attention nodes are left: {', '.join(left)}")
        names = [output.name for output in graph.graph.outputs]
        if names != ["logits", *(f"kv_out.{layer.index}" for layer in graph.layers)]:
            raise PassError(f"the outputs are {', '.join(names)}")


def lengthen_rotary_tables(graph: ModelGraph, rows: int) -> None:
    """Give rotary tables a row for each token of a step, if the context has fewer.

    A ragged row holds several sequences, so T may exceed the context. No position does, but ONNX Runtime's RotaryEmbedding
    refuses more tokens than its tables have rows.
    """
    for weight in [weight for weight in graph.weights.values() if weight.recipe.op == "computed"]:
        kind, params = weight.recipe.attrs
        if kind in ("rope_cos", "rope_sin") and weight.shape[0] < rows:
            recipe = Recipe("computed", (rows, *weight.shape[1:]), (), (kind, params))
            graph.replace_weight(graph.variable(weight.name), Weight(weight.name, weight.dtype, recipe))


@dataclass
class Head:
    """Where the logits begin: ``norm`` (or else ``matmul``) is the first node that needs only the wanted rows."""

    first: gs.Node
    source: gs.Variable  # its input, [1, T, E]


def find_head(graph: ModelGraph) -> tuple[Head | None, str]:
    """Walk from the logits up to the head's MatMul, over its bias, scale and cap, and over the final norm if only it reads it."""
    node = _producer(graph.graph.outputs[0])
    while node is not None and node.op in BEHIND_HEAD:
        weights = [graph.weights[tensor.name] for tensor in node.inputs if tensor.name in graph.weights]
        others = [tensor for tensor in node.inputs if tensor.name not in graph.weights]
        if len(others) != 1 or any(len(weight.shape) > 1 for weight in weights):
            break  # it joins two tensors, or rows with each other's
        node = _producer(others[0])
    if node is None or node.op != "MatMul" or node.inputs[1].name not in graph.weights:
        return None, f"they do not come from a MatMul by a weight, but from {node.name if node else 'an input'}"
    norm = _producer(node.inputs[0])
    if norm is not None and norm.op in NORMS and len(norm.outputs[0].outputs) == 1:
        node = norm
    return Head(node, node.inputs[0]), ""


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


class RaggedInputs:
    """The engine's inputs, in the order of its ABI, as new graph inputs (docs/engine-format.md)."""

    def __init__(self, graph: ModelGraph, limits: Limits) -> None:
        assert all(layer.group == "full" for layer in graph.layers), "only the block table group 'full' exists"
        self.block_size, self.blocks = limits.block_size, limits.max_blocks
        self.token_ids = gs.Variable("token_ids", INT32, ["T"])
        self.positions = gs.Variable("positions", INT32, ["T"])
        self.query_starts = gs.Variable("query_starts", INT32, ["B+1"])
        self.kv_lengths = gs.Variable("kv_lengths", INT32, ["B"])
        self.block_table = gs.Variable("block_table.full", INT32, ["B", "P"])
        self.logit_rows = gs.Variable("logit_rows", INT32, ["R"])
        self.pools = {layer.index: self.pool(f"kv.{layer.index}", graph, layer) for layer in graph.layers}

    def pool(self, name: str, graph: ModelGraph, layer: LayerInfo) -> gs.Variable:
        """A KV pool [blocks, 2, block_size, K, D]."""
        return gs.Variable(name, ONNX_TYPES[graph.dtype], [self.blocks, 2, self.block_size, layer.kv_heads, layer.head_dim])

    def add_tokens(self, graph: ModelGraph) -> None:
        """Cast and unsqueeze token_ids and positions once: the old inputs become [1, T] tensors.

        A graph that asks for no positions gets the engine's all the same, which nothing reads.
        """
        axis = gs.Constant("ragged.axis", np.array([0], np.int64))
        nodes: list[gs.Node] = []
        new_inputs = {new.name: new for new in (self.token_ids, self.positions)}
        for old in graph.data_inputs:
            new = new_inputs[old.name]
            wide = gs.Variable(f"{new.name}.int64", ONNX_TYPES["int64"], ["T"])
            old.name = f"{new.name}.row"
            nodes.append(gs.Node("Cast", f"{new.name}.cast", {"to": int(onnx.TensorProto.INT64)}, [new], [wide]))
            nodes.append(gs.Node("Unsqueeze", f"{new.name}.unsqueeze", inputs=[wide, axis], outputs=[old]))
        graph.graph.inputs = [variable for variable in graph.graph.inputs if variable.name in graph.weights]
        graph.graph.nodes[:0] = nodes

    def order(self, graph: ModelGraph) -> None:
        """Put the inputs before the weights and the pools' outputs behind the logits, in ABI order."""
        first = [self.token_ids, self.positions, self.query_starts, self.kv_lengths, self.block_table, self.logit_rows]
        graph.graph.inputs = [*first, *self.pools.values(), *graph.graph.inputs]


def _replace(graph: ModelGraph, one: LayerAttention, inputs: RaggedInputs) -> None:
    attention, layer = one.node, one.layer
    name, place = attention.name, _index(graph.graph.nodes, attention)
    outputs = [attention.outputs[0], inputs.pool(f"kv_out.{layer.index}", graph, layer)]
    detach([attention])
    pool, per_head = inputs.pools[layer.index], [] if one.per_head is None else [one.per_head]
    graph.graph.nodes[place] = one.plugin.node(
        name,
        [*one.inputs, pool, inputs.block_table, inputs.query_starts, inputs.kv_lengths, *per_head],
        outputs,
        num_heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        block_size=inputs.block_size,
        scale=layer.scale,
        window=layer.window,
        softcap=layer.softcap,
    )
    graph.graph.outputs.append(outputs[1])


def _gather_rows(graph: ModelGraph, head: Head, logit_rows: gs.Variable) -> None:
    """Squeeze [1, T, E] and keep the rows whose logits are wanted, before the head reads them."""
    axis = gs.Constant("logit_rows.axis", np.array([0], np.int64))
    flat = gs.Variable("logit_rows.flat", head.source.dtype, head.source.shape[1:] if head.source.shape else None)
    rows = gs.Variable("logit_rows.hidden", head.source.dtype, head.source.shape[1:] if head.source.shape else None)
    place = _index(graph.graph.nodes, head.first)
    head.first.inputs[0] = rows
    graph.graph.nodes[place:place] = [
        gs.Node("Squeeze", "logit_rows.squeeze", inputs=[head.source, axis], outputs=[flat]),
        gs.Node("Gather", "logit_rows.gather", {"axis": 0}, [flat, logit_rows], [rows]),
    ]


def _reshape(graph: ModelGraph, head: Head) -> None:
    """Rewrite the shapes that say [batch, sequence]: [1, T] before the rows are gathered, [R] behind."""
    behind = False
    for node in graph.graph.nodes:
        behind = behind or node.name == "logit_rows.gather"
        for tensor in node.outputs:
            if tensor.shape is None:
                continue
            if behind and not tensor.name.startswith("kv_out."):
                tensor.shape = ["R", tensor.shape[-1]]
            else:
                tensor.shape = [{"batch": 1, "sequence": "T"}.get(size, size) for size in tensor.shape]


def _index(nodes: list[gs.Node], wanted: gs.Node) -> int:
    return next(place for place, node in enumerate(nodes) if node is wanted)
