"""Stop strings in text that comes in pieces, against a search of the whole text."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.runtime.stops import StopMatcher


def searched(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The same rule, said plainly: the match that ends first, the longest of those."""
    matches = [(at + len(stop), -len(stop), stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    if not matches:
        return text, None
    end, _, stop = min(matches)
    return text[: end if include else end - len(stop)], stop


def streamed(parts: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    text = ""
    for part in parts:
        new, found = matcher.push(part)
        text += new
        if found is not None:
            return text, found
    return text + matcher.finish(), None


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.text("ab🦜", max_size=4), max_size=12),
    stops=st.lists(st.text("ab🦜", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_pieces_find_what_a_search_of_the_whole_finds(parts: list[str], stops: list[str], include: bool) -> None:
    assert streamed(parts, stops, include) == searched("".join(parts), stops, include)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.text("ab", max_size=3), max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_text_is_given_as_soon_as_it_cannot_become_a_stop(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = given_out = ""
    for part in parts:
        new, found = matcher.push(part)
        if found:
            return
        seen, given_out = seen + part, given_out + new
        held = seen[len(given_out) :]
        assert seen == given_out + held
        assert held == "" or any(stop.startswith(held) for stop in stops), "held back for no reason"
        longer = [n for n in range(len(held) + 1, len(seen) + 1) if any(stop.startswith(seen[-n:]) for stop in stops)]
        assert not longer, "given out, though it may become a stop string"


def test_held_text_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["###END"])
    assert matcher.push("hello ###") == ("hello ", None)
    assert matcher.finish() == "###" and matcher.finish() == ""


def test_work_is_linear_in_the_new_text() -> None:
    """A stop string that nearly matches all the time: 400,000 characters in seconds, not minutes."""
    matcher = StopMatcher(["a" * 1000 + "b"])
    start = time.perf_counter()
    for _ in range(4000):
        matcher.push("a" * 100)
    assert time.perf_counter() - start < 5
