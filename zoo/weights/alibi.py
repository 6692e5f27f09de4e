"""Slopes of linear attention biases (Press et al. 2022, "Train Short, Test Long": ALiBi), as checkpoints were trained with them.

The slopes of n heads, n a power of two, are 2 ** (-bias_max * i / n) for i = 1 to n; the paper's bias_max is 8. Any other number
of heads gets the slopes of the power of two below it, then every other one of twice as many, from the first on. BLOOM and Falcon
("bloom") and MPT ("mpt", which takes the power of two above apart) write this differently and mean the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from zoo.errors import ArtifactError

Array = np.ndarray[Any, Any]


def alibi_slopes(shape: tuple[int, ...], params: Mapping[str, Any]) -> Array:
    """[heads] float32, all more than 0: how much a score falls for each position of distance.

    params  heads, rule ("bloom" or "mpt"), bias_max, factor (multiplies; for models that scale biases as they scale scores)
    """
    heads, rule = int(params["heads"]), params.get("rule", "bloom")
    bias_max, factor = float(params.get("bias_max", 8.0)), float(params.get("factor", 1.0))
    if shape != (heads,) or heads < 1 or rule not in ("bloom", "mpt") or not factor > 0:
        raise ArtifactError(f"alibi slopes: {dict(params)} do not make a table of the shape {shape}; rebuild the engine")
    below = 1 << (heads.bit_length() - 1)
    made = np.concatenate([_slopes(below, bias_max), _slopes(2 * below, bias_max)[::2]])[:heads]
    slopes: Array = (made * factor).astype(np.float32)
    return slopes


def _slopes(count: int, bias_max: float) -> Array:
    return np.exp2(-bias_max * np.arange(1, count + 1) / count)
