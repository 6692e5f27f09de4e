"""Attention in two steps, for targets with kernels: rotate the queries and write the cache; attend to what lies in it.

                ┌ q ─ (norm) ─ RotaryEmbedding ─┐
    qkv ─ Split ┼ k ─ (norm) ─ RotaryEmbedding ─ ZooPagedAttention ─▶ out, kv_out.{i}
                └ v ────────────────────────────┘

    becomes     qkv, tables, kv.{i} ─ ZooRotaryCache ─▶ q, kv_out.{i} ─ ZooCachedAttention ─▶ out

ZooRotaryCacheNorm where heads are normed, ZooCacheWrite where nothing is rotated; a (norm) is Reshape, RMSNormalization,
Reshape. A variant of ZooPagedAttention becomes the same variant of ZooCachedAttention. If one ZooQuantizeFp8 alone reads
``out``, attention writes float8 itself (ZooCachedAttentionOut8). Rotations read the engine's own ``positions``. The index
inputs of both steps become inputs of the graph, behind the pools.

All layers are rewritten or none: a target with kernels has none for ZooPagedAttention and its variants.

H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import ONNX_TYPES, IndexInput, Miss, ModelGraph, PassReport
from zoo.passes.clean import detach, remove_dead
from zoo.passes.cuda_fp8 import output_ids, replace_nodes, rounding_of
from zoo.passes.frame import Pass, PassContext
from zoo.plugins import cached_attention, rotary_cache
from zoo.plugins.contract import Plugin
from zoo.plugins.paged_attention import PLUGINS as PAGED
from zoo.plugins.paged_attention import variant_of
from zoo.spec import BuildSpec
from zoo.targets import Target

NORM, ROTARY = "RMSNormalization", "RotaryEmbedding"
INDEX_INPUTS = (IndexInput("token_slots", "int32", ("T",)), IndexInput("prefill_tiles", "int32", ("W", 4)))


class FuseRotaryCache(Pass):
    """Split attention from the cache. Counts: the op types it writes."""

    name = "fuse_rotary_cache"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return target.kernels and build.model.template == "decoder"  # an encoder has no cache, and rotates by itself

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return True

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        if not graph.ragged:
            raise PassError("it starts from a graph with paged attention")

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return fuse_rotary_cache(graph)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if left := [node for node in graph.graph.nodes if node.op in PAGED]:
            raise PassError(f"{left[0].op} nodes are left: {', '.join(node.name for node in left[:5])}")


@dataclass
class Path:
    """How a head projection reaches attention: ``start`` is a part of the Split, ``nodes`` lie between, last first."""

    start: gs.Variable
    rotary: gs.Node | None
    norm: gs.Node | None
    nodes: list[gs.Node]


@dataclass
class Match:
    """A layer that can be rewritten. ``given`` has what the two ops read, by the names of their contracts' ports."""

    attention: gs.Node
    write: Plugin
    attrs: dict[str, int | float]  # of ``write``
    given: dict[str, gs.Variable]
    nodes: list[gs.Node]  # that go: from the Split to the attention, and the rounding behind it


