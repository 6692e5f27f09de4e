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
    """How an engine is called: its inputs in order (weights, caches and index inputs apart), caches, outputs.

    ``rope_tables``: (length, first row) of each rotary table, shortest first, where a sequence's length decides which it reads.
    """

    inputs: tuple[TensorAbi, ...]
    outputs: tuple[TensorAbi, ...]
    caches: tuple[CacheAbi, ...]
    index_inputs: tuple[TensorAbi, ...] = ()
    rope_tables: tuple[tuple[int, int], ...] = ()


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
    pooling                   of an encoder, how a text's embedding comes from its tokens' hidden states: "mean", "first" or
                              "none"; "" of a decoder. An encoder has no caches, and no limits of blocks and rows
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
    pooling: str = ""
    scratch: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = dataclasses.asdict(self)
        if not self.abi.rope_tables:  # as in most engines
            del data["abi"]["rope_tables"]
        return data

    @classmethod
    def from_json(cls, data: Any) -> EngineManifest:
        """Rebuild a manifest. Raises ArtifactError that names the field for anything malformed or from another schema."""
        if not isinstance(data, dict):
            raise ArtifactError("engine.json: expected an object")
        if data.get("schema") != SCHEMA:
            raise ArtifactError(f"engine.json: schema is {data.get('schema')!r}; this version reads {SCHEMA}; rebuild the engine")
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(map(str, set(data) - set(known))):
            raise ArtifactError(f"engine.json: unknown fields {', '.join(unknown)}; it was written by another version of zoo")
        needed = [f.name for f in known.values() if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in needed if name not in data]:
            raise ArtifactError(f"engine.json: no field {', '.join(missing)}; rebuild the engine")
        for name, value in data.items():
            _check(name, value, FIELDS[name])
        _check_values(data)
        return cls(**(data | {"abi": _abi(data["abi"])}))


# What JSON each field holds: a type, [type] for a list of it, {"*": type} for a table, {name: type} for a table in which
# these names, if they are there, hold that. A ``dict`` may hold anything: it is shown and compared, never acted upon.
FIELDS: dict[str, Any] = {
    "model": str,
    "version": str,
    "profile": str,
    "build": str,
    "made": dict,
    "compiler": {"*": str},
    "spec": {"model": dict, "quant": dict, "hardware": dict, "parallel": {"tp": int, "pp": int}, "limits": dict, "dtype": str},
    "needs": {"kind": str, "sm": int, "memory": int, "packages": {"*": str}},
    "limits": {"*": int},
    "abi": {"inputs": list, "outputs": list, "caches": list, "index_inputs": list, "rope_tables": [[int]]},
    "weights": {"table": str, "bound": bool, "files": [{"name": str, "digest": str, "size": int}]},
    "passes": [{"name": str, "counts": {"*": int}, "misses": [dict]}],
    "plugins": {"*": str},
    "pooling": str,
    "scratch": int,
    "files": {"*": {"digest": str, "size": int}},
    "created": str,
    "seconds": (int, float),
    "schema": int,
}
POOLINGS = ("none", "first", "mean")
LONGEST = 1 << 16  # entries of one list or table


def _check(path: str, value: Any, expected: Any) -> None:
    """Compare JSON with its description in ``FIELDS``. Integers are never negative and never bools."""
    if isinstance(expected, list | dict) or expected in (list, dict):
        kind = list if isinstance(expected, list) else dict if isinstance(expected, dict) else expected
        if not isinstance(value, kind) or len(value) > LONGEST:
            raise ArtifactError(f"engine.json: {path} is {_said(value)}; expected {'a list' if kind is list else 'an object'}")
        if isinstance(expected, list):
            for place, item in enumerate(value):
                _check(f"{path}[{place}]", item, expected[0])
        elif isinstance(expected, dict):
            for key, item in dict(value).items():
                if (inner := expected.get(key, expected.get("*"))) is not None:
                    _check(f"{path}.{str(key)[:80]}", item, inner)
        return
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        names = {str: "text", bool: "true or false", int: "a whole number"}
        raise ArtifactError(f"engine.json: {path} is {_said(value)}; expected {names.get(expected, 'a number')}")
    if isinstance(value, int | float) and not 0 <= value < 1 << 63:
        raise ArtifactError(f"engine.json: {path} is {_said(value)}; expected a number from 0 on")


