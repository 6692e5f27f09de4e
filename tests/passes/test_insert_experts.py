"""insert_experts and lower_experts: every block in every form, what must not match and why, twice, weights, what is quantized."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from linear_graphs import nodes_of
from moe_blocks import CASES, checkpoint, inputs, plain_graph, reference, run, spec, weights_of
from ragged import build_spec
from safetensors.numpy import save_file

from zoo.errors import PassError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.modelspec import ModelSpec, MoeSpec, TensorNames
from zoo.passes import frame, run_passes
from zoo.passes.frame import PassContext, check_graph
from zoo.passes.insert_experts import InsertExperts, insert_experts, stack_gate_up
from zoo.passes.lower_experts import LowerExperts, lower_experts, woven
from zoo.plugins.moe import PLUGINS
from zoo.runtime.cuda.runs import runs_of
from zoo.targets import TARGETS
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Recipe, Weight, concat, reshape, slice_, tensor, transpose

OPS = {
    "mixtral": {"ZooRouter": 1, "ZooExperts": 1},
    "qwen2_moe": {"ZooRouter": 1, "ZooExperts": 1, "ZooSharedGate": 1},
    "deepseek_v3": {"ZooRouterSelect": 1, "ZooExperts": 1},
    "gpt_oss": {"ZooRouterBias": 1, "ZooExpertsBias": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_the_block_of_transformers(name: str, tmp_path: Path) -> None:
    """The bodies, and both lowerings: float32, 1e-5."""
    x = inputs(2, 7)
    with checkpoint(name, tmp_path) as tensors:
        for form in ("body", "dense", "chosen"):
            graph = plain_graph(spec(name))
            report = insert_experts(graph)
            assert report.counts == OPS.get(name, OPS["mixtral"]) and not report.misses
            if form != "body":
                lower_experts(graph, form)
                assert not {node.op for node in graph.graph.nodes} & (set(PLUGINS) - {"ZooSharedGate"})
            check_graph(graph)
            np.testing.assert_allclose(run(graph, weights_of(graph, tensors), x), reference(name, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_twice_changes_nothing(name: str) -> None:
    graph = plain_graph(spec(name), "bfloat16")
    insert_experts(graph)
    before, weights = nodes_of(graph), dict(graph.weights)
    assert not insert_experts(graph).changed and nodes_of(graph) == before and graph.weights == weights
    lower_experts(graph, "dense")
    before = nodes_of(graph)
    assert not lower_experts(graph, "dense").changed and nodes_of(graph) == before


def test_before_and_expected() -> None:
    graph = plain_graph(spec("deepseek_v3"), "bfloat16")
    before = [node.name for node in graph.graph.nodes]
    insert_experts(graph)
    first = next(place for place, name in enumerate(before) if name.startswith("layer.0.router"))
    assert nodes_of(graph)[:first] == nodes_of(plain_graph(spec("deepseek_v3"), "bfloat16"))[:first]
    router, weights = ["layer.0.router.chosen", "layer.0.router.weights"], ["layer.0.experts.gate_up", "layer.0.experts.down"]
    assert nodes_of(graph)[first:] == [
        ("ZooRouterSelect", "layer.0.router", ["x", "layer.0.router", "layer.0.select_bias"], router),
        ("ZooExperts", "layer.0.experts", ["x", *router, *weights], ["layer.0.experts.rounded.out"]),
        ("Add", "layer.0.moe", ["layer.0.experts.rounded.out", "layer.0.shared.down.out"], ["y"]),
    ]
    chooser, experts = graph.graph.nodes[first : first + 2]
    given = {"top_k": 3, "score": 1, "normalize": 1, "groups": 4, "top_groups": 2, "group_score": 1, "scale": 2.5}
    assert chooser.attrs == given | {"plugin_namespace": "zoo", "plugin_version": "1"}
    assert (experts.attrs["kind"], experts.attrs["top_k"]) == (0, 3)
    assert [graph.weights[name].shape for name in ("layer.0.router", *weights)] == [(8, 24), (8, 40, 24), (8, 24, 20)]
    assert [variable.shape for variable in chooser.outputs] == [["batch", "sequence", 3]] * 2
    assert list(graph.weights) == [variable.name for variable in graph.graph.inputs[1:]]
    assert list(graph.weights)[-4:] == ["layer.0.router", "layer.0.select_bias", *weights]
    assert sorted(graph.functions) == ["ZooExperts", "ZooRouterSelect"]


def node(graph: ModelGraph, name: str) -> gs.Node:
    return next(node for node in graph.graph.nodes if node.name == name)


def set_attr(name: str, key: str, value: object) -> Callable[[ModelGraph], None]:
    return lambda graph: node(graph, name).attrs.update({key: value})


def set_constant(name: str, place: int, values: object) -> Callable[[ModelGraph], None]:
    return lambda graph: node(graph, name).inputs.__setitem__(place, gs.Constant("other", np.array(values, np.int64)))


def add_reader(name: str) -> Callable[[ModelGraph], None]:
    def change(graph: ModelGraph) -> None:
        out = gs.Variable("spy.out", dtype=1)
        graph.graph.nodes.append(gs.Node("Neg", "spy", inputs=[node(graph, name).outputs[0]], outputs=[out]))
        graph.graph.outputs.append(out)

    return change


def swap(name: str, place: int, other: str) -> Callable[[ModelGraph], None]:
    return lambda graph: node(graph, name).inputs.__setitem__(place, node(graph, other).outputs[0])


MISSES: dict[str, tuple[str, Callable[[ModelGraph], None], str]] = {
    "another-reader": ("mixtral", add_reader("layer.0.experts.gate"), "spy reads layer.0.experts.gate.out, too"),
    "weights-read-elsewhere": ("mixtral", add_reader("layer.0.router.share"), "spy reads layer.0.router.share.out, too"),
    "smallest": ("mixtral", set_attr("layer.0.router.top", "largest", 0), "does not give the places of the largest in order"),
    "unsorted": ("mixtral", set_attr("layer.0.router.top", "sorted", 0), "does not give the places of the largest in order"),
    "softmax-axis": ("mixtral", set_attr("layer.0.router.scores", "axis", 1), "layer.0.router.scores has axis 1, not -1"),
    "kept-axis": ("mixtral", set_attr("layer.0.experts", "keepdims", 1), "layer.0.experts has keepdims 1, not 0"),
    "sum-of-tokens": ("mixtral", set_constant("layer.0.experts", 1, [2]), "layer.0.experts reads the constant .2., not .1."),
    "other-numbers": (
        "mixtral",
        set_constant("layer.0.experts.chosen.same", 1, [[[[1, 0, 2, 3, 4, 5, 6, 7]]]]),
        "reads the constant",
    ),
    "another-gate": (
        "mixtral",
        lambda graph: node(graph, "layer.0.experts.act.sigmoid").__setattr__("op", "Tanh"),
        "is made by Tanh, not by Sigmoid",
    ),
    "router-of-something-else": (
        "qwen2_moe",
        swap("layer.0.router", 0, "layer.0.shared.down"),
        "layer.0.experts reads x, not layer.0.shared.down.out|reads layer.0.shared.down.out, not x",
    ),
    "epsilon": (
        "mixtral",
        lambda graph: graph.weights.__setitem__(
            "router.epsilon",
            dataclasses.replace(
                graph.weights["router.epsilon"], recipe=Recipe("computed", (), (), ("constant", (("value", 1e-3),)))
            ),
        ),
        "reads the number 0.001, not 1e-20",
    ),
    "groups-that-may-be-chosen": (
        "deepseek_v2",
        lambda graph: graph.weights.__setitem__(
            "router.lowest",
            dataclasses.replace(
                graph.weights["router.lowest"], recipe=Recipe("computed", (), (), ("constant", (("value", 0.0),)))
            ),
        ),
        "gives experts of other groups the score 0.0, which may be chosen",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_must_not_match_and_why(name: str) -> None:
    case, change, reason = MISSES[name]
    graph = plain_graph(spec(case))
    change(graph)
    before = nodes_of(graph)
    report = insert_experts(graph)
    assert not report.changed and nodes_of(graph) == before
    (miss,) = report.misses
    assert miss.where == "layer.0.experts" and re.search(reason, miss.reason), miss.reason


def test_a_shared_gate_that_others_read_stays() -> None:
    graph = plain_graph(spec("qwen2_moe"))
    add_reader("layer.0.shared_gate.sigmoid")(graph)
    report = insert_experts(graph)
    assert report.counts == {"ZooRouter": 1, "ZooExperts": 1}
    assert [(miss.where, miss.reason) for miss in report.misses] == [
        ("layer.0.moe", "something else reads layer.0.shared_gate.sigmoid.out, too")
    ]


def test_single_tensors_are_joined_as_they_lie(tmp_path: Path) -> None:
    """Gate and up of expert 0, then of expert 1: whole tensors, so that a GPU gets them from the file."""
    rng = np.random.default_rng(0)
    arrays = {f"{role}.{n}": rng.standard_normal((3, 5), np.float32) for role in ("gate", "up") for n in range(4)}
    save_file(arrays, tmp_path / "model.safetensors")

    def stacked(role: str) -> Recipe:
        return concat([reshape(tensor(f"{role}.{n}", (3, 5)), (1, 3, 5)) for n in range(4)], 0)

    recipe = stack_gate_up(stacked("gate"), stacked("up"))
    wanted = np.stack([np.concatenate([arrays[f"gate.{n}"], arrays[f"up.{n}"]]) for n in range(4)])
    with Tensors.open(tmp_path) as tensors:
        runs = runs_of(recipe, tensors)
        assert runs is not None and len(runs) == 8
        stored = [np.fromfile(run.path, np.float32, 15, offset=run.offset).reshape(3, 5) for run in runs]
        assert np.array_equal(np.concatenate(stored).reshape(4, 6, 5), wanted)
        turns = materialize(Weight("turns", "float32", woven(recipe)), tensors, {})
    assert np.array_equal(turns, wanted.reshape(4, 2, 3, 5).swapaxes(1, 2).reshape(4, 6, 5))
    assert sum(1 for _ in woven(recipe).leaves()) == 8


def test_what_a_checkpoint_has_in_this_order_is_left_alone() -> None:
    whole = tensor("gate_up", (4, 6, 5))
    assert stack_gate_up(slice_(whole, 1, 0, 3), slice_(whole, 1, 3, 6)) is whole
    graph = plain_graph(spec("mixtral"))
    insert_experts(graph)
    assert {weight.recipe.op for weight in graph.weights.values()} == {"tensor"}


def test_turns_of_gpt_oss_are_those_of_its_checkpoint() -> None:
    """It stores gate and up in turns, [X, in, 2F]; where ONNX Runtime wants turns, too, that is only turned around."""
    graph = plain_graph(spec("gpt_oss"))
    insert_experts(graph)
    lower_experts(graph, "chosen")
    recipe, bias = (graph.weights[f"layer.0.experts.gate_up{part}"].recipe for part in ("", ".bias"))
    assert recipe == transpose(tensor("experts.gate_up_proj", (8, 24, 40)), (0, 2, 1))
    assert bias == tensor("experts.gate_up_proj_bias", (8, 40))


NAMES = {
    **{role: f"l.{{layer}}.{role}" for role in ("norm1", "norm2", "q", "k", "v", "o", "router")},
    **{role: f"l.{{layer}}.{role}" for role in ("gate", "up", "down", "shared.gate", "shared.up", "shared.down", "shared_gate")},
    **{f"experts.{role}": f"l.{{layer}}.{{expert}}.{role}" for role in ("gate", "up", "down")},
}
MODEL = ModelSpec(
    "moe", "moe", 64, 32, 3, 2, 1, 16, 48, 64,
    moe=MoeSpec(8, 2, 16, shared=32, shared_gate=True, dense_layers=(1,)),
    tensors=TensorNames(model={name: name for name in ("embed", "final_norm", "lm_head")}, layer=NAMES),
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_whole_models_on_every_target(name: str, quant: str) -> None:
    """Layers 0 and 2 have experts, layer 1 has none. Quantization leaves routers, gates and experts alone, and says so."""
    target = TARGETS[name]
    build = dataclasses.replace(build_spec(MODEL, compiler=name, quant=quant), dtype=target.dtypes[0])
    graph = run_passes(expand(MODEL, build.dtype, 64), build, target, check=name != "cuda")
    reports = {report.name: report for report in graph.reports}
    inserted = reports["insert_experts"]
    assert inserted.counts == {"ZooRouter": 2, "ZooExperts": 2, "ZooSharedGate": 2}
    reasons = [(miss.where, miss.reason) for miss in inserted.misses]
    kept = f"quant fp8 has no kernels for experts: they stay in {build.dtype}"
    assert reasons == ([(f"layer.{i}.experts", kept) for i in (0, 2)] if quant == "fp8" else [])
    lowered = {"onnxruntime": "Sparse", "tensorrt": "Dense", "tensorrt_rtx": "Dense"}.get(name)
    ops = {node.op for node in graph.graph.nodes}
    assert (f"ZooExperts{lowered}Silu" if lowered else "ZooExperts") in ops and "ZooSharedGate" in ops
    quantized = {weight.name for weight in graph.weights.values() if weight.dtype == "float8e4m3"}
    assert bool(quantized) == (quant == "fp8")
    assert not any("router" in one or "shared_gate" in one or "experts" in one for one in quantized)


def test_a_model_of_experts_needs_them_found() -> None:
    build = build_spec(dataclasses.replace(MODEL, num_layers=1))
    graph = expand(build.model, "float32", 64)
    set_attr("layer.0.router.top", "sorted", 0)(graph)
    with pytest.raises(PassError, match=r"pass 'insert_experts'.*layer.0.experts: layer.0.router.top does not give the places"):
        frame.run([InsertExperts()], graph, build, TARGETS["onnxruntime"])


def test_who_wants_the_passes() -> None:
    dense, target = dataclasses.replace(MODEL, moe=MoeSpec()), TARGETS["onnxruntime"]
    assert not InsertExperts().wanted(build_spec(dense), target) and not LowerExperts().wanted(build_spec(dense), target)
    assert not LowerExperts().wanted(build_spec(MODEL), TARGETS["cuda"]) and LowerExperts().wanted(build_spec(MODEL), target)
    all_dense = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, dense_layers=(0, 1, 2)))
    assert not InsertExperts().demanded(build_spec(all_dense), target)
    LowerExperts().requires(plain_graph(spec("mixtral")), PassContext(build_spec(MODEL), target))


def test_weights_may_be_made_whatever_their_order(tmp_path: Path) -> None:
    """The lowered weight is the plain one, row by row in turns."""
    with checkpoint("mixtral", tmp_path) as tensors:
        graph = plain_graph(spec("mixtral"))
        insert_experts(graph)
        before = materialize(graph.weights["layer.0.experts.gate_up"], tensors, {})
        lower_experts(graph, "chosen")
        after = materialize(graph.weights["layer.0.experts.gate_up"], tensors, {})
    assert np.array_equal(after[:, ::2], before[:, :20]) and np.array_equal(after[:, 1::2], before[:, 20:])
