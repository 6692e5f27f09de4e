"""An engine's weight table, read as hostile, and compared with the checkpoint that it is to be carried out over.

A recipe says its own shape; what is loaded is laid out by it. So every shape must follow from the shapes of the inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ArtifactError, CheckpointError
from zoo.modelspec import ALIBI_RULES
from zoo.ropetables import NUMBERS
from zoo.runtime.cuda.checks import AGAIN, BYTES, read_json, said
from zoo.weights.reader import NUMPY, Tensors
from zoo.weights.recipe import Recipe, Weight


def read_table(folder: Path) -> list[Weight]:
    """``weights.json``, every recipe's shape compared with those of its inputs."""
    path = folder / "weights.json"
    rows = read_json(path).get("weights")
    if not isinstance(rows, list):
        raise ArtifactError(f"{path}: expected a list 'weights'; {AGAIN}")
    table = []
    try:
        for row in rows:
            weight = Weight.from_json(row)
            if weight.dtype not in NUMPY:
                raise ArtifactError(f"weight {weight.name!r} has the dtype {said(weight.dtype)}")
            if reason := _recipe(weight.recipe):
                raise ArtifactError(f"weight {weight.name!r}: {reason}")
            table.append(weight)
    except (ArtifactError, TypeError) as error:  # TypeError: a value that cannot be hashed, or counted
        raise ArtifactError(f"{path}: {error}; {AGAIN}") from None
    if len({weight.name for weight in table}) < len(table):
        raise ArtifactError(f"{path}: two weights have one name; {AGAIN}")
    return table


def _recipe(recipe: Recipe) -> str:
    """Why a recipe cannot be carried out; empty if it can."""
    for child in recipe.inputs:
        if reason := _recipe(child):
            return reason
    try:
        shape = _shape(recipe, [child.shape for child in recipe.inputs])
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
        return f"{recipe.op} is malformed ({error!r})"
    return "" if shape == recipe.shape else f"{recipe.op} of {said(recipe.attrs)} gives {shape}, not {recipe.shape}"


