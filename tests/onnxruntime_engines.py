"""Tiny CPU engines in a folder, laid out as an opened artifact, without a registry."""

from __future__ import annotations

import os
from pathlib import Path

import families
from ragged import build_spec

from zoo.artifacts.manifest import EngineManifest
from zoo.compilers.onnxruntime import OnnxRuntimeCompiler
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.spec import BuildSpec, Limits, to_json
from zoo.targets import TARGETS
from zoo.weights.reader import Tensors


def rewritten(checkpoint: Path, limits: Limits | None = None) -> tuple[ModelGraph, BuildSpec]:
    """The graph of a checkpoint folder, rewritten for ONNX Runtime."""
    build = build_spec(families.spec(checkpoint), limits)
    graph = expand(build.model, "float32", build.limits.max_context)
    return run_passes(graph, build, TARGETS["onnxruntime"]), build


def compile_engine(folder: Path, checkpoint: Path, limits: Limits | None = None) -> EngineManifest:
    """Compile into ``folder``, link the checkpoint beside it, and give the manifest."""
    graph, build = rewritten(checkpoint, limits)
    compiler = OnnxRuntimeCompiler()
    folder.mkdir(parents=True)
    with Tensors.open(checkpoint) as tensors:
        compiled = compiler.compile(graph, build, tensors, {}, folder)
        (folder / "checkpoint").mkdir()
        for file in tensors.files:
            os.link(file, folder / "checkpoint" / file.name)
    assert set(compiled.files) == {"model.onnx", "weights.json"} and all(path.is_file() for path in compiled.files.values())
    return EngineManifest(
        model=build.model.name,
        version="0" * 12,
        profile=build.profile,
        build="sha256:" + "0" * 64,
        made={},
        compiler={"name": compiler.name, "version": compiler.version()},
        spec={"threads": 1},
        needs=compiled.needs,
        limits=to_json(build.limits),
        abi=compiled.abi,
        weights=compiled.weights,
        scratch=compiled.scratch,
    )
