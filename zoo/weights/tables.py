"""Tables that a recipe computes rather than reads. Each function takes the shape and the recipe's parameters, and gives float32.

Rotary frequencies follow transformers' ``modeling_rope_utils``, operation by operation in float32, so that checkpoints behave as
they were trained. ``zoo.modelspec.RopeSpec`` says what each kind is and where it comes from, ``zoo.ropetables`` makes the
parameters: those numbers of a RopeSpec that its kind reads, ``rotary_dim``, and where they are needed

    attention_factor  what cosines and sines are multiplied by
    lengths           several tables lie one after the other, each for sequences up to so many tokens, with so many rows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zoo.errors import ArtifactError
from zoo.weights.alibi import alibi_slopes

Array = np.ndarray[Any, Any]


def rotary_frequencies(params: Mapping[str, Any], length: int = 0) -> Array:
    """Angle per position of each rotated pair: [rotary_dim / 2] float32; for sequences of ``length`` where that matters."""
    kind = params.get("kind", "default")
    if kind not in KINDS:
        raise ArtifactError(f"rotary kind {kind!r} is not known; known are {', '.join(KINDS)}; rebuild the engine")
    made: Array = KINDS[kind](params, length).astype(np.float32)
    return made


def _powers(params: Mapping[str, Any], theta: float | np.float32) -> Array:
    """theta^(2i / dim) for each pair i: the reciprocal of its plain frequency."""
    dim = int(params["rotary_dim"])
    powers: Array = np.power(np.float32(theta), np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    return powers


def _default(params: Mapping[str, Any], length: int) -> Array:
    return np.float32(1) / _powers(params, params["theta"])


def _linear(params: Mapping[str, Any], length: int) -> Array:
    return _default(params, length) / np.float32(params["factor"])


def _dynamic(params: Mapping[str, Any], length: int) -> Array:
    """The base grows with the length of the sequence; within the original context it is the plain one."""
    dim, original = int(params["rotary_dim"]), int(params["original_max_positions"])
    if length <= original:
        return _default(params, length)
    factor = np.float32(params["factor"])
    grown = factor * np.float32(length) / np.float32(original) - np.float32(params["factor"] - 1)
    theta = np.float32(params["theta"]) * np.power(grown, np.float32(dim / (dim - 2)))
    return np.float32(1) / _powers(params, theta)


def _yarn(params: Mapping[str, Any], length: int) -> Array:
    """Pairs that turn ``beta_fast`` times and more within the original context are kept, those below ``beta_slow`` slowed."""
    dim, theta, original = int(params["rotary_dim"]), float(params["theta"]), params["original_max_positions"]

    def pair(rotations: float) -> float:
        """Which pair turns so often within the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(params["beta_fast"]), pair(params["beta_slow"])
    if params["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # two equal bounds are a step
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - np.clip(ramp, 0, 1)
    powers = _powers(params, theta)
    slowed = np.float32(1) / (np.float32(params["factor"]) * powers)
    mixed: Array = slowed * (np.float32(1) - kept) + np.float32(1) / powers * kept
    return mixed


def _llama3(params: Mapping[str, Any], length: int) -> Array:
    frequencies = _default(params, length)
    slowed = frequencies / np.float32(params["factor"])
    low, high = float(params["low_freq_factor"]), float(params["high_freq_factor"])
    trained = float(params["original_max_positions"])
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((trained / wavelengths - low) / (high - low), 0, 1).astype(np.float32)
    mixed: Array = (1 - blend) * slowed + blend * frequencies
    return mixed


def _longrope(params: Mapping[str, Any], length: int) -> Array:
    factors = params["short_factor" if length <= params["original_max_positions"] else "long_factor"]
    powers = _powers(params, params["theta"])
    if len(factors) != len(powers):
        raise ArtifactError(f"rotary table: {len(factors)} factors for {len(powers)} frequencies; rebuild the engine")
    return np.float32(1) / (np.array(factors, np.float32) * powers)


KINDS: dict[str, Callable[[Mapping[str, Any], int], Array]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _rope(function: Callable[..., Any]) -> Callable[[tuple[int, ...], Mapping[str, Any]], Array]:
    def table(shape: tuple[int, ...], params: Mapping[str, Any]) -> Array:
        rows, pairs = shape if len(shape) == 2 else (0, 0)
        lengths = params.get("lengths", (rows,))
        if pairs != int(params["rotary_dim"]) // 2 or rows < sum(lengths):
            several = f" with tables for lengths {', '.join(map(str, lengths))}" if len(lengths) > 1 else ""
            raise ArtifactError(
                f"rotary table: the shape {shape} does not fit rotary_dim {params['rotary_dim']}{several}; rebuild the engine"
            )
        spare = rows - sum(lengths)  # a graph may want more rows than there are positions; they go on behind the last
        counts = [*lengths[:-1], lengths[-1] + spare]
        made = [_angles(params, length, count) for length, count in zip(lengths, counts, strict=True)]
        turned: Array = function(np.concatenate(made))
        factor = params.get("attention_factor", 1.0)
        return turned if factor == 1.0 else turned * np.float32(factor)

    return table


def _angles(params: Mapping[str, Any], length: int, rows: int) -> Array:
    angles: Array = np.outer(np.arange(rows, dtype=np.float32), rotary_frequencies(params, length))
    return angles


def _constant(shape: tuple[int, ...], params: Mapping[str, Any]) -> Array:
    return np.full(shape, params["value"], np.float32)


# kind of a `computed` recipe -> (shape, params) -> float32 array of that shape
TABLES: dict[str, Callable[[tuple[int, ...], Mapping[str, Any]], Array]] = {
    "rope_cos": _rope(np.cos),  # [rows, rotary_dim / 2]
    "rope_sin": _rope(np.sin),
    "constant": _constant,
    "alibi_slopes": alibi_slopes,  # [heads]
}
