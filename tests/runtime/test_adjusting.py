"""Requests with penalties, logit_bias and min_tokens, adjusted by the session: the tokens that the host's sampler gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_adjusting import AdjustingSampler
from fake_session import END, FakeSampler, collect, drain, greedy, limits, params
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.plugins.adjusting import cuda
from zoo.runtime import adjusting
from zoo.runtime.abi import STEPS_AHEAD, EngineLimits
from zoo.runtime.adjusting import HEADER, LISTED, adjustment_of
from zoo.runtime.engine import Engine
from zoo.runtime.request import CompletionOutput, SamplingParams

ADJUSTED: list[dict[str, object]] = [
    {"repetition_penalty": 1.6},
    {"presence_penalty": 0.9},
    {"frequency_penalty": 0.7, "ignore_eos": True},
    {"frequency_penalty": -0.6, "min_tokens": 3},
    {"logit_bias": {5: 3.0, END: -2.5, 17: 1.5}},
    {"min_tokens": 4},
    {"min_tokens": 2, "stop_token_ids": [7, 8, 9], "logit_bias": {7: 4.0}},
    {"repetition_penalty": 0.7, "presence_penalty": -0.4, "frequency_penalty": 0.3, "logit_bias": {3: 1.0}, "min_tokens": 5},
]
OTHERS: list[dict[str, object]] = [{}, {"ignore_eos": True}, {"logprobs": 1, "repetition_penalty": 1.4}, {"logprobs": 0}]


def engine_of(session: FakeSampler, ahead: int = STEPS_AHEAD) -> Engine:
    return Engine(session, None, (END,), steps_ahead=ahead)


def some_prompt(rng: random.Random, longest: int = 20) -> list[int]:
    return [rng.randrange(2, 50) for _ in range(rng.randint(1, longest))]


def on_host(prompt: list[int], wanted: SamplingParams, context: int = 64) -> CompletionOutput:
    """What a request gives by itself, its tokens chosen by ``zoo.runtime.sampler``."""
    engine = engine_of(FakeSampler(limits(max_context=context)), ahead=0)
    engine.add_request("x", prompt, wanted)
    return drain(engine)["x"]


def by_itself(prompt: list[int], wanted: SamplingParams, context: int = 64) -> CompletionOutput:
    """What it gives by itself, adjusted by the session: for tokens that are drawn, which the host draws otherwise."""
    engine = engine_of(AdjustingSampler(limits(max_context=context)), ahead=0)
    engine.add_request("x", prompt, wanted)
    return drain(engine)["x"]


@pytest.mark.parametrize("values", ADJUSTED, ids=lambda values: ",".join(values))
def test_greedy_tokens_are_the_hosts_and_no_step_waits_for_them(values: dict[str, object]) -> None:
    wanted = params(max_tokens=14, **values)
    for seed in range(6):
        session = AdjustingSampler(limits())
        engine = engine_of(session)
        prompt = some_prompt(random.Random(seed))
        engine.add_request("a", prompt, wanted)
        output = drain(engine)["a"]
        assert output == on_host(prompt, wanted)
        assert len(session.batches) + len(session.open) == len(output.token_ids) + (output.finish_reason == "stop")
        assert session.most_open == min(STEPS_AHEAD + 1, len(output.token_ids))
    plain = [greedy(some_prompt(random.Random(seed)), 14) for seed in range(6)]
    assert any(on_host(some_prompt(random.Random(seed)), wanted).token_ids != plain[seed] for seed in range(6)), "no effect"


def some_limits(data: st.DataObject) -> EngineLimits:
    block_size = data.draw(st.integers(1, 6))
    return limits(
        max_tokens=data.draw(st.integers(1, 20)),
        max_sequences=data.draw(st.integers(1, 8)),
        max_context=32,
        block_size=block_size,
        max_blocks=1 + data.draw(st.integers(-(-32 // block_size), 60)),
    )


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_arrivals_cancels_preemption_and_failing_steps_change_no_tokens(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    session = AdjustingSampler(some_limits(data), room=data.draw(st.sampled_from([0, 1, 2, 100])))
    engine = engine_of(session)
    outputs: dict[str, CompletionOutput] = {}
    wanted: dict[str, CompletionOutput] = {}
    cancelled: dict[str, int] = {}
    trouble = rng.random() < 0.3
    for index in range(data.draw(st.integers(1, 12))):
        prompt, name = some_prompt(rng), str(index)
        kind = rng.choice(ADJUSTED if rng.random() < 0.7 else OTHERS)
        sampling = params(max_tokens=rng.randint(5, 14), **kind)
        engine.add_request(name, prompt, sampling, priority=rng.randint(0, 1))
        wanted[name] = on_host(prompt, sampling, context=32)
        for _ in range(rng.randint(0, 4)):
            if trouble and rng.random() < 0.2:
                session.fail_submit = RuntimeError("cannot start")
            if trouble and rng.random() < 0.2:
                session.fail_result = RuntimeError("cannot end")
            collect(engine, outputs)
        if rng.random() < 0.3 and engine.abort(name := str(rng.randint(0, index))):
            cancelled[name] = len(outputs[name].token_ids) if name in outputs else 0
    session.fail_submit = session.fail_result = None
    drain(engine, outputs)
    for name, output in wanted.items():
        given_out = outputs[name].token_ids if name in outputs else []
        if name in cancelled:
            assert given_out == output.token_ids[: cancelled[name]], "a cancelled request gives nothing more"
        elif outputs[name].finish_reason == "error":
            assert "cannot" in str(outputs[name].error) and given_out == output.token_ids[: len(given_out)]
        else:
            assert outputs[name] == output
    assert not engine.scheduler.rows.adjusts and not engine._adjusted, "a slot was not given back"


def test_a_sequence_that_starts_over_counts_again_from_nothing() -> None:
    rng, session = random.Random(5), AdjustingSampler(limits(max_blocks=20))
    engine = engine_of(session)
    requests = {f"r{index}": (some_prompt(rng, 12), params(max_tokens=30, **ADJUSTED[index % 4])) for index in range(10)}
    for name, (prompt, wanted) in requests.items():
        engine.add_request(name, prompt, wanted)
    outputs = drain(engine)
    assert engine.scheduler.preemptions > 2
    for name, (prompt, wanted) in requests.items():
        assert outputs[name] == on_host(prompt, wanted)


def test_seed_and_counter_decide_drawn_tokens_whoever_is_beside() -> None:
    rng, engine = random.Random(6), engine_of(AdjustingSampler(limits(max_blocks=24)))
    requests = {}
    for index in range(12):
        kind = {"temperature": 0.8, "top_k": 12, "seed": rng.randrange(2**64), **ADJUSTED[index % len(ADJUSTED)]}
        requests[str(index)] = (some_prompt(rng), params(max_tokens=12, **kind))
    outputs: dict[str, CompletionOutput] = {}
    for name, (prompt, wanted) in requests.items():
        engine.add_request(name, prompt, wanted)
        collect(engine, outputs)
    drain(engine, outputs)
    for name, (prompt, wanted) in requests.items():
        assert outputs[name] == by_itself(prompt, wanted)


def test_requests_beyond_the_slots_are_the_hosts() -> None:
    session = AdjustingSampler(limits(), room=2)
    engine = engine_of(session)
    prompts = {name: [3, 4, ord(name) % 50] for name in "abcd"}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params(max_tokens=9, ignore_eos=True, repetition_penalty=1.5))
    assert session.asked == 3, "the fourth is asked for, too, but two have slots"
    outputs = drain(engine)
    for name, prompt in prompts.items():
        assert outputs[name] == on_host(prompt, params(max_tokens=9, ignore_eos=True, repetition_penalty=1.5))
    engine.add_request("later", [3, 4], params(repetition_penalty=1.5))
    assert "later" in engine._adjusted


def test_no_more_slots_are_asked_for_than_run_at_once() -> None:
    session = AdjustingSampler(limits(max_sequences=3))
    engine = engine_of(session)
    for index in range(9):
        engine.add_request(str(index), [3, 4 + index], params(max_tokens=4, presence_penalty=1.0, ignore_eos=True))
    assert session.asked == 3
    assert all(len(output.token_ids) == 4 for output in drain(engine).values())


def test_steps_do_what_their_rows_need() -> None:
    """A long prompt with a penalty is counted in chunks; a ban is over after min_tokens; nothing is left when both are gone."""
    session = AdjustingSampler(limits(max_tokens=8))
    engine = engine_of(session)
    engine.add_request("plain", [5, 6], params(max_tokens=13, ignore_eos=True))
    engine.add_request("bans", [3, 4], params(max_tokens=10, min_tokens=2, ignore_eos=True, stop_token_ids=[49]))
    engine.add_request("counts", [7] * 20, params(max_tokens=2, ignore_eos=True, presence_penalty=0.5))
    outputs = drain(engine)
    assert [len(outputs[name].token_ids) for name in ("plain", "bans", "counts")] == [13, 10, 2]
    chunks = [(True, True, False)] * 2 + [(True, False, False)]  # 4, 6 and 6 tokens of the long prompt
    assert session.kinds == [*chunks, *[(True, False, True)] * 2, *[(False, False, False)] * 8]


def test_rows_that_no_token_is_left_to_say_so() -> None:
    engine = engine_of(AdjustingSampler(limits(), vocab_size=4))
    engine.add_request("a", [1, 2], params(max_tokens=4, min_tokens=2, stop_token_ids=[0, 1, 2, 3]))
    engine.add_request("b", [1, 3], params(max_tokens=4, presence_penalty=0.1, ignore_eos=True))
    outputs = drain(engine)
    assert outputs["a"].finish_reason == "error"
    assert "min_tokens and logit_bias leave no token to choose" in str(outputs["a"].error)
    assert len(outputs["b"].token_ids) == 4


def test_nan_is_an_error_though_its_token_is_banned() -> None:
    session = AdjustingSampler(limits())
    session.poisoned = {9: 3}  # logit 7
    engine = engine_of(session)
    engine.add_request("a", [9, 3], params(max_tokens=6, min_tokens=6, stop_token_ids=[7]))
    output = drain(engine)["a"]
    assert len(output.token_ids) == 1 and output.finish_reason == "error" and "NaN" in str(output.error)


def test_the_layout_of_a_slot_is_the_kernels() -> None:
    assert (cuda.HEADER, cuda.LISTED, cuda.IN_PROMPT) == (HEADER, LISTED, adjusting.IN_PROMPT)
    assert adjusting.counts_at() == cuda.COUNTS and cuda.COUNTS % 4 == 0
    for vocab in (5, 50257, 128256):
        words = adjusting.slot_words(vocab)
        assert words % 64 == 0 and cuda.COUNTS + vocab <= words < cuda.COUNTS + vocab + 64


def test_words_of_a_request() -> None:
    wanted = params(
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=-0.3, min_tokens=2, logit_bias={9: 0.1, 4: -100}
    )
    found = adjustment_of(wanted, 7, 20, {9, 30, 77}, 50)
    assert found is not None and found.counts and found.listed_until == 20
    floats = found.words.view(np.float32)
    np.testing.assert_array_equal(floats[:3], np.array([1.1, 0.2, -0.3], np.float32))
    assert found.words[3:6].tolist() == [7, 2, 3]
    assert found.words[HEADER::2].tolist() == [4, 9 - 2**31, 30 - 2**31]
    np.testing.assert_array_equal(floats[HEADER + 1 :: 2], np.array([-100, 0.1, 0], np.float32))


def test_how_long_lists_matter() -> None:
    def until(limit: int = 20, **values: object) -> int:
        found = adjustment_of(params(max_tokens=None, **values), 7, limit, {3}, 50)
        assert found is not None
        return found.listed_until

    assert until(presence_penalty=1.0) == 0 and until(logit_bias={3: 1.0}) == 20
    assert until(min_tokens=4) == 11 and until(min_tokens=2**40) == 20 and until(min_tokens=4, logit_bias={1: 1.0}) == 20
    found = adjustment_of(params(max_tokens=None, min_tokens=2**40), 7, 20, {3}, 50)
    assert found is not None and found.words[4] == 2**31 - 1


def test_lists_that_no_slot_holds_are_the_hosts() -> None:
    session = AdjustingSampler(limits(), vocab_size=2000)
    engine = engine_of(session)
    bias = dict.fromkeys(range(LISTED), 0.5)
    engine.add_request("fits", [3, 4], params(max_tokens=3, logit_bias=bias, ignore_eos=True))
    engine.add_request("beyond", [3, 4], params(max_tokens=3, logit_bias=bias | {LISTED: 0.5}, ignore_eos=True))
    assert engine._adjusted == {"fits"}
    outputs = drain(engine)
    assert len(outputs["fits"].token_ids) == len(outputs["beyond"].token_ids) == 3
