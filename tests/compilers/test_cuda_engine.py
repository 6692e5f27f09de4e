"""A ``cuda`` engine's files: what is written, what it says it needs, the same bytes again, and who cannot have one."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import cuda_engines
import families
import pytest
from cuda_engines import HOPPER, LIMITS, compile_engine

from zoo.artifacts.manifest import EngineManifest
from zoo.compilers.base import weight_bytes
from zoo.compilers.cuda import CudaCompiler
from zoo.compilers.cuda.engine import RUNTIME
from zoo.compilers.cuda.plan import SCHEMA
from zoo.errors import CompileError, UnavailableError
from zoo.runtime.cuda import checks
from zoo.runtime.cuda.table import check_products, read_table
from zoo.runtime.cuda.weights import SOURCES
from zoo.spec import HardwareSpec


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = families.CASES["llama-grouped"]
    return families.make_checkpoint(tmp_path_factory.getbasetemp(), family, **overrides)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "checkpoint" not in path.parts
    }


@pytest.mark.parametrize("quant", ["none", "fp8-kv"])
def test_what_is_written(checkpoint: Path, tmp_path: Path, quant: str) -> None:
    manifest = compile_engine(tmp_path / "engine", checkpoint, quant)
    written, plan = files(tmp_path / "engine"), checks.read_plan(tmp_path / "engine")
    kernels = {f"kernels/{name}.cubin": data["digest"].removeprefix("sha256:") for name, data in plan["kernels"].items()}
    scales = {"scales.json"} if quant != "none" else set()
    assert set(written) == {"plan.json", "weights.json", *scales, *kernels}
    assert all(written[name] == digest for name, digest in kernels.items())
    assert plan["schema"] == SCHEMA == checks.SCHEMA and (plan["sm"], plan["dtype"], plan["vocab_size"]) == (90, "bfloat16", 262)
    table = read_table(tmp_path / "engine")
    check_products(plan, table)
    loaders = {kind: set(kernels) for kind, kernels in plan["weight_kernels"].items()}
    assert loaders == ({} if quant == "none" else {kind: set(SOURCES) for kind in ("channel_scale", "quantize")})
    assert {weight.dtype for weight in table} == {"bfloat16"} | ({"float8e4m3", "float32"} if quant != "none" else set())
    assert checks.check_manifest(manifest).max_tokens == LIMITS.max_tokens
    assert EngineManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert len((tmp_path / "engine" / "plan.json").read_bytes()) < 100_000


def test_the_same_build_is_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compile_engine(tmp_path / name, checkpoint, "fp8-kv")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_what_it_says_it_needs(checkpoint: Path, tmp_path: Path) -> None:
    """Weights, activations, the pools of one context and what the runtime takes: a GPU with more memory holds more sequences."""
    manifest = compile_engine(tmp_path / "engine", checkpoint, "fp8-kv")
    graph = cuda_engines.rewritten(cuda_engines.build_spec(families.spec(checkpoint), "fp8-kv"))
    pools = 2 * (1 + LIMITS.max_context // LIMITS.block_size) * 2 * LIMITS.block_size * 2 * 16  # layers, blocks, keys and values
    assert manifest.scratch == checks.read_plan(tmp_path / "engine")["arena"]
    memory = weight_bytes(graph) + manifest.scratch + pools + RUNTIME
    assert manifest.needs == {"kind": "gpu", "sm": 90, "memory": memory, "packages": {"cuda-bindings": "13.0"}}


def test_other_hardware_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    compiler = CudaCompiler()
    assert compiler.supports(HOPPER) == ""
    others = [dataclasses.replace(HOPPER, name="l40s", sm=89), HardwareSpec("cpu", "cpu")]
    for hardware in others:
        assert compiler.supports(hardware) == (
            f"it builds for GPUs of SM 9.0, and {hardware.name!r} is none; pick another compiler"
        )
        build = cuda_engines.build_spec(families.spec(checkpoint), hardware=hardware)
        with pytest.raises(
            CompileError, match=rf"cuda does not build for hardware '{hardware.name}': it builds for GPUs of SM 9\.0"
        ):
            compiler.compile(cuda_engines.rewritten(build), build, None, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    compiler, words = CudaCompiler(), r"Triton, which compiles the kernels, is not installed; install it with `pip install "
    assert compiler.available() == "" and compiler.version() == f"triton {importlib.metadata.version('triton')}"
    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compiler.available().startswith(words)
    with pytest.raises(UnavailableError, match=words):
        compiler.version()
