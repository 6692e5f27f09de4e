"""paged_attention for layers with sinks or linear biases: the plain graph is what numpy says, and what becomes of it.

The numbers of what becomes of it are judged in tests/plugins/test_paged_attention.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from attention_graphs import VOCAB, attention_graph, attention_spec, logits_of, random_arrays
from kernel_graphs import TINY
from linear_graphs import nodes_of
from ragged import build_spec

from zoo.errors import PassError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.passes.frame import PassContext, run
from zoo.passes.paged_attention import InsertPagedAttention
from zoo.plugins.paged_attention import PLUGINS
from zoo.spec import ModelSpec
from zoo.targets import TARGETS
from zoo.weights.recipe import Weight, tensor

CPU = TARGETS["onnxruntime"]
SPECS = {
    "sinks": attention_spec(4, 2, 8, sinks=True),
    "window-sinks": attention_spec(4, 2, 8, window=3, sinks=True),
    "softcap-sinks": attention_spec(4, 2, 8, softcap=1.5, sinks=True),
    "alibi": attention_spec(4, 2, 8, alibi=True),
    "window-softcap-alibi": attention_spec(4, 2, 8, window=3, softcap=1.5, alibi=True),
}
SINKS, ALIBI = SPECS["sinks"], SPECS["alibi"]


def insert(graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
    return run([InsertPagedAttention()], graph, build_spec(spec), CPU, check=True)


def op_of(spec: ModelSpec) -> str:
    return "ZooPagedAttentionSinks" if spec.sinks else "ZooPagedAttentionSlopes"


@pytest.mark.parametrize("case", SPECS)
def test_the_plain_graph_means_what_its_layer_table_says(case: str) -> None:
    """ONNX Runtime's own Attention, with masks for sinks and biases, within 1e-5 of numpy: so the pass may read the table."""
    spec = SPECS[case]
    graph = attention_graph(spec)
    arrays, model = random_arrays(graph), graph.to_onnx()
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(1).integers(0, VOCAB, (2, 9))
    feeds = arrays | {"token_ids": rows, "positions": np.tile(np.arange(9), (2, 1))}
    (got,) = session.run(None, {one.name: feeds[one.name] for one in session.get_inputs()})
    for row, found in zip(rows, got, strict=True):
        want = logits_of(arrays, spec, row.tolist())
        assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("case", SPECS)
def test_before_and_expected(case: str) -> None:
    """Keys and values as they are without a sink's position; the weight behind the tables; nothing of the mask."""
    spec = SPECS[case]
    graph = insert(attention_graph(spec), spec)
    op, weight = op_of(spec), "layer.0.sinks" if spec.sinks else "alibi.slopes"
    ops = [node.op for node in graph.graph.nodes]
    node = next(node for node in graph.graph.nodes if node.domain == "zoo")
    tables = ["block_table.full", "query_starts", "kv_lengths"]
    assert [one.name for one in node.inputs] == ["layer.0.q.out", "layer.0.k.out", "layer.0.v.out", "kv.0", *tables, weight]
    assert (node.op, [one.name for one in node.outputs]) == (op, ["layer.0.attention.out", "kv_out.0"])
    assert (node.attrs["window"], node.attrs["softcap"]) == (spec.window, spec.softcap)
    looked_up = ["Cast", "Unsqueeze", "Gather", "Gather", "Gather"]
    if spec.position == "learned":
        looked_up += [*looked_up, "Add", "Add", "Add"]
    assert sorted(ops) == sorted([*looked_up, op, "Squeeze", "Gather", "RMSNormalization", "MatMul"])
    assert graph.reports[-1].counts == {op: 1, "masks": 1} and list(graph.functions) == [op]
    assert graph.weights[weight].dtype == ("float32" if spec.position == "alibi" else graph.dtype)


@pytest.mark.parametrize("positions", [True, False])
def test_the_abi_has_positions_whether_or_not_a_graph_reads_them(positions: bool) -> None:
    graph = insert(attention_graph(ALIBI, positions=positions), ALIBI)
    names = ["token_ids", "positions", "query_starts", "kv_lengths", "block_table.full", "logit_rows", "kv.0"]
    assert [one.name for one in graph.data_inputs] == names
    assert not graph.variable("positions").outputs


@pytest.mark.parametrize("case", SPECS)
def test_twice_changes_nothing(case: str) -> None:
    graph = insert(attention_graph(SPECS[case]), SPECS[case])
    before = nodes_of(graph)
    assert not InsertPagedAttention().apply(graph, PassContext(build_spec(SPECS[case]), CPU)).changed
    assert nodes_of(graph) == before


def named(graph: ModelGraph, name: str) -> gs.Node:
    return next(node for node in graph.graph.nodes if node.name == name)


def table(**options: Any) -> Callable[[ModelGraph], None]:
    def change(graph: ModelGraph) -> None:
        graph.layers[0] = dataclasses.replace(graph.layers[0], **options)

    return change


def attribute(name: str, **attrs: Any) -> Callable[[ModelGraph], None]:
    return lambda graph: named(graph, name).attrs.update(attrs)


def no_concat(graph: ModelGraph) -> None:
    attention = named(graph, "layer.0.attention")
    attention.inputs[2] = attention.inputs[2].inputs[0].inputs[0]


def rename_concat(graph: ModelGraph) -> None:
    named(graph, "layer.0.k.sink").name = "layer.1.k.sink"


