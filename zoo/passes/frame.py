"""The frame that every rewriting pass stands in: ``requires -> apply -> ensures``, reports, dumps, errors that name the pass.

A pass is one file with one subclass of ``Pass``. It rewrites ``ModelGraph`` in place, counts what it did, and records a
``Miss`` with a reason for every place that nearly matched. A pass that the spec demands and that changes nothing is an
error which lists those misses. Running a pass twice changes nothing the second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from zoo.errors import PassError, ZooError
from zoo.graph import Miss, ModelGraph, PassReport
from zoo.spec import BuildSpec
from zoo.targets import Target

# The order of phases. Fusion stands before quantization so that a fused linear layer is quantized once, with one
# activation scale, and a target sees one FP8 GEMM where the template wrote three.
PHASES = ("clean", "parallelism", "paged attention", "fusion", "quantization", "lowering")
MISSES_SHOWN = 5


@dataclass(frozen=True)
class PassContext:
    """What a pass may ask besides the graph: what is built, and what the target can do."""

    build: BuildSpec
    target: Target


class Pass:
    """One rewriting pass. Subclasses set ``name`` and ``phase`` and override what they need.

    ``wanted``    whether to run at all for this build; a pass that is not wanted leaves no report
    ``demanded``  whether the build cannot do without it: changing nothing is then an error
    ``requires``  raises PassError when the graph is not what the pass can start from
    ``apply``     rewrites in place and reports
    ``ensures``   raises PassError when the graph is not what the pass promises; also runs when nothing changed
    """

    name: ClassVar[str]
    phase: ClassVar[str]

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return True

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return False

    def requires(self, graph: ModelGraph, ctx: PassContext) -> None:
        return None

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        raise NotImplementedError

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        return None

    def report(self) -> PassReport:
        """An empty report in this pass's name."""
        return PassReport(self.name)


def run(
    passes: Sequence[Pass],
    graph: ModelGraph,
    build: BuildSpec,
    target: Target,
    dump_dir: Path | None = None,
    check: bool = False,
) -> ModelGraph:
    """Run passes in order over ``graph``, in place, and give it back.

    dump_dir  a folder for ``NN-phase.onnx`` (weightless, opens in Netron) of the start and of each phase's result
    check     export and run onnx.checker after every pass: for tests and for debugging a pass

    Raises PassError that names the pass, what failed and the passes before it.
    """
    ctx = PassContext(build, target)
    done: list[str] = []
    phase, number = graph.phase, 0
    if dump_dir:
        dump_dir.mkdir(parents=True, exist_ok=True)
        _dump(graph, dump_dir, number)
    for step in passes:
        assert step.phase in PHASES, f"pass {step.name} stands in the unknown phase {step.phase!r}"
        if not step.wanted(build, target):
            continue
        if dump_dir and phase != step.phase and phase in PHASES:
            number += 1
            _dump(graph, dump_dir, number)
        graph.phase = phase = step.phase
        try:
            _run_one(step, graph, ctx)
            if check:
                check_graph(graph)
        except ZooError as error:
            before = ", ".join(done) or "no other pass"
            raise PassError(f"pass {step.name!r} on model {build.model.name!r}: {error} (ran before it: {before})") from error
        done.append(step.name)
    if dump_dir and phase in PHASES:
        _dump(graph, dump_dir, number + 1)
    return graph


def _run_one(step: Pass, graph: ModelGraph, ctx: PassContext) -> None:
    step.requires(graph, ctx)
    report = step.apply(graph, ctx)
    assert report.name == step.name, f"pass {step.name} reports in the name of {report.name}"
    if not report.changed and step.demanded(ctx.build, ctx.target):
        raise PassError(f"it is needed for {ctx.build.profile} but found nothing to rewrite; {describe_misses(report.misses)}")
    step.ensures(graph, ctx)
    graph.reports.append(report)


def describe_misses(misses: Sequence[Miss]) -> str:
    """The nearest misses in one line."""
    if not misses:
        return "no node came near its pattern"
    shown = "; ".join(f"{miss.where}: {miss.reason}" for miss in misses[:MISSES_SHOWN])
    more = f" and {len(misses) - MISSES_SHOWN} more" if len(misses) > MISSES_SHOWN else ""
    return f"nearest misses: {shown}{more}"


def check_graph(graph: ModelGraph) -> None:
    """Export and check the graph as ONNX; raises PassError with the checker's words."""
    undefined = [
        f"{node.name} reads {tensor.name!r}"
        for node in graph.graph.nodes
        for tensor in node.inputs
        if not tensor.is_empty() and not tensor.inputs and not _is_given(graph, tensor)
    ]
    if undefined:
        raise PassError(f"the graph reads tensors that nothing makes: {'; '.join(undefined[:MISSES_SHOWN])}")
    try:
        onnx.checker.check_model(graph.to_onnx())
    except (onnx.checker.ValidationError, ValueError) as error:
        raise PassError(f"the graph is not valid ONNX afterwards: {error}") from None


def _is_given(graph: ModelGraph, tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or any(tensor is given for given in graph.graph.inputs)


def _dump(graph: ModelGraph, folder: Path, number: int) -> None:
    graph.save(folder / f"{number:02d}-{graph.phase.replace(' ', '-')}.onnx")
