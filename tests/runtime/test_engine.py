"""The engine loop on a fake session: whatever else is in the batch, a request gives the tokens it gives alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_session import END, FakeSession, collect, drain, fake_logits, greedy, limits, params
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import RequestError
from zoo.runtime.abi import Batch, StepResult
from zoo.runtime.engine import Engine
from zoo.runtime.request import CompletionOutput, SamplingParams


def engine_of(session: FakeSession | None = None, **changes: int) -> Engine:
    return Engine(session or FakeSession(limits(**changes)), None, (END,))


def some_prompt(rng: random.Random, longest: int = 30) -> list[int]:
    return [rng.randrange(2, 50) for _ in range(rng.randint(1, longest))]


@pytest.mark.parametrize(
    ("changes", "preempts"),
    [
        ({}, False),
        ({"max_tokens": 5}, False),
        ({"max_blocks": 20}, True),
        ({"max_blocks": 17, "max_tokens": 7, "block_size": 4}, True),
        ({"max_sequences": 64, "max_rows": 64, "max_tokens": 128, "max_blocks": 40}, True),
        ({"block_size": 1, "max_blocks": 70}, True),
        ({"max_sequences": 1}, False),
    ],
    ids=["roomy", "tiny budget", "few blocks", "both", "many", "single-token blocks", "one at a time"],
)
def test_sixty_four_requests_in_flight_give_what_each_gives_alone(changes: dict[str, int], preempts: bool) -> None:
    rng = random.Random(1)
    session = FakeSession(limits(**changes))
    engine = engine_of(session)
    outputs: dict[str, CompletionOutput] = {}
    wanted: dict[str, list[int]] = {}
    for index in range(64):
        prompt, tokens = some_prompt(rng), rng.randint(1, 30)
        name = f"r{index}"
        engine.add_request(name, prompt, params(max_tokens=tokens))
        wanted[name] = greedy(prompt, tokens)
        for _ in range(rng.choice([0, 0, 1, 3])):  # it joins while others run
            collect(engine, outputs)
    drain(engine, outputs)
    assert {name: output.token_ids for name, output in outputs.items()} == wanted
    for name, output in outputs.items():
        ended = wanted[name][-1] == END
        assert output.finish_reason == ("stop" if ended else "length") and output.stop_reason is None
    assert (engine.scheduler.preemptions > 0) == preempts
    assert engine.scheduler.blocks.used_blocks == 0
    # some step continued a prompt in the middle
    chunked = any(
        (batch.positions[batch.query_starts[:-1]][np.diff(batch.query_starts) > 1] > 0).any() for batch in session.batches
    )
    assert chunked or changes.get("max_tokens", 64) > 7, "the cases with a small budget must have computed prompts in chunks"


def test_alone_is_what_the_engine_gives_for_one_request() -> None:
    """Ties the helper that knows no engine to the engine."""
    engine = engine_of()
    engine.add_request("a", [3, 4, 5], params(max_tokens=20, ignore_eos=True))
    assert drain(engine)["a"].token_ids == greedy([3, 4, 5], 20, end=None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_arrivals_cancels_and_tight_limits_change_no_tokens(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    block_size = data.draw(st.integers(1, 6))
    bounds = limits(
        max_tokens=data.draw(st.integers(1, 20)),
        max_sequences=data.draw(st.integers(1, 8)),
        max_context=32,
        block_size=block_size,
        max_blocks=1 + data.draw(st.integers(-(-32 // block_size), 60)),
    )
    engine = engine_of(FakeSession(bounds))
    outputs: dict[str, CompletionOutput] = {}
    wanted: dict[str, list[int]] = {}
    cancelled: dict[str, int] = {}
    for index in range(data.draw(st.integers(1, 12))):
        prompt, tokens = some_prompt(rng, 20), rng.randint(1, 12)
        engine.add_request(str(index), prompt, params(max_tokens=tokens), priority=rng.randint(0, 1))
        wanted[str(index)] = greedy(prompt, tokens)
        for _ in range(rng.randint(0, 4)):
            collect(engine, outputs)
        if rng.random() < 0.3:
            name = str(rng.randint(0, index))
            if engine.abort(name):
                cancelled[name] = len(outputs[name].token_ids) if name in outputs else 0
    drain(engine, outputs)
    for name, tokens in wanted.items():
        given_out = outputs[name].token_ids if name in outputs else []
        if name in cancelled:
            assert given_out == tokens[: cancelled[name]], "a cancelled request gives nothing more"
        else:
            assert given_out == tokens
    assert engine.scheduler.blocks.used_blocks == 0


def test_seeded_sampling_is_the_same_alone_in_a_crowd_and_after_preemption() -> None:
    rng = random.Random(2)
    wild = [
        params(temperature=1.5, seed=index, max_tokens=20, top_p=0.9, ignore_eos=True, repetition_penalty=1.2)
        for index in range(12)
    ]
    prompts = [some_prompt(rng) for _ in wild]
    alone = []
    for prompt, wanted in zip(prompts, wild, strict=True):
        engine = engine_of()
        engine.add_request("x", prompt, wanted)
        alone.append(drain(engine)["x"].token_ids)
    crowd = engine_of(max_blocks=20, max_tokens=9)
    for index, (prompt, wanted) in enumerate(zip(prompts, wild, strict=True)):
        crowd.add_request(str(index), prompt, wanted)
    together = drain(crowd)
    assert crowd.scheduler.preemptions > 0
    assert [together[str(index)].token_ids for index in range(len(wild))] == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_unseeded_sampling_differs() -> None:
    engine = engine_of()
    for name in "ab":
        engine.add_request(name, [3, 4], params(temperature=1.0, max_tokens=30, ignore_eos=True))
    outputs = drain(engine)
    assert outputs["a"].token_ids != outputs["b"].token_ids


def test_nan_fails_one_request_by_name_and_spares_the_others() -> None:
    session = FakeSession(limits(max_blocks=20))
    session.poisoned = {9: 6}
    engine = engine_of(session)
    engine.add_request("sick", [9, 3, 4, 5], params(max_tokens=10, ignore_eos=True))
    others = {name: [int(name), 8, 9] for name in ("2", "3", "4")}
    for name, prompt in others.items():
        engine.add_request(name, prompt, params(max_tokens=25))
    outputs = drain(engine)
    assert outputs["sick"].token_ids == greedy([9, 3, 4, 5], 2, end=None)
    assert outputs["sick"].finish_reason == "error"
    assert "'sick' failed after 2 tokens" in str(outputs["sick"].error) and "nan" in str(outputs["sick"].error)
    for name, prompt in others.items():
        assert outputs[name].token_ids == greedy(prompt, 25)
    assert engine.scheduler.blocks.used_blocks == 0


def test_failing_step_ends_its_requests_and_keeps_the_others() -> None:
    session = FakeSession(limits(max_sequences=1))
    engine = engine_of(session)
    engine.add_request("first", [3, 4], params(max_tokens=5, ignore_eos=True))
    engine.add_request("second", [5, 6], params(max_tokens=5, ignore_eos=True))
    engine.step()
    session.fail_next = RuntimeError("out of luck")
    [piece] = engine.step()
    assert (piece.request_id, piece.token_ids, piece.finish_reason) == ("first", [], "error")
    assert piece.error == "request 'first' failed after 1 tokens: the engine failed: out of luck"
    assert engine.scheduler.blocks.used_blocks == 0
    outputs = drain(engine)
    assert list(outputs) == ["second"] and outputs["second"].token_ids == greedy([5, 6], 5, end=None)


def test_an_engine_that_always_fails_comes_to_an_end() -> None:
    class Broken(FakeSession):
        def step(self, batch: Batch) -> StepResult:
            raise RuntimeError("no luck at all")

    engine = engine_of(Broken(limits(max_sequences=2)))
    for index in range(7):
        engine.add_request(f"r{index}", [3, 4 + index], params(max_tokens=5))
    outputs = drain(engine, steps=7)
    assert len(outputs) == 7 and {output.finish_reason for output in outputs.values()} == {"error"}
    assert engine.scheduler.blocks.used_blocks == 0 and not engine.has_work


@pytest.mark.parametrize("error", [KeyboardInterrupt(), AssertionError("a bug")], ids=lambda error: type(error).__name__)
def test_interrupts_and_bugs_go_up(error: BaseException) -> None:
    session = FakeSession(limits(max_sequences=1))
    engine = engine_of(session)
    engine.add_request("first", [3, 4], params(max_tokens=5))
    engine.add_request("second", [5, 6], params(max_tokens=5, ignore_eos=True))
    session.fail_next = error  # type: ignore[assignment]
    with pytest.raises(type(error)):
        engine.step()
    assert "first" not in engine.scheduler and engine.scheduler.blocks.used_blocks == 0
    assert drain(engine)["second"].token_ids == greedy([5, 6], 5, end=None)


def test_stop_tokens_end_tokens_and_min_tokens() -> None:
    free = greedy([3, 4], 30, end=None)
    engine = engine_of()
    engine.add_request("stop", [3, 4], params(max_tokens=30, stop_token_ids=[free[4]], ignore_eos=True))
    engine.add_request("min", [3, 4], params(max_tokens=30, stop_token_ids=[free[0]], min_tokens=3, ignore_eos=True))
    outputs = drain(engine)
    first = free.index(free[4])
    assert outputs["stop"].token_ids == free[: first + 1] and outputs["stop"].stop_reason == free[4]
    assert outputs["stop"].finish_reason == "stop"
    assert free[0] not in outputs["min"].token_ids[:3] and len(outputs["min"].token_ids) >= 3


def test_several_end_tokens_and_ignore_eos() -> None:
    free = greedy([3, 4], 12, end=None)
    ends = (free[5], free[8])
    for ignore in (False, True):
        engine = Engine(FakeSession(limits()), None, ends)
        engine.add_request("a", [3, 4], params(max_tokens=12, ignore_eos=ignore))
        output = drain(engine)["a"]
        if ignore:
            assert (output.token_ids, output.finish_reason) == (free, "length")
        else:
            assert output.token_ids == free[: min(map(free.index, ends)) + 1]
            assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_continuation_ends_at_the_context() -> None:
    engine = engine_of(max_context=20)
    engine.add_request("a", [3] * 15, params(max_tokens=None, ignore_eos=True))
    engine.add_request("b", [4] * 19, params(max_tokens=100, ignore_eos=True))
    outputs = drain(engine)
    assert len(outputs["a"].token_ids) == 5 and len(outputs["b"].token_ids) == 1
    assert outputs["a"].finish_reason == outputs["b"].finish_reason == "length"


def test_prompt_that_can_never_fit_is_refused() -> None:
    engine = engine_of(max_context=20)
    with pytest.raises(RequestError, match=r"prompt has 20 tokens.*20 tokens of one sequence.*at most 19.*max_context"):
        engine.add_request("a", [3] * 20, params())
    small = engine_of(max_context=64, max_blocks=4)  # 12 tokens
    with pytest.raises(RequestError, match="prompt has 12 tokens"):
        small.add_request("a", [3] * 12, params())
    small.add_request("b", [3] * 11, params(ignore_eos=True))
    assert len(drain(small)["b"].token_ids) == 1


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        ([], {}, "prompt is empty"),
        ([3, 50], {}, "prompt has token id 50; the model's ids are 0 to 49"),
        ([-1], {}, "prompt has token id -1"),
        ([3], {"stop": "x"}, "stop needs a tokenizer"),
        ([3], {"stop_token_ids": [50]}, "stop_token_ids has token id 50"),
        ([3], {"logit_bias": {99: 1.0}}, "logit_bias has token id 99"),
    ],
)
def test_bad_requests_are_refused_at_admission(prompt: list[int], values: dict[str, object], message: str) -> None:
    engine = engine_of()
    with pytest.raises(RequestError, match=message):
        engine.add_request("a", prompt, params(**values))
    assert not engine.has_work


def test_parameters_changed_after_the_fact_are_checked_again() -> None:
    changed = params()
    changed.max_tokens = 0
    with pytest.raises(RequestError, match="max_tokens is 0"):
        engine_of().add_request("a", [3], changed)


def test_request_ids_are_unique_while_in_use() -> None:
    engine = engine_of()
    engine.add_request("a", [3], params(max_tokens=1))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request("a", [3], params())
    drain(engine)
    engine.add_request("a", [3], params(max_tokens=1))


def test_logprobs_are_of_the_raw_distribution() -> None:
    engine = engine_of()
    shaped = SamplingParams(temperature=0.3, top_k=2, seed=3, logprobs=3, max_tokens=6, ignore_eos=True, presence_penalty=1.5)
    engine.add_request("a", [3, 4], shaped)
    engine.add_request("b", [3, 4], params(max_tokens=6, ignore_eos=True))
    outputs = drain(engine)
    known = [3, 4]
    for token, entry in zip(outputs["a"].token_ids, outputs["a"].logprobs or [], strict=True):
        raw = fake_logits(known, 50).astype(np.float64)
        raw -= np.log(np.exp(raw).sum())
        expected = {*np.argsort(-raw)[:3].tolist(), token}
        assert set(entry) == expected
        assert all(abs(entry[t] - raw[t]) < 1e-5 for t in entry)
        known.append(token)
    assert outputs["b"].logprobs is None


def test_session_that_samples_itself() -> None:
    class Sampling(FakeSession):
        def step(self, batch: Batch) -> StepResult:
            result = super().step(batch)
            assert result.logits is not None
            return StepResult(token_ids=result.logits.argmax(axis=1).astype(np.int32))

    engine = engine_of(Sampling(limits()))
    engine.add_request("a", [3, 4], params(max_tokens=9))
    assert drain(engine)["a"].token_ids == greedy([3, 4], 9)


def test_close_closes_the_session() -> None:
    session = FakeSession(limits())
    engine = engine_of(session)
    engine.add_request("a", [3], params())
    engine.close()
    assert session.closed and not engine.has_work