def _said(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, str | int | float) or value is None else f"a {type(value).__name__}"


def _check_values(data: dict[str, Any]) -> None:
    """What must hold beyond types: the kind of machine, and that files are described in full."""
    kind = data["needs"].get("kind")
    if kind not in ("cpu", "gpu"):
        raise ArtifactError(f"engine.json: needs.kind is {_said(kind)}; expected cpu or gpu")
    if (pooling := data.get("pooling", "")) not in ("", *POOLINGS):
        raise ArtifactError(f"engine.json: pooling is {_said(pooling)}; expected one of {', '.join(POOLINGS)}, or nothing")
    tables = data["abi"].get("rope_tables") or [[1 << 63]]
    if tables[-1][:1] < [data["limits"].get("max_context", 0)]:
        raise ArtifactError("engine.json: the last of abi.rope_tables is shorter than limits.max_context")
    described: list[tuple[str, Any, tuple[str, ...]]]
    described = [(f"files.{name}", one, ("digest", "size")) for name, one in data.get("files", {}).items()]
    described += [("weights.files", one, ("name",)) for one in data.get("weights", {}).get("files", ())]
    described += [("passes", one, ("name",)) for one in data.get("passes", ())]
    for path, one, names in described:
        if missing := [name for name in names if name not in one]:
            raise ArtifactError(f"engine.json: {path} has no {', '.join(missing)}")


def _tensor(data: Any, path: str) -> TensorAbi:
    _check(path, data, {"name": str, "dtype": str, "shape": list})
    if set(data) != {"name", "dtype", "shape"}:
        raise ArtifactError(f"engine.json: {path} has {', '.join(map(str, data))}; expected name, dtype and shape")
    if not all(isinstance(size, str) or (type(size) is int and 0 <= size < 1 << 63) for size in data["shape"]):
        raise ArtifactError(f"engine.json: the shape of {path} is {str(data['shape'])[:80]}; expected sizes and names of sizes")
    return TensorAbi(data["name"], data["dtype"], tuple(data["shape"]))


def _cache(data: Any, path: str) -> CacheAbi:
    _check(path, data, {"name": str, "dtype": str, "shape": [int], "group": str})
    if set(data) != {"name", "dtype", "shape", "group"}:
        raise ArtifactError(f"engine.json: {path} has {', '.join(map(str, data))}; expected name, dtype, shape and group")
    return CacheAbi(data["name"], data["dtype"], tuple(data["shape"]), data["group"])


def _abi(data: dict[str, Any]) -> Abi:
    if missing := [name for name in ("inputs", "outputs", "caches") if name not in data]:
        raise ArtifactError(f"engine.json: abi has no {', '.join(missing)}")
    inputs, outputs, index = (
        tuple(_tensor(one, f"abi.{name}[{place}]") for place, one in enumerate(data.get(name, ())))
        for name in ("inputs", "outputs", "index_inputs")
    )
    caches = tuple(_cache(one, f"abi.caches[{place}]") for place, one in enumerate(data["caches"]))
    return Abi(inputs, outputs, caches, index, _rope_tables(data.get("rope_tables", [])))


def _rope_tables(data: list[list[int]]) -> tuple[tuple[int, int], ...]:
    """Tables that lie one after the other, each for longer sequences than the one before."""
    found, end, longest = [], 0, 0
    for place, table in enumerate(data):
        if len(table) != 2 or not longest < table[0] < 1 << 31 or table[1] != end:
            raise ArtifactError(
                f"engine.json: abi.rope_tables[{place}] is {str(table)[:80]}; expected a length over {longest} and the row {end}"
            )
        longest, end = table[0], table[1] + table[0]
        found.append((table[0], table[1]))
    if end >= 1 << 31:  # positions are int32
        raise ArtifactError(f"engine.json: abi.rope_tables have {end} rows, more than positions can name")
    return tuple(found)


@dataclass
class Engine:
    """A compiled engine before it is stored: its manifest and where its files lie now (name in the artifact -> path)."""

    manifest: EngineManifest
    files: dict[str, Path]
