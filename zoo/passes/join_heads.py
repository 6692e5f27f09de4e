"""Queries, keys and values side by side again, for targets with kernels, where something stands between them and the cache.

                ┌ q ─ norm ─┐                                         ┌ q ─ norm ─┐
    qkv ─ Split ┼ k ─ norm ─ ZooPagedAttention   becomes  qkv ─ Split ┼ k ─ norm ─ Concat ─ Split ─ ZooPagedAttention
                └ v ────────┘                                         └ v ────────┘

A rotation behind the norm, if there is one, then stands behind the second Split, and ``fuse_rotary_cache``, the next pass, takes
both. By itself it knows a norm of each head where heads are rotated, too. Anything else goes through here: a norm over all heads,
a weight for each head, a layer norm, a clip, a norm without a rotation. That costs a copy, so each such layer is recorded with
the reason.

H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import Miss, ModelGraph, PassReport
from zoo.passes.cuda_fp8 import output_ids
from zoo.passes.frame import Pass, PassContext
from zoo.passes.fuse_rotary_cache import ROTARY, Match, match
from zoo.plugins.paged_attention import PLUGINS as PAGED
from zoo.spec import BuildSpec
from zoo.targets import Target


class JoinHeads(Pass):
    """Join what fuse_rotary_cache would not take. Counts: ``Concat``."""

    name = "join_heads"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return target.kernels and build.model.template == "decoder"

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        if not graph.ragged:
            raise PassError("it starts from a graph with paged attention")

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return join_heads(graph)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if left := [node.name for node, _, _ in _apart(graph)]:
            raise PassError(f"queries, keys and values could be joined, but are not: {', '.join(left[:5])}")


@dataclass
class Read:
    """Where a projection is read: by the rotation before an attention, if there is one, else by the attention."""

    node: gs.Node
    place: int

    @property
    def tensor(self) -> gs.Variable:
        return self.node.inputs[self.place]


def join_heads(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(JoinHeads.name)
    for node, reads, reason in _apart(graph):
        _join(graph, node, reads)
        report.misses.append(Miss(node.name, reason))
        report.counts["Concat"] = report.counts.get("Concat", 0) + 1
    return report


def _apart(graph: ModelGraph) -> list[tuple[gs.Node, list[Read], str]]:
    """Attention nodes that do not read the parts of one Split, and why fuse_rotary_cache cannot take them as they are."""
    kept = output_ids(graph)
    positions = next((variable for variable in graph.data_inputs if variable.name == "positions"), None)
    found = []
    for node in graph.graph.nodes:
        if node.op not in PAGED or isinstance(reason := match(graph, node, kept, positions), Match):
            continue
        reads = [_read(node, place) for place, port in enumerate(PAGED[node.op].inputs) if port.name in ("q", "k", "v")]
        split = _producer(reads[0].tensor)
        one_split = split is not None and split.op == "Split" and [id(r.tensor) for r in reads] == [id(o) for o in split.outputs]
        rotations = [read.node.outputs[0] for read in reads if read.node is not node]
        alone = all(len(tensor.outputs) == 1 and id(tensor) not in kept for tensor in rotations)
        if alone and not one_split:
            found.append((node, reads, reason))
    return found


def _read(attention: gs.Node, place: int) -> Read:
    rotation = _producer(attention.inputs[place])
    return Read(rotation, 0) if rotation is not None and rotation.op == ROTARY else Read(attention, place)


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def _join(graph: ModelGraph, attention: gs.Node, reads: list[Read]) -> None:
    """Concat and Split right before the attention, and the rotations behind them, which nobody else reads."""
    name = f"{attention.name.removesuffix('.attention')}.join"
    heads, kv_heads, size = (int(attention.attrs[key]) for key in ("num_heads", "kv_heads", "head_dim"))
    widths = [heads * size, kv_heads * size, kv_heads * size]
    parts = [read.tensor for read in reads]
    kind, shape = parts[0].dtype, list(parts[0].shape[:-1])
    whole = gs.Variable(f"{name}.out", kind, [*shape, sum(widths)])
    cuts = [gs.Variable(f"{name}.{role}.out", kind, [*shape, width]) for role, width in zip("qkv", widths, strict=True)]
    concat = gs.Node("Concat", name, {"axis": 2}, parts, [whole])
    sizes = gs.Constant(f"{name}.sizes", np.array(widths, np.int64))
    split = gs.Node("Split", f"{name}.split", {"axis": 2}, [whole, sizes], cuts)
    for read, cut in zip(reads, cuts, strict=True):
        read.node.inputs[read.place] = cut
    moved = [read.node for read in reads if read.node is not attention]
    others = [node for node in graph.graph.nodes if not any(node is one for one in moved)]
    place = next(at for at, node in enumerate(others) if node is attention)
    graph.graph.nodes = [*others[:place], concat, split, *moved, *others[place:]]
