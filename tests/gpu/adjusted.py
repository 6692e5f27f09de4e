"""Requests with penalties, logit_bias and min_tokens through a ``cuda`` session, each token judged by the host's sampler.

The engine loop runs them a step at a time. Each step runs twice: as it is, and again for its logits, which are the same bits and
from which ``zoo.runtime.sampler`` says what the token is to be. Then they run as requests do, captured and overlapped, and are to
give the same tokens: all of them start at once and end by length, so that both ways make the same steps. Needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.runtime.abi import STEPS_AHEAD, Batch, Sampling, StepResult
from zoo.runtime.engine import Engine
from zoo.runtime.request import SamplingParams
from zoo.runtime.rows import Step
from zoo.runtime.sampler import Chooser, candidates
from zoo.runtime.sampling import Request
from zoo.runtime.sessions.cuda import CudaSession

END = 3
KINDS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.8, "presence_penalty": 0.5},
    {"presence_penalty": 1.5, "frequency_penalty": 0.9},
    {"frequency_penalty": -0.8},
    {"logit_bias": {5: 6.0, 9: -100.0, 17: 4.0}},
    {"stop_token_ids": list(range(END, END + 40))},  # banned all the time
    {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "logit_bias": {8: 3.0}, "stop_token_ids": [END]},
    {"repetition_penalty": 1.4, "temperature": 0.8, "seed": 11},
    {"frequency_penalty": 0.6, "temperature": 1.1, "top_k": 30, "top_p": 0.9, "seed": 12},
    {},
)


class Judge:
    """Between an engine and its session. ``problems``: tokens that the sampler would not have chosen."""

    samples = True

    def __init__(self, session: CudaSession) -> None:
        self.session, self.limits, self.vocab_size = session, session.limits, session.vocab_size
        self.rope_tables = session.rope_tables
        self.step_at_hand: Step[Request] | None = None
        self.choosers: dict[str, Chooser] = {}
        self.problems: list[str] = []
        self.judged = 0

    def watch(self, engine: Engine) -> None:
        """Learn which requests a step's rows belong to."""
        rows = engine.scheduler.rows
        sample = rows.sample

        def watched(step: Step[Request]) -> Sampling:
            self.step_at_hand = step
            return sample(step)

        rows.sample = watched  # type: ignore[method-assign]

    def reserve(self, slots: int) -> bool:
        assert self.session.reserve(slots), "no room for slots"
        return True

    def submit(self, batch: Batch, sampling: Sampling | None = None) -> Done:
        step = self.step_at_hand
        assert sampling is not None and step is not None and step.batch is batch and not len(sampling.host_rows)
        found = self.session.submit(batch, sampling).result().token_ids
        assert found is not None
        found = found.copy()
        logits = self.session.step(batch).logits
        assert logits is not None or not len(found)
        for row, (request, token) in enumerate(zip(step.sampled, found.tolist(), strict=True)):
            assert logits is not None
            self._judge(request, token, logits[row], int(step.counters[row]))
        return Done(StepResult(token_ids=found))

    def _judge(self, request: Request, token: int, logits: np.ndarray, counter: int) -> None:
        params = request.params
        if request.request_id not in self.choosers:
            greedy = dataclasses.replace(params, temperature=0.0)
            prompt = request.tokens[: request.prompt_length].tolist()
            self.choosers[request.request_id] = Chooser(greedy, prompt, self.vocab_size, request.end_tokens)
        chooser = self.choosers[request.request_id]
        scores = chooser._adjust(logits, counter)
        nearly = dataclasses.replace(params, top_p=min(1.0, params.top_p + 1e-4))
        fitting = [int(scores.argmax())] if not params.temperature else candidates(scores, nearly)[0].tolist()
        if params.temperature:  # the device keeps all tokens that are as likely as the last one
            fitting = np.flatnonzero(scores >= scores[fitting].min()).tolist()
        self.judged += 1
        if token not in fitting:
            self.problems.append(f"{request.request_id}: token {counter} is {token}, by the sampler {fitting[:4]}")
        only = np.full(len(logits), -1e9, np.float32)
        only[max(token, 0)] = 1e9
        chooser.choose(only, counter)

    def step(self, batch: Batch) -> StepResult:
        raise AssertionError("an engine submits")

    def close(self) -> None:
        pass


@dataclasses.dataclass
class Done:
    """The ticket of a step that is over."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


def generate(session: Any, prompts: Sequence[Sequence[int]], tokens: int, ahead: int, first: int = 0) -> list[list[int]]:
    """New tokens of every prompt, all started at once, with one kind after the other from the ``first`` on."""
    engine = Engine(session, steps_ahead=ahead)
    if isinstance(session, Judge):
        session.watch(engine)
    assert len(prompts) <= engine.scheduler.capacity
    for place, prompt in enumerate(prompts):
        kind = {"temperature": 0.0, **KINDS[(first + place) % len(KINDS)]}
        engine.add_request(str(place), prompt, SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, **kind))
    found: dict[str, list[int]] = {str(place): [] for place in range(len(prompts))}
    while engine.has_work:
        for piece in engine.step():
            assert piece.error is None, piece.error
            found[piece.request_id] += piece.token_ids
    return list(found.values())


def check_adjusted(session: CudaSession, prompts: Sequence[Sequence[int]], tokens: int, first: int = 0) -> tuple[int, list[str]]:
    """How many tokens were judged, and what is wrong. Each prompt is continued by ``tokens`` tokens."""
    judge = Judge(session)
    alone, together = generate(judge, prompts, tokens, 0, first), generate(session, prompts, tokens, STEPS_AHEAD, first)
    problems = judge.problems
    for place, (one, other) in enumerate(zip(alone, together, strict=True)):
        if one != other:
            at = next(at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
            problems.append(f"{place}: overlapped steps give {other[at : at + 3]}, not {one[at : at + 3]}, from token {at} on")
    return judge.judged, problems
