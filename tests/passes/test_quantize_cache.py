"""quantize_cache: before and expected for each kind of layer, near misses, twice, a broken promise, and the same numbers."""

from __future__ import annotations

import dataclasses

import families
import ml_dtypes
import numpy as np
import onnx
import pytest
from kernel_graphs import KERNELS, PLAIN, STEPS, TINY, KernelRagged, ops_of, rewritten, small
from linear_graphs import nodes_of
from ragged import Traffic, build_spec, engine_limits

from zoo.calibration import calibrate, unbound_scales
from zoo.errors import PassError
from zoo.graph import ModelGraph, PassReport
from zoo.graph_templates import expand
from zoo.passes.cuda_fp8 import CudaFp8
from zoo.passes.frame import Pass, run
from zoo.passes.fuse_activation import FuseActivation
from zoo.passes.fuse_norm import FuseNorm
from zoo.passes.fuse_rotary_cache import FuseRotaryCache
from zoo.passes.quantize_cache import TWINS, QuantizeCache, cache_scale, quantize_cache
from zoo.plugins import cached_attention, rotary_cache
from zoo.spec import BuildSpec, ModelSpec, QuantSpec
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors
from zoo.weights.recipe import concat, reshape, scale

LLAMA = dataclasses.replace(TINY, num_layers=1)
QWEN3 = dataclasses.replace(LLAMA, qk_norm="head")
GPT2 = dataclasses.replace(
    LLAMA, position="learned", num_kv_heads=2, norm="layer", mlp="plain", tie_embeddings=True, tensors=families.GPT2_NAMES
)
FUSED: tuple[Pass, ...] = (CudaFp8(), FuseNorm(), FuseActivation(), FuseRotaryCache())
PLUGINS = rotary_cache.PLUGINS | cached_attention.PLUGINS


def build_of(model: ModelSpec, quant: str = "none") -> BuildSpec:
    """With an FP8 cache."""
    return dataclasses.replace(build_spec(model), quant=QuantSpec(f"{quant}-kv", quant, kv_cache="fp8"))


def ragged(model: ModelSpec, quant: str = "none") -> ModelGraph:
    spec = build_of(model, quant)
    return run((*STEPS, *FUSED), expand(model, "float32", spec.limits.max_context), spec, KERNELS)


def given(graph: ModelGraph, name: str) -> tuple[str, dict[str, str], list[str]]:
    """A node's op, what it reads by the ports of its contract, and what it makes."""
    node = next(node for node in graph.graph.nodes if node.name == name)
    ports = [port.name for port in PLUGINS[node.op].inputs]
    return node.op, dict(zip(ports, [one.name for one in node.inputs], strict=True)), [one.name for one in node.outputs]


@pytest.mark.parametrize(
    ("model", "quant", "write", "read"),
    [
        (LLAMA, "none", "ZooRotaryCache", "ZooCachedAttention"),
        (LLAMA, "fp8", "ZooRotaryCache", "ZooCachedAttentionOut8"),
        (QWEN3, "none", "ZooRotaryCacheNorm", "ZooCachedAttention"),
        (GPT2, "none", "ZooCacheWrite", "ZooCachedAttention"),
    ],
    ids=["rotary", "rotary-fp8", "norm", "plain"],
)
def test_before_and_expected(model: ModelSpec, quant: str, write: str, read: str) -> None:
    graph = ragged(model, quant)
    before = {name: given(graph, name) for name in ("layer.0.cache", "layer.0.attention")}
    assert [op for op, *_ in before.values()] == [write, read]
    names, nodes = [node.name for node in graph.graph.nodes], nodes_of(graph)
    attributes = {node.name: dict(node.attrs) for node in graph.graph.nodes}
    report = quantize_cache(graph)
    assert report.counts == {"layers": 1} and not report.misses
    for (name, (op, inputs, outputs)), twin in zip(
        before.items(), (write + "Fp8", read.replace("Attention", "AttentionFp8")), strict=True
    ):
        assert TWINS[op] == twin and given(graph, name) == (twin, inputs | {"kv_scale": "kv_scale.0"}, outputs)
        node = next(node for node in graph.graph.nodes if node.name == name)
        assert dict(node.attrs) == attributes[name] and node.domain == "zoo"
    # all else is as it was, and in its order
    assert [node.name for node in graph.graph.nodes] == names
    others = [one for one in nodes if one[1] not in before]
    assert [one for one in nodes_of(graph) if one[1] not in before] == others
    assert {write + "Fp8", read.replace("Attention", "AttentionFp8")} <= set(graph.functions)
    onnx.checker.check_model(graph.to_onnx(), full_check=True)


def test_a_layers_scales_are_one_weight_from_calibration() -> None:
    graph = ragged(TINY)
    assert quantize_cache(graph).counts == {"layers": 2}
    for layer in (0, 1):
        weight = graph.weights[f"kv_scale.{layer}"]
        parts = [reshape(scale(f"layer.{layer}.{role}_cache"), (1,)) for role in ("k", "v")]
        assert (weight.dtype, weight.shape, weight.recipe) == ("float32", (2,), concat(parts, 0))
        assert weight.recipe == cache_scale(str(layer))
        assert {node.op for node in graph.variable(weight.name).outputs} == {"ZooRotaryCacheFp8", "ZooCachedAttentionFp8"}
    assert unbound_scales(graph) == [f"layer.{layer}.{role}_cache" for layer in (0, 1) for role in ("k", "v")]
    pools = [variable for variable in graph.graph.inputs if variable.name.startswith("kv.")]
    assert [pool.dtype for pool in pools] == [onnx.TensorProto.FLOAT] * 2, "a compiler gives pools their own type"


