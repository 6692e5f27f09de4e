"""A tiny engine of the cuda compiler; the GPU is Triton's interpreter (``cuda_on_cpu``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cuda_engines
import families
import pytest
from tuning_sweeps import shorten

from zoo.artifacts.manifest import EngineManifest


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineManifest]:
    """A Llama with grouped heads, FP8 and an FP8 cache, built without a checkpoint: its folder and manifest."""
    base = tmp_path_factory.mktemp("tuning")
    family, overrides = families.CASES["llama-grouped"]
    checkpoint = families.make_checkpoint(base, family, **overrides)
    folder = base / "engine"
    return folder, cuda_engines.compile_engine(folder, checkpoint, "fp8-kv", bound=False)


@pytest.fixture(scope="session")
def plan(engine: tuple[Path, EngineManifest]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((engine[0] / "plan.json").read_text())
    return found


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps that are short."""
    shorten(monkeypatch)
