"""Attention nodes of a plain graph beside the layer table: which node is a layer's, what it reads, whether the two agree.

    layer of the table   node                                            becomes
    plain, window        q, k, v (, bool mask), is_causal                ZooPagedAttention
    alibi                q, k, v, float mask, is_causal                  ZooPagedAttentionSlopes
    sinks                q, k and v with one more position of zeros at   ZooPagedAttentionSinks
                         their end, float mask with one more column

Nothing is read from masks but which weights they are made from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import onnx_graphsurgeon as gs

from zoo.graph import LayerInfo, Miss, ModelGraph
from zoo.plugins.contract import Plugin
from zoo.plugins.paged_attention import OP, PLUGINS
from zoo.plugins.paged_attention.body import SINKS, SLOPES

T = TypeVar("T")
ATTENTION = re.compile(r"layer\.(\d+)\.attention")


@dataclass(frozen=True)
class LayerAttention:
    """One layer's Attention node. ``inputs``: q, k, v as a pool holds them; ``per_head``: its sinks or slopes [H], if any."""

    node: gs.Node
    layer: LayerInfo
    plugin: Plugin
    inputs: tuple[gs.Variable, gs.Variable, gs.Variable]
    per_head: gs.Variable | None


def match(graph: ModelGraph) -> tuple[list[LayerAttention], list[Miss]]:
    """Each layer's Attention node, in order of the table, and what disagrees with the table."""
    inputs = {variable.name: variable for variable in graph.graph.inputs}
    return match_layers(graph, lambda node, layer: read(graph, node, layer, inputs))


def match_layers(graph: ModelGraph, read: Callable[[gs.Node, LayerInfo], T | str]) -> tuple[list[T], list[Miss]]:
    """What ``read`` makes of each layer's Attention node, in order of the table; a text it gives is the reason of a miss."""
    found: dict[int, T] = {}
    seen: set[int] = set()
    misses: list[Miss] = []
    for node in graph.graph.nodes:
        if node.op != "Attention":
            continue
        name = ATTENTION.fullmatch(node.name)
        if name is None or int(name[1]) >= len(graph.layers):
            misses.append(Miss(node.name, f"it is not layer.0.attention to layer.{len(graph.layers) - 1}.attention"))
            continue
        layer = graph.layers[int(name[1])]
        seen.add(layer.index)
        one = read(node, layer)
        if isinstance(one, str):
            misses.append(Miss(node.name, one))
        else:
            found[layer.index] = one
    misses += [
        Miss(f"layer.{layer.index}.attention", "there is no such Attention node")
        for layer in graph.layers
        if layer.index not in seen
    ]
    return [found[layer.index] for layer in graph.layers if layer.index in found], misses


def variant(layer: LayerInfo) -> str:
    """The variant of ``ZooPagedAttention`` that a layer needs."""
    return SINKS if layer.sinks else SLOPES if layer.alibi else ""


def read(graph: ModelGraph, node: gs.Node, layer: LayerInfo, inputs: dict[str, gs.Variable]) -> LayerAttention | str:
    """What a layer's Attention node reads, or how it differs from its row of the layer table. ``inputs``: the graph's."""
    if reason := disagreement(node, layer):
        return reason
    weight = f"layer.{layer.index}.sinks" if layer.sinks else "alibi.slopes" if layer.alibi else ""
    if weight:
        dtype = graph.dtype if layer.sinks else "float32"
        found = graph.weights.get(weight)
        if found is None or (found.dtype, found.shape) != (dtype, (layer.heads,)):
            option = "sinks" if layer.sinks else "alibi"
            return f"the layer table says {option}, but there is no weight {weight}, {dtype} [{layer.heads}]"
    q, k, v = node.inputs[:3]
    if layer.sinks:
        for role, tensor in (("k", k), ("v", v)):
            if reason := _no_sink(tensor, f"layer.{layer.index}.{role}.sink"):
                return reason
        k, v = k.inputs[0].inputs[0], v.inputs[0].inputs[0]
    if len(node.inputs) > 3:
        made_from = weights_behind(node.inputs[3], graph)
        if made_from != ({weight} if weight else set()):
            names = ", ".join(sorted(made_from)) or "no weight"
            return f"its mask is made from {names}, by the layer table from {weight or 'no weight'}"
    return LayerAttention(node, layer, PLUGINS[OP + variant(layer)], (q, k, v), inputs[weight] if weight else None)