def rename(graph: ModelGraph, name: str) -> None:
    next(variable for variable in graph.graph.inputs if variable.name == "kv.0").name = name


@pytest.mark.parametrize("name", ["kv.shared", "cache.0", "kv.", "kv.0.k"])
def test_a_pool_that_is_no_layers_is_left_alone_with_a_reason(name: str) -> None:
    graph = ragged(LLAMA)
    rename(graph, name)
    before, weights = nodes_of(graph), dict(graph.weights)
    with pytest.raises(
        PassError, match=rf"nearest misses: layer\.0\.cache: its pool is {name.replace('.', '[.]')}, which is no layer's"
    ) as caught:
        graph.graph.nodes[:] = [node for node in graph.graph.nodes if not node.op.startswith("ZooCachedAttention")]
        run([QuantizeCache()], graph, build_of(LLAMA), KERNELS)
    assert "'quantize_cache'" in str(caught.value)
    assert [one for one in before if not one[0].startswith("ZooCachedAttention")] == nodes_of(graph) and graph.weights == weights


def test_one_layer_that_stays_fails_the_build() -> None:
    """Half an FP8 cache would be read as what it is not."""
    graph = ragged(TINY)
    rename(graph, "kv.shared")
    with pytest.raises(PassError, match=r"these nodes still have a pool of the compute type: layer\.0\.cache"):
        run([QuantizeCache()], graph, build_of(TINY), KERNELS)


def test_a_graph_without_caches_is_refused() -> None:
    with pytest.raises(PassError, match=r"'quantize_cache'.*found nothing to rewrite; no node came near its pattern"):
        run([QuantizeCache()], expand(LLAMA, "float32"), build_of(LLAMA), KERNELS)


def test_twice_changes_nothing() -> None:
    graph = ragged(TINY, "fp8")
    quantize_cache(graph)
    before, weights, functions = nodes_of(graph), dict(graph.weights), dict(graph.functions)
    again = quantize_cache(graph)
    assert not again.changed and not again.misses
    assert nodes_of(graph) == before and graph.weights == weights and graph.functions == functions


def test_who_wants_it() -> None:
    one = QuantizeCache()
    assert one.wanted(build_of(TINY), KERNELS) and one.demanded(build_of(TINY), KERNELS)
    assert not one.wanted(build_spec(TINY), KERNELS) and not one.wanted(build_spec(TINY, quant="fp8"), PLAIN)
    graph = run([QuantizeCache()], ragged(TINY), build_spec(TINY), KERNELS)
    assert all(report.name != "quantize_cache" for report in graph.reports)


def test_every_op_with_a_pool_has_a_twin() -> None:
    assert set(TWINS) | set(TWINS.values()) == set(PLUGINS)
    for name, twin in TWINS.items():
        ports = [port.name for port in PLUGINS[twin].inputs]
        assert [port.name for port in PLUGINS[name].inputs] == [name for name in ports if name != "kv_scale"]
        assert [port.name for port in PLUGINS[name].outputs] == [port.name for port in PLUGINS[twin].outputs]
        assert PLUGINS[name].attributes == PLUGINS[twin].attributes


def test_a_broken_promise() -> None:
    class Lazy(QuantizeCache):
        def apply(self, graph: ModelGraph, ctx: object) -> PassReport:
            return PassReport(self.name, {"layers": 1})

    with pytest.raises(PassError, match=r"still have a pool of the compute type: layer\.0\.cache, layer\.0\.attention, layer\.1"):
        rewritten([Lazy()], ragged(TINY), build_of(TINY))


@pytest.mark.parametrize("case", ["llama-grouped", "qwen3-norms", "gpt2", "mistral-window"])
def test_the_same_numbers_but_for_keys_and_values_that_are_rounded(tmp_path_factory: pytest.TempPathFactory, case: str) -> None:
    """The first layer's pool holds the plain graph's keys and values, rounded to float8 by their scales, bit for bit.

    That moves logits of these random models, whose attention is sharp, by 3 to 9%; by less than 0.5% would mean: not at all.
    """
    model = small(tmp_path_factory.getbasetemp(), case, "none")
    build = dataclasses.replace(model.build, quant=QuantSpec("none-kv", kv_cache="fp8"))
    graphs = [rewritten(FUSED, model.graph(), model.build), rewritten([*FUSED, QuantizeCache()], model.graph(), build)]
    layers = build.model.num_layers
    assert ops_of(graphs[0])["ZooCachedAttention"] == ops_of(graphs[1])["ZooCachedAttentionFp8"] == layers
    with Tensors.open(model.folder) as tensors:
        scales = calibrate(build.model, tensors, families.prompt(model.folder, 64, seed=6), cache=True)
        weights = [{name: materialize(one, tensors, scales) for name, one in graph.weights.items()} for graph in graphs]
    logits, pools = [], []
    a, b = families.prompt(model.folder, 10, seed=1), families.prompt(model.folder, 7, seed=2)
    for graph, given in zip(graphs, weights, strict=True):
        traffic = Traffic(KernelRagged(graph, given, engine_limits(build.limits)))
        first = traffic.step({"a": a[:6], "b": b[:6]}, rows=range(12))
        logits.append(np.concatenate([first, traffic.step({"a": a[6:], "b": b[6:]}, rows=range(5))]))
        pools.append(traffic.engine.pools["kv.0"])  # [blocks, 2, block_size, kv_heads, head_dim]
    by = weights[1]["kv_scale.0"].reshape(1, 2, 1, 1, 1)
    rounded = np.clip(pools[0] / by, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * by
    np.testing.assert_array_equal(pools[1], rounded)
    assert np.isfinite(rounded).any() and (rounded[np.isfinite(rounded)] != pools[0][np.isfinite(rounded)]).mean() > 0.9
    assert 0.005 < np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]) < 0.12
