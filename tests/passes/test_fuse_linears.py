"""fuse_linears: before and expected, what must not match and why, twice, the same numbers, and recipes that stay simple."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import onnx
import pytest
from linear_graphs import from_text, nodes_of

from zoo.graph_templates import expand
from zoo.passes.fuse_linears import fuse_linears, join, join_along
from zoo.weights.reader import Tensors
from zoo.weights.recipe import concat, slice_, tensor, transpose

QKV = """
agraph (float[1,S,8] x, float[8,4] w.q, float[8,2] w.k, float[8,2] w.v) =>
       (float[1,S,4] layer.0.q.out, float[1,S,2] layer.0.k.out, float[1,S,2] layer.0.v.out) {
  layer.0.q.out = MatMul(x, w.q)
  layer.0.k.out = MatMul(x, w.k)
  layer.0.v.out = MatMul(x, w.v)
}
"""
BIASES = """
agraph (float[1,S,8] x, float[8,4] w.gate, float[4] b.gate, float[8,4] w.up, float[4] b.up) => (float[1,S,4] y) {
  layer.0.gate = MatMul(x, w.gate)
  layer.0.gate.bias = Add(layer.0.gate, b.gate)
  layer.0.act = Sigmoid(layer.0.gate.bias)
  layer.0.up = MatMul(x, w.up)
  layer.0.up.bias = Add(b.up, layer.0.up)
  y = Mul(layer.0.act, layer.0.up.bias)
}
"""


def test_three_become_one_and_a_split() -> None:
    graph = from_text(QKV)
    report = fuse_linears(graph)
    assert report.counts == {"qkv": 1} and not report.misses
    assert nodes_of(graph) == [
        ("MatMul", "layer.0.qkv", ["x", "layer.0.qkv"], ["layer.0.qkv.out"]),
        (
            "Split",
            "layer.0.qkv.split",
            ["layer.0.qkv.out", "layer.0.qkv.split.sizes"],
            ["layer.0.q.out", "layer.0.k.out", "layer.0.v.out"],
        ),
    ]
    assert graph.graph.nodes[1].inputs[1].values.tolist() == [4, 2, 2]
    stored = [tensor("w.q.stored", (4, 8)), tensor("w.k.stored", (2, 8)), tensor("w.v.stored", (2, 8))]
    assert list(graph.weights) == ["layer.0.qkv"]
    assert graph.weights["layer.0.qkv"].recipe == transpose(concat(stored, 0), (1, 0))
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_biases_are_joined_too() -> None:
    graph = from_text(BIASES)
    assert fuse_linears(graph).counts == {"gate_up": 1}
    assert nodes_of(graph) == [
        ("MatMul", "layer.0.gate_up", ["x", "layer.0.gate_up"], ["layer.0.gate_up.out"]),
        ("Add", "layer.0.gate_up.bias", ["layer.0.gate_up.out", "layer.0.gate_up.bias"], ["layer.0.gate_up.bias.out"]),
        (
            "Split",
            "layer.0.gate_up.split",
            ["layer.0.gate_up.bias.out", "layer.0.gate_up.split.sizes"],
            ["layer.0.gate.bias", "layer.0.up.bias"],
        ),
        ("Sigmoid", "layer.0.act", ["layer.0.gate.bias"], ["layer.0.act"]),
        ("Mul", "y", ["layer.0.act", "layer.0.up.bias"], ["y"]),
    ]
    assert graph.weights["layer.0.gate_up.bias"].recipe == concat([tensor(f"b.{r}.stored", (4,)) for r in ("gate", "up")], 0)
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_the_first_layer_in_graph_order_gives_the_place() -> None:
    """k stands before q here, and something reads k before q is made."""
    graph = from_text(
        QKV.replace("layer.0.q.out = MatMul(x, w.q)", "")
        .replace("layer.0.v.out = ", "early = Neg(layer.0.k.out)\n layer.0.q.out = MatMul(x, w.q)\n layer.0.v.out = ")
        .replace("(float[1,S,4] layer.0.q.out,", "(float[1,S,2] early, float[1,S,4] layer.0.q.out,")
    )
    assert fuse_linears(graph).counts == {"qkv": 1}
    assert [node.op for node in graph.graph.nodes] == ["MatMul", "Split", "Neg"]
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


NEAR_MISSES = {
    "another input": (
        QKV.replace("x, float[8,4] w.q", "x, float[1,S,8] z, float[8,4] w.q").replace("MatMul(x, w.v)", "MatMul(z, w.v)"),
        "layer.0.v reads z, layer.0.q reads x",
    ),
    "no weight": (
        QKV.replace("MatMul(x, w.k)", "MatMul(x, z)").replace("float[8,2] w.k", "float[8,2] z"),
        "layer.0.k multiplies by z, which is not a weight of two axes",
    ),
    "weight of three axes": (QKV.replace("float[8,2] w.k", "float[1,8,2] w.k"), "layer.0.k multiplies by w.k, which"),
    "shared weight": (QKV.replace("MatMul(x, w.v)", "MatMul(x, w.k)"), "the weight w.k is read by 2 nodes"),
    "missing": (
        QKV.replace("layer.0.v.out = MatMul(x, w.v)", "other = MatMul(x, w.v)").replace("[1,S,2] layer.0.v.out", "[1,S,2] other"),
        "there is no node layer.0.v",
    ),
    "not a product": (
        QKV.replace("layer.0.k.out = MatMul(x, w.k)", "layer.0.k.out = Gemm(x, w.k)"),
        "layer.0.k is Gemm, not MatMul",
    ),
    "one bias": (
        BIASES.replace("layer.0.up.bias = Add(b.up, layer.0.up)", "").replace(
            "layer.0.act, layer.0.up.bias", "layer.0.act, layer.0.up"
        ),
        "of layer.0.gate and layer.0.up only one has a bias",
    ),
    "product seen outside": (
        BIASES.replace("=> (float[1,S,4] y)", "=> (float[1,S,4] y, float[1,S,4] layer.0.up)"),
        "of layer.0.gate and layer.0.up only one has a bias",
    ),
    "bias of another shape": (
        BIASES.replace("float[4] b.up", "float[1] b.up"),
        "of layer.0.gate and layer.0.up only one has a bias",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_left_alone_with_a_reason(case: str) -> None:
    text, reason = NEAR_MISSES[case]
    graph = from_text(text)
    before = nodes_of(graph)
    report = fuse_linears(graph)
    assert not report.changed and nodes_of(graph) == before
    (miss,) = report.misses
    assert miss.where == ("layer.0.gate_up" if "gate" in text else "layer.0.qkv") and miss.reason.startswith(reason)


def test_dtypes_must_agree() -> None:
    graph = from_text(QKV)
    weight = graph.weights["w.v"]
    graph.weights["w.v"] = type(weight)(weight.name, "float16", weight.recipe)
    assert fuse_linears(graph).misses[0].reason == "layer.0.v is float16, layer.0.q is float32"


@pytest.fixture(scope="module", params=["llama-grouped", "llama-biases", "qwen2-tied-odd", "qwen3-norms", "gpt2-odd"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = families.CASES[request.param]
    return families.make_checkpoint(tmp_path_factory.mktemp("checkpoints"), family, **overrides)


def test_same_numbers_and_twice_changes_nothing(folder: Path) -> None:
    model = families.spec(folder)
    graph = expand(model, "float32")
    with Tensors.open(folder) as tensors:
        before = families.Plain(graph.copy(), tensors).logits([families.prompt(folder, 12)])
        report = fuse_linears(graph)
        assert report.counts == {"qkv": model.num_layers} | ({"gate_up": model.num_layers} if model.mlp == "gated" else {})
        assert not report.misses
        after = families.Plain(graph, tensors).logits([families.prompt(folder, 12)])
    np.testing.assert_allclose(after, before, atol=1e-5, rtol=0)
    fused = nodes_of(graph)
    again = fuse_linears(graph)
    assert not again.changed and not again.misses and nodes_of(graph) == fused


def test_weights_stay_in_the_order_of_use(folder: Path) -> None:
    graph = expand(families.spec(folder), "float32")
    fuse_linears(graph)
    read = [tensor.name for node in graph.graph.nodes for tensor in node.inputs if tensor.name in graph.weights]
    order = [name for name in dict.fromkeys(read) if not name.startswith("rope")]
    assert [name for name in graph.weights if not name.startswith("rope")] == order
    assert [v.name for v in graph.graph.inputs] == ["token_ids", "positions", *graph.weights]


def test_a_graph_without_shapes_is_fused_too() -> None:
    """Paged-attention insertion clears shapes that are no longer true."""
    graph = from_text(QKV)
    graph.graph.inputs[0].shape = None
    assert fuse_linears(graph).changed and graph.graph.nodes[0].outputs[0].shape is None


def test_joined_recipes_read_the_checkpoint_as_it_is_stored() -> None:
    whole = tensor("c_attn", (8, 12))  # GPT-2 stores [in, out], all three side by side
    parts = [slice_(whole, 1, start, start + 4) for start in (0, 4, 8)]
    assert join(parts) == whole
    assert join(parts[:2]) == slice_(whole, 1, 0, 8)
    assert join([parts[0], parts[2]]) == concat([parts[0], parts[2]], 1)
    fused = tensor("qkv", (12, 8))  # stored [out, in], all three above each other
    assert join([transpose(slice_(fused, 0, start, start + 4), (1, 0)) for start in (0, 4, 8)]) == transpose(fused, (1, 0))
    bias = tensor("bias", (12,))
    assert join_along([slice_(bias, 0, 0, 4), slice_(bias, 0, 4, 12)], 0) == bias
    assert join_along([slice_(bias, 0, 4, 12), slice_(bias, 0, 0, 4)], 0).op == "concat"
    assert join_along([slice_(bias, 0, 0, 4), slice_(tensor("other", (12,)), 0, 4, 12)], 0).op == "concat"
