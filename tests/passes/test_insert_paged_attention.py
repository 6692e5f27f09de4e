"""paged_attention: before and expected, each disagreement with the layer table, twice, and the same numbers on real models."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import attention_graph, attention_spec
from linear_graphs import nodes_of
from ragged import Ragged, Traffic, build_spec, engine_limits

from zoo.errors import PassError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.passes.frame import PassContext, run
from zoo.passes.paged_attention import InsertPagedAttention
from zoo.spec import ModelSpec
from zoo.targets import TARGETS
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight, tensor

CPU = TARGETS["onnxruntime"]
SPEC = attention_spec(4, 2, 8)
WINDOW = attention_spec(4, 2, 8, window=6, softcap=3.0)


def insert(graph: ModelGraph, spec: ModelSpec = SPEC) -> ModelGraph:
    return run([InsertPagedAttention()], graph, build_spec(spec), CPU, check=True)


def test_before_and_expected() -> None:
    graph = insert(attention_graph(SPEC))
    looked_up = [
        ("Gather", "{0}.token", ["embed.{0}", "token_ids.row"], ["{0}.token.out"]),
        ("Gather", "{0}.place", ["place.{0}", "positions.row"], ["{0}.place.out"]),
        ("Add", "layer.0.{0}", ["{0}.token.out", "{0}.place.out"], ["layer.0.{0}.out"]),
    ]

    def filled(role: str) -> list[tuple[str, str, list[str], list[str]]]:
        return [
            (op, name.format(role), [i.format(role) for i in ins], [o.format(role) for o in outs])
            for op, name, ins, outs in looked_up
        ]

    assert nodes_of(graph) == [
        ("Cast", "token_ids.cast", ["token_ids"], ["token_ids.int64"]),
        ("Unsqueeze", "token_ids.unsqueeze", ["token_ids.int64", "ragged.axis"], ["token_ids.row"]),
        ("Cast", "positions.cast", ["positions"], ["positions.int64"]),
        ("Unsqueeze", "positions.unsqueeze", ["positions.int64", "ragged.axis"], ["positions.row"]),
        *filled("q"),
        *filled("k"),
        *filled("v"),
        (
            "ZooPagedAttention",
            "layer.0.attention",
            ["layer.0.q.out", "layer.0.k.out", "layer.0.v.out", "kv.0", "block_table.full", "query_starts", "kv_lengths"],
            ["layer.0.attention.out", "kv_out.0"],
        ),
        ("Squeeze", "logit_rows.squeeze", ["layer.0.attention.out", "logit_rows.axis"], ["logit_rows.flat"]),
        ("Gather", "logit_rows.gather", ["logit_rows.flat", "logit_rows"], ["logit_rows.hidden"]),
        ("RMSNormalization", "final_norm", ["logit_rows.hidden", "final_norm"], ["final_norm.out"]),
        ("MatMul", "lm_head", ["final_norm.out", "lm_head"], ["logits"]),
    ]


def test_inputs_and_outputs_are_the_engine_abi() -> None:
    graph = insert(attention_graph(SPEC))
    inputs = [(v.name, onnx.TensorProto.DataType.Name(int(v.dtype)), list(v.shape)) for v in graph.data_inputs]
    pool = [129, 2, 4, 2, 8]
    assert inputs == [
        ("token_ids", "INT32", ["T"]),
        ("positions", "INT32", ["T"]),
        ("query_starts", "INT32", ["B+1"]),
        ("kv_lengths", "INT32", ["B"]),
        ("block_table.full", "INT32", ["B", "P"]),
        ("logit_rows", "INT32", ["R"]),
        ("kv.0", "FLOAT", pool),
    ]
    assert graph.graph.inputs[7].name in graph.weights
    assert [(v.name, list(v.shape)) for v in graph.graph.outputs] == [("logits", ["R", 50]), ("kv_out.0", pool)]
    assert graph.ragged


def test_attributes_come_from_the_layer_table() -> None:
    graph = insert(attention_graph(WINDOW), WINDOW)
    node = next(node for node in graph.graph.nodes if node.op == "ZooPagedAttention")
    assert node.domain == "zoo" and node.attrs == {
        "num_heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "block_size": 4,
        "scale": 8**-0.5,
        "window": 6,
        "softcap": 3.0,
        "plugin_namespace": "zoo",
        "plugin_version": "1",
    }


def test_masks_fall_away() -> None:
    graph = insert(attention_graph(WINDOW), WINDOW)
    assert not {node.op for node in graph.graph.nodes} & {"Less", "Range", "Sub", "Shape"}
    assert graph.reports[-1].counts == {"ZooPagedAttention": 1, "masks": 1}


def test_no_shape_still_says_batch_or_sequence() -> None:
    graph = insert(attention_graph(WINDOW), WINDOW)
    sizes = [size for tensor in graph.graph.tensors().values() for size in tensor.shape or ()]
    assert "T" in sizes and "R" in sizes and not {"batch", "sequence"} & set(map(str, sizes))


def attention(graph: ModelGraph) -> dict[str, object]:
    return next(node for node in graph.graph.nodes if node.op == "Attention").attrs


def rename(graph: ModelGraph) -> None:
    next(node for node in graph.graph.nodes if node.op == "Attention").name = "block.0.attn"


def drop_mask(graph: ModelGraph) -> None:
    next(node for node in graph.graph.nodes if node.op == "Attention").inputs.pop()


def head_is_no_weight(graph: ModelGraph) -> None:
    del graph.weights["lm_head"]


BROKEN: dict[str, tuple[ModelSpec, Callable[[ModelGraph], object], str]] = {
    "heads": (SPEC, lambda g: attention(g).update(q_num_heads=8), "q_num_heads is 8, the layer table says 4"),
    "kv heads": (SPEC, lambda g: attention(g).update(kv_num_heads=4), "kv_num_heads is 4, the layer table says 2"),
    "scale": (SPEC, lambda g: attention(g).update(scale=0.5), "scale is 0.5, the layer table says 0.35355"),
    "not causal": (SPEC, lambda g: attention(g).pop("is_causal"), "is_causal is 0, the layer table says 1"),
    "soft cap": (WINDOW, lambda g: attention(g).pop("softcap"), "softcap is 0.0, the layer table says 3.0"),
    "unknown attribute": (SPEC, lambda g: attention(g).update(qk_matmul_output_mode=2), "qk_matmul_output_mode"),
    "name": (SPEC, rename, "block.0.attn: it is not layer.0.attention to layer.0.attention"),
    "no mask": (WINDOW, drop_mask, "the layer table says window 6, but it has no mask"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_disagrees_with_the_table_is_a_miss_and_nothing_changes(case: str) -> None:
    spec, breaks, reason = BROKEN[case]
    graph = attention_graph(spec)
    breaks(graph)
    before = nodes_of(graph)
    report = InsertPagedAttention().apply(graph, PassContext(build_spec(spec), CPU))
    assert reason in "; ".join(f"{miss.where}: {miss.reason}" for miss in report.misses)
    assert not report.changed and nodes_of(graph) == before and not graph.ragged
    with pytest.raises(PassError, match=r"pass 'paged_attention'.*nearest misses"):
        insert(graph, spec)


def test_a_mask_without_a_window_is_a_miss() -> None:
    graph = attention_graph(WINDOW)
    graph.layers = attention_graph(attention_spec(4, 2, 8, softcap=3.0)).layers
    report = InsertPagedAttention().apply(graph, PassContext(build_spec(WINDOW), CPU))
    assert [miss.reason for miss in report.misses] == ["it has a mask, but the layer table says no window, sinks or alibi"]


def test_a_head_that_is_no_linear_layer_is_a_miss() -> None:
    graph = attention_graph(SPEC)
    head_is_no_weight(graph)
    graph.graph.inputs = [v for v in graph.graph.inputs if v.name != "lm_head"]
    report = InsertPagedAttention().apply(graph, PassContext(build_spec(SPEC), CPU))
    assert "do not come from a MatMul by a weight" in report.misses[0].reason


def bend(graph: ModelGraph, *shape: int) -> list[gs.Node]:
    """Behind the head: times a weight, by another, tanh, times that again; ``shape`` is that of the first weight."""
    weights = [graph.add_weight(Weight(name, graph.dtype, tensor(name, size))) for name, size in (("scale", shape), ("cap", ()))]
    x, steps = graph.graph.outputs[0], []
    for op, name, inputs in (
        ("Mul", "scaled", [weights[0]]),
        ("Div", "ratio", [weights[1]]),
        ("Tanh", "bent", []),
        ("Mul", "capped", [weights[1]]),
    ):
        out = gs.Variable(f"{name}.out", x.dtype, list(x.shape))
        steps.append(gs.Node(op, name, inputs=[x, *inputs], outputs=[out]))
        x = out
    graph.graph.outputs[0].name, x.name = "lm_head.out", "logits"
    graph.graph.outputs[0] = x
    graph.graph.nodes += steps
    return steps


@pytest.mark.parametrize("shape", [(), (50,)], ids=["a number", "a row"])
def test_a_head_may_be_scaled_and_bent(shape: tuple[int, ...]) -> None:
    graph = attention_graph(SPEC)
    bend(graph, *shape)
    insert(graph)
    names = [node.name for node in graph.graph.nodes]
    behind = ["final_norm", "lm_head", "scaled", "ratio", "bent", "capped"]
    assert names[names.index("logit_rows.gather") + 1 :] == behind
    assert [node.outputs[0].shape for node in graph.graph.nodes[-6:]] == [["R", 32], *[["R", 50]] * 5]


def scaled_by_rows(graph: ModelGraph) -> None:
    bend(graph, 3, 50)


def scaled_by_itself(graph: ModelGraph) -> None:
    first = bend(graph)[0]
    first.inputs[1] = first.inputs[0]


@pytest.mark.parametrize("breaks", [scaled_by_rows, scaled_by_itself])
def test_a_head_that_is_joined_with_more_than_weights_of_its_rows_is_a_miss(breaks: Callable[[ModelGraph], None]) -> None:
    graph = attention_graph(SPEC)
    breaks(graph)
    report = InsertPagedAttention().apply(graph, PassContext(build_spec(SPEC), CPU))
    assert [(miss.where, miss.reason) for miss in report.misses] == [
        ("logits", "they do not come from a MatMul by a weight, but from scaled")
    ]


def test_other_inputs_are_refused() -> None:
    graph = attention_graph(SPEC)
    graph.variable("positions").name = "position_ids"
    with pytest.raises(PassError, match="starts from inputs token_ids, positions"):
        insert(graph)


def test_twice_changes_nothing() -> None:
    graph = insert(attention_graph(SPEC))
    before = nodes_of(graph)
    assert not InsertPagedAttention().apply(graph, PassContext(build_spec(SPEC), CPU)).changed
    assert nodes_of(graph) == before


@pytest.mark.parametrize("compiler", ["onnxruntime", "tensorrt_rtx"])
def test_eighty_layers_are_rewritten_in_well_under_a_second(compiler: str, tmp_path: Path) -> None:
    """Seconds of this process, fastest of three: 0.15 where nothing else runs."""
    small = families.spec(families.make_checkpoint(tmp_path, "llama"))
    spec = dataclasses.replace(small, num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, head_dim=128)
    build, seconds = build_spec(spec, compiler=compiler), []
    for _ in range(3):
        graph = expand(spec, "float32")
        start = time.process_time()
        run_passes(graph, build, TARGETS[compiler])
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.6


@pytest.mark.parametrize("case", families.CASES)
def test_whole_models_keep_their_numbers(case: str, tmp_path: Path) -> None:
    """All passes, on a checkpoint of each family: chunks, decode and mixed batches within 1e-5 of the plain graph."""
    family, overrides = families.CASES[case]
    folder = families.make_checkpoint(tmp_path, family, **overrides)
    spec, tensors = families.spec(folder), Tensors.open(folder)
    a, b = families.prompt(folder, 30, 1), families.prompt(folder, 21, 2)
    plain = families.Plain(expand(spec, "float32"), tensors)
    want_a, want_b = plain.logits([a])[0], plain.logits([b])[0]
    build = build_spec(spec)
    graph = run_passes(expand(spec, "float32", build.limits.max_context), build, CPU, check=True)
    weights = {name: materialize(weight, tensors, {}) for name, weight in graph.weights.items()}
    traffic = Traffic(Ragged(graph, weights, engine_limits(build.limits)))

    def close(got: np.ndarray, want: np.ndarray) -> None:
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want_a).max()

    close(traffic.step({"a": a[:13]}, rows=range(13)), want_a[:13])
    close(traffic.step({"b": b[:7], "a": a[13:14]}), np.stack([want_b[6], want_a[13]]))
    close(traffic.step({"a": a[14:15], "b": b[7:8]}), np.stack([want_a[14], want_b[7]]))
    close(traffic.step({"a": a[15:30], "b": b[8:21]}, rows=range(28)), np.concatenate([want_a[15:], want_b[8:]]))
