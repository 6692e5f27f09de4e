"""The frame: order of calls, reports, errors that name the pass and those before it, dumps, and the checker."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import attention_graph, attention_spec
from ragged import build_spec

from zoo.errors import PassError
from zoo.graph import Miss, ModelGraph, PassReport
from zoo.passes import PASSES, run_passes
from zoo.passes.frame import PHASES, Pass, PassContext, describe_misses, run
from zoo.spec import BuildSpec
from zoo.targets import TARGETS, Target

SPEC = attention_spec()
CPU = TARGETS["onnxruntime"]


class Noting(Pass):
    """Writes down what the frame calls; renames nothing, counts ``changes``."""

    name, phase = "noting", "clean"

    def __init__(self, changes: int = 1, needed: bool = False) -> None:
        self.changes, self.needed, self.calls = changes, needed, list[str]()

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return self.needed

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        self.calls.append("requires")

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        self.calls.append("apply")
        misses = [Miss(f"node.{n}", f"reason {n}") for n in range(7)]
        return PassReport(self.name, {"things": self.changes}, misses)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        self.calls.append("ensures")


class Later(Noting):
    name, phase = "later", "lowering"


class Unwanted(Noting):
    name = "unwanted"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return False


class Breaks(Noting):
    name = "breaks"

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        graph.graph.nodes[-1].inputs[0] = gs.Variable("from.nowhere", 1, [1])
        return PassReport(self.name, {"things": 1})


class Promises(Noting):
    name = "promises"

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        raise PassError("a Relu is left")


def graph() -> ModelGraph:
    return attention_graph(SPEC)


def test_requires_apply_ensures_and_a_report() -> None:
    step, unwanted = Noting(), Unwanted()
    done = run([step, unwanted], graph(), build_spec(SPEC), CPU)
    assert step.calls == ["requires", "apply", "ensures"] and unwanted.calls == []
    assert [(r.name, r.counts) for r in done.reports] == [("noting", {"things": 1})]
    assert done.phase == "clean"


def test_a_demanded_pass_that_changes_nothing_lists_its_nearest_misses() -> None:
    with pytest.raises(PassError) as caught:
        run([Noting(), Later(changes=0, needed=True)], graph(), build_spec(SPEC), CPU)
    message = str(caught.value)
    assert "pass 'later'" in message and "ran before it: noting" in message and "none-cpu-onnxruntime-tp1" in message
    assert "node.0: reason 0" in message and "node.4: reason 4 and 2 more" in message and "node.5" not in message


def test_a_pass_may_find_nothing_when_nobody_demands_it() -> None:
    done = run([Noting(changes=0)], graph(), build_spec(SPEC), CPU)
    assert len(done.reports) == 1 and not done.reports[0].changed and len(done.reports[0].misses) == 7


def test_a_broken_promise_names_the_pass() -> None:
    with pytest.raises(PassError, match=r"pass 'promises' on model 'attention': a Relu is left \(ran before it: no other pass\)"):
        run([Promises()], graph(), build_spec(SPEC), CPU)


def test_the_checker_finds_a_tensor_that_nothing_makes() -> None:
    with pytest.raises(PassError, match=r"pass 'breaks'.*lm_head reads 'from.nowhere'"):
        run([Breaks()], graph(), build_spec(SPEC), CPU, check=True)


def test_the_checker_speaks_for_onnx() -> None:
    class Wrong(Noting):
        name = "wrong"

        def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
            graph.graph.nodes[-1].attrs["no_such_attribute"] = 1
            return PassReport(self.name, {"things": 1})

    with pytest.raises(PassError, match=r"not valid ONNX.*(?s:.*)no_such_attribute"):
        run([Wrong()], graph(), build_spec(SPEC), CPU, check=True)


def test_dumps_of_every_phase_open(tmp_path: Path) -> None:
    run_passes(graph(), build_spec(SPEC), CPU, tmp_path / "dumps")
    names = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert names == ["00-template.onnx", "01-clean.onnx", "02-paged-attention.onnx", "03-fusion.onnx", "04-lowering.onnx"]
    for name in names:
        onnx.checker.check_model(onnx.load(tmp_path / "dumps" / name), full_check=True)
    ops = {node.op_type for node in onnx.load(tmp_path / "dumps" / names[2]).graph.node}
    assert "ZooPagedAttention" in ops and "Attention" not in ops


def test_the_list_is_in_the_order_of_the_phases() -> None:
    order = [PHASES.index(step.phase) for step in PASSES]
    assert order == sorted(order)
    assert len({step.name for step in PASSES}) == len(PASSES)


def test_no_misses_at_all() -> None:
    assert describe_misses([]) == "no node came near its pattern"
