"""join_heads: before and expected, what it leaves alone, twice, and the same numbers on models that need it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import kernel_graphs
import numpy as np
import onnx
import pytest
import zoo_cases
from kernel_graphs import KERNELS, PLAIN, STEPS, TINY, Small, ops_of, rewritten
from linear_graphs import nodes_of
from ragged import build_spec

from zoo.checkpoints import Checkpoint
from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.names import fit_names
from zoo.config import compose_model
from zoo.errors import PassError
from zoo.graph import ModelGraph, PassReport
from zoo.graph_templates import expand
from zoo.passes.cuda_fp8 import CudaFp8
from zoo.passes.frame import run
from zoo.passes.fuse_activation import FuseActivation
from zoo.passes.fuse_norm import FuseNorm
from zoo.passes.fuse_rotary_cache import FuseRotaryCache, fuse_rotary_cache
from zoo.passes.join_heads import JoinHeads, join_heads
from zoo.spec import ModelSpec

ONE = dataclasses.replace(TINY, num_layers=1)
NORMED = dataclasses.replace(ONE, qk_norm="all", tensors=dataclasses.replace(TINY.tensors, layer=TINY.tensors.layer))


def ragged(model: ModelSpec) -> ModelGraph:
    spec = build_spec(model)
    return run([*STEPS], expand(model, "float32", spec.limits.max_context), spec, KERNELS)


def behind(graph: ModelGraph, name: str) -> list[tuple[str, str, list[str], list[str]]]:
    nodes = nodes_of(graph)
    place = next(at for at, node in enumerate(nodes) if node[1] == name)
    end = next(at for at, node in enumerate(nodes) if node[1] == "layer.0.attention")
    return nodes[place + 1 : end]


def test_before_and_expected() -> None:
    """A norm over all heads: H 2, K 1, D 8."""
    graph = ragged(NORMED)
    assert [node[1] for node in behind(graph, "layer.0.qkv.split")] == [
        "layer.0.q.norm",
        "layer.0.q.rope",
        "layer.0.k.norm",
        "layer.0.k.rope",
    ]
    report = join_heads(graph)
    assert report.counts == {"Concat": 1}
    (miss,) = report.misses
    reason = "layer.0.q.norm.out, layer.0.k.norm.out, layer.0.v.out are not the three parts of one Split"
    assert (miss.where, miss.reason) == ("layer.0.attention", reason)
    tables = ["rope.cos", "rope.sin", "positions.row"]
    cuts = [f"layer.0.join.{role}.out" for role in "qkv"]
    assert behind(graph, "layer.0.qkv.split") == [
        ("RMSNormalization", "layer.0.q.norm", ["layer.0.q.out", "layer.0.q_norm"], ["layer.0.q.norm.out"]),
        ("RMSNormalization", "layer.0.k.norm", ["layer.0.k.out", "layer.0.k_norm"], ["layer.0.k.norm.out"]),
        ("Concat", "layer.0.join", ["layer.0.q.norm.out", "layer.0.k.norm.out", "layer.0.v.out"], ["layer.0.join.out"]),
        ("Split", "layer.0.join.split", ["layer.0.join.out", "layer.0.join.sizes"], cuts),
        ("RotaryEmbedding", "layer.0.q.rope", [cuts[0], *tables], ["layer.0.q.rope.out"]),
        ("RotaryEmbedding", "layer.0.k.rope", [cuts[1], *tables], ["layer.0.k.rope.out"]),
    ]
    split = next(node for node in graph.graph.nodes if node.name == "layer.0.join.split")
    assert split.inputs[1].values.tolist() == [16, 8, 8] and split.inputs[0].shape == [1, "T", 32]
    onnx.checker.check_model(graph.to_onnx(), full_check=True)
    assert fuse_rotary_cache(graph).counts == {"ZooRotaryCache": 1, "ZooCachedAttention": 1}
    cache = next(node for node in graph.graph.nodes if node.op == "ZooRotaryCache")
    assert cache.inputs[0].name == "layer.0.join.out" and ops_of(graph)["Split"] == 2  # query, key, value; gate and up


LEFT = {
    "nothing between": ONE,
    "a norm of each head, rotated": dataclasses.replace(ONE, qk_norm="head"),
    "nothing between, not rotated": dataclasses.replace(ONE, position="none"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_the_next_pass_takes_is_left_alone(case: str) -> None:
    graph = ragged(LEFT[case])
    before = nodes_of(graph)
    report = join_heads(graph)
    assert not report.changed and not report.misses and nodes_of(graph) == before


def test_what_is_read_by_others_is_left_for_the_next_pass_to_say() -> None:
    graph = ragged(NORMED)
    rotation = next(node for node in graph.graph.nodes if node.name == "layer.0.k.rope")
    graph.graph.outputs.append(rotation.outputs[0])
    assert not join_heads(graph).changed
    (miss,) = fuse_rotary_cache(graph).misses
    assert "are not the three parts of one Split" in miss.reason


JOINED = {
    "a norm without a rotation": (dataclasses.replace(ONE, qk_norm="head", position="none"), "heads are normed and not rotated"),
    "a weight for each head": (dataclasses.replace(ONE, qk_norm="heads"), "layer.0.q.merge does not put back together"),
    "a clip": (dataclasses.replace(ONE, clip_qkv=0.5), "layer.0.q.clip.out, layer.0.k.clip.out, layer.0.v.clip.out are not"),
}


@pytest.mark.parametrize("case", JOINED)
def test_other_things_between_are_joined(case: str) -> None:
    model, reason = JOINED[case]
    graph = ragged(model)
    report = join_heads(graph)
    assert report.counts == {"Concat": 1} and report.misses[0].reason.startswith(reason)
    written = "ZooRotaryCache" if model.position == "rope" else "ZooCacheWrite"
    assert fuse_rotary_cache(graph).counts == {written: 1, "ZooCachedAttention": 1}


def test_twice_changes_nothing() -> None:
    graph = ragged(NORMED)
    join_heads(graph)
    before = nodes_of(graph)
    assert not join_heads(graph).changed and nodes_of(graph) == before


def test_who_wants_it() -> None:
    spec = build_spec(TINY)
    assert JoinHeads().wanted(spec, KERNELS) and not JoinHeads().wanted(spec, PLAIN)
    assert not JoinHeads().demanded(spec, KERNELS)


def test_a_broken_promise_and_a_wrong_start() -> None:
    class Lazy(JoinHeads):
        def apply(self, graph: ModelGraph, ctx: object) -> PassReport:
            return PassReport(self.name)

    with pytest.raises(PassError, match=r"could be joined, but are not: layer\.0\.attention"):
        rewritten([Lazy()], ragged(NORMED), build_spec(NORMED))
    with pytest.raises(PassError, match=r"pass 'join_heads'.*it starts from a graph with paged attention"):
        rewritten([JoinHeads()], expand(TINY, "float32"), build_spec(TINY))


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("name", ["olmo2-biases", "cohere-normed-heads", "stablelm-parallel-normed-heads", "exaone4-pattern"])
def test_the_same_numbers_with_all_passes_for_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, quant: str
) -> None:
    """The graph that becomes a launch plan, in ragged batches: the same float32 operators in the same order as before."""
    monkeypatch.setattr(kernel_graphs, "_scales", lambda folder: {})  # every scale is 0.02, on both sides
    folder = zoo_cases.make_folder(tmp_path / name, zoo_cases.all_cases()[name])
    spec = fit_names(compose_model(adopt(folder)).model, Checkpoint.open(folder).tensors)
    model = Small(folder, build_spec(spec, quant=quant))
    graph = rewritten([CudaFp8(), FuseNorm(), FuseActivation(), JoinHeads(), FuseRotaryCache()], model.graph(), model.build)
    counts = ops_of(graph)
    assert counts["Concat"] >= 1 and not {"ZooPagedAttention", "RotaryEmbedding"} & set(counts)
    np.testing.assert_allclose(model.logits(graph), model.logits(model.graph()), atol=1e-6, rtol=0)
