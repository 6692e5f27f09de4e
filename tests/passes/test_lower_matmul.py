"""lower_matmul: before and expected, what must not match and why, twice, the same numbers."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
from linear_graphs import from_text, nodes_of

from zoo.graph_templates import expand
from zoo.passes.lower_matmul import LowerMatMul, lower_matmul
from zoo.targets import TARGETS
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight, tensor

BEFORE = """
agraph (float[1,S,8] x, float[8,4] w.a, float[4,8] w.b, float[8,4] w.twice) => (float[1,S,8] y, float[1,S,4] z) {
  a = MatMul(x, w.a)
  square = MatMul(a, y)
  y = MatMul(a, w.b)
  left = MatMul(x, w.twice)
  right = MatMul(y, w.twice)
  z = Add(left, right)
}
""".replace("  square = MatMul(a, y)\n", "")


def test_before_and_expected() -> None:
    graph = from_text(BEFORE)
    report = lower_matmul(graph)
    assert report.counts == {"FusedMatMul": 2}
    assert nodes_of(graph) == [
        ("FusedMatMul", "a", ["x", "w.a"], ["a"]),
        ("FusedMatMul", "y", ["a", "w.b"], ["y"]),
        ("MatMul", "left", ["x", "w.twice"], ["left"]),
        ("MatMul", "right", ["y", "w.twice"], ["right"]),
        ("Add", "z", ["left", "right"], ["z"]),
    ]
    lowered = graph.graph.nodes[0]
    assert (lowered.domain, lowered.attrs) == ("com.microsoft", {"transB": 1})
    assert graph.weights["w.a"] == Weight("w.a", "float32", tensor("w.a.stored", (4, 8)))
    assert graph.variable("w.a").shape == [4, 8]


def test_misses_say_why() -> None:
    graph = from_text(BEFORE)
    weight = graph.weights["w.a"]
    graph.replace_weight(graph.variable("w.a"), Weight("w.a", "float32", tensor("conv1d", weight.shape)))
    assert [(m.where, m.reason) for m in lower_matmul(graph).misses] == [
        ("a", "w.a is stored [in, out]"),
        ("left", "2 nodes read w.twice"),
        ("right", "2 nodes read w.twice"),
    ]
    between = from_text("agraph (float[1,S,S] x) => (float[1,S,S] y) { y = MatMul(x, x) }")
    assert [m.reason for m in lower_matmul(between).misses] == ["x is not a weight of two axes"]


def test_twice_changes_nothing() -> None:
    graph = from_text(BEFORE)
    lower_matmul(graph)
    before = nodes_of(graph)
    assert not lower_matmul(graph).changed and nodes_of(graph) == before


def test_a_tied_head_reads_the_embedding(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    graph = expand(families.spec(folder), "float32")
    assert "lm_head" in graph.weights
    report = lower_matmul(graph)
    assert report.counts["shared_weights"] == 1 and "lm_head" not in graph.weights
    head = next(node for node in graph.graph.nodes if node.name == "lm_head")
    assert head.op == "FusedMatMul" and head.inputs[1] is graph.variable("embed")


def test_a_fused_weight_is_read_as_stored() -> None:
    """What a target binds without transposing: nothing but tensors, joined."""
    graph = from_text(BEFORE)
    lower_matmul(graph)
    assert {weight.recipe.op for name, weight in graph.weights.items() if name != "w.twice"} == {"tensor"}


def test_the_same_numbers(tmp_path: Path) -> None:
    """Within 1e-6 of the largest logit: the products are the same, their order in a sum may differ."""
    for family in ("llama", "gpt2"):
        folder = families.make_checkpoint(tmp_path, family)
        tensors, ids = Tensors.open(folder), families.prompt(folder, 12)
        plain, lowered = (expand(families.spec(folder), "float32") for _ in range(2))
        assert lower_matmul(lowered).changed
        want, got = (families.Plain(graph, tensors).logits([ids]) for graph in (plain, lowered))
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_only_for_targets_that_have_it() -> None:
    wanted = {name: LowerMatMul().wanted(None, target) for name, target in TARGETS.items()}  # type: ignore[arg-type]
    assert wanted["onnxruntime"] and not wanted["tensorrt_rtx"] and not wanted["tensorrt"]
