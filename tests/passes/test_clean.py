"""clean: before and expected, what must not match, twice, the same numbers, and a graph of 80 layers in no time."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from linear_graphs import from_text, nodes_of

from zoo.passes.clean import clean

BEFORE = """
agraph (float[1,S,4] x, float[4,4] w.used, float[4,4] w.unused, float[4,4] w.dead) => (float[1,S,4] y, float[1,S,4] named) {
  copy = Identity(x)
  again = Identity(copy)
  product = MatMul(again, w.used)
  dead = MatMul(x, w.dead)
  deader = Relu(dead)
  y = Add(product, copy)
  named = Identity(product)
}
"""


def test_before_and_expected() -> None:
    graph = from_text(BEFORE)
    report = clean(graph)
    assert report.counts == {"identities": 2, "dead_nodes": 2, "unused_weights": 2}
    assert nodes_of(graph) == [
        ("MatMul", "product", ["x", "w.used"], ["product"]),
        ("Add", "y", ["product", "x"], ["y"]),
        ("Identity", "named", ["product"], ["named"]),
    ]
    assert list(graph.weights) == ["w.used"] and [v.name for v in graph.graph.inputs] == ["x", "w.used"]
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_an_identity_that_names_an_output_is_a_miss() -> None:
    report = clean(from_text(BEFORE))
    assert [(miss.where, miss.reason) for miss in report.misses] == [("named", "it names the graph output named")]


def test_twice_changes_nothing() -> None:
    graph = from_text(BEFORE)
    clean(graph)
    before = nodes_of(graph)
    assert not clean(graph).changed and nodes_of(graph) == before


def test_data_inputs_stay_even_if_nothing_reads_them() -> None:
    graph = from_text("agraph (float[1,S,4] x, float[1,S,4] spare) => (float[1,S,4] y) { y = Relu(x) }")
    assert not clean(graph).changed
    assert [v.name for v in graph.graph.inputs] == ["x", "spare"]


def test_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((1, 3, 4)), "w.used": rng.standard_normal((4, 4))}
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    plain, cleaned = from_text(BEFORE), from_text(BEFORE)
    clean(cleaned)
    spare = {name: np.zeros((4, 4), np.float32) for name in ("w.unused", "w.dead")}
    want = onnxruntime.InferenceSession(plain.to_onnx().SerializeToString()).run(None, feeds | spare)
    got = onnxruntime.InferenceSession(cleaned.to_onnx().SerializeToString()).run(None, feeds)
    for a, b in zip(want, got, strict=True):
        assert np.array_equal(a, b)


def test_many_layers_take_no_time() -> None:
    """2,000 nodes, half of them dead, half of them in one chain of identities: well below half a second."""
    graph = from_text("agraph (float[4] x) => (float[4] y) { y = Relu(x) }")
    x, last = graph.graph.inputs[0], graph.graph.nodes[0]
    source = x
    for number in range(1000):
        copy, spare = (gs.Variable(f"{kind}.{number}", 1, [4]) for kind in ("copy", "spare"))
        graph.graph.nodes[-1:-1] = [
            gs.Node("Identity", f"identity.{number}", inputs=[source], outputs=[copy]),
            gs.Node("Add", f"add.{number}", inputs=[x, copy], outputs=[spare]),
        ]
        source = copy
    last.inputs = [source]
    start = time.perf_counter()
    report = clean(graph)
    assert time.perf_counter() - start < 0.5
    assert report.counts == {"identities": 1000, "dead_nodes": 1000, "unused_weights": 0}
    assert nodes_of(graph) == [("Relu", "y", ["x"], ["y"])]
