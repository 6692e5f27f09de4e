"""Plans of every family: nothing is left out, nothing is overwritten while it is needed, and all of it survives JSON."""

from __future__ import annotations

import functools
import json
from math import prod
from pathlib import Path
from typing import Any

import cuda_engines
import families
import onnx_graphsurgeon as gs
import pytest

from zoo.compilers.base import ITEM_SIZES
from zoo.compilers.cuda import CudaCompiler
from zoo.compilers.cuda.memory import ALIGN
from zoo.compilers.cuda.plan import Gemm, Plan, Planner, gemm_json, largest, launch_json
from zoo.errors import CompileError
from zoo.graph import ModelGraph
from zoo.plugins.kernels import Launch, Scratch
from zoo.spec import BuildSpec

SIXTEENS = ["llama-three-heads", "qwen2-tied-odd", "gpt2-odd"]  # whose sizes are no multiples of 16
ALL = [(case, quant) for case in families.CASES for quant in ("none", "fp8", "fp8-kv") if quant == "none" or case not in SIXTEENS]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@functools.cache
def planner_of(base: Path, case: str, quant: str) -> tuple[Planner, BuildSpec]:
    family, overrides = families.CASES[case]
    build = cuda_engines.build_spec(families.spec(families.make_checkpoint(base, family, **overrides)), quant)
    planner = Planner(cuda_engines.rewritten(build), build, {})
    planner.run()
    return planner, build


def touched(step: Launch | Gemm) -> list[str]:
    """The tensors and scratch of a step, by name."""
    if isinstance(step, Gemm):
        few = [arg for launch in step.launches for arg in launch.args]
        return [step.x, step.w, step.y, *(name for name in (step.w_scale, step.x_scale) if name), *names(few)]
    return names(step.args)


def names(args: Any) -> list[str]:
    return [arg.name if isinstance(arg, Scratch) else arg for arg in args if isinstance(arg, str | Scratch)]


@pytest.mark.parametrize(("case", "quant"), ALL)
def test_every_node_is_carried_out(base: Path, case: str, quant: str) -> None:
    """What a node makes is made by a step, or is another name of what it reads; what a node reads, a step reads."""
    planner, _ = planner_of(base, case, quant)
    plan, graph = planner.plan, planner.graph
    seen = {name for step in plan.steps for name in touched(step)}
    for node in graph.graph.nodes:
        for tensor in node.outputs:
            cast = node.outputs[0].outputs and node.outputs[0].outputs[0].op == "Cast" and node.op in ("MatMul", "FusedMatMul")
            assert plan.root(tensor.name) in seen or cast, f"{node.name}: {tensor.name} is made by no step"
        for tensor in node.inputs:
            constant = isinstance(tensor, gs.Constant) or tensor.is_empty()
            assert constant or plan.root(tensor.name) in seen or id(node) in planner.skipped, f"{node.name} reads {tensor.name}"
    for name, root in plan.views.items():
        assert name not in plan.places and plan.root(root) == plan.root(name)
    assert set(plan.kernels) == {launch.kernel.name for step in plan.steps for launch in launches(step)}
    assert all(graph.weights.keys() >= {step.w} for step in plan.steps if isinstance(step, Gemm))


def launches(step: Launch | Gemm) -> list[Launch]:
    return [step] if isinstance(step, Launch) else list(step.launches)


@pytest.mark.parametrize(
    ("case", "quant"), [("llama-grouped", "fp8-kv"), ("qwen3-norms", "none"), ("gpt2", "fp8"), ("gpt2-odd", "none")]
)
def test_nothing_is_overwritten_while_it_is_needed(base: Path, case: str, quant: str) -> None:
    """Sizes and lifetimes anew from the steps, and whether places overlap."""
    planner, build = planner_of(base, case, quant)
    plan, most = planner.plan, largest(build)
    sizes: dict[str, int] = {}
    for ref in planner.refs.values():
        if ref.name in plan.places:
            shape = [size if isinstance(size, int) else most[size] for size in ref.shape]
            sizes[ref.name] = max(sizes.get(ref.name, 0), prod(shape) * ITEM_SIZES[ref.dtype])
    for step in plan.steps:
        for launch in launches(step):
            for arg in launch.args:
                if isinstance(arg, Scratch):
                    sizes[arg.name] = max(sizes.get(arg.name, 0), arg.size.at(most))
    life: dict[str, tuple[int, int]] = {}
    for number, step in enumerate(plan.steps):
        for name in touched(step):
            if name in plan.places:
                life[name] = (life.get(name, (number, 0))[0], number)
    assert set(sizes) == set(life) == set(plan.places)
    live = [sum(sizes[name] for name, (first, last) in life.items() if first <= at <= last) for at in range(len(plan.steps))]
    assert max(live) <= plan.arena <= max(max(live) * 1.1, max(live) + 8 * ALIGN), "the arena is larger than it has to be"
    for one, (first, last) in life.items():
        start, end = plan.places[one], plan.places[one] + sizes[one]
        assert start % ALIGN == 0 and end <= plan.arena
        for other, (begin, stop) in life.items():
            apart = end <= plan.places[other] or plan.places[other] + sizes[other] <= start
            assert one == other or last < begin or stop < first or apart, f"{one} and {other} overlap"


