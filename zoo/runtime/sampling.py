"""Who chooses a request's tokens: a session that samples, or the host from the row's logits, and what comes of both.

A session knows temperature, top_k, top_p and min_p (``zoo.runtime.abi.SAMPLING``). Logprobs and grammars are ``sampler.py``'s;
so are logit_bias, penalties, and end tokens that are banned until ``min_tokens``, where the session has no slot for a request
(``zoo.runtime.adjusting``). One step may do both, row by row. Who chooses is settled when a request comes, and stays.

R rows, H rows chosen on the host, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from zoo.runtime.abi import SAMPLING, Sampling, StepResult
from zoo.runtime.adjusting import adjustment_of, penalizes
from zoo.runtime.detokenizer import TextStream
from zoo.runtime.grammar import Walk
from zoo.runtime.request import SamplingParams
from zoo.runtime.rows import Step
from zoo.runtime.sampler import GREEDY, Chooser, Chosen, choose_all
from zoo.runtime.sequence import Sequence
from zoo.runtime.stops import StopMatcher

LARGEST = float(np.finfo(np.float32).max)


class Request(Sequence):
    """A sequence with what turns its tokens into an answer.

    chooser     chooses its tokens on the host; None if the session always does
    text        None without a tokenizer
    stops       None without stop strings
    end_tokens  that stop it
    """

    __slots__ = ("chooser", "end_tokens", "stops", "text")

    chooser: Chooser | None
    text: TextStream | None
    stops: StopMatcher | None
    end_tokens: frozenset[int]

    def choose_by(
        self,
        prompt: Items[int],
        vocab_size: int,
        samples: bool,
        reserve: Callable[[], bool] = lambda: False,
        walk: Walk | None = None,
    ) -> None:
        """Settle who chooses its tokens: the session, if it ``samples`` and knows how, or else the host.

        reserve   whether the session has a slot for it, asked if it takes one
        walk      the request's way through its grammar, if it has one
        """
        if samples:
            self.sampling = sampling_record(self.params)
            self.host_until = host_until(self)
            if self.host_until and self.params.logprobs is None and walk is None:
                found = adjustment_of(self.params, self.prompt_length, self.limit, self.end_tokens, vocab_size)
                if found is not None and reserve():
                    self.adjustment, self.host_until = found, 0
        hosted = not samples or self.host_until > 0
        self.chooser = Chooser(self.params, prompt, vocab_size, self.end_tokens, walk) if hosted else None


def sampling_record(params: SamplingParams) -> npt.NDArray[np.void]:
    """A request's ``SAMPLING`` record, of shape []. Without a seed it gets one that nobody knows."""
    seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else int(params.seed)
    record = np.zeros((), SAMPLING)
    record["temperature"] = min(params.temperature, LARGEST) if params.temperature >= GREEDY else 0
    record["top_k"] = min(max(params.top_k, 0), 2**31 - 1)
    record["top_p"] = params.top_p
    record["min_p"] = params.min_p
    record["seed"] = seed & 0xFFFFFFFF, seed >> 32
    return record


def host_until(request: Request) -> int:
    """While a request knows fewer tokens than this, the host chooses the next: 0 never, its limit always."""
    params = request.params
    if params.logprobs is not None or params.logit_bias or params.grammar is not None or penalizes(params):
        return request.limit
    banned = params.min_tokens and request.end_tokens
    return min(request.limit, request.prompt_length + params.min_tokens) if banned else 0


def choose(step: Step[Request], sampling: Sampling | None, result: StepResult) -> Chosen:
    """The next token of every row of a step. ``sampling`` is what the session was asked for; None: logits of all rows."""
    if result.token_ids is None:
        return _on_host(step, range(len(step.sampled)), result)
    chosen = Chosen(result.token_ids.tolist())
    if result.token_ids.min(initial=0) < 0:
        for row in np.flatnonzero(result.token_ids < 0).tolist():
            chosen.errors[row] = "the engine gave NaN logits, or none that are finite; its weights or its cache are damaged"
            if step.sampled[row].adjustment is not None and step.counters[row] < step.sampled[row].params.min_tokens:
                chosen.errors[row] = "min_tokens and logit_bias leave no token to choose, or the engine gave NaN logits"
    if sampling is not None and len(sampling.host_rows):
        rows = sampling.host_rows.tolist()
        apart = _on_host(step, rows, result)
        for row, token in zip(rows, apart.token_ids, strict=True):
            chosen.token_ids[row] = token
            chosen.errors.pop(row, None)
        chosen.errors |= {rows[index]: reason for index, reason in apart.errors.items()}
        chosen.logprobs = {rows[index]: found for index, found in apart.logprobs.items()}
    return chosen


def _on_host(step: Step[Request], rows: Items[int], result: StepResult) -> Chosen:
    """Tokens from logits, a row of them for each of ``rows``."""
    assert result.logits is not None and len(result.logits) == len(rows), "a step gives logits or tokens"
    counters = step.counters.tolist()
    choosers = [chooser for row in rows if (chooser := step.sampled[row].chooser) is not None]
    return choose_all(result.logits, choosers, [counters[row] for row in rows])
