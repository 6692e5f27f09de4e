"""FP8 insertion: every linear layer but the skipped roles becomes a ``ZooFp8Linear`` with float8e4m3 weights.

    x ── MatMul W [K, N] ─▶   becomes   x ── ZooFp8Linear W8 [N, K], scale [N], x_scale [] ─▶

    W8 = round8(Wᵀ / scale),  scale[n] = max|W[:, n]| / 448;  x_scale = max|x| / 448, from a calibration run

All of them are weights with recipes: nothing is read here, and recalibrating changes no node. Linear layers that read the
same tensor share its scale, named after the first of them. A bias stays the Add behind the node.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import Miss, ModelGraph, PassReport
from zoo.passes.frame import Pass, PassContext
from zoo.passes.linears import GROUPS, ROLES, Linear, activation_names, keep_weight_order, read_linear, role_of
from zoo.plugins.fp8_linear import PLUGIN
from zoo.spec import BuildSpec
from zoo.targets import Target
from zoo.weights.recipe import Weight, channel_scale, quantize, scale, transpose


class QuantizeFp8(Pass):
    """Replace linear layers by ZooFp8Linear. Count: ``ZooFp8Linear``. Misses: skipped roles, and MatMuls without a weight."""

    name = "quantize_fp8"
    phase = "quantization"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return build.quant.method == "fp8"

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return build.quant.method == "fp8"

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        known = (*ROLES, *GROUPS)
        if unknown := [role for role in ctx.build.quant.skip if role not in known]:
            raise PassError(f"quant.skip names {', '.join(map(repr, unknown))}; pick from {', '.join(known)}")

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        report = self.report()
        names = activation_names(graph)
        instead: dict[int, gs.Node] = {}
        order: dict[str, str] = {}
        shared: dict[str, gs.Variable] = {}  # activation -> its scale
        for node in [node for node in graph.graph.nodes if node.op == "MatMul"]:
            linear = read_linear(graph, node)
            if isinstance(linear, str):
                report.misses.append(Miss(node.name, linear))
            elif reason := _skipped(linear.name, ctx.build.quant.skip):
                report.misses.append(Miss(node.name, reason))
            else:
                activation = names[linear.name]
                if activation not in shared:
                    shared[activation] = graph.add_weight(Weight(f"{activation}_scale", "float32", scale(activation)))
                order |= {f"{linear.name}.scale": linear.weight.name}
                order.setdefault(f"{activation}_scale", linear.weight.name)
                instead[id(node)] = _quantized(graph, linear, shared[activation])
        if instead:
            graph.graph.nodes = [instead.get(id(node), node) for node in graph.graph.nodes]
            graph.functions[PLUGIN.op] = PLUGIN.body
            report.counts[PLUGIN.op] = len(instead)
            keep_weight_order(graph, order)
        return report

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        for node in graph.graph.nodes:
            if node.op == PLUGIN.op:
                dtypes = [graph.weights[tensor.name].dtype for tensor in node.inputs[1:] if tensor.name in graph.weights]
                if dtypes != ["float8e4m3", "float32", "float32"]:
                    raise PassError(f"{node.name}: weight, weight_scale and x_scale must be weights, found {dtypes}")


def _skipped(name: str, skip: tuple[str, ...]) -> str:
    role = role_of(name)
    for part in (role, *GROUPS.get(role, ())):
        if part in skip:
            return f"quant.skip names {part}"
    for fused, parts in GROUPS.items():
        if fused in skip and role in parts:
            return f"quant.skip names {fused}"
    return ""


def _quantized(graph: ModelGraph, linear: Linear, x_scale: gs.Variable) -> gs.Node:
    """The ZooFp8Linear that stands for a linear layer's MatMul; its weight input keeps its name."""
    x, variable, outputs = linear.input, linear.matmul.inputs[1], list(linear.matmul.outputs)
    stored = transpose(linear.weight.recipe, (1, 0))
    scales = channel_scale(stored, axis=0)
    linear.matmul.inputs.clear()
    linear.matmul.outputs.clear()
    graph.replace_weight(variable, Weight(linear.weight.name, "float8e4m3", quantize(stored, scales, axis=0)))
    weight_scale = graph.add_weight(Weight(f"{linear.name}.scale", "float32", scales))
    return PLUGIN.node(linear.name, [x, variable, weight_scale, x_scale], outputs)
