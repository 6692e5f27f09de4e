"""Tables that a recipe computes rather than reads. Each function takes the shape and the recipe's parameters, and gives float32.

Rotary frequencies follow transformers' ``modeling_rope_utils``, so that checkpoints behave as they were trained:
``default`` (Su et al. 2021), ``linear`` (positions divided by ``factor``), ``llama3`` (the Llama 3.1 release: long wavelengths
slowed by ``factor``, short ones kept, a linear blend between).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zoo.errors import ArtifactError

Array = np.ndarray[Any, Any]


def rotary_frequencies(params: Mapping[str, Any]) -> Array:
    """Angle per position of each rotated pair: [rotary_dim / 2] float32."""
    dim, theta, kind = int(params["rotary_dim"]), float(params["theta"]), params.get("kind", "default")
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies: Array = (np.float32(1) / np.power(np.float32(theta), exponents)).astype(np.float32)
    if kind == "default":
        return frequencies
    factor = np.float32(params["factor"])
    slowed: Array = frequencies / factor
    if kind == "linear":
        return slowed
    if kind != "llama3":
        raise ArtifactError(f"rotary kind {kind!r} is not known; rebuild the engine")
    low, high = float(params["low_freq_factor"]), float(params["high_freq_factor"])
    trained = float(params["original_max_positions"])
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((trained / wavelengths - low) / (high - low), 0, 1).astype(np.float32)
    mixed: Array = (1 - blend) * slowed + blend * frequencies
    return mixed


def _rope(function: Callable[..., Any]) -> Callable[[tuple[int, ...], Mapping[str, Any]], Array]:
    def table(shape: tuple[int, ...], params: Mapping[str, Any]) -> Array:
        frequencies = rotary_frequencies(params)
        if shape[1:] != frequencies.shape:
            raise ArtifactError(
                f"rotary table: the shape {shape} does not fit rotary_dim {params['rotary_dim']}; rebuild the engine"
            )
        positions = np.arange(shape[0], dtype=np.float32)
        made: Array = function(np.outer(positions, frequencies)).astype(np.float32)
        return made

    return table


def _constant(shape: tuple[int, ...], params: Mapping[str, Any]) -> Array:
    return np.full(shape, params["value"], np.float32)


# kind of a `computed` recipe -> (shape, params) -> float32 array of that shape
TABLES: dict[str, Callable[[tuple[int, ...], Mapping[str, Any]], Array]] = {
    "rope_cos": _rope(np.cos),  # [max_context, rotary_dim / 2]
    "rope_sin": _rope(np.sin),
    "constant": _constant,
}
