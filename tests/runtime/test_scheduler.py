"""Which sequences a step serves: budget, order, preemption. What comes out of it is in test_engine.py."""

from __future__ import annotations

import numpy as np
import pytest
from fake_session import limits, params
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.runtime.abi import EngineLimits
from zoo.runtime.scheduler import Scheduler, Step
from zoo.runtime.sequence import Sequence


def add(scheduler: Scheduler, name: str, prompt: int, new: int = 8, priority: int = 0) -> Sequence:
    limit = min(prompt + new, scheduler.max_length)
    sequence = Sequence(name, list(range(1, prompt + 1)), params(max_tokens=new), limit, priority)
    scheduler.add(sequence)
    return sequence


def run(scheduler: Scheduler) -> tuple[Step, dict[str, int]]:
    """One step; each sampled sequence gets a token, and goes when it is full. Gives tokens by sequence, in batch order."""
    step = scheduler.schedule()
    assert step is not None
    counts = np.diff(step.batch.query_starts).tolist()
    served = {sequence.request_id: count for sequence, count in zip(step.sequences, counts, strict=True)}
    for sequence in step.sampled:
        sequence.append(5)
        if sequence.known == sequence.limit:
            scheduler.remove(sequence.request_id)
    return step, served


def test_batch_is_laid_out_as_the_abi_says() -> None:
    scheduler = Scheduler(limits(max_tokens=10))
    add(scheduler, "a", 3)
    add(scheduler, "b", 9)
    step, served = run(scheduler)
    assert served == {"a": 3, "b": 7}
    batch = step.batch
    assert batch.token_ids.tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 7]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    assert batch.query_starts.tolist() == [0, 3, 10] and batch.kv_lengths.tolist() == [3, 7]
    assert batch.logit_rows.tolist() == [2], "b has not caught up"
    assert batch.block_tables["full"].tolist() == [[1, 0], [2, 3]]
    step, served = run(scheduler)
    assert served == {"a": 1, "b": 2}
    assert step.batch.token_ids.tolist() == [5, 8, 9] and step.batch.positions.tolist() == [3, 7, 8]
    assert step.batch.kv_lengths.tolist() == [4, 9] and step.batch.logit_rows.tolist() == [0, 2]
    assert step.batch.block_tables["full"].tolist() == [[1, 0, 0], [2, 3, 4]]


def test_nothing_to_do() -> None:
    assert Scheduler(limits()).schedule() is None


def test_streams_go_on_beside_a_long_prompt() -> None:
    scheduler = Scheduler(limits(max_tokens=8))
    for name in "abc":
        add(scheduler, name, 2, new=20)
    run(scheduler)
    add(scheduler, "long", 40)
    for _ in range(7):
        _, served = run(scheduler)
        assert served == {"a": 1, "b": 1, "c": 1, "long": 5}


def test_waiting_sequences_come_in_order_and_never_past_the_one_before() -> None:
    scheduler = Scheduler(limits(max_blocks=9, max_tokens=64))  # 8 blocks of 4
    add(scheduler, "a", 20)  # 5 blocks
    add(scheduler, "large", 12)  # 3 blocks, and one to spare for a
    add(scheduler, "small", 1)
    assert run(scheduler)[1] == {"a": 20}
    assert run(scheduler)[1] == {"a": 1}, "small must not slip past large"
    scheduler.remove("a")
    assert run(scheduler)[1] == {"large": 12, "small": 1}


def test_more_important_sequences_run_first_and_are_preempted_last() -> None:
    scheduler = Scheduler(limits(max_blocks=6, max_sequences=3, max_tokens=64))  # 5 blocks of 4
    add(scheduler, "low", 4, new=16, priority=5)
    add(scheduler, "high", 4, new=12, priority=1)
    assert list(run(scheduler)[1]) == ["high", "low"]
    preempted = []
    while "high" in scheduler:
        run(scheduler)
        preempted += [s.request_id for s in scheduler._sequences.values() if s.row < 0]
    assert set(preempted) == {"low"}
    assert scheduler.preemptions == 1
    while "low" in scheduler:
        run(scheduler)


def test_preempted_sequence_catches_up_with_all_its_tokens() -> None:
    scheduler = Scheduler(limits(max_blocks=6, max_tokens=64, block_size=4))  # 20 tokens
    add(scheduler, "a", 7, new=12)
    b = add(scheduler, "b", 4, new=8)
    while not b.preemptions:
        run(scheduler)
    known = b.known
    assert known > b.prompt_length and b.computed == 0 and b.row == -1 and b.room == 0
    while b.row < 0:
        _, served = run(scheduler)
    assert served["b"] == known, "prompt and generated tokens are computed again"


def test_removed_sequences_give_everything_back_and_are_never_served() -> None:
    scheduler = Scheduler(limits(max_sequences=2, max_tokens=64))
    for name in "abcd":
        add(scheduler, name, 5)
    run(scheduler)
    assert scheduler.waiting == 2 and scheduler.remove("c") and scheduler.remove("a") and not scheduler.remove("a")
    assert list(run(scheduler)[1]) == ["b", "d"]
    scheduler.remove("b")
    scheduler.remove("d")
    assert scheduler.blocks.used_blocks == 0 and len(scheduler) == 0 and scheduler.schedule() is None
    assert not scheduler.rows.tables.any()


