"""FP8 linear layers in two steps, for targets with kernels: rounding the activation, and a GEMM of float8 operands.

    x ─ ZooFp8Linear ─▶ q                        ┌─ ZooFp8Gemm ─▶ q
    x ─ ZooFp8Linear ─▶ k    becomes   x ─ ZooQuantizeFp8
                                                 └─ ZooFp8Gemm ─▶ k

Linear layers that read one activation with one scale share its rounding. Later passes let the kernel that makes the
activation round it, where nobody else reads it.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import ONNX_TYPES, ModelGraph, PassReport
from zoo.passes.clean import detach
from zoo.passes.frame import Pass, PassContext
from zoo.plugins.fp8_gemm import FP8_GEMM, QUANTIZE_FP8
from zoo.plugins.fp8_linear import PLUGIN
from zoo.spec import BuildSpec
from zoo.targets import Target


class CudaFp8(Pass):
    """Split every ZooFp8Linear. Counts: ``ZooFp8Gemm``, ``ZooQuantizeFp8``."""

    name = "cuda_fp8"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return target.kernels and build.quant.method == "fp8"

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return True

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return split_fp8_linears(graph)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if left := [node.name for node in graph.graph.nodes if node.op == PLUGIN.op]:
            raise PassError(f"{PLUGIN.op} nodes are left: {', '.join(left[:5])}")


def split_fp8_linears(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(CudaFp8.name)
    nodes: list[gs.Node] = []
    shared: dict[tuple[int, int], gs.Variable] = {}  # an activation and its scale -> the activation in float8
    for node in graph.graph.nodes:
        if node.op != PLUGIN.op:
            nodes.append(node)
            continue
        (x, weight, weight_scale, x_scale), outputs = list(node.inputs), list(node.outputs)
        detach([node])
        if (id(x), id(x_scale)) not in shared:
            name = f"{node.name}.quantize"
            x8 = gs.Variable(f"{name}.out", ONNX_TYPES["float8e4m3"], list(x.shape) if x.shape else None)
            nodes.append(QUANTIZE_FP8.node(name, [x, x_scale], [x8]))
            shared[id(x), id(x_scale)] = x8
        given = [shared[id(x), id(x_scale)], weight, weight_scale, x_scale]
        nodes.append(FP8_GEMM.node(node.name, given, outputs, to=ONNX_TYPES[graph.dtype]))
        report.counts[FP8_GEMM.op] = report.counts.get(FP8_GEMM.op, 0) + 1
    if report.changed:
        graph.graph.nodes = nodes
        report.counts[QUANTIZE_FP8.op] = len(shared)
        graph.functions |= {plugin.op: plugin.body for plugin in (QUANTIZE_FP8, FP8_GEMM)}
        graph.functions.pop(PLUGIN.op, None)
    return report


def output_ids(graph: ModelGraph) -> set[int]:
    """The graph's outputs, by identity: what a fusion may not swallow."""
    return {id(output) for output in graph.graph.outputs}


def rounding_of(graph: ModelGraph, tensor: gs.Variable, kept: Collection[int]) -> gs.Node | str | None:
    """The ZooQuantizeFp8 that alone reads a tensor; None if none reads it; the reason if something else needs the tensor too.

    kept  ``output_ids`` of the graph
    """
    readers = list(tensor.outputs)
    rounding = next((reader for reader in readers if reader.op == QUANTIZE_FP8.op), None)
    if rounding is None:
        return None
    others = [reader.name for reader in readers if reader is not rounding]
    if others:
        return f"{rounding.name} rounds {tensor.name}, but {others[0]} reads it, too"
    if id(tensor) in kept:
        return f"{rounding.name} rounds {tensor.name}, but it is an output of the graph, too"
    if rounding.inputs[1].name not in graph.weights:
        return f"the scale of {rounding.name}, {rounding.inputs[1].name}, is no weight"
    return rounding


def replace_nodes(graph: ModelGraph, instead: dict[int, list[gs.Node]], gone: Collection[int]) -> None:
    """Put new nodes in the place of old ones, by identity, and take out what is ``gone`` besides, which is detached already."""
    kept: list[gs.Node] = []
    for node in graph.graph.nodes:
        if id(node) in instead:
            kept += instead[id(node)]
        elif id(node) not in gone:
            kept.append(node)
    graph.graph.nodes = kept