def _shape(recipe: Recipe, given: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape that a recipe's attributes and inputs give; None if they give none."""
    if any(side > BYTES or type(side) is not int for side in recipe.shape) or math.prod(recipe.shape) > BYTES:
        return None
    counts = {"tensor": 0, "computed": 0, "scale": 0, "quantize": 2, "concat": max(1, len(given))}
    if len(given) != counts.get(recipe.op, 1):
        return None
    match recipe.op:
        case "tensor":
            return recipe.shape if isinstance(recipe["name"], str) else None
        case "scale":
            return () if isinstance(recipe["name"], str) else None
        case "computed":
            return recipe.shape if _is_table(str(recipe["kind"]), dict(recipe["params"]), recipe.shape) else None
        case "transpose":
            return tuple(given[0][side] for side in recipe["perm"]) if sorted(recipe["perm"]) == [*range(len(given[0]))] else None
        case "reshape":
            return recipe.shape if math.prod(recipe.shape) == math.prod(given[0]) else None
        case "concat":
            axis = _axis(recipe["axis"], given[0])
            rest = {(*one[:axis], *one[axis + 1 :]) for one in given}
            return (*given[0][:axis], sum(one[axis] for one in given), *given[0][axis + 1 :]) if len(rest) == 1 else None
        case "slice":
            axis, start, stop = _axis(recipe["axis"], given[0]), recipe["start"], recipe["stop"]
            inside = type(start) is int and type(stop) is int and 0 <= start <= stop <= given[0][axis]
            return (*given[0][:axis], stop - start, *given[0][axis + 1 :]) if inside else None
        case "every":
            axis, start, step = _axis(recipe["axis"], given[0]), recipe["start"], recipe["step"]
            size = given[0][axis]
            fits = type(start) is int and type(step) is int and 0 <= start < step and size % step == 0
            return (*given[0][:axis], size // step, *given[0][axis + 1 :]) if fits else None
        case "shift":
            return given[0] if math.isfinite(float(recipe["value"])) else None
        case "channel_scale":
            return (given[0][_axis(recipe["axis"], given[0])],) if 0 < float(recipe["limit"]) < float("inf") else None
        case "quantize":
            axis = _axis(recipe["axis"], given[0])
            return given[0] if given[1] == (given[0][axis],) and recipe["dtype"] == "float8e4m3" else None
    return None


def _axis(axis: Any, shape: Sequence[int]) -> int:
    if type(axis) is not int or not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {said(axis)} of {list(shape)}")
    return axis % len(shape)


def _is_table(kind: str, params: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether ``zoo.weights.tables`` can make it: it knows the kind, and parameters are finite numbers, or lists of them."""
    texts = {key: params[key] for key in ("kind", "rule") if key in params}
    lists = {key: value for key, value in params.items() if isinstance(value, tuple)}
    numbers = {key: float(value) for key, value in params.items() if key not in texts and key not in lists}
    found = [*numbers.values(), *(float(value) for many in lists.values() for value in many)]
    if not all(math.isfinite(number) for number in found):
        return False
    if kind == "constant":
        return "value" in numbers
    if kind == "alibi_slopes":
        sound = numbers.get("factor", 1.0) > 0 and texts.get("rule", "bloom") in ALIBI_RULES
        return sound and len(shape) == 1 and 1 <= shape[0] == numbers.get("heads", 0)
    return kind in ("rope_cos", "rope_sin") and _is_rope(texts, numbers, lists, shape)


def _is_rope(
    texts: Mapping[str, Any], numbers: Mapping[str, float], lists: Mapping[str, tuple[Any, ...]], shape: tuple[int, ...]
) -> bool:
    needed = NUMBERS.get(str(texts.get("kind", "default")))
    if needed is None or not {*numbers, *lists} >= {"rotary_dim", "theta", *needed} or len(shape) != 2:
        return False
    pairs = numbers["rotary_dim"] // 2
    factors = [len(lists[key]) for key in ("short_factor", "long_factor") if key in needed]
    lengths = list[Any](lists.get("lengths", (shape[0],)))
    positive = all(numbers[key] > 0 for key in ("rotary_dim", "theta", *needed) if key in numbers and key != "truncate")
    whole = all(_is_length(length) for length in lengths)
    return positive and whole and shape[1] == pairs and sum(lengths) <= shape[0] and all(count == pairs for count in factors)


def _is_length(value: Any) -> bool:
    return type(value) is int and value > 0


def check_products(plan: Mapping[str, Any], table: Sequence[Weight]) -> None:
    """The weights that products of a plan read, and their scales, have the plan's shapes: cuBLASLt would read beyond them."""
    weights = {weight.name: weight for weight in table}
    for place, step in enumerate(plan["steps"]):
        if step["op"] != "gemm":
            continue
        n, k, dtype = step["n"], step["k"], step["dtype"]
        expected: dict[str, tuple[str, tuple[int, ...]]] = {"w": (dtype, (n, k) if step["stored"] == "out_in" else (k, n))}
        if dtype == "float8e4m3":
            expected |= {"w_scale": ("float32", (n,)), "x_scale": ("float32", ())}
        for key, (kind, shape) in expected.items():
            weight = weights.get(step[key].get("tensor", ""))
            if weight is None or (weight.dtype, weight.shape) != (kind, shape):
                found = f"{weight.dtype} {list(weight.shape)}" if weight else f"no weight ({said(step[key])})"
                raise ArtifactError(
                    f"plan.json: steps[{place}].{key} is to be {kind} {list(shape)}, and weights.json has {found}; {AGAIN}"
                )


def read_scales(folder: Path) -> dict[str, float]:
    """``scales.json`` of a folder, if there is one: numbers above 0 that float32 holds."""
    path = folder / "scales.json"
    if not path.exists():
        return {}
    scales = read_json(path)
    for name, value in scales.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-37 < value < 1e37:
            raise ArtifactError(f"{path}: the scale {said(name)} is {said(value)}, not a float32 above 0; {AGAIN}")
    return {name: float(value) for name, value in scales.items()}


def check_sources(table: Sequence[Weight], tensors: Tensors, scales: Mapping[str, float], where: Path) -> None:
    """Every tensor and scale that recipes read is there and has its shape. The error lists all that are not.

    Layers differ by a number in their names: what is wrong with all of them alike is said once.
    """
    names, wrong = set(tensors.names), {}
    leaves = {leaf for weight in table for leaf in weight.recipe.leaves()}
    for leaf in sorted(leaves, key=lambda leaf: str(leaf["name"])):
        name = str(leaf["name"])
        if name not in names:
            wrong[name] = "missing"
        elif tensors.shape(name) != leaf.shape:
            wrong[name] = f"{list(tensors.shape(name))}, not {list(leaf.shape)}"
    if wrong:
        raise CheckpointError(
            f"{where}: not the checkpoint of this engine, {len(wrong)} of {len(leaves)} tensors do not fit: {_listed(wrong)}; "
            "give the folder of the model that the engine was built for"
        )
    asked = {str(leaf["name"]) for weight in table for leaf in weight.recipe.leaves("scale")}
    if missing := dict.fromkeys(sorted(asked - scales.keys()), "missing"):
        raise ArtifactError(
            f"{where}: {len(missing)} of the engine's {len(asked)} scales are missing from scales.json: {_listed(missing)}; a "
            "quantized engine needs them: one built with model.checkpoint=FOLDER is calibrated and carries its own"
        )


def _listed(wrong: Mapping[str, str]) -> str:
    """Names and what is wrong with them, those together that differ by numbers only."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in wrong.items():
        groups.setdefault((re.sub(r"\d+", "*", name), reason), []).append(name)
    parts = []
    for (pattern, reason), names in groups.items():
        parts.append(f"{names[0]} is {reason}" if len(names) == 1 else f"{pattern} ({len(names)} of them) are {reason}")
    return "; ".join(parts)
