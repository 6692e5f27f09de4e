"""cuda_fp8: before and expected, what is shared and what is not, twice, the same numbers, a broken promise."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from kernel_graphs import CASES, KERNELS, PLAIN, STEPS, TINY, from_text8, ops_of, rewritten, small
from linear_graphs import from_text, nodes_of
from ragged import build_spec

from zoo.errors import PassError
from zoo.graph import ModelGraph, PassReport
from zoo.graph_templates import expand
from zoo.passes.cuda_fp8 import CudaFp8, split_fp8_linears
from zoo.passes.frame import run
from zoo.plugins.fp8_linear import PLUGIN

TEXT = """
agraph (float[1,S,8] x, float8e4m3fn[4,8] w.q, float8e4m3fn[6,8] w.up, float8e4m3fn[8,4] w.o,
        float[4] w.qs, float[6] w.us, float[8] w.os, float[] x_scale, float[] z_scale)
    => (float[1,S,8] layer.0.o.out, float[1,S,6] layer.0.up.out) {
  layer.0.q.out = zoo.ZooFp8Linear (x, w.q, w.qs, x_scale)
  layer.0.o.out = zoo.ZooFp8Linear (layer.0.q.out, w.o, w.os, z_scale)
  layer.0.up.out = zoo.ZooFp8Linear (x, w.up, w.us, x_scale)
}
"""
SPEC = build_spec(TINY, quant="fp8")


def graph_of(text: str = TEXT) -> ModelGraph:
    graph = from_text8(text)
    graph.functions[PLUGIN.op] = PLUGIN.body
    return graph


def test_before_and_expected() -> None:
    """The two readers of x share its rounding, made where the first of them stands."""
    graph = graph_of()
    report = split_fp8_linears(graph)
    assert nodes_of(graph) == [
        ("ZooQuantizeFp8", "layer.0.q.quantize", ["x", "x_scale"], ["layer.0.q.quantize.out"]),
        ("ZooFp8Gemm", "layer.0.q", ["layer.0.q.quantize.out", "w.q", "w.qs", "x_scale"], ["layer.0.q.out"]),
        ("ZooQuantizeFp8", "layer.0.o.quantize", ["layer.0.q.out", "z_scale"], ["layer.0.o.quantize.out"]),
        ("ZooFp8Gemm", "layer.0.o", ["layer.0.o.quantize.out", "w.o", "w.os", "z_scale"], ["layer.0.o.out"]),
        ("ZooFp8Gemm", "layer.0.up", ["layer.0.q.quantize.out", "w.up", "w.us", "x_scale"], ["layer.0.up.out"]),
    ]
    assert report.counts == {"ZooFp8Gemm": 3, "ZooQuantizeFp8": 2} and not report.misses
    assert sorted(graph.functions) == ["ZooFp8Gemm", "ZooQuantizeFp8"]
    assert graph.graph.nodes[1].attrs["to"] == onnx.TensorProto.FLOAT
    rounded = graph.graph.nodes[0].outputs[0]
    assert (rounded.dtype, rounded.shape) == (onnx.TensorProto.FLOAT8E4M3FN, [1, "S", 8])
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_another_scale_is_another_rounding() -> None:
    graph = graph_of(TEXT.replace("(x, w.up, w.us, x_scale)", "(x, w.up, w.us, z_scale)"))
    assert split_fp8_linears(graph).counts == {"ZooFp8Gemm": 3, "ZooQuantizeFp8": 3}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gemm_names_the_compute_type(dtype: str) -> None:
    graph = run([*STEPS, CudaFp8()], expand(TINY, dtype, SPEC.limits.max_context), SPEC, KERNELS, check=True)
    codes = {node.attrs["to"] for node in graph.graph.nodes if node.op == "ZooFp8Gemm"}
    assert codes == {onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.BFLOAT16}


def test_twice_changes_nothing() -> None:
    graph = graph_of()
    split_fp8_linears(graph)
    before = nodes_of(graph)
    assert not split_fp8_linears(graph).changed and nodes_of(graph) == before


def test_who_wants_it() -> None:
    assert CudaFp8().wanted(SPEC, KERNELS) and CudaFp8().demanded(SPEC, KERNELS)
    assert not CudaFp8().wanted(SPEC, PLAIN)
    assert not CudaFp8().wanted(build_spec(TINY), KERNELS)


def test_finding_nothing_is_an_error() -> None:
    text = "agraph (float[1,S,8] x, float[8,4] w.a) => (float[1,S,4] y) { y = MatMul(x, w.a) }"
    with pytest.raises(PassError, match=r"pass 'cuda_fp8'.*found nothing to rewrite"):
        rewritten([CudaFp8()], from_text(text), SPEC)


def test_a_broken_promise() -> None:
    class Lazy(CudaFp8):
        def apply(self, graph: ModelGraph, ctx: object) -> PassReport:
            return PassReport(self.name, {"ZooFp8Gemm": 1})

    with pytest.raises(PassError, match=r"ZooFp8Linear nodes are left: layer.0.q, layer.0.o, layer.0.up"):
        rewritten([Lazy()], graph_of(), SPEC)


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(tmp_path_factory: pytest.TempPathFactory, case: str) -> None:
    """The same float32 operators in the same order, so that no rounding to float8 falls to another side."""
    model = small(tmp_path_factory.getbasetemp(), case, "fp8")
    graph = rewritten([CudaFp8()], model.graph(), model.build)
    assert ops_of(graph)["ZooFp8Gemm"] == 4 * model.build.model.num_layers
    wanted = model.logits(model.graph())
    np.testing.assert_allclose(model.logits(graph), wanted, atol=1e-6, rtol=0)


def test_layers_that_share_an_activation_share_its_rounding(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where q, k, v and gate, up are not fused, they read one tensor each."""
    model = small(tmp_path_factory.getbasetemp(), "llama-grouped", "fp8")
    steps = [step for step in STEPS if step.name != "fuse_linears"]
    before, graph = (
        run(each, expand(model.build.model, "float32", 64), model.build, KERNELS) for each in (steps, [*steps, CudaFp8()])
    )
    counts = ops_of(graph)
    assert (counts["ZooFp8Gemm"], counts["ZooQuantizeFp8"]) == (14, 8)
    np.testing.assert_allclose(model.logits(graph), model.logits(before), atol=1e-6, rtol=0)
