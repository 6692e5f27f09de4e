"""What a step sends to the GPU: buckets, captured and other shapes, padding, and room for any step within the limits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.runtime.abi import SAMPLING, Adjusting, Batch, EngineLimits, Sampling
from zoo.runtime.cuda import steps
from zoo.runtime.cuda.steps import bucket, captured_size, captured_step, eager_step, input_bytes
from zoo.runtime.cuda_indices import decode_splits

LIMITS = EngineLimits(max_tokens=64, max_sequences=16, max_rows=16, max_context=100, max_blocks=200, block_size=16)
SHAPES: dict[str, tuple[str, ...]] = {
    "token_ids": ("T",),
    "positions": ("T",),
    "query_starts": ("B+1",),
    "kv_lengths": ("B",),
    "block_table.full": ("B", "P"),
    "logit_rows": ("R",),
    "token_slots": ("T",),
    "prefill_tiles": ("W", "4"),
}


@dataclass
class Shape:
    index_inputs: tuple[str, ...] = ("token_slots", "prefill_tiles")
    kv_heads: int = 2


def batch_of(counts: list[int], lengths: list[int], rows: list[int], size: int = 16) -> Batch:
    """Sequences with so many new tokens, so long after the step; sequence s has the blocks 10 s + 1, ..."""
    width = -(-max(lengths) // size)
    table = np.zeros((len(counts), width), np.int32)
    for number, length in enumerate(lengths):
        used = -(-length // size)
        table[number, :used] = 10 * number + 1 + np.arange(used)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    starts = np.concatenate([[0], np.cumsum(counts)])
    ids = 100 + np.arange(len(positions))
    arrays = [array.astype(np.int32) for array in (ids, positions, starts, np.array(lengths))]
    return Batch(*arrays, {"full": table}, np.array(rows, np.int32))


def sampling_of(rows: int, temperature: float = 0.0, counted: list[int] | None = None) -> Sampling:
    """``counted``: slots of the sequences, which makes it a step with penalties."""
    made = np.zeros(rows, SAMPLING)
    made["temperature"], made["top_p"] = temperature, 1
    adjusting = Adjusting([], np.array(counted, np.int32), False, True) if counted else None
    return Sampling(made, np.empty(0, np.int32), temperature == 0, adjusting)


def test_buckets_of_the_docs() -> None:
    found = sorted({bucket(count, 2000) for count in range(1, 130)})
    assert found == [1, 2, 4, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160]


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_buckets(count: int, most: int) -> None:
    """Room for all, at most a quarter too much, never beyond the limit, few of them, and their own buckets."""
    size = bucket(count, most)
    if count > most:
        assert size == 0
        return
    assert count <= size <= most
    assert size <= max(count * 1.25, count + 3) and bucket(size, most) == size
    assert bucket(min(count + 1, most), most) >= size


def test_which_steps_are_captured() -> None:
    five = batch_of([1] * 5, [9] * 5, list(range(5)))
    assert captured_size(five, LIMITS) == 8
    assert captured_size(batch_of([1] * 5, [9] * 5, [0, 2]), LIMITS) == 8, "not every sequence wants logits"
    assert captured_size(batch_of([1], [1], []), LIMITS) == 1
    assert captured_size(batch_of([1, 2], [9, 9], [0]), LIMITS) == 0
    assert captured_size(batch_of([2], [9], [0, 1]), LIMITS) == 0
    assert captured_size(batch_of([1, 1], [9, 9], [0, 0, 1]), LIMITS) == 0, "more rows than sequences"
    odd = dataclasses.replace(batch_of([1, 1], [9, 9], [0]), query_starts=np.array([0, 0, 2], np.int32))
    assert captured_size(odd, LIMITS) == 0, "as many tokens as sequences, but not one each"


@pytest.mark.parametrize("limit", ["max_tokens", "max_sequences", "max_rows"])
def test_no_limit_is_padded_over(limit: str) -> None:
    five = batch_of([1] * 5, [9] * 5, [0])
    assert captured_size(five, dataclasses.replace(LIMITS, **{limit: 6})) == 6
    assert captured_size(five, dataclasses.replace(LIMITS, **{limit: 4})) == 0
    assert captured_size(batch_of([1] * 5, [9] * 5, [0]), dataclasses.replace(LIMITS, max_sequences=steps.CAPTURED * 2)) == 8


def test_a_step_as_it_comes() -> None:
    batch = batch_of([3, 1, 1], [20, 33, 2], [2, 3])
    step = eager_step(batch, sampling_of(2, 0.5), LIMITS, Shape())
    assert step.chooser == "sample" and list(step.arrays) == [*SHAPES, "sampling"]
    splits = decode_splits(2, 2, 33, LIMITS)
    assert step.sizes == {"T": 5, "B": 3, "R": 2, "W": 1, "S": splits, "P": 3, "J": int(splits > 1)}
    np.testing.assert_array_equal(step.arrays["prefill_tiles"], [[0, 0, 3, 17]])
    slots = [2 * 16 + 1, 2 * 16 + 2, 2 * 16 + 3, 13 * 16 + 0, 21 * 16 + 1]
    np.testing.assert_array_equal(step.arrays["token_slots"], slots)
    assert all(array.flags.c_contiguous for array in step.arrays.values())
    assert (
        eager_step(batch, None, LIMITS, Shape()).chooser == ""
        and eager_step(batch, sampling_of(2), LIMITS, Shape()).chooser == "greedy"
    )
    alone = eager_step(batch_of([3], [20], [2]), None, LIMITS, Shape(()))
    assert list(alone.arrays) == list(SHAPES)[:6] and alone.sizes["W"] == 0 and alone.sizes["S"] >= 1


def test_a_captured_step_is_padded() -> None:
    batch = batch_of([1] * 5, [9, 40, 70, 1, 2], [0, 2, 4])
    step = captured_step(batch, sampling_of(3, 1.0), LIMITS, Shape(), 8)
    assert step.sizes == {"T": 8, "B": 8, "R": 8, "W": 0, "S": decode_splits(8, 2, 100, LIMITS), "P": 7, "J": 0}
    arrays, plain = step.arrays, eager_step(batch, sampling_of(3, 1.0), LIMITS, Shape()).arrays
    for name, count in (
        ("token_ids", 5),
        ("positions", 5),
        ("token_slots", 5),
        ("logit_rows", 3),
        ("kv_lengths", 5),
        ("sampling", 3),
    ):
        np.testing.assert_array_equal(arrays[name][:count], plain[name])
        assert len(arrays[name]) == 8
    np.testing.assert_array_equal(arrays["query_starts"], [0, 1, 2, 3, 4, 5, 5, 5, 5])
    np.testing.assert_array_equal(arrays["kv_lengths"][5:], [1, 1, 1])
    np.testing.assert_array_equal(arrays["block_table.full"][:5, :5], plain["block_table.full"])
    assert not arrays["block_table.full"][5:].any() and not arrays["block_table.full"][:, 5:].any()
    assert not arrays["token_slots"][5:].any() and not arrays["sampling"]["temperature"][3:].any()
    assert {array.dtype for name, array in arrays.items() if name != "sampling"} == {np.dtype(np.int32)}


def test_only_steps_with_adjusted_requests_run_more_and_have_graphs_of_their_own() -> None:
    batch = batch_of([1] * 5, [9, 40, 70, 1, 2], [0, 1, 2, 3, 4])
    keys = set()
    for counted, listed, penalized, runs in (
        (False, False, False, ()),
        (True, False, True, ("count", "penalized")),
        (True, False, False, ("count",)),  # a chunk of a prompt, beside rows of others
        (False, True, False, ("listed",)),
        (True, True, True, ("count", "listed", "penalized")),
    ):
        slots = np.array([0, 3, 0, 1, 2], np.int32) if counted else None
        sampling = dataclasses.replace(sampling_of(5), adjusting=Adjusting([(2, slots)], slots, listed, penalized))  # type: ignore[list-item]
        for step in (eager_step(batch, sampling, LIMITS, Shape()), captured_step(batch, sampling, LIMITS, Shape(), 8)):
            assert step.adjusting == runs and ("counted" in step.arrays) == counted
        if counted:
            assert step.arrays["counted"].tolist() == [0, 3, 0, 1, 2, 0, 0, 0]
        keys.add(step.key)
    plain = captured_step(batch, sampling_of(5), LIMITS, Shape(), 8)
    assert len(keys) == 5 and plain.key in keys and "counted" not in plain.arrays


def test_sizes_of_captured_steps_are_few() -> None:
    """What a graph is kept for: contexts from 1 to 100 and 1 to 16 sequences give so many."""
    seen = set()
    for count in range(1, 17):
        for length in range(1, 101):
            batch = batch_of([1] * count, [length] * count, list(range(count)))
            seen.add(tuple(captured_step(batch, None, LIMITS, Shape(()), captured_size(batch, LIMITS)).sizes.values()))
    assert len(seen) <= 8 * 4, "eight buckets of sequences, four widths of tables"


@st.composite
def some_steps(draw: st.DrawFn) -> tuple[EngineLimits, Batch]:
    """Any step that a scheduler may make within some limits, all of them reached now and then."""
    size = draw(st.sampled_from([1, 4, 16]))
    limits = EngineLimits(
        draw(st.integers(1, 300)), draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(2, 300)), 1, size
    )
    single = draw(st.booleans())
    counts, room = [], limits.max_tokens
    while room and len(counts) < limits.max_sequences and (not counts or draw(st.integers(0, 9))):
        counts.append(1 if single else draw(st.integers(1, min(room, limits.max_context))))
        room -= counts[-1]
    lengths = [draw(st.integers(count, limits.max_context)) for count in counts]
    rows = list(range(min(sum(counts), limits.max_rows, draw(st.integers(0, 20)))))
    return limits, batch_of(counts, lengths, rows, size)


@settings(max_examples=150, deadline=None)
@given(some_steps())
def test_there_is_room_for_any_step(drawn: tuple[EngineLimits, Batch]) -> None:
    limits, batch = drawn
    room = input_bytes(SHAPES, limits)
    sampling = sampling_of(len(batch.logit_rows), counted=[1] * len(batch.kv_lengths))
    made: list[steps.Step] = [eager_step(batch, sampling, limits, Shape())]
    if size := captured_size(batch, limits):
        made.append(captured_step(batch, sampling, limits, Shape(), size))
    most: dict[str, Any] = {"T": limits.max_tokens, "B": limits.max_sequences, "R": limits.max_rows, "W": limits.max_tokens}
    for step in made:
        assert set(step.arrays) == set(room)
        for name, array in step.arrays.items():
            assert array.nbytes <= room[name], name
        assert all(step.sizes[symbol] <= number for symbol, number in most.items())
        for name, shape in SHAPES.items():
            sides = [
                int(side) if side.isdigit() else step.sizes["B"] + 1 if side == "B+1" else step.sizes[side] for side in shape
            ]
            assert list(step.arrays[name].shape) == sides, name
