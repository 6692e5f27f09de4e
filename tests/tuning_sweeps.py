"""Sweeps that Triton's interpreter gets through in a second."""

from __future__ import annotations

import pytest

from zoo.tuning import attention, bench, elementwise, products, trial


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of operands, one replay, few candidates, few tokens."""
    monkeypatch.setattr(bench, "COLD", 1)
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    monkeypatch.setattr(products, "BUCKETS", (16, 32))
    monkeypatch.setattr(products, "SWEEP", (((128, 3), 64, 4),))
    monkeypatch.setattr(products, "WAVES", (1.4,))
    monkeypatch.setattr(attention, "DECODE", ((32, 4, 2), (64, 4, 3)))
    monkeypatch.setattr(attention, "PREFILL", ((64, 32, 4, 2),))
    monkeypatch.setattr(attention, "DECODE_LOADS", {"1 x 20": [(1, 20)], "3 x 9": [(1, 9)] * 3})
    monkeypatch.setattr(attention, "PREFILL_LOADS", {"5 of 20": [(5, 20), (3, 3)]})
    monkeypatch.setattr(elementwise, "ROTARY", ((1024, 4, 4),))
    monkeypatch.setattr(elementwise, "TOKENS", (8, 16))
    monkeypatch.setattr(elementwise, "WARPS", (2, 4))
