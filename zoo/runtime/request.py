"""What a user asks for and gets back. Names and meanings are those of vLLM's LLM API.

``SamplingParams`` says how to choose tokens and when to stop. ``RequestOutput`` holds what one prompt gave,
``CompletionOutput`` one of its ``n`` continuations. ``Piece`` is what a stream yields.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zoo.errors import RequestError
from zoo.runtime.grammar import Grammar

INTEGERS = (int, np.integer)
NUMBERS = (*INTEGERS, float, np.floating)
MAX_N = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters of one stop string
SEEDS = 2**64


def _number(name: str, value: Any, low: float, high: float, what: str) -> None:
    number = isinstance(value, NUMBERS) and not isinstance(value, bool)
    if not number or not low <= value <= min(high, sys.float_info.max):  # an int may be larger than any float
        raise RequestError(f"{name} is {value!r}; it must be {what}")


def _integer(name: str, value: Any, low: int, what: str, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, INTEGERS) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; it must be {what}")


@dataclass(kw_only=True)
class SamplingParams:
    """How to continue a prompt. Every field is checked when the object is made and again when a request is added.

    n                      continuations of each prompt; with a seed, continuation i uses seed + i (modulo 2**64)
    max_tokens             at most so many new tokens, at least 1 (0 is an error); None: up to the engine's context
    min_tokens             no end token, stop token or stop string before so many tokens
    temperature            0 (below 1e-5) is greedy, the most likely token; else logits are divided by it
    top_k                  keep the k most likely tokens (ties with the last of them too); 0 or -1: all
    top_p                  then keep the smallest set of most likely tokens whose probability reaches top_p (nucleus sampling,
                           Holtzman et al. 2019)
    min_p                  then drop tokens less likely than min_p times the most likely one (Nguyen et al. 2024)
    seed                   0 to 2**64 - 1: same seed, same tokens, whatever else is in the batch; None: different each time
    repetition_penalty     logits of tokens in the prompt or the continuation are divided by it where positive and multiplied
                           where negative (Keskar et al. 2019); 0.01 to 100, 1: none
    presence_penalty       subtracted once from the logit of a token that the continuation has
    frequency_penalty      subtracted as often as the continuation has the token
    logit_bias             token id -> number added to its logit
    stop                   strings that end the continuation; the text ends before them. Where several would match, the one
                           completed first counts, and of those the longest
    stop_token_ids         tokens that end the continuation, beside the model's own end tokens
    include_stop_str_in_output   keep the stop string, or the text of the stop token, in the text
    ignore_eos             go on after the model's end tokens
    logprobs               None: none. k: for each token a dict {token id: log-probability} of the k most likely tokens and the
                           chosen one (k + 1 entries when it is not among them). They are of the model's raw distribution:
                           before temperature, penalties, bias and filters
    prompt_logprobs        the same for each token of the prompt but the first, which has none
    skip_special_tokens    leave special tokens out of the text
    grammar                what the whole answer must be: a ``zoo.runtime.grammar.Grammar``

    Raises RequestError that names the field, what was found and what is allowed.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise RequestError for a field out of its range. The fields may have been set since the object was made."""
        _integer("n", self.n, 1, f"a whole number of at least 1 and at most {MAX_N}")
        if self.n > MAX_N:
            raise RequestError(f"n is {self.n}; it must be at most {MAX_N}")
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, "a whole number of at least 1, or None for as many as fit")
        _integer("min_tokens", self.min_tokens, 0, "a whole number of at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is {self.max_tokens}")
        _number("temperature", self.temperature, 0, math.inf, "a finite number of at least 0 (0 is greedy)")
        _integer("top_k", self.top_k, -1, "a whole number of at least 1, or 0 or -1 for all tokens")
        _number("top_p", self.top_p, math.ulp(0.0), 1, "above 0 and at most 1")
        _number("min_p", self.min_p, 0, 1, "between 0 and 1")
        if self.seed is not None:
            _integer("seed", self.seed, 0, "a whole number of at least 0 and below 2**64, or None", SEEDS - 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100, "between 0.01 and 100 (1 is none)")
        _number("presence_penalty", self.presence_penalty, -2, 2, "between -2 and 2")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "between -2 and 2")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, "a whole number of at least 0, or None")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar is {self.grammar!r}; it must be a Grammar")
        if self.grammar is not None and self.ignore_eos:
            raise RequestError("ignore_eos does not go with a grammar, which says where the answer ends; leave one of them out")
        self._check_stops()
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError(f"logit_bias is {self.logit_bias!r}; it must be a dict of token id to number")
            for token, bias in self.logit_bias.items():
                _integer("a token id in logit_bias", token, 0, "a whole number of at least 0")
                _number(f"logit_bias[{token}]", bias, -100, 100, "between -100 and 100")

    def _check_stops(self) -> None:
        for name in ("stop", "stop_token_ids"):
            if not isinstance(getattr(self, name), list | tuple | set | frozenset | str | None):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be a list")
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in stops:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                shown = text if not isinstance(text, str) or len(text) < 40 else text[:40] + "..."
                raise RequestError(f"stop has {shown!r}; stops must be strings of 1 to {MAX_STOP_LENGTH} characters")
        for token in self.stop_token_ids or ():
            _integer("a token id in stop_token_ids", token, 0, "a whole number of at least 0")

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


def unfold(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Parameters of each of ``count`` continuations, one each; with a seed, continuation i has seed + i."""
    seeds = [None if params.seed is None else (int(params.seed) + index) % SEEDS for index in range(count)]
    return [dataclasses.replace(params, n=1, seed=seed) for seed in seeds]


@dataclass
class CompletionOutput:
    """One continuation.

    index               which of the ``n``
    text                without the stop string and without the text of the token that stopped it
    token_ids           every new token, the one that stopped it included
    logprobs            one {token id: log-probability} a token, if asked for
    cumulative_logprob  sum over the chosen tokens, if asked for
    finish_reason       "stop": end token, stop token or stop string; "length": max_tokens or the engine's context;
                        "error": this request failed, others went on; None: not finished
    stop_reason         the stop string, or the id from stop_token_ids; None for the model's own end token
    error               why it failed, when finish_reason is "error"
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    def finished(self) -> bool:
        """Whether it ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """What one prompt gave. ``prompt`` is None when token ids were given; ``outputs`` has ``n`` entries."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        """Whether every continuation ended."""
        return all(output.finished() for output in self.outputs)


@dataclass(slots=True)
class Piece:
    """What one step added to one request: text that is complete so far (it may be empty) and the new tokens.

    ``finish_reason``, ``stop_reason`` and ``error`` are as in ``CompletionOutput``; they come with the last piece.
    ``prompt_logprobs`` come with the first one.
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last piece."""
        return self.finish_reason is not None