def disagreement(node: gs.Node, layer: LayerInfo) -> str:
    """How the attributes and the number of inputs of an Attention node differ from its row of the table; "" if they do not."""
    if reason := attributes_differ(node, layer, int(not layer.sinks)):
        return reason
    if layer.sinks and layer.alibi:
        return "the layer table says sinks and alibi, for which there is no op"
    options = (f"window {layer.window}" * bool(layer.window), "sinks" * layer.sinks, "alibi" * layer.alibi)
    return mask_differs(node, ", ".join(option for option in options if option), "window, sinks or alibi")


def attributes_differ(
    node: gs.Node, layer: LayerInfo, causal: int, says: str = "the layer table says", op: str = "paged attention"
) -> str:
    """How an Attention node's attributes and its number of inputs and outputs differ from its row; "" if they do not.

    says, op   for the reasons: what has the numbers, and which op does not know an attribute
    """
    expected = {"q_num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "is_causal": causal}
    for key, value in expected.items():
        if node.attrs.get(key, 0) != value:
            return f"{key} is {node.attrs.get(key, 0)}, {says} {value}"
    for key, number, default in (("scale", layer.scale, layer.head_dim**-0.5), ("softcap", layer.softcap, 0.0)):
        if not math.isclose(node.attrs.get(key, default), number, rel_tol=1e-6):
            return f"{key} is {node.attrs.get(key, default)}, the layer table says {number}"
    if extra := sorted(set(node.attrs) - {*expected, "scale", "softcap"}):
        return f"it has the attributes {', '.join(extra)}, which {op} does not know"
    if len(given(node)) not in (3, 4) or len(node.outputs) != 1:
        return "it has a cache of its own (more than q, k, v and a mask in, or more than one output)"
    return ""


def mask_differs(node: gs.Node, masked: str, options: str) -> str:
    """Why an Attention node has a mask or none; ``masked``: what the layer has of the ``options`` that want one."""
    if masked and len(given(node)) == 3:
        return f"the layer table says {masked}, but it has no mask"
    if not masked and len(given(node)) == 4:
        return f"it has a mask, but the layer table says no {options}"
    return ""


def given(node: gs.Node) -> list[gs.Tensor]:
    """The inputs that a node really has."""
    return [tensor for tensor in node.inputs if not tensor.is_empty()]


def _no_sink(tensor: gs.Variable, name: str) -> str:
    """Why keys or values have no position of a sink at their end; "" if they have."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op != "Concat" or node.name != name:
        return f"the layer table says sinks, but {tensor.name} does not come from a Concat {name}"
    if len(node.inputs) != 2 or node.attrs.get("axis", 0) not in (1, -2):
        return f"{name} joins {len(node.inputs)} tensors along axis {node.attrs.get('axis', 0)}, not 2 along axis 1"
    return ""


def weights_behind(tensor: gs.Tensor, graph: ModelGraph) -> set[str]:
    """The weights that a tensor is made from, without plain numbers. What a Shape is of is not counted."""
    found: set[str] = set()
    seen: set[int] = set()
    ahead = [tensor]
    while ahead:
        one = ahead.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        weight = graph.weights.get(one.name)
        if weight is not None and (weight.recipe.op, *weight.recipe.attrs[:1]) != ("computed", "constant"):
            found.add(one.name)
        ahead += [given for node in one.inputs if node.op != "Shape" for given in node.inputs]
    return found
