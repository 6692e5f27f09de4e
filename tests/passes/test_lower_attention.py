"""lower_attention: before and expected for each target's lowering, what stays, twice.

The numbers are judged in tests/plugins/test_paged_attention.py.
"""

from __future__ import annotations

import dataclasses

import onnx
import pytest
from attention_graphs import attention_graph, attention_spec
from linear_graphs import nodes_of
from ragged import build_spec

from zoo.errors import PassError
from zoo.graph import ModelGraph
from zoo.passes.frame import PassContext, run
from zoo.passes.lower_attention import LowerAttention, lower_attention
from zoo.passes.paged_attention import InsertPagedAttention
from zoo.plugins.paged_attention import PLUGIN
from zoo.targets import TARGETS

SPEC = attention_spec(4, 2, 8)
QKV = ["layer.0.q.out", "layer.0.k.out", "layer.0.v.out", "kv.0"]
LOOP_INPUTS = [
    "pool_writes",
    "pool_blanks",
    "context_blocks",
    "row_positions",
    "work_items",
    "decode_step",
    "decode_keys",
    "decode_values",
    "decode_bias",
]
PADDED_INPUTS = ["pool_slots", "query_rows", "token_rows"]


def ragged() -> ModelGraph:
    return run([InsertPagedAttention()], attention_graph(SPEC), build_spec(SPEC), TARGETS["onnxruntime"])


def lowered(kind: str) -> ModelGraph:
    target = dataclasses.replace(TARGETS["onnxruntime"], attention=kind)
    return run([LowerAttention()], ragged(), build_spec(SPEC), target, check=True)


@pytest.mark.parametrize(
    ("kind", "op", "inputs", "index"),
    [
        ("loop", "ZooPagedAttentionLoop", [*QKV, *LOOP_INPUTS], LOOP_INPUTS),
        (
            "padded",
            "ZooPagedAttentionPadded",
            [*QKV, "block_table.full", "query_starts", "kv_lengths", *PADDED_INPUTS],
            PADDED_INPUTS,
        ),
    ],
)
def test_before_and_expected(kind: str, op: str, inputs: list[str], index: list[str]) -> None:
    before, graph = nodes_of(ragged()), lowered(kind)
    place = next(n for n, node in enumerate(before) if node[0] == "ZooPagedAttention")
    expected = (op, "layer.0.attention", inputs, ["layer.0.attention.out", "kv_out.0"])
    assert nodes_of(graph) == [*before[:place], expected, *before[place + 1 :]]
    assert [extra.name for extra in graph.index_inputs] == index
    names = [variable.name for variable in graph.graph.inputs]
    assert names[6 : 7 + len(index)] == ["kv.0", *index] and names[7 + len(index)] in graph.weights
    assert list(graph.functions) == [op]
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_the_node_keeps_its_attributes() -> None:
    attrs = [node.attrs for node in lowered("loop").graph.nodes if node.domain == "zoo"]
    assert attrs == [node.attrs for node in ragged().graph.nodes if node.domain == "zoo"]


def test_layers_of_different_kinds_get_different_functions() -> None:
    graph = ragged()
    node = next(node for node in graph.graph.nodes if node.domain == "zoo")
    node.attrs["window"] = 6
    report = lower_attention(graph, "loop")
    assert report.counts == {"ZooPagedAttentionLoopWindow": 1} and list(graph.functions) == ["ZooPagedAttentionLoopWindow"]


def test_a_target_with_plugins_keeps_the_node_and_its_body() -> None:
    target = dataclasses.replace(TARGETS["tensorrt"], attention="plugin")
    assert not LowerAttention().wanted(build_spec(SPEC), target)
    graph = run([LowerAttention()], ragged(), build_spec(SPEC), target)
    assert "ZooPagedAttention" in graph.functions and graph.index_inputs == []


def test_a_plain_graph_is_refused() -> None:
    with pytest.raises(PassError, match=r"pass 'lower_attention'.*a graph with paged attention"):
        run([LowerAttention()], attention_graph(SPEC), build_spec(SPEC), TARGETS["onnxruntime"])


def test_a_ragged_graph_without_the_node_is_an_error() -> None:
    graph = lowered("loop")
    with pytest.raises(PassError, match="no node came near"):
        run([LowerAttention()], graph, build_spec(SPEC), TARGETS["onnxruntime"])


def test_twice_changes_nothing() -> None:
    graph = lowered("padded")
    before, inputs = nodes_of(graph), list(graph.index_inputs)
    report = LowerAttention().apply(graph, PassContext(build_spec(SPEC), TARGETS["tensorrt_rtx"]))
    assert not report.changed and nodes_of(graph) == before and graph.index_inputs == inputs


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_names_a_lowering_that_exists(name: str) -> None:
    assert TARGETS[name].attention in {"plugin", *PLUGIN.lowerings}
