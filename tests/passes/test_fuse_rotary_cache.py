"""fuse_rotary_cache: before and expected for each kind of layer, what must not match and why, twice, the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import families
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from kernel_graphs import CASES, KERNELS, PLAIN, STEPS, TINY, ops_of, rewritten, small
from linear_graphs import nodes_of
from ragged import build_spec

from zoo.errors import PassError
from zoo.graph import ONNX_TYPES, ModelGraph, PassReport
from zoo.graph_templates import expand
from zoo.passes.cuda_fp8 import CudaFp8
from zoo.passes.frame import Pass, run
from zoo.passes.fuse_activation import FuseActivation
from zoo.passes.fuse_norm import FuseNorm
from zoo.passes.fuse_rotary_cache import FuseRotaryCache, fuse_rotary_cache
from zoo.plugins import cached_attention, rotary_cache
from zoo.plugins.contract import Plugin
from zoo.runtime.cuda_indices import CUDA_INDEX_BUILDERS
from zoo.spec import ModelSpec

LLAMA = dataclasses.replace(TINY, num_layers=1)
QWEN3 = dataclasses.replace(LLAMA, qk_norm="head")
GPT2 = dataclasses.replace(
    LLAMA, position="learned", num_kv_heads=2, norm="layer", mlp="plain", tie_embeddings=True, tensors=families.GPT2_NAMES
)
ALL: tuple[Pass, ...] = (CudaFp8(), FuseNorm(), FuseActivation(), FuseRotaryCache())


def ragged(model: ModelSpec, quant: str = "none") -> ModelGraph:
    spec = build_spec(model, quant=quant)
    steps = [*STEPS, *([CudaFp8()] if quant == "fp8" else [])]
    return run(steps, expand(model, "float32", spec.limits.max_context), spec, KERNELS)


def named(graph: ModelGraph, name: str) -> gs.Node:
    return next(node for node in graph.graph.nodes if node.name == name)


def given(graph: ModelGraph, name: str, plugin: Plugin) -> dict[str, str]:
    """What a node reads, by the ports of its contract."""
    node = named(graph, name)
    assert node.op == plugin.op
    return {port.name: tensor.name for port, tensor in zip(plugin.inputs, node.inputs, strict=True)}


TABLES = {"cos": "rope.cos", "sin": "rope.sin", "positions": "positions"}
NORMS = {"q_norm": "layer.0.q_norm", "k_norm": "layer.0.k_norm"}
BATCH = {
    "block_table": "block_table.full",
    "query_starts": "query_starts",
    "kv_lengths": "kv_lengths",
    "prefill_tiles": "prefill_tiles",
}


@pytest.mark.parametrize(
    ("model", "op", "more"),
    [(LLAMA, "ZooRotaryCache", TABLES), (QWEN3, "ZooRotaryCacheNorm", TABLES | NORMS), (GPT2, "ZooCacheWrite", {})],
    ids=["rotary", "norm", "plain"],
)
def test_before_and_expected(model: ModelSpec, op: str, more: dict[str, str]) -> None:
    graph = ragged(model)
    report = fuse_rotary_cache(graph)
    assert report.counts == {op: 1, "ZooCachedAttention": 1} and not report.misses
    names = [node.name for node in graph.graph.nodes]
    place = names.index("layer.0.qkv")
    assert names[place + 1 : place + 4] == ["layer.0.cache", "layer.0.attention", "layer.0.o"]
    write, attend = rotary_cache.PLUGINS[op], cached_attention.PLUGINS["ZooCachedAttention"]
    wanted = {"qkv": "layer.0.qkv.out", "kv": "kv.0", "token_slots": "token_slots"} | more
    assert given(graph, "layer.0.cache", write) == wanted
    assert given(graph, "layer.0.attention", attend) == {"q": "layer.0.cache.out", "kv": "kv_out.0"} | BATCH
    assert [t.name for t in named(graph, "layer.0.cache").outputs] == ["layer.0.cache.out", "kv_out.0"]
    assert [t.name for t in named(graph, "layer.0.attention").outputs] == ["layer.0.attention.out"]
    assert not {"RotaryEmbedding", "Reshape", "ZooPagedAttention"} & set(ops_of(graph)) and "layer.0.qkv.split" not in names
    # positions are cast for nobody but a table of learned ones
    assert ("positions.cast" in names) == (model is GPT2)
    assert sorted(graph.functions) == sorted([op, "ZooCachedAttention"])
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_the_nodes_keep_their_attributes() -> None:
    model = dataclasses.replace(QWEN3, window=5, softcap=3.0, attention_scale=0.7, norm_eps=0.25)
    graph = ragged(model)
    before = dict(named(graph, "layer.0.attention").attrs)
    fuse_rotary_cache(graph)
    assert dict(named(graph, "layer.0.attention").attrs) == before and before["window"] == 5
    attrs = {k: v for k, v in named(graph, "layer.0.cache").attrs.items() if not k.startswith("plugin_")}
    shape = {"num_heads": 2, "kv_heads": 1, "head_dim": 8, "block_size": 4}
    assert attrs == shape | {"rotary_dim": 8, "interleaved": 0, "epsilon": 0.25}


def test_a_part_of_a_head_may_be_rotated() -> None:
    graph = ragged(dataclasses.replace(LLAMA, rope=dataclasses.replace(LLAMA.rope, fraction=0.5)))
    fuse_rotary_cache(graph)
    assert named(graph, "layer.0.cache").attrs["rotary_dim"] == 4


def test_attention_rounds_for_a_gemm_behind_it() -> None:
    graph = ragged(LLAMA, "fp8")
    report = fuse_rotary_cache(graph)
    assert report.counts == {"ZooRotaryCache": 1, "ZooCachedAttentionOut8": 1}
    attend = cached_attention.PLUGINS["ZooCachedAttentionOut8"]
    wanted = {"q": "layer.0.cache.out", "kv": "kv_out.0", "out_scale": "layer.0.o.x_scale"} | BATCH
    assert given(graph, "layer.0.attention", attend) == wanted
    assert named(graph, "layer.0.o").inputs[0] is named(graph, "layer.0.attention").outputs[0]
    assert named(graph, "layer.0.attention").outputs[0].dtype == onnx.TensorProto.FLOAT8E4M3FN


def test_a_rounding_that_is_not_alone_stays() -> None:
    graph = ragged(LLAMA, "fp8")
    side = gs.Variable("side", ONNX_TYPES["float32"], [1, "T", 16])
    graph.graph.nodes.append(gs.Node("Neg", "side", inputs=[named(graph, "layer.0.attention").outputs[0]], outputs=[side]))
    graph.graph.outputs.append(side)
    report = fuse_rotary_cache(graph)
    assert report.counts == {"ZooRotaryCache": 1, "ZooCachedAttention": 1}
    reason = "layer.0.o.quantize rounds layer.0.attention.out, but side reads it, too"
    assert [(miss.where, miss.reason) for miss in report.misses] == [("layer.0.attention", reason)]


def test_index_inputs_are_declared_once_behind_the_pools() -> None:
    graph = ragged(TINY)
    fuse_rotary_cache(graph)
    assert [extra.name for extra in graph.index_inputs] == ["token_slots", "prefill_tiles"] == list(CUDA_INDEX_BUILDERS)
    names = [variable.name for variable in graph.graph.inputs]
    assert names[6:10] == ["kv.0", "kv.1", "token_slots", "prefill_tiles"] and names[10] in graph.weights
    assert [output.name for output in graph.graph.outputs] == ["logits", "kv_out.0", "kv_out.1"]
    ports = {p.name: p for plugin in (*rotary_cache.PLUGINS.values(), *cached_attention.PLUGINS.values()) for p in plugin.inputs}
    assert [(ports[e.name].dtype, ports[e.name].shape) for e in graph.index_inputs] == [("int32", ("T",)), ("int32", ("W", 4))]


def read_too(name: str) -> Callable[[ModelGraph], None]:
    def change(graph: ModelGraph) -> None:
        tensor = named(graph, name).outputs[0]
        side = gs.Variable("side", tensor.dtype, tensor.shape)
        graph.graph.nodes.append(gs.Node("Neg", "side", inputs=[tensor], outputs=[side]))
        graph.graph.outputs.append(side)

    return change


def attribute(name: str, key: str, value: object) -> Callable[[ModelGraph], None]:
    return lambda graph: named(graph, name).attrs.update({key: value})


def constant(name: str, values: list[int]) -> Callable[[ModelGraph], None]:
    def change(graph: ModelGraph) -> None:
        named(graph, name).inputs[1] = gs.Constant(f"{name}.other", np.array(values, np.int64))

    return change


def skip(name: str) -> Callable[[ModelGraph], None]:
    """Let the readers of a node read its input."""

    def change(graph: ModelGraph) -> None:
        node = named(graph, name)
        for reader in list(node.outputs[0].outputs):
            reader.inputs = [node.inputs[0] if tensor is node.outputs[0] else tensor for tensor in reader.inputs]
        graph.graph.nodes = [other for other in graph.graph.nodes if other is not node]
        node.inputs.clear()

    return change


def both(*changes: Callable[[ModelGraph], None]) -> Callable[[ModelGraph], None]:
    def change(graph: ModelGraph) -> None:
        for one in changes:
            one(graph)

    return change


def swap_values(graph: ModelGraph) -> None:
    split = named(graph, "layer.0.qkv.split")
    q, k, v = list(split.outputs)
    split.outputs.clear()
    split.outputs = [q, v, k]


def other_positions(graph: ModelGraph) -> None:
    row = gs.Variable("other.row", ONNX_TYPES["int64"], [1, "T"])
    graph.graph.inputs.insert(0, row)
    for role in "qk":
        named(graph, f"layer.0.{role}.rope").inputs[3] = row


def other_tables(graph: ModelGraph) -> None:
    named(graph, "layer.0.k.rope").inputs[1] = graph.variable("rope.sin")


def as_output(graph: ModelGraph) -> None:
    graph.graph.outputs.append(named(graph, "layer.0.q.rope").outputs[0])


NEAR_MISSES: dict[str, tuple[ModelSpec, Callable[[ModelGraph], None], str]] = {
    "values before keys": (
        LLAMA,
        swap_values,
        "layer.0.q.out, layer.0.k.out, layer.0.v.out are not the three parts of one Split",
    ),
    "other sizes": (
        LLAMA,
        constant("layer.0.qkv.split", [8, 8, 16]),
        "the parts of layer.0.qkv.split are [8, 8, 16], not [16, 8",
    ),
    "another axis": (LLAMA, attribute("layer.0.qkv.split", "axis", 1), "layer.0.qkv.split splits axis 1, not the last"),
    "read by others": (LLAMA, read_too("layer.0.k.rope"), "2 nodes read layer.0.k.rope.out"),
    "a part read by others": (LLAMA, read_too("layer.0.qkv.split"), "2 nodes read layer.0.q.out"),
    "an output": (LLAMA, as_output, "layer.0.q.rope.out is an output of the graph"),
    "one rotation": (LLAMA, skip("layer.0.k.rope"), "of queries and keys only one is rotated"),
    "other tables": (LLAMA, other_tables, "layer.0.q.rope and layer.0.k.rope read other tables or positions"),
    "other rotation": (
        LLAMA,
        attribute("layer.0.k.rope", "interleaved", 1),
        "layer.0.q.rope and layer.0.k.rope rotate differently",
    ),
    "other heads": (
        LLAMA,
        attribute("layer.0.q.rope", "num_heads", 4),
        "layer.0.q.rope rotates 4 heads with 4 inputs, not 2 with 4",
    ),
    "other positions": (
        LLAMA,
        other_positions,
        "layer.0.q.rope reads positions from other.row, not the engine's own",
    ),
    "no rotation": (
        QWEN3,
        both(skip("layer.0.q.rope"), skip("layer.0.k.rope")),
        "heads are normed and not rotated, for which there is no op",
    ),
    "one norm": (
        QWEN3,
        both(skip("layer.0.k.merge"), skip("layer.0.k.norm"), skip("layer.0.k.heads")),
        "of queries and keys only one is normed",
    ),
    "two epsilons": (
        QWEN3,
        attribute("layer.0.k.norm", "epsilon", 0.5),
        "layer.0.q.norm has the epsilon 1e-05, layer.0.k.norm 0.5",
    ),
    "another norm": (
        QWEN3,
        attribute("layer.0.k.norm", "stash_type", 10),
        "layer.0.k.norm does not norm the last axis in float32",
    ),
    "other cut": (
        QWEN3,
        constant("layer.0.q.heads", [0, 0, 4, 4]),
        "layer.0.q.heads has the shape [0, 0, 4, 4], not [0, 0, 2, 8]",
    ),
    "no norm between": (
        QWEN3,
        skip("layer.0.q.norm"),
        "layer.0.q.merge does not put back together what a Reshape cut and a norm normed",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_left_alone_with_a_reason(case: str) -> None:
    model, change, reason = NEAR_MISSES[case]
    graph = ragged(model)
    change(graph)
    before, inputs = nodes_of(graph), [variable.name for variable in graph.graph.inputs]
    report = fuse_rotary_cache(graph)
    assert not report.changed and nodes_of(graph) == before and not graph.index_inputs
    assert [variable.name for variable in graph.graph.inputs] == inputs
    (miss,) = report.misses
    assert miss.where == "layer.0.attention" and miss.reason.startswith(reason)


def test_one_layer_that_does_not_fit_fails_the_build() -> None:
    graph = ragged(TINY)
    read_too("layer.0.k.rope")(graph)
    with pytest.raises(
        PassError, match=r"'fuse_rotary_cache'.*nearest misses: layer.0.attention: 2 nodes read layer.0.k.rope.out"
    ):
        rewritten([FuseRotaryCache()], graph, build_spec(TINY))
    assert ops_of(graph)["ZooPagedAttention"] == 2


def test_a_plain_graph_is_refused() -> None:
    with pytest.raises(PassError, match=r"pass 'fuse_rotary_cache'.*it starts from a graph with paged attention"):
        rewritten([FuseRotaryCache()], expand(TINY, "float32"), build_spec(TINY))


def test_twice_changes_nothing() -> None:
    graph = ragged(QWEN3)
    fuse_rotary_cache(graph)
    before, index = nodes_of(graph), list(graph.index_inputs)
    assert not fuse_rotary_cache(graph).changed and nodes_of(graph) == before and graph.index_inputs == index


def test_who_wants_it() -> None:
    spec = build_spec(TINY)
    assert FuseRotaryCache().wanted(spec, KERNELS) and FuseRotaryCache().demanded(spec, KERNELS)
    assert not FuseRotaryCache().wanted(spec, PLAIN)


def test_a_broken_promise() -> None:
    class Lazy(FuseRotaryCache):
        def apply(self, graph: ModelGraph, ctx: object) -> PassReport:
            return PassReport(self.name, {"ZooRotaryCache": 1})

    with pytest.raises(PassError, match=r"ZooPagedAttention nodes are left: layer.0.attention, layer.1.attention"):
        rewritten([Lazy()], ragged(TINY), build_spec(TINY))


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("case", [*CASES, "mistral-window"])
def test_the_same_numbers_with_all_passes_for_kernels(tmp_path_factory: pytest.TempPathFactory, case: str, quant: str) -> None:
    """The graph that becomes a launch plan, in ragged batches: the same float32 operators in the same order as before.

    So no rounding to float8 falls to another side, and 1e-6 is tight for FP8, too.
    """
    model = small(tmp_path_factory.getbasetemp(), case, quant)
    graph = rewritten([*ALL], model.graph(), model.build)
    counts, layers = ops_of(graph), model.build.model.num_layers
    assert counts["ZooCachedAttentionOut8" if quant == "fp8" else "ZooCachedAttention"] == layers
    if case != "gpt2":  # no norm, activation or rotation is left but the norms at both ends
        left = {"Split", "Sigmoid", "Mul", "RotaryEmbedding", "Reshape", "ZooQuantizeFp8", "ZooPagedAttention"} & set(counts)
        assert not left and counts["RMSNormalization"] == (1 if quant == "fp8" else 2)
    np.testing.assert_allclose(model.logits(graph), model.logits(model.graph()), atol=1e-6, rtol=0)