def fuse_rotary_cache(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(FuseRotaryCache.name)
    kept = output_ids(graph)
    positions = next((variable for variable in graph.data_inputs if variable.name == "positions"), None)
    matches: list[Match] = []
    for node in graph.graph.nodes:
        if node.op in PAGED:
            matched = match(graph, node, kept, positions)
            if isinstance(matched, str):
                report.misses.append(Miss(node.name, matched))
            else:
                matches.append(matched)
    if report.misses or not matches:
        return report
    index = _index_inputs(graph)
    instead: dict[int, list[gs.Node]] = {}
    gone: set[int] = set()
    for matched in matches:
        rounding = rounding_of(graph, matched.attention.outputs[0], kept)
        if isinstance(rounding, str):
            report.misses.append(Miss(matched.attention.name, rounding))
            rounding = None
        if rounding is not None:
            matched.nodes.append(rounding)
        gone |= {id(node) for node in matched.nodes}
        matched.given |= index
        instead[id(matched.attention)] = _split(graph, matched, rounding)
        for node in instead[id(matched.attention)]:
            report.counts[node.op] = report.counts.get(node.op, 0) + 1
    replace_nodes(graph, instead, gone)
    remove_dead(graph)
    graph.functions = {op: function for op, function in graph.functions.items() if op not in PAGED}
    return report


def match(graph: ModelGraph, node: gs.Node, kept: set[int], positions: gs.Variable | None) -> Match | str:
    """A node of ``PAGED`` with all that leads to it from a fused linear layer, or the reason why it is not that.

    kept       ``output_ids`` of the graph
    positions  the engine's input [T]; None where the graph has none, so that nothing may be rotated
    """
    heads, kv_heads, size = (int(node.attrs[key]) for key in ("num_heads", "kv_heads", "head_dim"))
    inputs = dict(zip((port.name for port in PAGED[node.op].inputs), node.inputs, strict=True))
    q, k = _path(inputs["q"], heads, size), _path(inputs["k"], kv_heads, size)
    if isinstance(q, str) or isinstance(k, str):
        return q if isinstance(q, str) else str(k)
    split = _producer(q.start)
    parts = (q.start, k.start, inputs["v"])
    if split is None or split.op != "Split" or [id(part) for part in split.outputs] != [id(part) for part in parts]:
        return f"{', '.join(part.name for part in parts)} are not the three parts of one Split"
    if reason := _sizes(split, [heads * size, kv_heads * size, kv_heads * size]):
        return reason
    nodes = [split, *q.nodes, *k.nodes]
    for tensor in [tensor for each in nodes for tensor in each.outputs]:
        if id(tensor) in kept:
            return f"{tensor.name} is an output of the graph"
        if len(tensor.outputs) != 1:
            return f"{len(tensor.outputs)} nodes read {tensor.name}"
    attrs: dict[str, int | float] = {key: node.attrs[key] for key in ("num_heads", "kv_heads", "head_dim", "block_size")}
    given = inputs | {"qkv": split.inputs[0]} | ({} if positions is None else {"positions": positions})
    for reason in (_rotation(q, k, size, attrs, given), _head_norm(graph, q, k, size, attrs, given)):
        if reason:
            return reason
    write = rotary_cache.PLUGINS[rotary_cache.op_name(q.rotary is not None, q.norm is not None, False)]
    return Match(node, write, attrs, given, [*nodes, node])


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def _path(tensor: gs.Variable, heads: int, size: int) -> Path | str:
    """Walk up from what attention reads, over a rotation and a norm of each head, if they are there."""
    path = Path(tensor, None, None, [])
    node = _producer(path.start)
    if node is not None and node.op == ROTARY:
        if node.attrs.get("num_heads", 0) != heads or len(node.inputs) != 4:
            found = f"{node.attrs.get('num_heads', 0)} heads with {len(node.inputs)} inputs"
            return f"{node.name} rotates {found}, not {heads} with 4"
        path = Path(node.inputs[0], node, None, [node])
        node = _producer(path.start)
    if node is None or node.op != "Reshape":
        return path
    merge, norm = node, _producer(node.inputs[0])
    cut = _producer(norm.inputs[0]) if norm is not None and norm.op == NORM else None
    if norm is None or cut is None or cut.op != "Reshape":
        return f"{merge.name} does not put back together what a Reshape cut and a norm normed"
    for reshape, shape in ((cut, [0, 0, heads, size]), (merge, [0, 0, heads * size])):
        found = reshape.inputs[1].values.tolist() if isinstance(reshape.inputs[1], gs.Constant) else reshape.inputs[1].name
        if found != shape:
            return f"{reshape.name} has the shape {found}, not {shape}"
    return Path(cut.inputs[0], path.rotary, norm, [*path.nodes, merge, norm, cut])


def _sizes(split: gs.Node, wanted: Sequence[int]) -> str:
    """Why a Split of the last axis is not into these sizes; "" if it is."""
    if split.attrs.get("axis", 0) not in (-1, 2):
        return f"{split.name} splits axis {split.attrs.get('axis', 0)}, not the last"
    sizes = split.inputs[1] if len(split.inputs) > 1 else None
    found = sizes.values.tolist() if isinstance(sizes, gs.Constant) else "unknown"
    return "" if found == list(wanted) else f"the parts of {split.name} are {found}, not {list(wanted)}"


def _rotation(q: Path, k: Path, size: int, attrs: dict[str, int | float], given: dict[str, gs.Variable]) -> str:
    """Enter the rotation into ``attrs`` and ``given``; gives the reason why one op cannot do both."""
    if q.rotary is None and k.rotary is None:
        return ""
    if q.rotary is None or k.rotary is None:
        return "of queries and keys only one is rotated"
    if any(a is not b for a, b in zip(q.rotary.inputs[1:], k.rotary.inputs[1:], strict=True)):
        return f"{q.rotary.name} and {k.rotary.name} read other tables or positions"
    kinds = [
        (int(node.attrs.get("rotary_embedding_dim", 0)) or size, int(node.attrs.get("interleaved", 0)))
        for node in (q.rotary, k.rotary)
    ]
    if kinds[0] != kinds[1]:
        return f"{q.rotary.name} and {k.rotary.name} rotate differently"
    _, cos, sin, raw = q.rotary.inputs
    while (node := _producer(raw)) is not None and node.op in ("Cast", "Unsqueeze"):
        raw = node.inputs[0]
    if raw is not given.get("positions"):
        return f"{q.rotary.name} reads positions from {raw.name}, not the engine's own"
    attrs |= {"rotary_dim": kinds[0][0], "interleaved": kinds[0][1]}
    given |= {"cos": cos, "sin": sin}
    return ""


def _head_norm(
    graph: ModelGraph, q: Path, k: Path, size: int, attrs: dict[str, int | float], given: dict[str, gs.Variable]
) -> str:
    """The same for the norm of each head."""
    if q.norm is None and k.norm is None:
        return ""
    if q.norm is None or k.norm is None:
        return "of queries and keys only one is normed"
    if q.rotary is None:
        return "heads are normed and not rotated, for which there is no op"
    epsilons = []
    for norm in (q.norm, k.norm):
        weight = graph.weights.get(norm.inputs[1].name)
        if weight is None or weight.shape != (size,):
            return f"{norm.name} scales by {norm.inputs[1].name}, which is not a weight [{size}]"
        if norm.attrs.get("axis", -1) not in (-1, 3) or norm.attrs.get("stash_type", 1) != 1:
            return f"{norm.name} does not norm the last axis in float32"
        epsilons.append(float(norm.attrs.get("epsilon", 1e-5)))
    if epsilons[0] != epsilons[1]:
        return f"{q.norm.name} has the epsilon {epsilons[0]}, {k.norm.name} {epsilons[1]}"
    attrs["epsilon"] = epsilons[0]
    given |= {"q_norm": q.norm.inputs[1], "k_norm": k.norm.inputs[1]}
    return ""


def _split(graph: ModelGraph, matched: Match, rounding: gs.Node | None) -> list[gs.Node]:
    """The two nodes that stand for a layer's attention."""
    attention = matched.attention
    out, pool = attention.outputs
    given = dict(matched.given)
    if rounding is not None:
        given["out_scale"], out = rounding.inputs[1], rounding.outputs[0]
    detach(matched.nodes)
    name = f"{attention.name.removesuffix('.attention')}.cache"
    queries = gs.Variable(f"{name}.out", given["q"].dtype, list(given["q"].shape) if given["q"].shape else None)
    op = cached_attention.op_name(False, rounding is not None, variant_of(attention.op))
    write, attend = matched.write, cached_attention.PLUGINS[op]
    graph.functions |= {plugin.op: plugin.body for plugin in (write, attend)}
    written = write.node(name, [given[port.name] for port in write.inputs], [queries, pool], **matched.attrs)
    given |= {"q": queries, "kv": pool}
    attrs = {attribute.name: attention.attrs[attribute.name] for attribute in attend.attributes}
    return [written, attend.node(attention.name, [given[port.name] for port in attend.inputs], [out], **attrs)]


def _index_inputs(graph: ModelGraph) -> dict[str, gs.Variable]:
    """Declare the index inputs of both ops, between the pools and the weights."""
    variables = {extra.name: gs.Variable(extra.name, ONNX_TYPES[extra.dtype], list(extra.shape)) for extra in INDEX_INPUTS}
    weights = [variable for variable in graph.graph.inputs if variable.name in graph.weights]
    graph.graph.inputs = [*graph.data_inputs, *variables.values(), *weights]
    graph.index_inputs += INDEX_INPUTS
    return variables