def one_more_part(graph: ModelGraph) -> None:
    node = named(graph, "layer.0.k.sink")
    node.inputs.append(node.inputs[1])


def no_mask(graph: ModelGraph) -> None:
    named(graph, "layer.0.attention").inputs.pop()


def other_weight(name: str, dtype: str, size: int) -> Callable[[ModelGraph], None]:
    return lambda graph: graph.weights.__setitem__(name, Weight(name, dtype, tensor(name, (size,))))


def mask_of_another_weight(graph: ModelGraph) -> None:
    extra = graph.add_weight(Weight("other", "float32", tensor("other", (4, 1, 1))))
    attention = named(graph, "layer.0.attention")
    moved = gs.Variable("moved", attention.inputs[3].dtype)
    graph.graph.nodes.insert(-3, gs.Node("Add", "moved", inputs=[attention.inputs[3], extra], outputs=[moved]))
    attention.inputs[3] = moved


NEAR_MISSES: dict[str, tuple[ModelSpec, Callable[[ModelGraph], None], str]] = {
    "sinks that the table does not know": (SINKS, table(sinks=False), "is_causal is 0, the layer table says 1"),
    "sinks and causality": (SINKS, attribute("layer.0.attention", is_causal=1), "is_causal is 1, the layer table says 0"),
    "biases that the table does not know": (
        ALIBI,
        table(alibi=False),
        "it has a mask, but the layer table says no window, sinks or alibi",
    ),
    "biases in place of a window": (
        ALIBI,
        table(alibi=False, window=3),
        "its mask is made from alibi.slopes, by the layer table from no weight",
    ),
    "a window in place of biases": (
        attention_spec(4, 2, 8, window=3),
        table(alibi=True),
        "the layer table says alibi, but there is no weight alibi.slopes, float32 [4]",
    ),
    "both": (SINKS, table(alibi=True), "the layer table says sinks and alibi, for which there is no op"),
    "sinks without a mask": (SINKS, no_mask, "the layer table says sinks, but it has no mask"),
    "biases without a mask": (ALIBI, no_mask, "the layer table says alibi, but it has no mask"),
    "window and biases without a mask": (
        SPECS["window-softcap-alibi"],
        no_mask,
        "the layer table says window 3, alibi, but it has no mask",
    ),
    "values without a sink": (
        SINKS,
        no_concat,
        "the layer table says sinks, but layer.0.v.out does not come from a Concat layer.0.v.sink",
    ),
    "another layer's keys": (
        SINKS,
        rename_concat,
        "the layer table says sinks, but layer.0.k.sink.out does not come from a Concat layer.0.k.sink",
    ),
    "another axis": (
        SINKS,
        attribute("layer.0.k.sink", axis=2),
        "layer.0.k.sink joins 2 tensors along axis 2, not 2 along axis 1",
    ),
    "two positions more": (SINKS, one_more_part, "layer.0.k.sink joins 3 tensors along axis 1, not 2 along axis 1"),
    "a weight of other heads": (
        SINKS,
        other_weight("layer.0.sinks", "float32", 8),
        "the layer table says sinks, but there is no weight layer.0.sinks, float32 [4]",
    ),
    "coarse slopes": (
        ALIBI,
        other_weight("alibi.slopes", "bfloat16", 4),
        "the layer table says alibi, but there is no weight alibi.slopes, float32 [4]",
    ),
    "a mask of something else": (
        ALIBI,
        mask_of_another_weight,
        "its mask is made from alibi.slopes, other, by the layer table from alibi.slopes",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_disagrees_with_the_table_is_a_miss_and_nothing_changes(case: str) -> None:
    spec, change, reason = NEAR_MISSES[case]
    graph = attention_graph(spec)
    change(graph)
    before = nodes_of(graph)
    report = InsertPagedAttention().apply(graph, PassContext(build_spec(spec), CPU))
    assert [(miss.where, miss.reason) for miss in report.misses] == [("layer.0.attention", reason)]
    assert not report.changed and nodes_of(graph) == before and not graph.ragged
    with pytest.raises(PassError, match=r"pass 'paged_attention'.*nearest misses"):
        insert(graph, spec)


def test_layers_of_different_kinds_stand_side_by_side() -> None:
    """The template's own graph, one layer of it without sinks by the table and by its node."""
    names = dataclasses.replace(TINY.tensors, layer=TINY.tensors.layer | {"sinks": "model.layers.{layer}.self_attn.sinks"})
    model = dataclasses.replace(TINY, sinks=True, tensors=names)
    graph = expand(model, "float32")
    node = named(graph, "layer.1.attention")
    keys, values = (tensor.inputs[0].inputs[0] for tensor in node.inputs[1:3])
    node.inputs = [node.inputs[0], keys, values]
    node.attrs["is_causal"] = 1
    graph.layers[1] = dataclasses.replace(graph.layers[1], sinks=False)
    rewritten = insert(graph, model)
    counts = {"ZooPagedAttentionSinks": 1, "ZooPagedAttention": 1, "masks": 1}
    assert rewritten.reports[-1].counts == counts and sorted(rewritten.functions) == [
        "ZooPagedAttention",
        "ZooPagedAttentionSinks",
    ]
    lowered = run_passes(expand(model, "float32"), build_spec(model), CPU)
    assert {node.op for node in lowered.graph.nodes if node.domain == "zoo"} == {"ZooPagedAttentionLoopSinks"}
    assert not set(lowered.functions) & set(PLUGINS)
