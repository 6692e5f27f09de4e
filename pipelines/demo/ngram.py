"""A byte n-gram model with interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999), in NumPy.

An n-gram is packed into one integer, its first byte highest, so that sorted n-grams are grouped by context. The highest
order counts occurrences; a lower order counts in how many different contexts an n-gram was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def pack(texts: Sequence[bytes], order: int) -> Integers:
    """Every n-gram that ends at a byte of a text; before its first byte a text is padded with zero bytes."""
    padding = bytes(order - 1)
    data = np.frombuffer(b"".join(padding + text for text in texts), dtype=np.uint8).astype(np.int64)
    real = np.concatenate([np.arange(len(padding) + len(text)) >= order - 1 for text in texts])[order - 1 :]
    packed = np.zeros(len(data) - order + 1, dtype=np.int64)
    for i in range(order):
        packed = packed << 8 | data[i : len(data) - order + 1 + i]
    return packed[real]


@dataclass(frozen=True)
class Level:
    """One order: n-grams with discounted counts, contexts with totals and the weight left for lower orders."""

    grams: Integers
    discounted: Floats
    contexts: Integers
    totals: Floats
    left: Floats


def make_level(grams: Integers, counts: Integers) -> Level:
    """Discount the counts of sorted, distinct n-grams and sum them by context."""
    seen = [max(1, int(np.count_nonzero(counts == n))) for n in (1, 2, 3, 4)]
    ratio = seen[0] / (seen[0] + 2 * seen[1])
    discounts = np.array([0.0] + [n - (n + 1) * ratio * seen[n] / seen[n - 1] for n in (1, 2, 3)])
    discount = np.clip(discounts, [0.0, 0.1, 0.1, 0.1], [0.0, 1.0, 2.0, 3.0])[np.minimum(counts, 3)]
    contexts, starts = np.unique(grams >> 8, return_index=True)
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    return Level(grams, counts - discount, contexts, totals, np.add.reduceat(discount, starts) / totals)


def look_up(keys: Integers, sorted_keys: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    """Index of each key among `sorted_keys`, and whether it is there at all."""
    index = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return index, sorted_keys[index] == keys


class ByteNgram:
    """Model of the given order, trained on `texts`."""

    def __init__(self, texts: Sequence[bytes], order: int = 5) -> None:
        self.order = order
        self.levels: list[Level] = []
        grams, counts = np.unique(pack(texts, order), return_counts=True)
        for n in range(order, 0, -1):
            self.levels.insert(0, make_level(grams, counts))
            grams, counts = np.unique(grams & ((1 << 8 * (n - 1)) - 1), return_counts=True)

    def bits(self, texts: Sequence[bytes]) -> float:
        """Total bits that the model needs for `texts`."""
        packed = pack(texts, self.order)
        probability = np.full(len(packed), 1 / 256)
        for n, level in enumerate(self.levels, start=1):
            keys = packed & ((1 << 8 * n) - 1)
            gram, known_gram = look_up(keys, level.grams)
            context, known_context = look_up(keys >> 8, level.contexts)
            own = np.where(known_gram, level.discounted[gram], 0.0) / level.totals[context]
            probability = np.where(known_context, own + level.left[context] * probability, probability)
        return float(-np.log2(probability).sum())
