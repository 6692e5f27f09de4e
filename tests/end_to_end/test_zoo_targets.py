"""Every architecture compiles for the targets that cannot run here, small; every published model is rewritten at full size.

Small: the first case of each kind in tests/zoo_cases. A TensorRT-RTX plan is built in full. For cuda the launch plan is made in
full; of the kernels, which families share but for their constants, each is compiled to a cubin once for the whole run, as the
first that asks for it wants it (tests/compilers has them one by one).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import zoo_cases

from zoo.artifacts.registry import Registry
from zoo.build import build, open_checkpoint, rewrite
from zoo.checkpoints.adopt import adopt
from zoo.compilers.cuda.aot import compile_kernels
from zoo.compilers.cuda.plan import Planner
from zoo.config import compose, compose_model, conf_dir, families
from zoo.errors import CompileError
from zoo.spec import BuildSpec

SMALL = ["limits.max_tokens=16", "limits.max_sequences=2", "limits.max_context=64"]
COMPILED: set[str] = set()  # sources of kernels


def first_of_each() -> dict[str, zoo_cases.Case]:
    """The first case of each model type and form of checkpoint."""
    chosen: dict[tuple[str, str], str] = {}
    cases = zoo_cases.all_cases()
    for name, case in cases.items():
        chosen.setdefault((case.kind, case.repack.__name__ if case.repack else ""), name)
    return {name: cases[name] for name in chosen.values()}


CASES = first_of_each()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def spec_of(root: Path, name: str, *overrides: str) -> BuildSpec:
    folder = root / name
    if not folder.exists():
        zoo_cases.make_folder(folder, CASES[name])
    return compose_model(adopt(folder), [*SMALL, *overrides])


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_rtx(root: Path, name: str, record_property) -> None:
    spec = spec_of(root, name, "hardware=l40s")
    zoo_cases.about(root / name, record_property)
    result = build(spec, Registry(root / "registry"))
    assert result.entry.manifest.compiler["name"] == "tensorrt_rtx" and result.built


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_cuda(root: Path, name: str, record_property, tmp_path: Path) -> None:
    spec, _ = open_checkpoint(spec_of(root, name, "hardware=h200-sxm"))
    if spec.model.latent.kv_rank:  # the one kind of attention without kernels; docs/models.md then shows no check for it
        with pytest.raises(CompileError, match="no kernel for Transpose"):
            Planner(rewrite(spec), spec, spec.hardware.tuning).run()
        return
    zoo_cases.about(root / name, record_property)
    plan = Planner(rewrite(spec), spec, spec.hardware.tuning).run()
    new = {kernel.source: kernel for kernel in plan.kernels.values() if kernel.source not in COMPILED}
    made = compile_kernels(list(new.values()), spec.hardware.sm, tmp_path)
    COMPILED.update(new)
    assert len(made) == len(new) and all((tmp_path / f"{kernel.name}.cubin").stat().st_size for kernel in new.values())
    assert plan.steps and "logits" in plan.places


def one_of_each_family() -> list[str]:
    """The first published model of each family, by name."""
    first: dict[str, str] = {}
    for path in sorted((conf_dir() / "models").glob("*.yaml")):
        found = re.search(r"families/(\w+)@_here_", path.read_text())
        if found:
            first.setdefault(found[1], path.stem)
    return sorted(first.values())


@pytest.mark.parametrize("model", one_of_each_family())
@pytest.mark.parametrize("hardware", ["cpu", "l40s", "h200-sxm"])
def test_full_size_rewrites(model: str, hardware: str, record_property) -> None:
    spec = compose([f"models={model}", f"hardware={hardware}"])
    for architecture in families()[spec.model.family]["architectures"]:
        record_property("architecture", architecture)
    graph = rewrite(spec)
    assert graph.graph.nodes and graph.weights
