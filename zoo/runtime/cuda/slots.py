"""Slots on the GPU: what ``zoo.runtime.adjusting`` says of a request whose logits are adjusted, and the counts of its tokens.

They are made a few at a time as more such requests run at once, never move and stay until the end. Kernels look a slot's address
up in a table, so a captured graph knows no slot. A slot of a vocabulary of 128,256 takes half a megabyte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zoo.errors import ResourceError
from zoo.runtime.abi import Int32
from zoo.runtime.adjusting import HEADER, LISTED, counts_at, slot_words
from zoo.runtime.cuda.driver import Array, Device

CHUNK = 8  # slots that are made at once
LEFT = 128 << 20  # bytes of GPU memory that are not taken: graphs are captured later


class Slots:
    """Slots 1 to ``most``. ``table``: where kernels find their addresses, [1 + most] of 64 bits, the first one nobody's.

    made   how many there are
    turns  steps whose words may be on their way to the GPU at once
    """

    def __init__(self, device: Device, vocab_size: int, most: int, turns: int) -> None:
        self._device, self._most = device, most
        self._size = 4 * slot_words(vocab_size)
        self._counts = 4 * vocab_size
        self._addresses = device.pinned(8 * (1 + most)).view(np.uint64)
        self._addresses[:] = 0
        self.table = device.allocate(8 * (1 + most), "the table of slots")
        self._words: list[Array | None] = [None] * turns
        self._full = False
        self.made = 0

    def reserve(self, slots: int, stream: int) -> bool:
        """Make slots until there are so many; False once there was no memory for more."""
        assert slots <= self._most, f"{slots} slots for {self._most} sequences"
        while self.made < slots and not self._full:
            count = min(CHUNK, self._most - self.made)
            self._full = self._device.memory()[0] < count * self._size + LEFT
            if not self._full:
                try:
                    place = self._device.allocate(count * self._size, "counts of tokens")
                except ResourceError:
                    self._full = True
                    break
                self._addresses[1 + self.made : 1 + self.made + count] = place + self._size * np.arange(count, dtype=np.uint64)
                self.made += count
                self._device.send(self.table, self._addresses, stream)  # what steps under way may read of it stays as it is
        return self.made >= slots

    def start(self, turn: int, started: Sequence[tuple[int, Int32]], stream: int) -> None:
        """Queue words and zero counts of slots that begin. The words of the turn's last step must be there."""
        room = self._room(turn, len(started)) if started else ()
        for (slot, words), pinned in zip(started, room, strict=True):
            place = int(self._addresses[slot])
            pinned[: len(words)] = words
            self._device.send(place, pinned[: len(words)], stream)
            self._device.fill(place + 4 * counts_at(), 0, self._counts, stream)

    def _room(self, turn: int, count: int) -> Array:
        """Pinned memory for words of so many requests."""
        have = self._words[turn]
        if have is None or len(have) < count:
            self._words[turn] = None
            if have is not None:
                self._device.free(have.ctypes.data)
            width = HEADER + 2 * LISTED
            rows = min(1 << (count - 1).bit_length(), self._most)
            have = self._words[turn] = self._device.pinned(4 * rows * width).view(np.int32).reshape(rows, width)
        return have[:count]
