"""Index inputs of the cuda target: one batch worked out by hand, random ones against the block table, and their cost.

Four sequences, block_size 4:  a 6 tokens, all new | b 9 tokens, 1 new | c 3 tokens, 2 new | padding: 2 tokens, length 1
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from zoo.runtime import cuda_indices, indices
from zoo.runtime.abi import Batch, EngineLimits
from zoo.runtime.cuda_indices import CUDA_INDEX_BUILDERS, decode_splits, prefill_tiles, token_slots

LIMITS = EngineLimits(max_tokens=64, max_sequences=4, max_rows=4, max_context=16, max_blocks=20, block_size=4)
TABLE = [[7, 3, 0, 0], [5, 9, 2, 0], [11, 0, 0, 0], [0, 0, 0, 0]]


def batch_of(counts: list[int], lengths: list[int], table: list[list[int]] | np.ndarray) -> Batch:
    positions = np.concatenate([np.maximum(np.arange(n - c, n), 0) for n, c in zip(lengths, counts, strict=True)])
    starts = np.concatenate([[0], np.cumsum(counts)])
    arrays = [np.array(values, np.int32) for values in (positions * 0, positions, starts, lengths)]
    return Batch(*arrays, {"full": np.array(table, np.int32)}, np.zeros(1, np.int32))


def batch() -> Batch:
    return batch_of([6, 1, 2, 2], [6, 9, 3, 1], TABLE)


def test_token_slots() -> None:
    got = token_slots(batch(), LIMITS)
    assert got.dtype == np.int32
    assert got.tolist() == [28, 29, 30, 31, 12, 13, 8, 45, 46, 0, 0]


def test_tokens_behind_the_last_sequence_go_into_block_0() -> None:
    made = batch()
    made.positions = np.concatenate([made.positions, np.zeros(3, np.int32)])
    assert token_slots(made, LIMITS)[11:].tolist() == [0, 0, 0]


def test_tiles_leave_out_decode_and_padding_and_begin_with_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_indices, "TILE", 4)
    got = prefill_tiles(batch(), LIMITS)
    assert got.dtype == np.int32
    assert got.tolist() == [[0, 4, 2, 4], [0, 0, 4, 0], [2, 7, 2, 1]]


def test_a_decode_step_has_no_tiles() -> None:
    assert prefill_tiles(batch_of([1, 1], [5, 9], TABLE[:2]), LIMITS).shape == (0, 4)


def test_sequences_without_tokens_have_no_tiles() -> None:
    assert prefill_tiles(batch_of([0, 3, 0], [5, 3, 1], TABLE[:3]), LIMITS).tolist() == [[1, 0, 3, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_indices, "TILE", 3)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 17, 4)
    counts = np.array([rng.integers(1, n + 1) for n in lengths])
    made = batch_of(list(counts), list(lengths), rng.permutation(np.arange(1, 20))[:16].reshape(4, 4))
    places = indices.pool_slots(made, LIMITS)[:, 0]
    assert (token_slots(made, LIMITS) == places[:, 0] * 4 + places[:, 2]).all()
    tiles = prefill_tiles(made, LIMITS)
    rows = [row for _, start, queries, _ in tiles for row in range(start, start + queries)]
    starts = made.query_starts
    assert sorted(rows) == [row for b in range(4) if counts[b] > 1 for row in range(starts[b], starts[b + 1])]
    assert (made.positions[tiles[:, 1]] == tiles[:, 3]).all() and (tiles[:, 2] <= 3).all()
    assert (np.diff(tiles[:, 3] + tiles[:, 2]) <= 0).all()
    assert all(starts[b] <= start and start + queries <= starts[b + 1] for b, start, queries, _ in tiles)


def test_splits_fill_a_gpu_and_no_more() -> None:
    limits = EngineLimits(8192, 1024, 1024, 131072, 9000, 16)
    assert decode_splits(1, 8, 1, limits) == 1
    assert decode_splits(1, 8, 256, limits) == 1, "two parts, and a kernel to join them, would take as long"
    assert decode_splits(1, 8, 257, limits) == 3
    assert decode_splits(1, 8, 2048, limits) == 16
    assert decode_splits(1, 8, 131072, limits) == decode_splits(1, 8, 1 << 30, limits) == 128
    assert decode_splits(1024, 8, 131072, limits) == 1
    for sequences in range(1, 1025):
        for kv_heads in (1, 2, 8, 32):
            splits = decode_splits(sequences, kv_heads, 131072, limits)
            assert splits == 1 or sequences * kv_heads * splits <= cuda_indices.WANTED


def test_a_thousand_sequences_cost_little() -> None:
    limits = EngineLimits(8192, 1024, 1024, 4096, 9000, 16)
    rng = np.random.default_rng(0)
    lengths = rng.integers(512, 4096, 1024)
    made = batch_of([1] * 896 + [57] * 128, list(lengths), rng.integers(1, 9000, (1024, 256)))
    for build in CUDA_INDEX_BUILDERS.values():
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            build(made, limits)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 2e-3
