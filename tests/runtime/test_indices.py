"""Index inputs: one batch worked out by hand, and properties of random ones.

Three sequences, block_size 4:  a 6 tokens, all new | b 9 tokens, 1 new | c 3 tokens, 2 new
"""

from __future__ import annotations

import numpy as np
import pytest

from zoo.runtime import indices
from zoo.runtime.abi import Batch, EngineLimits

LIMITS = EngineLimits(max_tokens=64, max_sequences=4, max_rows=4, max_context=16, max_blocks=20, block_size=4)
TABLE = [[7, 3, 0, 0], [5, 9, 2, 0], [11, 0, 0, 0]]


def batch() -> Batch:
    positions = [0, 1, 2, 3, 4, 5, 8, 1, 2]
    arrays = ([0] * 9, positions, [0, 6, 7, 9], [6, 9, 3])
    return Batch(*(np.array(a, np.int32) for a in arrays), {"full": np.array(TABLE, np.int32)}, np.array([5], np.int32))


def test_pool_slots_are_block_half_and_place() -> None:
    got = indices.pool_slots(batch(), LIMITS)
    places = [(7, 0), (7, 1), (7, 2), (7, 3), (3, 0), (3, 1), (2, 0), (11, 1), (11, 2)]
    assert got.dtype == np.int64
    assert got.tolist() == [[[block, 0, place], [block, 1, place]] for block, place in places]


def test_pool_writes_end_with_the_rest_of_each_last_block() -> None:
    got = indices.pool_writes(batch(), LIMITS)
    places = [(3, 2), (3, 3), (2, 1), (2, 2), (2, 3), (11, 3)]
    assert indices.pool_blanks(batch(), LIMITS).tolist() == [0, 0, 0, 0, len(places), 0, 0, 0]
    assert got[:9].tolist() == indices.pool_slots(batch(), LIMITS).tolist()
    assert got[9:].tolist() == [[[block, 0, place], [block, 1, place]] for block, place in places]


def test_a_full_last_block_has_no_rest() -> None:
    full = batch()
    full.kv_lengths[:] = [8, 12, 4]
    full.positions[:] = [2, 3, 4, 5, 6, 7, 11, 2, 3]
    assert len(indices.pool_writes(full, LIMITS)) == 9


def test_context_blocks_are_the_used_entries() -> None:
    got = indices.context_blocks(batch(), LIMITS)
    used = [7, 3, 5, 9, 2, 11]
    assert got.tolist() == [[[block, 0] for block in used], [[block, 1] for block in used]]


def test_work_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indices, "TILE", 4)
    assert indices.work_items(batch(), LIMITS).tolist() == [
        [0, 4, 0, 1, 4, 4, 0],
        [4, 6, 0, 2, 6, 8, 4],
        [6, 7, 2, 5, 9, 12, 8],
        [7, 9, 5, 6, 3, 4, 1],
    ]


def test_row_positions() -> None:
    assert indices.row_positions(batch(), LIMITS).tolist() == [0, 1, 2, 3, 4, 5, 8, 1, 2]


def decode() -> Batch:
    """The same contexts a step later: one token each, of 7, 10 and 4 tokens."""
    arrays = ([0] * 3, [6, 9, 3], [0, 1, 2, 3], [7, 10, 4])
    return Batch(*(np.array(a, np.int32) for a in arrays), {"full": np.array(TABLE, np.int32)}, np.arange(3, dtype=np.int32))


def test_decode_steps_have_one_token_a_sequence() -> None:
    assert indices.decode_step(decode(), LIMITS).item() is True
    assert indices.decode_step(batch(), LIMITS).item() is False
    assert indices.decode_keys(batch(), LIMITS).shape == indices.decode_values(batch(), LIMITS).shape == (0, 3, 3)
    assert indices.decode_bias(batch(), LIMITS).shape == (3, 0)


def test_decode_steps_bound_what_padding_costs() -> None:
    uneven, long = decode(), decode()
    uneven.kv_lengths[:] = [16, 1, 1]
    long.kv_lengths[:] = indices.TOGETHER // 3 + 1
    assert not indices.decode_step(uneven, LIMITS) and not indices.decode_step(long, LIMITS)


def test_decode_slots_repeat_the_last_position_and_the_bias_hides_it() -> None:
    keys, values = indices.decode_keys(decode(), LIMITS), indices.decode_values(decode(), LIMITS)
    bias = indices.decode_bias(decode(), LIMITS)
    assert keys.shape == values.shape == (10, 3, 3) and bias.shape == (3, 10) and bias.dtype == np.float32
    assert keys[:, 0].tolist() == [[7, 0, p] for p in range(4)] + [[3, 0, p] for p in (0, 1, 2, 2, 2, 2)]
    assert values[:, 2].tolist() == [[11, 1, p] for p in (0, 1, 2, 3, 3, 3, 3, 3, 3, 3)]
    assert np.isneginf(bias).sum(axis=1).tolist() == [3, 0, 6] and (bias[1] == 0).all()


def test_query_rows_and_token_rows_are_inverse() -> None:
    rows, back = indices.query_rows(batch(), LIMITS), indices.token_rows(batch(), LIMITS)
    assert rows.dtype == back.dtype == np.int32
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5], [6, 0, 0, 0, 0, 0], [7, 8, 0, 0, 0, 0]]
    assert back.tolist() == [0, 1, 2, 3, 4, 5, 6, 12, 13]
    assert rows.reshape(-1)[back].tolist() == list(range(9))


@pytest.mark.parametrize("seed", range(20))
def test_random_batches_name_the_blocks_that_the_table_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 17, 4)
    counts = np.array([rng.integers(1, n + 1) for n in lengths])
    table = rng.permutation(np.arange(1, 20))[:16].reshape(4, 4).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    made = Batch(np.zeros_like(positions), positions, starts, lengths.astype(np.int32), {"full": table}, starts[1:] - 1)
    slots, writes = indices.pool_slots(made, LIMITS), indices.pool_writes(made, LIMITS)
    sequence = np.repeat(np.arange(4), counts)
    assert (slots[:, 0, 0] == table[sequence, positions // 4]).all() and (slots[:, 1, 2] == positions % 4).all()
    assert len(np.unique(writes.reshape(-1, 3), axis=0)) == 2 * len(writes)  # no place is written twice
    items = indices.work_items(made, LIMITS)
    assert [row for start, stop, *_ in items for row in range(start, stop)] == list(range(len(positions)))
    assert (items[:, 6] == positions[items[:, 0]]).all() and (items[:, 4] == positions[items[:, 1] - 1] + 1).all()


def test_every_builder_takes_one_token() -> None:
    table = np.array([[1]], np.int32)
    one = np.array([0], np.int32)
    made = Batch(one, one, np.array([0, 1], np.int32), one + 1, {"full": table}, one)
    shapes = {name: build(made, LIMITS).shape for name, build in indices.INDEX_BUILDERS.items()}
    assert shapes == {
        "pool_slots": (1, 2, 3),
        "pool_writes": (4, 2, 3),
        "pool_blanks": (8,),
        "context_blocks": (2, 1, 2),
        "row_positions": (1,),
        "work_items": (1, 7),
        "query_rows": (1, 1),
        "token_rows": (1,),
        "decode_step": (),
        "decode_keys": (1, 1, 3),
        "decode_values": (1, 1, 3),
        "decode_bias": (1, 1),
        "text_tiles": (1, 4),
        "window_tiles": (1, 4),
    }
