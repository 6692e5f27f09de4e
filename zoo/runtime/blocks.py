"""The block manager: which sequence owns which blocks of the KV pools. It knows ids, not tensors.

    pool      | 0 reserved | 1 | 2 | 3 | 4 | 5 | ...        max_blocks blocks of block_size tokens, one id for all layers
    sequence A: 6 tokens, block_size 4      table [ 3, 1 ]     positions 0-3 in block 3, 4-5 in block 1, room for 2 more
    sequence B: 4 tokens                    table [ 2 ]
    free                                    4, 5, ...          taken from the front, given back at the end

Position p of a sequence lies in block ``table[p // block_size]`` at offset ``p % block_size``. Block 0 is never owned: it
fills the unused ends of tables and takes the writes of padding tokens. Blocks that were given back longest ago are reused
first, which is the order a prefix cache wants; their contents are undefined.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence


class BlockManager:
    """Hands out blocks 1 .. max_blocks - 1. free_blocks + used_blocks == total_blocks at all times."""

    def __init__(self, max_blocks: int, block_size: int) -> None:
        assert max_blocks >= 2 and block_size >= 1, (max_blocks, block_size)
        self.block_size = block_size
        self.total_blocks = max_blocks - 1
        self._free: deque[int] = deque(range(1, max_blocks))
        self._owned: dict[Hashable, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks nobody owns, the reserved block left out."""
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences own."""
        return sum(map(len, self._owned.values()))

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-tokens // self.block_size)

    def owned(self, owner: Hashable) -> list[int]:
        """The owner's blocks in order of position; empty for an unknown owner."""
        return list(self._owned.get(owner, ()))

    def owners(self) -> list[Hashable]:
        """Everybody who owns blocks."""
        return list(self._owned)

    def allocate(self, owner: Hashable, tokens: int, spare: int = 0) -> list[int] | None:
        """Let ``owner`` hold ``tokens`` tokens in all, and say which blocks that added, in order (perhaps none).

        Gives None, and changes nothing, when that would leave fewer than ``spare`` blocks free.
        """
        held = self._owned.get(owner, ())
        missing = self.blocks_for(tokens) - len(held)
        if missing <= 0:
            return []
        if missing + spare > len(self._free):
            return None
        new = [self._free.popleft() for _ in range(missing)]
        self._owned.setdefault(owner, []).extend(new)
        return new

    def extend(self, owners: Sequence[Hashable]) -> list[int] | None:
        """One more block for each of these owners, in order. None, and nothing changes, when there are not enough."""
        if len(owners) > len(self._free):
            return None
        new = [self._free.popleft() for _ in owners]
        for owner, block in zip(owners, new, strict=True):
            self._owned.setdefault(owner, []).append(block)
        return new

    def free(self, owner: Hashable) -> None:
        """Take all blocks of ``owner`` back. An unknown owner has none."""
        self._free.extend(self._owned.pop(owner, ()))
