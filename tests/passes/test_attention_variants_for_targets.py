"""Sinks and linear biases behind insertion: lowered for each target, fused with the cache, quantized, planned; the same numbers.

Models are the template's own, small and random.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import cuda_engines
import families
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import attention_graph, attention_spec
from kernel_graphs import KERNELS, STEPS, TINY, KernelRagged, ops_of
from ragged import Ragged, Traffic, build_spec, engine_limits
from safetensors.numpy import save_file

from zoo.compilers.cuda.plan import Planner
from zoo.compilers.tensorrt import implementations_of
from zoo.errors import CompileError, PassError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.passes.frame import PassContext, run
from zoo.passes.fuse_rotary_cache import FuseRotaryCache, fuse_rotary_cache
from zoo.passes.lower_attention import LowerAttention, lower_attention
from zoo.passes.paged_attention import InsertPagedAttention
from zoo.passes.quantize_cache import quantize_cache
from zoo.plugins import cached_attention
from zoo.plugins.kernels import Launch
from zoo.plugins.paged_attention import PLUGINS as PAGED
from zoo.targets import TARGETS
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors

NAMES = dataclasses.replace(TINY.tensors, layer=TINY.tensors.layer | {"sinks": "model.layers.{layer}.self_attn.sinks"})
FULL = dataclasses.replace(TINY, dtype="float32")  # so that no lookup is narrowed
MODELS = {
    "Sinks": dataclasses.replace(FULL, sinks=True, window=4, window_layers=(0,), tensors=NAMES),
    "Slopes": dataclasses.replace(FULL, num_heads=6, num_kv_heads=3, position="alibi"),
}
WEIGHT = {"Sinks": "layer.0.sinks", "Slopes": "alibi.slopes"}


def ragged(kind: str) -> ModelGraph:
    model = MODELS[kind]
    return run(STEPS, expand(model, "float32", 64), build_spec(model), KERNELS)


def given(graph: ModelGraph, name: str) -> dict[str, str]:
    """What a node of cached attention reads, by the ports of its contract."""
    node = next(node for node in graph.graph.nodes if node.name == name)
    return {port.name: one.name for port, one in zip(cached_attention.PLUGINS[node.op].inputs, node.inputs, strict=True)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["loop", "padded"])
def test_lowering_hands_the_weight_on(how: str, kind: str) -> None:
    graph = ragged(kind)
    report = lower_attention(graph, how)
    ops = [f"ZooPagedAttention{how.title()}{window}{kind}" for window in (("Window", "") if kind == "Sinks" else ("", ""))]
    assert report.counts == {op: ops.count(op) for op in ops} and set(graph.functions) == set(ops)
    nodes = [node for node in graph.graph.nodes if node.domain == "zoo"]
    inputs = PAGED[f"ZooPagedAttention{kind}"].lowerings[how].inputs
    for number, node in enumerate(nodes):
        weight = dict(zip(inputs, [one.name for one in node.inputs], strict=True))[kind.lower()]
        assert (node.op, weight) == (ops[number], WEIGHT[kind].replace("0", str(number)))
    onnx.checker.check_model(graph.to_onnx(), full_check=True)
    assert not lower_attention(graph, how).changed


@pytest.mark.parametrize("kind", MODELS)
def test_fusion_and_a_float8_cache_keep_the_variant(kind: str) -> None:
    graph = ragged(kind)
    write = "ZooRotaryCache" if kind == "Sinks" else "ZooCacheWrite"
    op = f"ZooCachedAttention{kind}"
    assert fuse_rotary_cache(graph).counts == {write: 2, op: 2}
    before = given(graph, "layer.0.attention")
    tables = ("block_table", "query_starts", "kv_lengths", "prefill_tiles")
    wanted = {"q": "layer.0.cache.out", "kv": "kv_out.0"} | {name: name for name in tables} | {kind.lower(): WEIGHT[kind]}
    assert before == wanted | {"block_table": "block_table.full"}
    assert set(graph.functions) == {write, op}
    assert quantize_cache(graph).counts == {"layers": 2}
    assert given(graph, "layer.0.attention") == before | {"kv_scale": "kv_scale.0"}
    assert {f"{write}Fp8": 2, f"{op}Fp8": 2}.items() <= ops_of(graph).items()
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_attention_rounds_for_a_gemm_behind_it() -> None:
    spec = build_spec(MODELS["Slopes"], quant="fp8")
    graph = expand(MODELS["Slopes"], "float32", 64)
    graph = run_passes(graph, spec, KERNELS)
    assert ops_of(graph)["ZooCachedAttentionSlopesOut8"] == 2


def split_graph(positions: bool) -> ModelGraph:
    """One layer whose queries, keys and values are parts of one Split, in a graph that rotates nothing."""
    spec = attention_spec(4, 2, 8, alibi=True)
    graph = attention_graph(spec, positions=positions)
    InsertPagedAttention().apply(graph, PassContext(build_spec(spec), KERNELS))
    attention = next(node for node in graph.graph.nodes if node.domain == "zoo")
    whole = gs.Variable("qkv", attention.inputs[0].dtype, [1, "T", 64])
    joined = gs.Node("Concat", "joined", {"axis": -1}, list(attention.inputs[:3]), [whole])
    parts = [gs.Variable(f"part.{name}", whole.dtype, [1, "T", width]) for name, width in (("q", 32), ("k", 16), ("v", 16))]
    sizes = gs.Constant("sizes", np.array([32, 16, 16], np.int64))
    place = next(place for place, node in enumerate(graph.graph.nodes) if node is attention)
    graph.graph.nodes[place:place] = [joined, gs.Node("Split", "split", {"axis": -1}, [whole, sizes], parts)]
    attention.inputs = [*parts, *attention.inputs[3:]]
    return graph


@pytest.mark.parametrize("positions", [True, False])
def test_nothing_rotated_needs_no_positions(positions: bool) -> None:
    """Not even the input, which some later target may do without."""
    graph = split_graph(positions)
    graph.graph.inputs = [one for one in graph.graph.inputs if one.name != "positions"]
    report = fuse_rotary_cache(graph)
    assert report.counts == {"ZooCacheWrite": 1, "ZooCachedAttentionSlopes": 1} and not report.misses


def test_a_rotation_without_the_engines_positions_is_a_miss() -> None:
    graph = ragged("Sinks")
    graph.variable("positions").name = "other"
    (first, _) = fuse_rotary_cache(graph).misses
    assert first.reason == "layer.0.q.rope reads positions from other, not the engine's own"


def test_what_is_left_is_named() -> None:
    graph = ragged("Sinks")
    ctx = PassContext(build_spec(MODELS["Sinks"]), KERNELS)
    for one in (FuseRotaryCache(), LowerAttention()):
        with pytest.raises(PassError, match=r"ZooPagedAttentionSinks nodes are left: layer.0.attention, layer.1.attention"):
            one.ensures(graph, ctx)


@functools.cache
def checkpoint(base: Path, kind: str) -> tuple[Path, list[list[int]], list[np.ndarray]]:
    """Random tensors for a model of ``MODELS``, two texts, and the plain graph's logits for them."""
    rng = np.random.default_rng(5)
    graph = expand(MODELS[kind], "float32", 64)
    leaves = {leaf["name"]: leaf.shape for weight in graph.weights.values() for leaf in weight.recipe.leaves()}
    made = {
        name: rng.standard_normal(shape).astype(np.float32) * (0.4 if len(shape) > 1 else 1) for name, shape in leaves.items()
    }
    folder = base / f"variants-{kind}"
    folder.mkdir()
    save_file(made, folder / "model.safetensors")
    texts = [rng.integers(0, TINY.vocab_size, count).tolist() for count in (17, 9)]
    with Tensors.open(folder) as tensors:
        plain = families.Plain(graph, tensors)
        return folder, texts, [plain.logits([text])[0] for text in texts]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["onnxruntime", "tensorrt_rtx", "kernels"])
