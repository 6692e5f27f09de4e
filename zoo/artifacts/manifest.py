"""``EngineManifest``: everything an engine says of itself, and ``Engine``: the manifest with its files.

The manifest is the ``engine.json`` layer of an artifact. It answers three questions: what was this made from (``made``),
what does it need (``needs``), and how is it called (``abi``). ``from_json`` treats its input as hostile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ArtifactError

SCHEMA = 1


@dataclass(frozen=True)
class TensorAbi:
    """One input or output of an engine. Sizes are numbers or names (T, B, P, R)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class CacheAbi:
    """The KV pool of one layer: ``kv.{layer}``, [blocks, 2, block_size, kv_heads, head_dim]."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str


@dataclass(frozen=True)
class Abi:
    """How an engine is called: its inputs in order (weights, caches and index inputs apart), caches, outputs."""

    inputs: tuple[TensorAbi, ...]
    outputs: tuple[TensorAbi, ...]
    caches: tuple[CacheAbi, ...]
    index_inputs: tuple[TensorAbi, ...] = ()


@dataclass(frozen=True)
class EngineManifest:
    """What an engine says of itself.

    model, version, profile   its name in a registry
    build                     digest of everything in ``made``
    made                      the named ingredients: each a JSON value; ``zoo diff`` compares them one by one
    compiler                  {"name", "version"}
    spec                      the resolved specs: model, quant, hardware, parallel, limits, dtype, threads
    needs                     selectors: {"kind", "sm", "memory" (bytes), "packages": {name: version}}
    limits                    the engine's limits, all numbers resolved
    abi                       how it is called
    weights                   {"table": file of recipes or "", "files": [{"name", "digest", "size"}], "bound": bool}
    passes                    [{"name", "counts", "misses": [{"where", "reason"}]}]
    plugins                   zoo op -> version
    scratch                   peak scratch bytes the compiler reports; 0: unknown
    files                     name in the artifact -> {"digest", "size"}; filled in when the engine is stored
    created                   RFC 3339 time, UTC
    seconds                   how long expanding, rewriting and compiling took
    """

    model: str
    version: str
    profile: str
    build: str
    made: dict[str, Any]
    compiler: dict[str, str]
    spec: dict[str, Any]
    needs: dict[str, Any]
    limits: dict[str, int]
    abi: Abi
    weights: dict[str, Any] = field(default_factory=dict)
    passes: list[dict[str, Any]] = field(default_factory=list)
    plugins: dict[str, str] = field(default_factory=dict)
    scratch: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = dataclasses.asdict(self)
        return data

    @classmethod
    def from_json(cls, data: Any) -> EngineManifest:
        """Rebuild a manifest. Raises ArtifactError that names the field for anything malformed or from another schema."""
        if not isinstance(data, dict):
            raise ArtifactError("engine.json: expected an object")
        if data.get("schema") != SCHEMA:
            raise ArtifactError(f"engine.json: schema is {data.get('schema')!r}; this version reads {SCHEMA}; rebuild the engine")
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - set(known)):
            raise ArtifactError(f"engine.json: unknown fields {', '.join(map(str, unknown))}")
        try:
            values = dict(data)
            values["abi"] = _abi(data["abi"])
            manifest = cls(**values)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"engine.json: malformed ({error}); rebuild the engine") from None
        for name in ("model", "version", "profile", "build"):
            if not isinstance(getattr(manifest, name), str):
                raise ArtifactError(f"engine.json: {name} must be a string")
        return manifest


def _tensor(data: dict[str, Any]) -> TensorAbi:
    return TensorAbi(str(data["name"]), str(data["dtype"]), tuple(data["shape"]))


def _abi(data: dict[str, Any]) -> Abi:
    caches = tuple(
        CacheAbi(str(c["name"]), str(c["dtype"]), tuple(int(n) for n in c["shape"]), str(c["group"])) for c in data["caches"]
    )
    index = tuple(_tensor(t) for t in data.get("index_inputs", ()))
    return Abi(tuple(map(_tensor, data["inputs"])), tuple(map(_tensor, data["outputs"])), caches, index)


@dataclass
class Engine:
    """A compiled engine before it is stored: its manifest and where its files lie now (name in the artifact -> path)."""

    manifest: EngineManifest
    files: dict[str, Path]