@pytest.mark.parametrize(("blocks", "left"), [(8, ["a", "b", "c", "d"]), (7, ["a", "b", "c"])])
def test_sequences_that_need_a_block_in_the_same_step_get_one_each_or_the_last_makes_room(blocks: int, left: list[str]) -> None:
    scheduler: Scheduler[Sequence] = Scheduler(limits(max_blocks=blocks + 1))
    for name in "abcd":
        add(scheduler, name, 1, new=30)
    for _ in range(4):
        run(scheduler)  # 4 known and computed tokens each, and one more
    assert scheduler.blocks.used_blocks == 4
    step, served = run(scheduler)
    assert list(served) == left and scheduler.preemptions == 4 - len(left)
    tables = step.batch.block_tables["full"]
    assert tables.tolist() == [scheduler.blocks.owned(sequence) for sequence in step.sequences]
    assert tables.shape == (len(left), 2)


def test_tokens_that_are_only_named_are_computed_ahead_and_settled_after() -> None:
    """Two steps are planned before the first one's tokens are there; the one that reaches its limit sits out."""
    scheduler: Scheduler[Sequence] = Scheduler(limits())
    a, b = add(scheduler, "a", 3, new=5), add(scheduler, "b", 2, new=1)
    first = scheduler.schedule()
    assert first is not None and first.last is not None and first.last.tolist() == [False, True]
    scheduler.rows.expect(first, scheduler.rows.sample(first))
    assert (a.known, a.generated, b.known) == (4, 0, 2)
    second = scheduler.schedule()
    assert second is not None and second.batch.token_ids.tolist() == [-1] and second.sequences == [a]
    scheduler.rows.expect(second, scheduler.rows.sample(second))
    scheduler.rows.settle(first, np.array([7, 8], np.int32))
    assert a.tokens.tolist() == [1, 2, 3, 7, -1] and b.tokens.tolist() == [1, 2, 8] and a.generated == 1
    scheduler.remove("b")
    scheduler.rows.settle(second, np.array([9], np.int32))
    assert a.tokens.tolist() == [1, 2, 3, 7, 9]
    third = scheduler.schedule()
    assert third is not None and third.batch.token_ids.tolist() == [9]
    assert scheduler.rows.sample(third).rows["counter"].tolist() == [2]


def test_fewer_rows_than_sequences_bound_what_runs() -> None:
    scheduler = Scheduler(limits(max_rows=2))
    for name in "abc":
        add(scheduler, name, 3)
    assert list(run(scheduler)[1]) == ["a", "b"]
    assert list(run(scheduler)[1]) == ["a", "b"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_schedule_keeps_its_promises(data: st.DataObject) -> None:
    """Arrivals and cancels at any time, tight limits: every step fits, serves someone, and the rest comes to an end."""
    bounds = EngineLimits(
        max_tokens=data.draw(st.integers(1, 12)),
        max_sequences=data.draw(st.integers(1, 6)),
        max_rows=data.draw(st.integers(1, 6)),
        max_context=24,
        max_blocks=data.draw(st.integers(3, 20)),
        block_size=data.draw(st.integers(1, 5)),
    )
    scheduler = Scheduler(bounds)
    alive: dict[str, Sequence] = {}
    actions = data.draw(st.lists(st.sampled_from(["come", "come", "step", "step", "step", "go"]), max_size=40))
    for index, action in enumerate([*actions, *["step"] * 2000]):
        if action == "come" and scheduler.max_length > 1:
            prompt = data.draw(st.integers(1, scheduler.max_length - 1))
            alive[str(index)] = add(scheduler, str(index), prompt, data.draw(st.integers(1, 9)), data.draw(st.integers(0, 2)))
        elif action == "go" and alive:
            name = data.draw(st.sampled_from(sorted(alive)))
            assert scheduler.remove(name)
            del alive[name]
        elif action == "step":
            step = scheduler.schedule()
            assert (step is None) == (not alive)
            if step is None:
                if index > len(actions):
                    break
                continue
            batch = step.batch
            assert 0 < len(batch.token_ids) <= bounds.max_tokens
            assert len(batch.kv_lengths) <= bounds.max_sequences and len(batch.logit_rows) <= bounds.max_rows
            for number, sequence in enumerate(step.sequences):
                table = batch.block_tables["full"][number]
                needed = -(-int(batch.kv_lengths[number]) // bounds.block_size)
                assert table[:needed].tolist() == scheduler.blocks.owned(sequence)[:needed]
                assert sequence.computed <= sequence.known <= sequence.limit
            for sequence in step.sampled:
                assert sequence.computed == sequence.known
                sequence.append(1)
                if sequence.known == sequence.limit:
                    scheduler.remove(sequence.request_id)
                    del alive[sequence.request_id]
            assert scheduler.running == sorted(scheduler.running, key=lambda s: s.key)
        assert scheduler.blocks.free_blocks + scheduler.blocks.used_blocks == scheduler.blocks.total_blocks
    assert not alive, "somebody was starved"
    assert scheduler.blocks.used_blocks == 0
