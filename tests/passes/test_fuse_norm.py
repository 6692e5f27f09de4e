"""fuse_norm: before and expected for each op, what must not match and why, twice, the same numbers, a broken promise."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from kernel_graphs import CASES, KERNELS, PLAIN, TINY, from_text8, ops_of, rewritten, small
from linear_graphs import nodes_of
from ragged import build_spec

from zoo.errors import PassError
from zoo.graph import ModelGraph, PassReport
from zoo.passes.cuda_fp8 import CudaFp8
from zoo.passes.fuse_norm import FuseNorm, fuse_norms

SPEC = build_spec(TINY)
TWO_LAYERS = """
agraph (float[1,S,8] x, float[1,S,8] a, float[1,S,8] b, float[8] w.n1, float[8] w.n2, float[8] w.n3)
    => (float[1,S,8] n1.out, float[1,S,8] n2.out, float[1,S,8] n3.out, float[1,S,8] end)
  <float[1,S,8] r1, float[1,S,8] r2> {
  n1.out = RMSNormalization <axis = -1, epsilon = 5e-1> (x, w.n1)
  r1 = Add(x, a)
  n2.out = RMSNormalization <axis = -1, epsilon = 25e-2> (r1, w.n2)
  r2 = Add(r1, b)
  n3.out = RMSNormalization <axis = 2, epsilon = 125e-3> (r2, w.n3)
  end = Add(r2, a)
}
"""
ROUNDED = """
agraph (float[1,S,8] x, float[1,S,8] a, float[8] w.n, float[] y_scale)
    => (float8e4m3fn[1,S,8] n8.out, float[1,S,8] r.out) {
  r.out = Add(x, a)
  n.out = RMSNormalization <axis = -1, epsilon = 5e-1> (r.out, w.n)
  n8.out = zoo.ZooQuantizeFp8 (n.out, y_scale)
}
"""
ALONE = """
agraph (float[1,S,8] x, float[8] w.n, float[] y_scale) => (float8e4m3fn[1,S,8] n8.out) {
  n.out = RMSNormalization <axis = -1, epsilon = 5e-1> (x, w.n)
  n8.out = zoo.ZooQuantizeFp8 (n.out, y_scale)
}
"""


def test_sums_and_norms_over_layer_borders() -> None:
    """The first norm reads no sum, the last sum has no norm; r1 and r2 keep their names and their other readers."""
    graph = from_text8(TWO_LAYERS)
    report = fuse_norms(graph)
    assert nodes_of(graph) == [
        ("RMSNormalization", "n1", ["x", "w.n1"], ["n1.out"]),
        ("ZooAddRmsNorm", "n2", ["a", "x", "w.n2"], ["r1", "n2.out"]),
        ("ZooAddRmsNorm", "n3", ["b", "r1", "w.n3"], ["r2", "n3.out"]),
        ("Add", "end", ["r2", "a"], ["end"]),
    ]
    assert report.counts == {"ZooAddRmsNorm": 2} and not report.misses
    assert [node.attrs["epsilon"] for node in graph.graph.nodes[1:3]] == [0.25, 0.125]
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_a_sum_and_a_rounding() -> None:
    graph = from_text8(ROUNDED)
    report = fuse_norms(graph)
    assert nodes_of(graph) == [("ZooAddRmsNormFp8", "n", ["a", "x", "w.n", "y_scale"], ["r.out", "n8.out"])]
    assert report.counts == {"ZooAddRmsNormFp8": 1} and list(graph.functions) == ["ZooAddRmsNormFp8"]
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_a_rounding_alone() -> None:
    graph = from_text8(ALONE)
    assert fuse_norms(graph).counts == {"ZooRmsNormFp8": 1}
    assert nodes_of(graph) == [("ZooRmsNormFp8", "n", ["x", "w.n", "y_scale"], ["n8.out"])]


READ_TOO = ROUNDED.replace("n8.out = zoo", "side = Neg(n.out)\n n8.out = zoo").replace("=> (", "=> (float[1,S,8] side, ")
LEFT = {  # text -> what becomes of its norm, and why not more
    "the norm is read by others": (READ_TOO, "ZooAddRmsNorm", "n8 rounds n.out, but side reads it, too"),
    "the norm is an output": (
        ROUNDED.replace("=> (", "=> (float[1,S,8] n.out, "),
        "ZooAddRmsNorm",
        "n8 rounds n.out, but it is an output of the graph, too",
    ),
    "the scale is no weight": (
        ALONE.replace("y_scale", "s"),
        "RMSNormalization",
        "the scale of n8, s, is no weight",
    ),
    "a bias": (
        ROUNDED.replace("float[1,S,8] a", "float[8] b.a").replace("Add(x, a)", "Add(x, b.a)"),
        "ZooRmsNormFp8",
        "r adds a weight, not a residual",
    ),
    "a broadcast": (
        ROUNDED.replace("float[1,S,8] a", "float[1,S,1] a"),
        "ZooRmsNormFp8",
        "r adds a [1, 'S', 1] to x [1, 'S', 8]",
    ),
    "another axis": (
        ROUNDED.replace("axis = -1", "axis = 1").replace("float[8] w.n", "float[2,8] w.n"),
        "RMSNormalization",
        "its axis is 1, not the last",
    ),
    "half precision inside": (
        ROUNDED.replace("axis = -1,", "stash_type = 10, axis = -1,"),
        "RMSNormalization",
        "its stash_type is 10; the fused op norms in float32",
    ),
    "a scale that is made": (
        ROUNDED.replace("float[8] w.n", "float[8] n0").replace("w.n)", "n0)"),
        "RMSNormalization",
        "its scale n0 is not a weight of one axis",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_does_not_fit_stays_with_a_reason(case: str) -> None:
    text, op, reason = LEFT[case]
    graph = from_text8(text)
    report = fuse_norms(graph)
    assert [(miss.where, miss.reason) for miss in report.misses] == [("n", reason)]
    assert [node.op for node in graph.graph.nodes if node.name == "n"] == [op]
    onnx.checker.check_model(graph.to_onnx())


def test_a_second_norm_of_a_sum_stays() -> None:
    text = ROUNDED.replace("n8.out = zoo", "m.out = RMSNormalization <axis = -1> (r.out, w.n)\n n8.out = zoo")
    graph = from_text8(text.replace("=> (", "=> (float[1,S,8] m.out, "))
    report = fuse_norms(graph)
    assert [node.op for node in graph.graph.nodes] == ["ZooAddRmsNormFp8", "RMSNormalization"]
    assert [(miss.where, miss.reason) for miss in report.misses] == [("m", "n is the norm of the sum r.out already")]


def test_layer_norms_are_not_near() -> None:
    text = ROUNDED.replace("RMSNormalization", "LayerNormalization")
    graph = from_text8(text)
    before, report = nodes_of(graph), fuse_norms(graph)
    assert not report.changed and not report.misses and nodes_of(graph) == before


@pytest.mark.parametrize("text", [TWO_LAYERS, ROUNDED, ALONE, READ_TOO])
def test_twice_changes_nothing(text: str) -> None:
    graph = from_text8(text)
    fuse_norms(graph)
    before = nodes_of(graph)
    assert not fuse_norms(graph).changed and nodes_of(graph) == before


def test_who_wants_it() -> None:
    assert FuseNorm().wanted(SPEC, KERNELS) and not FuseNorm().demanded(SPEC, KERNELS)
    assert not FuseNorm().wanted(SPEC, PLAIN)


def test_a_broken_promise() -> None:
    class Lazy(FuseNorm):
        def apply(self, graph: ModelGraph, ctx: object) -> PassReport:
            return self.report()

    with pytest.raises(PassError, match=r"pass 'fuse_norm'.* norms that could be fused are left: n2, n3"):
        rewritten([Lazy()], from_text8(TWO_LAYERS), SPEC)


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(tmp_path_factory: pytest.TempPathFactory, case: str, quant: str) -> None:
    """The bodies are the same float32 operators in the same order, so that no rounding to float8 falls to another side."""
    model = small(tmp_path_factory.getbasetemp(), case, quant)
    steps = [CudaFp8(), FuseNorm()]
    graph = rewritten(steps, model.graph(), model.build)
    counts, layers = ops_of(graph), model.build.model.num_layers
    if case == "gpt2":
        assert not graph.reports[-1].changed
    else:  # the first norm reads the embedding; rows are picked before the final one
        assert counts["ZooAddRmsNormFp8" if quant == "fp8" else "ZooAddRmsNorm"] == 2 * layers - 1
        assert counts.get("ZooRmsNormFp8", 0) == (quant == "fp8") and counts["Add"] == (9 if case == "llama-biases" else 1)
    np.testing.assert_allclose(model.logits(graph), model.logits(model.graph()), atol=1e-6, rtol=0)
