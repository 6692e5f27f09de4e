"""RMS norms with what stands around them, for targets with kernels: the residual sum before, the rounding to float8 behind.

    x, branch ─ Add ─┬─▶ sum                                            ┌─▶ sum
                     └ RMSNormalization ─▶ y     becomes    ZooAddRmsNorm
                                                                        └─▶ y

    x ─ RMSNormalization ─ ZooQuantizeFp8 ─▶     becomes    x ─ ZooRmsNormFp8 ─▶

and both at once: ZooAddRmsNormFp8. A sum's other readers, the next residual among them, read ``sum``; that joins the last
residual of a layer with the first norm of the next. Between the last layer and the final norm the rows are picked whose
logits are wanted, so that Add stays. The rounding goes into the norm only if nobody else reads the norm.

LayerNormalization stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import Miss, ModelGraph, PassReport
from zoo.passes.clean import detach
from zoo.passes.cuda_fp8 import output_ids, replace_nodes, rounding_of
from zoo.passes.frame import Pass, PassContext
from zoo.plugins.contract import Plugin
from zoo.plugins.rms_norm import ADD_RMS_NORM, ADD_RMS_NORM_FP8, RMS_NORM_FP8
from zoo.spec import BuildSpec
from zoo.targets import Target

NORM = "RMSNormalization"
# (with a residual sum, with a rounding) -> the op
OPS: dict[tuple[bool, bool], Plugin] = {
    (False, True): RMS_NORM_FP8,
    (True, False): ADD_RMS_NORM,
    (True, True): ADD_RMS_NORM_FP8,
}


class FuseNorm(Pass):
    """Fuse RMS norms. Counts: the op types it writes."""

    name = "fuse_norm"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return target.kernels

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return fuse_norms(graph)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        kept = output_ids(graph)
        if left := [node.name for node in graph.graph.nodes if node.op == NORM and match(graph, node, kept).found]:
            raise PassError(f"norms that could be fused are left: {', '.join(left[:5])}")


@dataclass
class Match:
    """What can become one node with a norm: the Add before it, the ZooQuantizeFp8 behind it; and why not more."""

    add: gs.Node | None = None
    rounding: gs.Node | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        return self.add is not None or self.rounding is not None


def fuse_norms(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(FuseNorm.name)
    kept = output_ids(graph)
    instead: dict[int, list[gs.Node]] = {}
    gone: set[int] = set()
    for node in [node for node in graph.graph.nodes if node.op == NORM]:
        matched = match(graph, node, kept)
        report.misses += [Miss(node.name, reason) for reason in matched.reasons]
        if not matched.found:
            continue
        old = [each for each in (matched.add, node, matched.rounding) if each is not None]
        plugin = OPS[matched.add is not None, matched.rounding is not None]
        instead[id(old[0])] = [_fused(plugin, node, matched)]
        gone |= {id(each) for each in old}
        graph.functions[plugin.op] = plugin.body
        report.counts[plugin.op] = report.counts.get(plugin.op, 0) + 1
    if report.changed:
        replace_nodes(graph, instead, gone)
    return report


def match(graph: ModelGraph, node: gs.Node, kept: set[int]) -> Match:
    """What an RMSNormalization can be fused with. ``kept``: ``output_ids`` of the graph."""
    matched = Match()
    for part, found in (("add", _residual(graph, node)), ("rounding", rounding_of(graph, node.outputs[0], kept))):
        if isinstance(found, str):
            matched.reasons.append(found)
        else:
            setattr(matched, part, found)
    if matched.found and (reason := _unknown_form(graph, node)):
        return Match(reasons=[reason])
    return matched


def _residual(graph: ModelGraph, node: gs.Node) -> gs.Node | str | None:
    """The Add of two activations of one shape that a norm reads; None if it reads no sum; the reason why a sum is none."""
    producer = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if producer is None:
        return None
    if producer.op in (ADD_RMS_NORM.op, ADD_RMS_NORM_FP8.op):
        return f"{producer.name} is the norm of the sum {node.inputs[0].name} already"
    if producer.op != "Add" or producer.domain:
        return None
    left, right = producer.inputs
    if left.name in graph.weights or right.name in graph.weights:
        return f"{producer.name} adds a weight, not a residual"
    if not left.shape or left.shape != right.shape:
        return f"{producer.name} adds {right.name} {right.shape} to {left.name} {left.shape}"
    return producer


def _unknown_form(graph: ModelGraph, node: gs.Node) -> str:
    """What the fused ops do not know about a norm; "" if they know all."""
    x, weight = node.inputs
    if node.attrs.get("axis", -1) not in (-1, len(x.shape or ()) - 1):
        return f"its axis is {node.attrs['axis']}, not the last"
    if node.attrs.get("stash_type", 1) != 1:
        return f"its stash_type is {node.attrs['stash_type']}; the fused op norms in float32"
    if weight.name not in graph.weights or len(graph.weights[weight.name].shape) != 1:
        return f"its scale {weight.name} is not a weight of one axis"
    return ""


def _fused(plugin: Plugin, node: gs.Node, matched: Match) -> gs.Node:
    x, weight = node.inputs
    inputs, outputs = [x, weight], [node.outputs[0]]
    if matched.add is not None:
        residual, branch = matched.add.inputs
        inputs, outputs = [branch, residual, weight], [x, *outputs]
    if matched.rounding is not None:
        inputs.append(matched.rounding.inputs[1])
        outputs[-1] = matched.rounding.outputs[0]
    detach([each for each in (matched.add, node, matched.rounding) if each is not None])
    return plugin.node(node.name, inputs, outputs, epsilon=node.attrs.get("epsilon", 1e-5))
