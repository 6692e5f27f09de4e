"""Graph rewriting: ``PASSES`` is the one ordered list, ``run_passes`` runs it. See docs/adding-a-pass.md."""

from __future__ import annotations

from pathlib import Path

from zoo.graph import ModelGraph
from zoo.passes.frame import Pass, PassContext, run
from zoo.spec import BuildSpec
from zoo.targets import Target

__all__ = ["PASSES", "Pass", "PassContext", "run_passes"]

PASSES: tuple[Pass, ...] = ()


def run_passes(
    graph: ModelGraph, build: BuildSpec, target: Target, dump_dir: Path | None = None, *, check: bool = False
) -> ModelGraph:
    """Rewrite a template's graph for a target, in place; the parameters are those of ``zoo.passes.frame.run``."""
    return run(PASSES, graph, build, target, dump_dir, check)
