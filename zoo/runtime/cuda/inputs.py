"""A step's inputs on their way to the GPU: packed into pinned memory, one copy, and a cell for the place of each.

What a step needs is as long as the step: an input's place moves with the sizes of those before it. Launches read places from
cells, so only the copy knows. A captured graph keeps the places of its own sizes, which are the same in every replay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from zoo.runtime.cuda.driver import Array, Device

ALIGN = 256


class Inputs:
    """Inputs by name, written in turn through ``slots`` pinned buffers, so that one is filled while another is copied."""

    def __init__(self, device: Device, most: Mapping[str, int], slots: int) -> None:
        """``most``: the most bytes that each input has."""
        size = sum(_padded(nbytes) for nbytes in most.values())
        self._device, self._most = device, dict(most)
        self._place = device.allocate(size, "the inputs of a step")
        self._pinned = [device.pinned(size) for _ in range(slots)]
        self.cells: dict[str, Any] = {name: ctypes.c_uint64(self._place) for name in most}

    def send(self, slot: int, arrays: Mapping[str, Array], stream: int) -> None:
        """Queue the copy of a step's inputs. The slot's last copy must be over. Arrays may be changed when this returns."""
        pinned, offset = self._pinned[slot], 0
        for name, array in arrays.items():
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            assert len(raw) <= self._most[name], f"{name}: {len(raw):,} bytes in a step, the engine takes {self._most[name]:,}"
            pinned[offset : offset + len(raw)] = raw
            self.cells[name].value = self._place + offset
            offset += _padded(len(raw))
        self._device.send(self._place, pinned[:offset], stream)


def _padded(size: int) -> int:
    return -(-max(size, 1) // ALIGN) * ALIGN
