"""Huge pages: only what is resident is touched, contents stay, and a system without them changes nothing."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from zoo.runtime.sessions import hugepages

MIB = 1 << 20


def resident(array: np.ndarray) -> int:
    """Bytes of an array's pages that are in memory."""
    start, pages = array.ctypes.data // mmap.PAGESIZE, array.nbytes // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(start * 8)
        entries = np.frombuffer(file.read(pages * 8), np.uint64)
    return int((entries & hugepages.PRESENT != 0).sum()) * mmap.PAGESIZE


def test_contents_stay_and_nothing_new_becomes_resident() -> None:
    full = np.arange(16 * MIB, dtype=np.uint64)  # 128 MiB
    sparse = np.empty(128 * MIB, np.uint8)
    sparse[:: 8 * MIB] = 7
    before = resident(sparse)
    done = hugepages.collapse()
    assert done % hugepages.HUGE == 0
    assert (full == np.arange(16 * MIB, dtype=np.uint64)).all() and (sparse[:: 8 * MIB] == 7).all()
    assert resident(sparse) == before < 64 * MIB


def test_resident_runs(tmp_path: Path) -> None:
    """Of five huge pages the second lacks a page, and the last two are there: runs of 1 and 3."""
    there = np.full(5 * hugepages.PAGES, hugepages.PRESENT, np.uint64)
    there[hugepages.PAGES + 3] = 0
    path = tmp_path / "pagemap"
    path.write_bytes(there.tobytes())
    with path.open("rb") as file:
        runs = list(hugepages._resident(file.fileno(), 0, 5 * hugepages.HUGE))
    assert runs == [(0, hugepages.HUGE), (2 * hugepages.HUGE, 3 * hugepages.HUGE)]


def test_a_system_without_the_files_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(least: int) -> None:
        raise FileNotFoundError("/proc/self/maps")

    monkeypatch.setattr(hugepages, "_anonymous", gone)
    assert hugepages.collapse() == 0
