"""Which rotary tables a model needs, and which of them a sequence reads: what the graph and the runtime must agree on.

Most kinds of rotary embedding have one table of cosines and one of sines, whose row p is for position p. The frequencies of
the kinds ``dynamic`` and ``longrope`` depend on how long a sequence is (``RopeSpec.by_length``). For those, one weight holds
several tables one after the other, each for sequences up to some length:

    rows   0 ...            L0 | 0 ...                       L1 | 0 ...            max_context
           sequences up to L0    sequences of L0 + 1 to L1        the longest ones

A sequence is admitted with its prompt and ``max_tokens`` known, together N. It takes the first table whose length is at least N,
and keeps it: the row of position p is ``first_row + p``, which is what the engine's input ``positions`` holds. So keys in the
cache and queries of one sequence always have the same frequencies, where transformers, which chooses anew in every step, mixes
those of several lengths once a sequence grows past a threshold.

longrope  two tables: up to ``original_max_positions`` with the short factors, beyond with the long ones. Both equal what
          transformers computes for a single forward of any such length.
dynamic   the first is the plain one, for sequences that fit the original context. The others stand at lengths that grow
          geometrically up to the engine's context. Each equals what transformers computes for a single forward of exactly its
          length; shorter sequences that read it have frequencies a little lower than transformers' for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from zoo.modelspec import RopeSpec

MOST_STEPS = 8  # lengths of a dynamic model behind its original context
MOST_ROWS = 3.0  # rows of all its tables together, as a multiple of the engine's context
# What tells the frequencies of each kind beside theta.
NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_positions"),
    "yarn": ("factor", "original_max_positions", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original_max_positions", "short_factor", "long_factor"),
}


@dataclass(frozen=True)
class Table:
    """One table among those of a weight: the longest sequence that reads it, and where it begins."""

    length: int
    first_row: int


def tables(rope: RopeSpec, max_positions: int, max_context: int = 0) -> tuple[Table, ...]:
    """The tables of one model, shortest sequences first; the last one is for ``max_context`` (0: ``max_positions``)."""
    context = max_context or max_positions
    original = rope.original_max_positions
    if not rope.by_length or context <= original:
        lengths = [context]
    elif rope.kind == "longrope":
        lengths = [original, context]
    else:
        lengths = _growing(original, context)
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return tuple(Table(length, start) for length, start in zip(lengths, starts, strict=True))


def _growing(original: int, context: int) -> list[int]:
    """``original``, then lengths in equal proportions up to ``context``: as many as ``MOST_STEPS`` and ``MOST_ROWS`` allow."""
    for steps in range(MOST_STEPS, 0, -1):
        lengths = sorted({round(original * (context / original) ** (step / steps)) for step in range(steps)} | {context})
        if sum(lengths) <= MOST_ROWS * context:
            break
    return lengths


def params(rope: RopeSpec, rotary_dim: int, max_positions: int, max_context: int = 0) -> tuple[int, dict[str, Any]]:
    """Rows of a model's rotary weights, and the parameters of their ``computed`` recipe: plain numbers, texts and tuples.

    ``zoo.weights.tables`` makes the tables from them. They name only what the kind reads, so that equal tables have equal
    recipes. ``lengths`` is there for kinds that go by length, ``attention_factor`` when it is not 1.
    """
    made = tables(rope, max_positions, max_context)
    numbers: dict[str, Any] = {"rotary_dim": rotary_dim, "kind": rope.kind, "theta": rope.theta}
    numbers |= {key: getattr(rope, key) for key in NUMBERS[rope.kind]}
    if (factor := attention_factor(rope)) != 1.0:
        numbers["attention_factor"] = factor
    if rope.by_length:
        numbers["lengths"] = tuple(table.length for table in made)
    return sum(table.length for table in made), numbers


def attention_factor(rope: RopeSpec) -> float:
    """What cosines and sines are multiplied by, so that scores keep their spread in longer contexts.

    yarn      0.1 ln(factor) + 1 (Peng et al. 2023); with DeepSeek's mscale and mscale_all_dim, the quotient of
              0.1 m ln(factor) + 1 for the two
    longrope  sqrt(1 + ln(factor) / ln(original_max_positions)) (Ding et al. 2024)
    """
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    grown = math.log(rope.factor)
    if rope.kind == "longrope":
        return math.sqrt(1 + grown / math.log(rope.original_max_positions))
    if rope.mscale and rope.mscale_all_dim:
        return (0.1 * rope.mscale * grown + 1.0) / (0.1 * rope.mscale_all_dim * grown + 1.0)
    return 0.1 * grown + 1.0
