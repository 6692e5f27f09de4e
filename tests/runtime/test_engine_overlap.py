"""The engine loop on a session that samples: planning ahead of the tokens changes none of them."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import tokenizers
from fake_session import END, FakeSampler, collect, drain, greedy, limits, params
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.runtime.abi import STEPS_AHEAD, EngineLimits, sampling_session
from zoo.runtime.detokenizer import Detokenizer
from zoo.runtime.engine import Engine
from zoo.runtime.request import CompletionOutput, SamplingParams
from zoo.runtime.sampling import Request, host_until, sampling_record

# What a device can do, and what the host does in its place.
DEVICE: list[dict[str, object]] = [
    {},
    {"ignore_eos": True},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.02},
    {"stop_token_ids": [7, 8, 9]},
]
HOST: list[dict[str, object]] = [
    {"logprobs": 2},
    {"min_tokens": 3},
    {"temperature": 0.9, "min_tokens": 2, "top_p": 0.9},
    {"repetition_penalty": 1.3},
    {"temperature": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {5: 3.0}, "logprobs": 0},
]


def engine_of(session: FakeSampler | None = None, ahead: int = STEPS_AHEAD, **changes: int) -> Engine:
    return Engine(session or FakeSampler(limits(**changes)), None, (END,), steps_ahead=ahead)


def some_prompt(rng: random.Random, longest: int = 20) -> list[int]:
    return [rng.randrange(2, 50) for _ in range(rng.randint(1, longest))]


def alone(prompt: list[int], wanted: SamplingParams, context: int = 64) -> CompletionOutput:
    """What a request gives by itself, a step after the other."""
    engine = engine_of(ahead=0, max_context=context)
    engine.add_request("x", prompt, wanted)
    return drain(engine)["x"]


@pytest.mark.parametrize(
    ("changes", "preempts"),
    [
        ({}, False),
        ({"max_tokens": 5}, False),
        ({"max_blocks": 20}, True),
        ({"max_blocks": 17, "max_tokens": 7}, True),
        ({"max_sequences": 64, "max_rows": 64, "max_tokens": 128, "max_blocks": 40}, True),
        ({"block_size": 1, "max_blocks": 70}, True),
        ({"max_sequences": 1}, False),
    ],
    ids=["roomy", "tiny budget", "few blocks", "both", "many", "single-token blocks", "one at a time"],
)
def test_sixty_four_requests_in_flight_give_what_each_gives_alone(changes: dict[str, int], preempts: bool) -> None:
    rng = random.Random(1)
    session = FakeSampler(limits(**changes))
    engine = engine_of(session)
    outputs: dict[str, CompletionOutput] = {}
    wanted: dict[str, list[int]] = {}
    for index in range(64):
        prompt, tokens = some_prompt(rng, 30), rng.randint(1, 30)
        engine.add_request(f"r{index}", prompt, params(max_tokens=tokens))
        wanted[f"r{index}"] = greedy(prompt, tokens)
        for _ in range(rng.choice([0, 0, 1, 3])):
            collect(engine, outputs)
    drain(engine, outputs)
    assert {name: output.token_ids for name, output in outputs.items()} == wanted
    for name, output in outputs.items():
        assert output.finish_reason == ("stop" if wanted[name][-1] == END else "length")
    assert (engine.scheduler.preemptions > 0) == preempts
    assert engine.scheduler.blocks.used_blocks == 0
    assert session.most_open == STEPS_AHEAD + 1, "nothing was planned ahead"


def some_params(rng: random.Random) -> SamplingParams:
    kind = rng.choice(DEVICE if rng.random() < 0.7 else HOST)
    return params(max_tokens=rng.randint(4, 12), seed=rng.randrange(2**64), **kind)


def some_limits(data: st.DataObject) -> EngineLimits:
    block_size = data.draw(st.integers(1, 6))
    return limits(
        max_tokens=data.draw(st.integers(1, 20)),
        max_sequences=data.draw(st.integers(1, 8)),
        max_context=32,
        block_size=block_size,
        max_blocks=1 + data.draw(st.integers(-(-32 // block_size), 60)),
    )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_arrivals_cancels_and_tight_limits_change_no_tokens(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    engine = engine_of(FakeSampler(some_limits(data)))
    outputs: dict[str, CompletionOutput] = {}
    wanted: dict[str, CompletionOutput] = {}
    cancelled: dict[str, int] = {}
    for index in range(data.draw(st.integers(1, 12))):
        prompt, name, sampling = some_prompt(rng), str(index), some_params(rng)
        engine.add_request(name, prompt, sampling, priority=rng.randint(0, 1))
        wanted[name] = alone(prompt, sampling, context=32)
        for _ in range(rng.randint(0, 4)):
            collect(engine, outputs)
        if rng.random() < 0.3:
            name = str(rng.randint(0, index))
            if engine.abort(name):
                cancelled[name] = len(outputs[name].token_ids) if name in outputs else 0
    drain(engine, outputs)
    for name, output in wanted.items():
        if name in cancelled:
            given_out = outputs[name].token_ids if name in outputs else []
            assert given_out == output.token_ids[: cancelled[name]], "a cancelled request gives nothing more"
        else:
            assert outputs[name] == output
    assert engine.scheduler.blocks.used_blocks == 0


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_failing_steps_end_their_requests_and_change_no_tokens_of_others(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    session = FakeSampler(some_limits(data))
    engine = engine_of(session)
    outputs: dict[str, CompletionOutput] = {}
    wanted: dict[str, CompletionOutput] = {}
    for index in range(data.draw(st.integers(1, 12))):
        prompt, sampling = some_prompt(rng), some_params(rng)
        engine.add_request(str(index), prompt, sampling)
        wanted[str(index)] = alone(prompt, sampling, context=32)
        for _ in range(rng.randint(0, 4)):
            if rng.random() < 0.2:
                session.fail_submit = RuntimeError("cannot start")
            if rng.random() < 0.2:
                session.fail_result = RuntimeError("cannot end")
            collect(engine, outputs)
    session.fail_submit = session.fail_result = None
    drain(engine, outputs)
    for name, output in wanted.items():
        if outputs[name].finish_reason == "error":
            tokens = outputs[name].token_ids
            assert tokens == output.token_ids[: len(tokens)]
            assert f"request '{name}' failed after {len(tokens)} tokens: the engine failed: cannot" in str(outputs[name].error)
        else:
            assert outputs[name] == output
    assert engine.scheduler.blocks.used_blocks == 0 and not engine.has_work


def test_steps_that_fail_to_start_let_the_step_before_end_first() -> None:
    session = FakeSampler(limits(max_sequences=2))
    engine = engine_of(session)
    for name in "abc":
        engine.add_request(name, [3, ord(name) % 50], params(max_tokens=6, ignore_eos=True))
    assert engine.step() == []
    session.fail_submit = RuntimeError("no memory")
    pieces = engine.step()
    assert [(piece.request_id, len(piece.token_ids), piece.finish_reason) for piece in pieces] == [
        ("a", 1, None),
        ("b", 1, None),
        ("a", 0, "error"),
        ("b", 0, "error"),
    ]
    assert pieces[2].error == "request 'a' failed after 1 tokens: the engine failed: no memory"
    outputs = drain(engine)
    assert list(outputs) == ["c"] and outputs["c"].token_ids == greedy([3, ord("c") % 50], 6, end=None)


@pytest.mark.parametrize("where", ["fail_submit", "fail_result"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), AssertionError("a bug")], ids=lambda error: type(error).__name__)
def test_interrupts_and_bugs_go_up(where: str, error: BaseException) -> None:
    session = FakeSampler(limits(max_tokens=4, max_sequences=2))
    engine = engine_of(session)
    outputs: dict[str, CompletionOutput] = {}
    engine.add_request("first", [3, 4], params(max_tokens=8, ignore_eos=True))
    for _ in range(3):
        collect(engine, outputs)
    engine.add_request("long", [5] * 20, params(max_tokens=5, ignore_eos=True))
    engine.add_request("later", [6, 7], params(max_tokens=5, ignore_eos=True))
    setattr(session, where, error)
    with pytest.raises(type(error)):
        engine.step()
    assert "first" not in engine.scheduler and "later" in engine.scheduler
    assert ("long" in engine.scheduler) == (where == "fail_result"), "the step that failed to end was planned before it came"
    drain(engine, outputs)
    assert outputs["later"].token_ids == greedy([6, 7], 5, end=None)
    if where == "fail_result":
        assert outputs["long"].token_ids == greedy([5] * 20, 5, end=None)
    assert engine.scheduler.blocks.used_blocks == 0


def test_interrupted_submit_leaves_no_name_of_a_token_to_a_sequence_that_was_preempted() -> None:
    session = FakeSampler(limits(max_blocks=6))  # 5 blocks of 4
    engine = engine_of(session)
    engine.add_request("grows", [3] * 7, params(max_tokens=9, ignore_eos=True))
    engine.add_request("makes room", [4] * 8, params(max_tokens=9, ignore_eos=True))
    outputs: dict[str, CompletionOutput] = {}
    for _ in range(2):
        collect(engine, outputs)
    session.fail_submit = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert "grows" not in engine.scheduler and engine.scheduler.preemptions == 1
    assert drain(engine, outputs)["makes room"].token_ids == greedy([4] * 8, 9, end=None)


def test_nan_fails_one_request_by_name_and_spares_the_others() -> None:
    session = FakeSampler(limits(max_blocks=20))
    session.poisoned = {9: 6}
    engine = engine_of(session)
    engine.add_request("sick", [9, 3, 4, 5], params(max_tokens=10, ignore_eos=True))
    others = {name: [int(name), 8, 9] for name in ("2", "3", "4")}
    for name, prompt in others.items():
        engine.add_request(name, prompt, params(max_tokens=25))
    outputs = drain(engine)
    assert outputs["sick"].token_ids == greedy([9, 3, 4, 5], 2, end=None)
    assert outputs["sick"].finish_reason == "error"
    assert str(outputs["sick"].error).startswith("request 'sick' failed after 2 tokens: the engine gave NaN logits")
    for name, prompt in others.items():
        assert outputs[name].token_ids == greedy(prompt, 25)
    assert engine.scheduler.blocks.used_blocks == 0


def test_ends_by_length_waste_no_step_and_others_one() -> None:
    free = greedy([3, 4], 12, end=None)
    for wanted, steps in (
        (params(max_tokens=5, ignore_eos=True), 5),
        (params(max_tokens=12, ignore_eos=True, stop_token_ids=[free[6]]), free.index(free[6]) + 2),
    ):
        session = FakeSampler(limits())
        engine = engine_of(session)
        engine.add_request("a", [3, 4], wanted)
        drain(engine)
        assert len(session.batches) + len(session.open) == steps


def test_rows_of_the_host_sit_out_and_do_not_hold_others_up() -> None:
    session = FakeSampler(limits())
    engine = engine_of(session)
    engine.add_request("host", [3, 4], params(max_tokens=6, ignore_eos=True, logprobs=1))
    engine.add_request("device", [5, 6], params(max_tokens=12, ignore_eos=True))
    outputs = drain(engine)
    assert outputs["host"].token_ids == greedy([3, 4], 6, end=None) and len(outputs["host"].logprobs or ()) == 6
    assert outputs["device"].token_ids == greedy([5, 6], 12, end=None)
    assert [len(batch.kv_lengths) for batch in session.batches] == [2, 1] * 6


def test_only_the_first_tokens_are_chosen_on_the_host_for_min_tokens() -> None:
    session = FakeSampler(limits())
    engine = engine_of(session)
    engine.add_request("a", [3, 4], params(max_tokens=8, min_tokens=2, stop_token_ids=[9], ignore_eos=True))
    hosted = []
    submit = session.submit
    session.submit = lambda batch, sampling=None: (hosted.append(len(sampling.host_rows)), submit(batch, sampling))[1]  # type: ignore[method-assign, misc, assignment, union-attr, func-returns-value]
    drain(engine)
    assert hosted == [1, 1, 0, 0, 0, 0, 0, 0]


def test_request_id_may_be_used_again_while_a_step_of_the_first_is_under_way() -> None:
    engine = engine_of()
    engine.add_request("a", [3, 4], params(max_tokens=9, ignore_eos=True))
    outputs: dict[str, CompletionOutput] = {}
    for _ in range(3):
        collect(engine, outputs)
    assert engine.abort("a")
    engine.add_request("a", [5, 6], params(max_tokens=9, ignore_eos=True))
    assert drain(engine)["a"].token_ids == greedy([5, 6], 9, end=None)


def test_stop_strings_end_where_they_end_without_planning_ahead() -> None:
    vocabulary = {f"<{index}>": index for index in range(50)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>"))
    free = greedy([3, 4], 20, end=None)
    stop = f"<{free[5]}> <{free[6]}>"
    texts = []
    for ahead in (0, STEPS_AHEAD):
        engine = Engine(FakeSampler(limits()), Detokenizer(tokenizer), (END,), steps_ahead=ahead)
        for name, prompt in (("a", [3, 4]), ("b", [6, 4])):
            engine.add_request(name, prompt, params(max_tokens=20, ignore_eos=True, stop=stop))
        outputs = drain(engine)
        assert outputs["a"].finish_reason == "stop" and outputs["a"].stop_reason == stop
        assert outputs["a"].token_ids == free[:7]
        texts.append((outputs["a"].text, outputs["b"].text))
    assert texts[0] == texts[1]


def test_without_planning_ahead_a_step_gives_its_pieces_at_once() -> None:
    session = FakeSampler(limits())
    engine = engine_of(session, ahead=0)
    engine.add_request("a", [3, 4], params(max_tokens=3, ignore_eos=True))
    assert [piece.token_ids for _ in range(3) for piece in engine.step()] == [[t] for t in greedy([3, 4], 3, end=None)]
    assert session.most_open == 1


def test_step_is_submit_and_result() -> None:
    engine = engine_of(ahead=0)
    engine.add_request("a", [3, 4], params())
    step = engine.scheduler.schedule()
    assert step is not None
    result = engine.session.step(step.batch)
    assert result.token_ids is None and result.logits is not None and result.logits.shape == (1, 50)


def test_close_drops_what_is_under_way() -> None:
    session = FakeSampler(limits())
    engine = engine_of(session)
    engine.add_request("a", [3], params())
    engine.step()
    engine.close()
    assert session.closed and not engine.has_work and engine.step() == []


def test_sessions_say_whether_they_sample() -> None:
    session = FakeSampler(limits())
    assert sampling_session(session) is session
    session.samples = False
    assert sampling_session(session) is None


def test_sampling_records() -> None:
    record = sampling_record(params(temperature=0.5, top_k=-1, top_p=0.9, min_p=0.1, seed=2**63 + 5))
    assert record["temperature"] == np.float32(0.5) and record["top_k"] == 0 and record["seed"].tolist() == [5, 2**31]
    assert record["top_p"] == np.float32(0.9) and record["min_p"] == np.float32(0.1) and not record["flags"]
    assert sampling_record(params(temperature=9e-6))["temperature"] == 0
    assert np.isfinite(sampling_record(params(temperature=1e300))["temperature"])
    assert sampling_record(params(top_k=2**40))["top_k"] == 2**31 - 1
    assert sampling_record(params())["seed"].tolist() != sampling_record(params())["seed"].tolist()


@pytest.mark.parametrize(
    ("values", "until"),
    [
        ({}, 0),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "stop_token_ids": [4]}, 0),
        ({"min_tokens": 2}, 0),
        ({"min_tokens": 2, "stop_token_ids": [4]}, 5),
        *(({name: value}, 9) for name, value in [("logprobs", 0), ("logit_bias", {3: 1.0}), ("repetition_penalty", 1.1)]),
        *(({name: 0.5}, 9) for name in ("presence_penalty", "frequency_penalty")),
    ],
)
def test_what_the_host_chooses(values: dict[str, object], until: int) -> None:
    request = Request("a", [3, 4, 5], params(**values), 9)
    request.end_tokens = frozenset(request.params.stop_token_ids or ())
    assert host_until(request) == until
    request.choose_by([3, 4, 5], 50, samples=True)
    assert (request.chooser is not None) == (until > 0)
    assert dataclasses.asdict(request.params) == dataclasses.asdict(params(**values))


def test_more_min_tokens_than_any_context_has_are_those_until_the_end() -> None:
    engine = engine_of(max_context=24)
    engine.add_request("long", [3, 4, 5], SamplingParams(temperature=0.0, max_tokens=None, min_tokens=2**40))
    engine.add_request("beside", [6, 7], params(max_tokens=4))
    outputs = drain(engine)
    assert len(outputs["long"].token_ids) == 21 and outputs["long"].finish_reason == "length"
    assert outputs["beside"].token_ids == alone([6, 7], params(max_tokens=4)).token_ids
