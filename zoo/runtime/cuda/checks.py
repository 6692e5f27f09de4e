"""An engine's JSON files, read as hostile: whatever is used of them later has its type and its range here.

    plan.json      kernels, steps, sizes, places: docs/engine-format.md, and the grammar in ``zoo.compilers.cuda.plan``
    engine.json    what of it a session builds on; ``EngineManifest.from_json`` has looked at its types
    weights.json   ``zoo.runtime.cuda.table``

Digests were compared before, so this is about damage and other versions rather than malice; but it is cheaper to say what is
wrong here than to find out on a GPU. Unknown fields are left to whoever wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError
from zoo.runtime.abi import EngineLimits
from zoo.runtime.cuda.arguments import SCALARS
from zoo.runtime.cuda.cublaslt import DATA_TYPES
from zoo.runtime.cuda_indices import CUDA_INDEX_BUILDERS

SCHEMA = 1
SYMBOLS = ("", "T", "B", "R", "W", "S", "P", "J")
PARTS = ("greedy", "sample", "resolve")
INPUTS = ("token_ids", "positions", "query_starts", "kv_lengths", "block_table.full", "logit_rows")
ENCODER_INPUTS = INPUTS[:3]
ENCODER_LIMITS = {"max_rows": 1, "max_blocks": 2, "block_size": 1}  # what an encoder has not, as little as buffers can be
MOST = (1 << 31) - 1  # of anything that a kernel gets as int32
BYTES = 1 << 48  # more than any GPU's memory
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
AGAIN = "pull or rebuild the engine"


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. ArtifactError for anything else."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; {AGAIN}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: malformed ({error}); {AGAIN}") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: expected an object; {AGAIN}")
    return data


def read_plan(folder: Path) -> dict[str, Any]:
    """``plan.json``, checked."""
    plan = read_json(folder / "plan.json")
    if plan.get("schema") != SCHEMA:
        raise ArtifactError(f"plan.json: schema is {said(plan.get('schema'))}; this version reads {SCHEMA}; rebuild the engine")
    _number(plan, "sm", 999)
    _number(plan, "vocab_size", MOST, least=1)
    _number(plan, "arena", BYTES)
    _number(plan, "logits", plan["arena"])
    kernels = _object(plan, "kernels")
    for name, data in kernels.items():
        _kernel(name, data)
    for place, step in enumerate(_list(plan, "steps")):
        _step(f"steps[{place}]", step, plan)
    sampling = _object(plan, "sampling")
    if missing := [part for part in PARTS if part not in sampling]:
        raise _wrong(f"sampling has no {', '.join(missing)}")
    for part in sampling:
        for place, step in enumerate(_list(sampling, part, "sampling")):
            _launch(f"sampling.{part}[{place}]", step, plan)
    for name in _object(plan, "sampling_scratch"):
        _number(plan["sampling_scratch"], name, BYTES)
    loaders = _object(plan, "weight_kernels")
    for kind in loaders:
        for dtype, name in _object(loaders, kind).items():
            if not isinstance(name, str) or name not in kernels:
                raise _wrong(f"weight_kernels.{kind}.{dtype} is {said(name)}, which is not among its kernels")
    return plan


def _kernel(name: str, data: Any) -> None:
    where = f"kernels.{name}"
    if not FILE_NAME.fullmatch(name):
        raise _wrong(f"a kernel is called {said(name)}")
    if not isinstance(data, dict):
        raise _wrong(f"{where} is {said(data)}, not an object")
    for key in ("entry", "digest"):
        if not isinstance(data.get(key), str):
            raise _wrong(f"{where}.{key} is {said(data.get(key))}, not text")
    _number(data, "warps", 32, least=1, where=where)
    _number(data, "shared", 1 << 20, where=where)
    for arg in _list(data, "args", where):
        match arg:
            case [str(), str(kind)] if kind.startswith("*") or kind in SCALARS:
                pass
            case _:
                raise _wrong(f"{where} has the argument {said(arg)}, not [name, type]")


def _step(where: str, step: Any, plan: Mapping[str, Any]) -> None:
    if not isinstance(step, dict) or step.get("op") not in ("launch", "gemm"):
        raise _wrong(f"{where} is {said(step)}, neither a launch nor a gemm")
    (_launch if step["op"] == "launch" else _gemm)(where, step, plan)


def _launch(where: str, step: Any, plan: Mapping[str, Any]) -> None:
    if not isinstance(step, dict) or step.get("op") != "launch":
        raise _wrong(f"{where} is {said(step)}, not a launch")
    name = step.get("kernel")
    if not isinstance(name, str) or name not in plan["kernels"]:
        raise _wrong(f"{where} launches {said(name)}, which is not among its kernels")
    grid = _list(step, "grid", where)
    if len(grid) != 3:
        raise _wrong(f"{where} has a grid of {len(grid)} sides, not 3")
    for side in grid:
        _size(where, side)
    types, args = plan["kernels"][name]["args"], _list(step, "args", where)
    if len(args) != len(types):
        raise _wrong(f"{where}: {name} takes {len(types)} arguments, not {len(args)}")
    for (parameter, kind), arg in zip(types, args, strict=True):
        _arg(f"{where}: {parameter} of {name}", arg, kind, plan)


def _gemm(where: str, step: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    _size(where, step.get("rows"))
    if step["rows"][0] not in ("T", "B", "R"):
        raise _wrong(f"{where} has rows {said(step['rows'])}, not of T, B or R")
    for key in ("n", "k"):
        _number(step, key, MOST, least=1, where=where)
    x, y = step.get("dtype"), step.get("out")
    known = all(isinstance(dtype, str) and dtype in DATA_TYPES for dtype in (x, y))
    if not known or step.get("stored") not in ("out_in", "in_out"):
        raise _wrong(f"{where} multiplies {said(x)} to {said(y)}, {said(step.get('stored'))}, which this version does not")
    scaled = x == "float8e4m3"
    if scaled and (step["n"] % 16 or step["k"] % 16 or step["stored"] != "out_in"):
        raise _wrong(f"{where} multiplies float8e4m3 by {step['n']} x {step['k']}, which are no multiples of 16")
    for key in ("x", "w", "y", *(("w_scale", "x_scale") if scaled else ())):
        _arg(f"{where}.{key}", step.get(key), "*", plan)
    counters = step.get("counters", 0)
    if type(counters) is not int or not 0 <= counters <= MOST:
        raise _wrong(f"{where}.counters is {said(counters)}")
    for place, small in enumerate(_list(step, "small", where) if "small" in step else []):
        at = f"{where}.small[{place}]"
        if not isinstance(small, dict):
            raise _wrong(f"{at} is {said(small)}, not an object")
        _number(small, "most", MOST, least=1, where=at)
        for number, launch in enumerate(_list(small, "launches", at)):
            _launch(f"{at}.launches[{number}]", launch, plan)


def _size(where: str, size: Any) -> None:
    match size:
        case [str(symbol), int(times), int(over)] if symbol in SYMBOLS and 0 < times <= MOST and 0 < over <= MOST:
            return
    raise _wrong(f"{where} has the size {said(size)}, not [symbol, times, over]")


def _arg(where: str, arg: Any, kind: str, plan: Mapping[str, Any]) -> None:
    match arg if isinstance(arg, dict) and len(arg) == 1 else None:
        case {"arena": offset} if (
            kind.startswith("*") and type(offset) is int and 0 <= offset < plan["arena"] and not offset % 16
        ):
            return
        case {"tensor": str()} if kind.startswith("*"):
            return
        case {"size": size} if kind == "i32":
            return _size(where, size)
        case {"float": float()} if kind in ("fp32", "fp64"):
            return
    raise _wrong(f"{where} is {said(arg)}, which is no {'address' if kind.startswith('*') else kind}")


def check_manifest(manifest: EngineManifest) -> EngineLimits:
    """What a session builds on: limits, inputs, pools. Gives the limits."""
    try:
        given = manifest.limits | ENCODER_LIMITS if manifest.pooling else manifest.limits
        limits = EngineLimits(**{key: int(value) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"engine.json: limits are malformed ({error}); rebuild the engine") from None
    least = {"max_blocks": 2}  # block 0 is reserved
    if low := [key for key, value in vars(limits).items() if not least.get(key, 1) <= value <= MOST]:
        raise ArtifactError(f"engine.json: limits.{low[0]} is {said(vars(limits)[low[0]])}; rebuild the engine")
    abi = manifest.abi
    names, expected = [one.name for one in abi.inputs], ENCODER_INPUTS if manifest.pooling else INPUTS
    if sorted(names) != sorted(expected):
        raise ArtifactError(f"engine.json: its inputs are {', '.join(names)}; expected {', '.join(expected)}; rebuild the engine")
    if unknown := [one.name for one in abi.index_inputs if one.name not in CUDA_INDEX_BUILDERS]:
        raise ArtifactError(f"engine.json: unknown index inputs {', '.join(unknown)}; it was written by another version of zoo")
    sides = ("T", "B", "B+1", "R", "W", "P")
    for one in (*abi.inputs, *abi.index_inputs):
        if one.dtype != "int32" or not all(side in sides if isinstance(side, str) else 0 < side <= MOST for side in one.shape):
            raise ArtifactError(f"engine.json: input {one.name} is {one.dtype} {said(list(one.shape))}; rebuild the engine")
    for cache in abi.caches:
        whole = len(cache.shape) == 5 and all(1 <= side <= MOST for side in cache.shape)
        if not whole or cache.dtype not in DATA_TYPES or cache.shape[1:3] != (2, limits.block_size):
            raise ArtifactError(f"engine.json: pool {cache.name} is {cache.dtype} {said(list(cache.shape))}; rebuild the engine")
    return limits


def _number(data: Mapping[str, Any], key: str, most: int, least: int = 0, where: str = "") -> None:
    value = data.get(key)
    if type(value) is not int or not least <= value <= most:
        raise _wrong(f"{where}{'.' * bool(where)}{key} is {said(value)}, not a number from {least} to {most}")


def _object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise _wrong(f"{key} is {said(value)}, not an object")
    return value


def _list(data: Mapping[str, Any], key: str, where: str = "") -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list):
        raise _wrong(f"{where}{'.' * bool(where)}{key} is {said(value)}, not a list")
    return value


def _wrong(what: str) -> ArtifactError:
    return ArtifactError(f"plan.json: {what}; {AGAIN}")


def said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
