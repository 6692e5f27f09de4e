"""Why one engine is not the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from artifact_engines import make_engine

from zoo.artifacts.diff import diff, diff_manifests
from zoo.artifacts.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_an_engine_does_not_differ_from_itself(tmp_path: Path, registry: Registry) -> None:
    entry = registry.store(make_engine(tmp_path / "a"))
    assert diff(entry, registry.resolve(entry.ref)) == []


def test_one_number_of_the_hardware_is_named_first(tmp_path: Path, registry: Registry) -> None:
    """Same version, same profile, other build: the older one is reached by its digest."""
    registry.store(make_engine(tmp_path / "a", memory=1))
    registry.store(make_engine(tmp_path / "b", memory=2))
    old, new = (registry.resolve(row["ref"]) for row in registry.rows())
    assert [str(change) for change in diff(old, new)] == ["hardware.memory: 1 -> 2"]


def test_what_came_out_differently_follows_what_went_in(tmp_path: Path) -> None:
    first = make_engine(tmp_path / "a").manifest
    second = dataclasses.replace(
        first,
        made=first.made | {"model": first.made["model"] | {"rope": {"theta": 5e5}}, "zoo": {"sources": "sha256:2"}},
        passes=[{"name": "paged_attention", "counts": {"ZooPagedAttention": 3}, "misses": [{"where": "x", "reason": "y"}]}],
        scratch=7,
        files={"engine.plan": {"digest": "sha256:1", "size": 5}},
    )
    assert [(one.path, one.before, one.after) for one in diff_manifests(first, second)] == [
        ("model.rope.theta", 1e4, 5e5),
        ("zoo", "(absent)", {"sources": "sha256:2"}),
        ("scratch", 0, 7),
        ("passes.paged_attention.ZooPagedAttention", 2, 3),
        ("passes.paged_attention.misses", 0, 1),
        ("files.engine.plan", "(absent)", {"digest": "sha256:1", "size": 5}),
    ]
    turned = [(one.path, one.after, one.before) for one in diff_manifests(second, first)]
    assert sorted(turned, key=str) == sorted(
        ((one.path, one.before, one.after) for one in diff_manifests(first, second)), key=str
    )


def test_profiles_and_versions_can_be_compared(tmp_path: Path, registry: Registry) -> None:
    a = registry.store(make_engine(tmp_path / "a"))
    b = registry.store(make_engine(tmp_path / "b", seed="b", quant="fp8", hardware="l40s"))
    paths = [change.path for change in diff(a, b)]
    assert set(paths[:4]) == {"seed", "quant.name", "hardware.name", "compiler.name"}  # ingredients first
    assert "files.model.onnx.digest" in paths
    assert not any(path.startswith("files.checkpoint") for path in paths)
    assert {"path": "seed", "before": "a", "after": "b"} in [change.to_json() for change in diff(a, b)]


def test_a_limit_is_named_once(tmp_path: Path, registry: Registry) -> None:
    a = registry.store(make_engine(tmp_path / "a", max_tokens=1))
    b = registry.store(make_engine(tmp_path / "b", max_tokens=2))
    assert [str(change) for change in diff(a, b)] == ["limits.max_tokens: 1 -> 2"]
