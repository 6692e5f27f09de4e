"""What two engines differ in, ingredient by ingredient: why one was built and the other was not reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoo.artifacts.entries import Entry
from zoo.artifacts.manifest import EngineManifest
from zoo.spec import to_json

MISSING = "(absent)"


@dataclass(frozen=True)
class Change:
    """One difference. ``path`` is dotted: ``hardware.memory``, ``files.model.onnx.size``, ``passes.fuse_linears.qkv``."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.after}"

    def to_json(self) -> dict[str, Any]:
        return to_json(self)


def diff(first: Entry, second: Entry) -> list[Change]:
    """Compare two stored engines; empty when they are the same engine. Raises what reading their manifests raises."""
    if first.digest == second.digest:
        return []
    return diff_manifests(first.manifest, second.manifest)


def diff_manifests(first: EngineManifest, second: EngineManifest) -> list[Change]:
    """First the ingredients (``made``), by their own names, since they decide; then what came out of them."""
    changes = _compare("", first.made, second.made)
    for name in ("limits", "needs", "abi", "plugins", "weights", "scratch"):
        found = _compare(name, to_json(first)[name], to_json(second)[name])
        changes += [change for change in found if change.path not in {one.path for one in changes}]
    changes += _compare("passes", _passes(first), _passes(second))
    changes += _compare("files", first.files, second.files)
    return changes


def _passes(manifest: EngineManifest) -> dict[str, Any]:
    return {one["name"]: one.get("counts", {}) | {"misses": len(one.get("misses", ()))} for one in manifest.passes}


def _compare(path: str, first: Any, second: Any) -> list[Change]:
    if isinstance(first, dict) and isinstance(second, dict):
        names = [*first, *(name for name in second if name not in first)]
        pairs = [(str(name), first.get(name, MISSING), second.get(name, MISSING)) for name in names]
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and _named(first) and _named(second):
        return _compare(path, {one["name"]: one for one in first}, {one["name"]: one for one in second})
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = [(str(place), *pair) for place, pair in enumerate(zip(first, second, strict=True))]
    else:
        return [] if first == second else [Change(path, first, second)]
    return [change for name, *pair in pairs for change in _compare(f"{path}.{name}" if path else name, *pair)]


def _named(values: list[Any] | tuple[Any, ...]) -> bool:
    return bool(values) and all(isinstance(one, dict) and "name" in one for one in values)
