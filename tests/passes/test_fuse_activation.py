"""fuse_activation: before and expected for each activation, what must not match and why, twice, the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_graphs import CASES, KERNELS, PLAIN, TINY, from_text8, ops_of, rewritten, small
from linear_graphs import nodes_of
from ragged import build_spec

from zoo.errors import PassError
from zoo.graph import ModelGraph, PassReport
from zoo.passes.cuda_fp8 import CudaFp8
from zoo.passes.fuse_activation import FuseActivation, fuse_activations

SPEC = build_spec(TINY)
ACTIVATIONS = {
    "silu": (0, "s = Sigmoid(gate)\n act = Mul(gate, s)"),
    "silu turned": (0, "s = Sigmoid(gate)\n act = Mul(s, gate)"),
    "gelu": (1, "act = Gelu(gate)"),
    "gelu_tanh": (2, 'act = Gelu <approximate = "tanh"> (gate)'),
    "relu": (3, "act = Relu(gate)"),
}


def gated(activation: str, rounded: bool = False) -> str:
    result = "float8e4m3fn[1,S,4] y8" if rounded else "float[1,S,4] y"
    return f"""
    agraph (float[1,S,8] x, float[] y_scale) => ({result})
      <int64[2] sizes = {{4, 4}}> {{
      gate, up = Split <axis = -1> (x, sizes)
      {activation}
      y = Mul(act, up)
      {"y8 = zoo.ZooQuantizeFp8 (y, y_scale)" if rounded else ""}
    }}
    """


SILU = gated(ACTIVATIONS["silu"][1])


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_before_and_expected(case: str) -> None:
    kind, text = ACTIVATIONS[case]
    graph = from_text8(gated(text))
    report = fuse_activations(graph)
    assert nodes_of(graph) == [("ZooGatedActivation", "y", ["x"], ["y"])] and graph.graph.nodes[0].attrs["kind"] == kind
    assert report.counts == {"ZooGatedActivation": 1} and not report.misses
    onnx.checker.check_model(graph.to_onnx(), full_check=True)
    x = 3 * np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32)
    wanted, got = (
        onnxruntime.InferenceSession(each.to_onnx().SerializeToString(), providers=["CPUExecutionProvider"]).run(
            ["y"], {"x": x, "y_scale": np.array(1, np.float32)}
        )[0]
        for each in (from_text8(gated(text)), graph)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_with_a_rounding(case: str) -> None:
    kind, text = ACTIVATIONS[case]
    graph = from_text8(gated(text, rounded=True))
    assert fuse_activations(graph).counts == {"ZooGatedActivationFp8": 1}
    assert nodes_of(graph) == [("ZooGatedActivationFp8", "y", ["x", "y_scale"], ["y8"])]
    assert graph.graph.nodes[0].attrs["kind"] == kind and list(graph.functions) == ["ZooGatedActivationFp8"]
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_the_first_factor_may_be_the_other_half() -> None:
    graph = from_text8(SILU.replace("Mul(act, up)", "Mul(up, act)"))
    assert fuse_activations(graph).changed and nodes_of(graph) == [("ZooGatedActivation", "y", ["x"], ["y"])]


def test_a_rounding_that_is_not_alone_stays() -> None:
    text = gated(ACTIVATIONS["relu"][1], rounded=True).replace("y8 = zoo", "z = Neg(y)\n y8 = zoo")
    graph = from_text8(text.replace("=> (", "=> (float[1,S,4] z, "))
    report = fuse_activations(graph)
    assert [node.op for node in graph.graph.nodes] == ["ZooGatedActivation", "Neg", "ZooQuantizeFp8"]
    assert [(miss.where, miss.reason) for miss in report.misses] == [("y", "y8 rounds y, but z reads it, too")]


OUTPUT = "=> (float[1,S,4] y"
NEAR_MISSES = {
    "no split": (
        SILU.replace("gate, up = Split <axis = -1> (x, sizes)", "gate = Neg(x)\n up = Abs(x)"),
        "its gate gate is not a part of a Split",
    ),
    "turned halves": (
        SILU.replace("gate, up =", "up, gate ="),
        "gate and up are not the first and the second of two parts of up",
    ),
    "three parts": (
        SILU.replace("sizes = {4, 4}", "sizes = {4, 2, 2}")
        .replace("int64[2]", "int64[3]")
        .replace("gate, up =", "gate, up, z ="),
        "gate and up are not the first and the second of two parts of gate",
    ),
    "twice the gate": (
        SILU.replace("Mul(act, up)", "Mul(act, gate)"),
        "gate and gate are not the first and the second of two parts of gate",
    ),
    "uneven": (SILU.replace("{4, 4}", "{6, 2}"), "gate makes parts of 6 and 2"),
    "another axis": (SILU.replace("axis = -1", "axis = 1"), "gate splits axis 1, not the last"),
    "unknown sizes": (
        SILU.replace("float[] y_scale)", "float[] y_scale, int64[2] sizes)").replace("<int64[2] sizes = {4, 4}>", ""),
        "gate has no constant sizes",
    ),
    "gate read by others": (
        SILU.replace("y = Mul", "z = Neg(gate)\n y = Mul").replace(OUTPUT, "=> (float[1,S,4] z, float[1,S,4] y"),
        "z reads gate, too",
    ),
    "activation read by others": (
        SILU.replace("y = Mul", "z = Neg(act)\n y = Mul").replace(OUTPUT, "=> (float[1,S,4] z, float[1,S,4] y"),
        "z reads act, too",
    ),
    "an output": (SILU.replace(OUTPUT, "=> (float[1,S,4] up, float[1,S,4] y"), "up is an output of the graph"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_left_alone_with_a_reason(case: str) -> None:
    text, reason = NEAR_MISSES[case]
    graph = from_text8(text)
    before, report = nodes_of(graph), fuse_activations(graph)
    assert not report.changed and nodes_of(graph) == before
    assert [(miss.where, miss.reason) for miss in report.misses] == [("y", reason)]


def test_a_product_or_an_activation_alone_is_not_near() -> None:
    text = (
        "agraph (float[1,S,4] a, float[1,S,4] b) => (float[1,S,4] c, float[1,S,4] e) {c = Mul(a, b) d = Sigmoid(a) e = Mul(a, d)}"
    )
    report = fuse_activations(from_text8(text))
    assert not report.changed and not report.misses


@pytest.mark.parametrize("text", [SILU, gated(ACTIVATIONS["gelu"][1], rounded=True)])
def test_twice_changes_nothing(text: str) -> None:
    graph = from_text8(text)
    fuse_activations(graph)
    before = nodes_of(graph)
    assert not fuse_activations(graph).changed and nodes_of(graph) == before


def test_who_wants_it() -> None:
    assert FuseActivation().wanted(SPEC, KERNELS) and not FuseActivation().demanded(SPEC, KERNELS)
    assert not FuseActivation().wanted(SPEC, PLAIN)


def test_a_broken_promise() -> None:
    class Lazy(FuseActivation):
        def apply(self, graph: ModelGraph, ctx: object) -> PassReport:
            return self.report()

    with pytest.raises(PassError, match=r"pass 'fuse_activation'.* gates that could be fused are left: y"):
        rewritten([Lazy()], from_text8(SILU), SPEC)


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(tmp_path_factory: pytest.TempPathFactory, case: str, quant: str) -> None:
    """The bodies are the same float32 operators in the same order, so that no rounding to float8 falls to another side."""
    model = small(tmp_path_factory.getbasetemp(), case, quant)
    graph = rewritten([CudaFp8(), FuseActivation()], model.graph(), model.build)
    op = "ZooGatedActivationFp8" if quant == "fp8" else "ZooGatedActivation"
    assert ops_of(graph).get(op, 0) == (0 if case == "gpt2" else model.build.model.num_layers)
    np.testing.assert_allclose(model.logits(graph), model.logits(model.graph()), atol=1e-6, rtol=0)
