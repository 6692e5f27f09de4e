"""The static memory plan: what lives at once lies apart, aligned, in an arena between two bounds; for any lifetimes."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.compilers.cuda.memory import ALIGN, Block, place


def rounded(size: int) -> int:
    return -(-max(size, 1) // ALIGN) * ALIGN


def live_bytes(blocks: list[Block]) -> int:
    """The most bytes that are needed at once: no arena can be smaller."""
    return max(
        (sum(rounded(one.size) for one in blocks if one.first <= at <= one.last) for at in {b.first for b in blocks}), default=0
    )


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Block]:
    sizes = st.one_of(st.integers(0, 3 * ALIGN), st.integers(0, 10**12), st.sampled_from([1, ALIGN - 1, ALIGN, ALIGN + 1]))
    steps = draw(st.integers(1, 30))
    blocks = []
    for number in range(draw(st.integers(0, 40))):
        first = draw(st.integers(0, steps))
        blocks.append(Block(f"t{number}", draw(sizes), first, draw(st.integers(first, steps))))
    return blocks


@settings(max_examples=200, deadline=None)
@given(lifetimes())
def test_what_lives_at_once_lies_apart(blocks: list[Block]) -> None:
    offsets, arena = place(blocks)
    assert set(offsets) == {block.name for block in blocks}
    assert all(offset % ALIGN == 0 and offset >= 0 for offset in offsets.values())
    for index, one in enumerate(blocks):
        assert offsets[one.name] + rounded(one.size) <= arena
        for other in blocks[:index]:
            if one.first <= other.last and other.first <= one.last:
                a, b = offsets[one.name], offsets[other.name]
                assert a + rounded(one.size) <= b or b + rounded(other.size) <= a, (one, other)
    assert live_bytes(blocks) <= arena <= sum(rounded(block.size) for block in blocks)
    assert place(blocks[::-1]) == (offsets, arena), "the order of the list decides nothing"


def test_places_are_shared_by_what_never_lives_at_once() -> None:
    chain = [Block(f"t{number}", 1000, number, number + 1) for number in range(50)]
    offsets, arena = place(chain)
    assert arena == 2 * rounded(1000) and len(set(offsets.values())) == 2
    whole = [*chain, Block("all", 5000, 0, 60)]
    assert place(whole)[1] == rounded(5000) + 2 * rounded(1000)


def test_nothing_and_one_name_twice() -> None:
    assert place([]) == ({}, 0)
    assert place([Block("a", 0, 0, 0)]) == ({"a": 0}, ALIGN)
    with pytest.raises(AssertionError, match="a is placed twice"):
        place([Block("a", 1, 0, 0), Block("a", 1, 5, 5)])


def test_the_tensors_of_an_eighty_layer_model_are_placed_at_once() -> None:
    """Ten tensors a layer, each read by its next two steps: half a second of CPU would be felt in a build."""
    blocks = [Block(f"t{number}", 1000 + 7919 * number % 100_000, number, number + 2) for number in range(800)]
    started = time.process_time()
    _, arena = place(blocks)
    assert time.process_time() - started < 0.5
    assert arena <= 1.35 * live_bytes(blocks)