def test_whole_models_keep_their_numbers(tmp_path_factory: pytest.TempPathFactory, how: str, kind: str) -> None:
    """All passes of each target, in float32: chunks, decode and mixed batches within 1e-5 of the plain graph."""
    folder, (a, b), (want_a, want_b) = checkpoint(tmp_path_factory.getbasetemp(), kind)
    build = build_spec(MODELS[kind])
    target = KERNELS if how == "kernels" else dataclasses.replace(TARGETS["onnxruntime"], attention=TARGETS[how].attention)
    graph = run_passes(expand(MODELS[kind], "float32", 64), build, target, check=True)
    with Tensors.open(folder) as tensors:
        weights = {name: materialize(weight, tensors, {}) for name, weight in graph.weights.items()}
    traffic = Traffic((KernelRagged if how == "kernels" else Ragged)(graph, weights, engine_limits(build.limits)))

    def close(got: np.ndarray, want: np.ndarray) -> None:
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want_a).max()

    close(traffic.step({"a": a[:7]}, rows=range(7)), want_a[:7])
    close(traffic.step({"b": b[:5], "a": a[7:8]}), np.stack([want_b[4], want_a[7]]))
    close(traffic.step({"a": a[8:9], "b": b[5:6]}), np.stack([want_a[8], want_b[5]]))
    close(traffic.step({"a": a[9:], "b": b[6:]}, rows=range(11)), np.concatenate([want_a[9:], want_b[6:]]))


@pytest.mark.parametrize("kind", MODELS)
def test_tensorrt_has_no_plugin_for_them(kind: str) -> None:
    """Neither by default, nor if a hardware profile asks for it."""
    build, graph = build_spec(MODELS[kind], compiler="tensorrt"), ragged(kind)
    assert implementations_of(graph, build) == {}
    tuning = {"tensorrt_plugins": {f"ZooPagedAttention{kind}": "aot"}}
    build = dataclasses.replace(build, hardware=dataclasses.replace(build.hardware, tuning=tuning))
    with pytest.raises(CompileError, match=f"ZooPagedAttention{kind}: aot; plugins exist for ZooPagedAttention, ZooFp8Linear"):
        implementations_of(graph, build)
    assert TARGETS["tensorrt"].attention == "padded"


@pytest.mark.parametrize("quant", ["none", "fp8-kv"])
@pytest.mark.parametrize("kind", MODELS)
def test_plans_give_kernels_the_weight(kind: str, quant: str) -> None:
    """The cuda target: every layer's launches read its own sinks, or the one table of slopes in float32."""
    model = dataclasses.replace(MODELS[kind], head_dim=16, hidden_size=32, intermediate_size=32)
    planner = Planner(cuda_engines.rewritten(cuda_engines.build_spec(model, quant)), cuda_engines.build_spec(model, quant), {})
    found: dict[str, list[tuple[str, str]]] = {}
    for step in planner.run().steps:
        if isinstance(step, Launch) and "cached_attention" in step.kernel.source and "extra" in dict(step.kernel.args):
            pointer, weight = dict(step.kernel.args)["extra"], step.args[-1]
            assert isinstance(weight, str)
            found.setdefault(step.kernel.source.partition(":")[2], []).append((weight, pointer))
    if kind == "Sinks":
        assert found == {name: [(f"layer.{i}.sinks", "*bf16") for i in range(2)] for name in ("prefill", "decode", "merge")}
    else:
        assert found == {name: [("alibi.slopes", "*fp32")] * 2 for name in ("prefill", "decode")}
