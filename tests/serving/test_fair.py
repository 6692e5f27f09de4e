"""The waiting room by its properties: turns, order, priorities, counts."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from zoo.serving.fair import WaitingRoom


def test_a_bulk_client_delays_others_by_one() -> None:
    room: WaitingRoom[str] = WaitingRoom(100)
    for number in range(5):
        room.put(f"a{number}", "a")
    room.put("b0", "b")
    room.put("c0", "c")
    room.put("b1", "b")
    assert [room.take() for _ in range(8)] == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4"]
    assert room.take() is None and len(room) == 0


def test_smaller_priorities_go_first_and_full_is_full() -> None:
    room: WaitingRoom[int] = WaitingRoom(3)
    room.put(1, "a", priority=5)
    room.put(2, "a", priority=-1)
    assert not room.full
    room.put(3, "b", priority=0)
    assert room.full and [room.take(), room.take(), room.take()] == [2, 3, 1]


@given(st.lists(st.one_of(st.tuples(st.sampled_from("abc"), st.integers(-1, 1)), st.just("take"), st.integers(0, 30))))
def test_any_sequence_of_events(events: list[object]) -> None:
    room: WaitingRoom[int] = WaitingRoom(1000)
    waiting: dict[int, tuple[str, int]] = {}
    order: dict[tuple[str, int], list[int]] = defaultdict(list)
    for number, event in enumerate(events):
        if event == "take":
            taken = room.take()
            assert (taken is None) == (not waiting)
            if taken is not None:
                client, priority = waiting.pop(taken)
                assert priority == min([priority, *(one for _, one in waiting.values())]), "the smallest number goes first"
                assert order[client, priority].pop(0) == taken, "within a client, first come first served"
        elif isinstance(event, int):
            assert room.remove(event) == (event in waiting)
            if event in waiting:
                order[waiting.pop(event)].remove(event)
        else:
            client, priority = event  # type: ignore[misc]
            room.put(number, client, priority)
            waiting[number] = (client, priority)
            order[client, priority].append(number)
        assert len(room) == len(waiting)
    assert sorted(room.drain()) == sorted(waiting) and len(room) == 0