@pytest.mark.parametrize(("case", "quant"), [("llama-grouped", "fp8-kv"), ("gpt2", "none")])
def test_a_plan_survives_json(base: Path, case: str, quant: str) -> None:
    planner, _ = planner_of(base, case, quant)
    plan = planner.plan
    data = [gemm_json(step, plan) if isinstance(step, Gemm) else launch_json(step, plan) for step in plan.steps]
    assert json.loads(json.dumps(data)) == data, "tuples, or keys that are no text"
    for step, one in zip(plan.steps, data, strict=True):
        if isinstance(step, Launch):
            assert one["kernel"] == step.kernel.name and len(one["args"]) == len(step.kernel.args) and len(one["grid"]) == 3
            for arg, (_, kind), said in zip(step.args, step.kernel.args, one["args"], strict=True):
                assert len(said) == 1 and set(said) <= ({"arena", "tensor"} if kind.startswith("*") else {"size", "float"})
                if isinstance(arg, str):
                    place = plan.places.get(plan.root(arg))
                    assert said == ({"tensor": plan.root(arg)} if place is None else {"arena": place})


def test_what_lies_outside_the_arena(base: Path) -> None:
    """Inputs, pools and weights have addresses of their own; logits have a place, for sampling to read."""
    planner, build = planner_of(base, "llama-grouped", "fp8-kv")
    plan = planner.plan
    outside = {name for step in plan.steps for name in touched(step)} - set(plan.places)
    weights = set(planner.graph.weights)
    batch = {
        "token_ids",
        "positions",
        "query_starts",
        "kv_lengths",
        "block_table.full",
        "logit_rows",
        "token_slots",
        "prefill_tiles",
    }
    assert outside - weights == batch | {"kv.0", "kv.1"}
    assert "logits" in plan.places and plan.views["kv_out.0"] == "kv.0"
    assert (
        {ref.dtype for name, ref in planner.refs.items() if plan.root(name).startswith("kv.")}
        == {build.cache_dtype}
        == {"float8e4m3"}
    )


def with_node(base: Path, op: str) -> tuple[ModelGraph, BuildSpec]:
    family, overrides = families.CASES["llama-grouped"]
    build = cuda_engines.build_spec(families.spec(families.make_checkpoint(base, family, **overrides)))
    graph = cuda_engines.rewritten(build)
    last = graph.graph.nodes[-1]
    logits = last.outputs[0]
    middle = gs.Variable("middle", logits.dtype, logits.shape)
    last.outputs = [middle]
    graph.graph.nodes.append(gs.Node(op, "the.odd.one", inputs=[middle], outputs=[logits]))
    return graph, build


def test_a_node_without_a_kernel_is_named(base: Path, tmp_path: Path) -> None:
    graph, build = with_node(base, "Softmax")
    with pytest.raises(
        CompileError, match=r"the\.odd\.one: the cuda target has no kernel for Softmax; it has .*Gather.*ZooCached"
    ):
        CudaCompiler().compile(graph, build, None, {}, tmp_path)
    assert not list(tmp_path.iterdir())
    graph, build = with_node(base, "Relu")  # which it has
    assert isinstance(Planner(graph, build, {}).run(), Plan)


@pytest.mark.parametrize("case", SIXTEENS)
def test_fp8_layers_that_tensor_cores_do_not_take_are_named(base: Path, tmp_path: Path, case: str) -> None:
    family, overrides = families.CASES[case]
    build = cuda_engines.build_spec(families.spec(families.make_checkpoint(base, family, **overrides)), "fp8")
    with pytest.raises(
        CompileError, match=r"sizes are multiples of 16, and \d+ are not: layer\.0\.qkv \[\d+, \d+\], .*quant\.skip"
    ):
        CudaCompiler().compile(cuda_engines.rewritten(build), build, None, {}, tmp_path)
