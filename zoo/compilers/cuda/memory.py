"""The static memory plan: every tensor of a step gets a place in one arena, and places are shared by what never lives at once.

Greedy by size (Pisarchyk and Lee 2020, "Efficient Memory Management for Deep Neural Net Inference"): the largest first, each
at the lowest offset where it meets no tensor that is alive at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 256


@dataclass(frozen=True)
class Block:
    """Bytes that are needed from step ``first`` to step ``last``, both included."""

    name: str
    size: int
    first: int
    last: int


def place(blocks: Sequence[Block]) -> tuple[dict[str, int], int]:
    """Offsets by name, each aligned, and the size of the arena."""
    offsets: dict[str, int] = {}
    placed: list[tuple[int, int, Block]] = []  # (offset, end, block)
    for block in sorted(blocks, key=lambda one: (-one.size, one.first, one.name)):
        assert block.name not in offsets, f"{block.name} is placed twice"
        size = -(-max(block.size, 1) // ALIGN) * ALIGN
        meets = sorted((o, e) for o, e, other in placed if other.first <= block.last and block.first <= other.last)
        offset = 0
        for start, end in meets:
            if offset + size <= start:
                break
            offset = max(offset, end)
        offsets[block.name] = offset
        placed.append((offset, offset + size, block))
    return offsets, max((end for _, end, _ in placed), default=0)
