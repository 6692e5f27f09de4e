"""From logits to tokens. One row at a time is a function of that row and its request alone, so batch mates change nothing.

The order is logit_bias and min_tokens, penalties, temperature, top_k, top_p, min_p, draw. Up to the penalties it is vLLM's;
from there on it is that of transformers' logits processors, which are the judge. Log-probabilities are of the raw logits.

R rows, V tokens of vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from zoo.runtime.abi import Float32
from zoo.runtime.grammar import Walk
from zoo.runtime.request import SamplingParams

Ids = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
GREEDY = 1e-5  # a temperature below this is greedy
HEAD = 1024  # sort so many of the most likely tokens first: they nearly always hold the whole nucleus


def log_probabilities(logits: Float32, count: int, chosen: int) -> dict[int, float]:
    """Log-probabilities of the ``count`` most likely tokens, most likely first, and of the chosen one. logits: [V]."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    count = min(count, len(logits))
    top = np.argpartition(logits, len(logits) - count)[len(logits) - count :] if count else np.empty(0, np.int64)
    top = top[np.argsort(-logits[top], kind="stable")]
    found = {int(token): float(logits[token]) - total for token in top}
    return found | {chosen: float(logits[chosen]) - total}


def nucleus(probabilities: Float64, top_p: float) -> Ids:
    """Indices of the smallest set of most likely candidates whose probabilities reach ``top_p``; at least one. [C] -> [<=C]"""
    order: Ids = np.empty(0, np.int64)
    if len(probabilities) > 4 * HEAD:
        order = np.argpartition(probabilities, len(probabilities) - HEAD)[len(probabilities) - HEAD :]
    if not len(order) or probabilities[order].sum() < top_p:
        order = np.arange(len(probabilities))
    order = order[np.argsort(-probabilities[order], kind="stable")]
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return order[before < top_p]


def candidates(scores: Float32, params: SamplingParams) -> tuple[Ids, Float64]:
    """Tokens that may be drawn, by rising id, and their probabilities after temperature and filters. [V] -> [C], [C]"""
    with np.errstate(over="ignore"):  # to -inf, probability 0
        scaled = (scores - scores.max()) / np.float32(params.temperature)
    if 0 < params.top_k < len(scaled):
        kth = np.partition(scaled, len(scaled) - params.top_k)[len(scaled) - params.top_k]
        ids = np.flatnonzero(scaled >= kth)
    else:
        ids = np.arange(len(scaled))
    weights = np.exp(scaled[ids], dtype=np.float64)
    weights /= weights.sum()
    if params.top_p < 1:
        kept = np.sort(nucleus(weights, params.top_p))
        ids, weights = ids[kept], weights[kept]
    if params.min_p > 0:
        likely = weights >= params.min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    return ids, weights / weights.sum()


class Chooser:
    """One continuation's way of choosing tokens: its parameters, its random generator, the tokens it has used.

    ``end_tokens`` are the ids that stop it; they are kept out until ``min_tokens``. ``vocab_size`` is V. ``walk``: its way
    through a grammar. ``problem`` says why ``choose`` gave -1.
    """

    __slots__ = ("_ban", "_bias", "_counts", "_random", "_seen", "_walk", "params", "plain", "problem")

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        end_tokens: Iterable[int] = (),
        walk: Walk | None = None,
    ) -> None:
        self.params, self._walk = params, walk
        self.problem = "min_tokens, logit_bias and the grammar leave no token to choose"
        self._ban = np.array([t for t in end_tokens if t < vocab_size], np.int64) if params.min_tokens else np.empty(0, np.int64)
        self._bias: tuple[Ids, Float32] | None = None
        if params.logit_bias:
            self._bias = (np.array([*params.logit_bias], np.int64), np.array([*params.logit_bias.values()], np.float32))
        self._seen: npt.NDArray[np.bool_] | None = None
        if params.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[np.asarray(prompt, np.int64)] = True
        self._counts: Float32 | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.float32)
        seed = None if params.seed is None else int(params.seed)
        self._random = np.random.Generator(np.random.PCG64(seed)) if params.temperature >= GREEDY else None
        # Nothing but the row's largest logit decides.
        adjusted = bool(params.min_tokens) or any(x is not None for x in (self._bias, self._seen, self._counts, walk))
        self.plain = self._random is None and not adjusted and params.logprobs is None

    def _adjust(self, logits: Float32, generated: int) -> Float32:
        params = self.params
        scores = logits.copy()
        if self._bias is not None:
            scores[self._bias[0]] += self._bias[1]
        if generated < params.min_tokens:
            scores[self._ban] = -np.inf
        if self._seen is not None:
            used = scores[self._seen]
            penalty = np.float32(params.repetition_penalty)
            scores[self._seen] = np.where(used < 0, used * penalty, used / penalty)
        if self._counts is not None:
            scores -= np.float32(params.frequency_penalty) * self._counts
            scores -= np.float32(params.presence_penalty) * (self._counts > 0)
        return scores

    def choose(self, logits: Float32, generated: int) -> int:
        """The next token after ``generated`` new ones, from finite-peaked logits [V]; -1 if none is allowed."""
        scores = self._adjust(logits, generated)
        if self._walk is not None:
            self._walk.mask(scores)
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            return -1
        if self._random is not None:
            ids, weights = candidates(scores, self.params)
            at = np.searchsorted(np.cumsum(weights), self._random.random(), side="right")
            best = int(ids[min(int(at), len(ids) - 1)])
        if self._seen is not None:
            self._seen[best] = True
        if self._counts is not None:
            self._counts[best] += 1
        if self._walk is not None and (problem := self._walk.take(best)):
            self.problem, best = problem, -1
        return best


@dataclass(slots=True)
class Chosen:
    """What a step's rows gave: a token each, log-probabilities of the rows that want them, reasons of rows that failed."""

    token_ids: list[int]
    logprobs: dict[int, dict[int, float]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def choose_all(logits: Float32, choosers: Sequence[Chooser], generated: Sequence[int]) -> Chosen:
    """The next token of every row. logits: [R, V]; R choosers; how many new tokens each has so far.

    A row whose largest logit is not a finite number (NaN anywhere counts as largest) fails alone, with the reason.
    """
    best = logits.argmax(axis=1)  # the first NaN, if there is one
    sound = np.isfinite(logits[np.arange(len(best)), best])
    chosen = Chosen(best.tolist())
    for row in np.flatnonzero(~sound).tolist():
        value = logits[row, best[row]]
        chosen.errors[row] = f"the engine gave {value} among the logits; its weights or its cache are damaged"
    for row, chooser in enumerate(choosers):
        if chooser.plain or row in chosen.errors:
            continue
        token = chosen.token_ids[row] = chooser.choose(logits[row], generated[row])
        if token < 0:
            chosen.errors[row] = chooser.problem
        elif chooser.params.logprobs is not None:
            chosen.logprobs[row] = log_probabilities(logits[row], chooser.params.logprobs, token)
    return chosen
