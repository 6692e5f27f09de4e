"""Choosing tokens; transformers' logits processors are the judge."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zoo.runtime.request import SamplingParams
from zoo.runtime.sampler import HEAD, Chooser, candidates, choose_all, log_probabilities, nucleus


def draw_logits(seed: int, size: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def judged(logits: np.ndarray, params: SamplingParams, prompt: list[int] | None = None) -> np.ndarray:
    """Probabilities after transformers' processors."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(MinPLogitsWarper(params.min_p))
    scores = chain(torch.tensor([prompt or [0]]), torch.from_numpy(logits.copy())[None])
    probabilities: np.ndarray = torch.softmax(scores[0].double(), -1).numpy()
    return probabilities


def ours(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, weights = candidates(logits, params)
    dense = np.zeros(len(logits))
    dense[ids] = weights
    return dense


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 200),
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, -1, 1, 2, 5, 50, 1000]),
    top_p=st.floats(0.01, 1),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
)
def test_filters_agree_with_transformers(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = draw_logits(seed, size)
    # Where a cumulative probability or a ratio falls on the threshold to rounding, either answer is right.
    only_k = ours(logits, SamplingParams(temperature=temperature, top_k=top_k))
    ordered = np.sort(only_k)[::-1]
    assume(np.abs(np.cumsum(ordered) - top_p).min() > 1e-5 or top_p == 1)
    assume(np.abs(ordered / ordered[0] - min_p).min() > 1e-5)
    np.testing.assert_allclose(ours(logits, params), judged(logits, params), rtol=0, atol=2e-6)


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_nucleus_of_a_large_vocabulary(top_p: float, scale: float) -> None:
    """Flat distributions need the full sort, peaked ones only the head."""
    logits = draw_logits(3, 20 * HEAD, scale)
    params = SamplingParams(temperature=0.8, top_p=top_p)
    kept, wanted = ours(logits, params) > 0, judged(logits, params) > 0
    assert abs(int(kept.sum()) - int(wanted.sum())) <= 1, "float32 and float64 sums may differ by one token"
    assert (kept != wanted).sum() <= 1


def test_nucleus_keeps_at_least_the_most_likely() -> None:
    assert nucleus(np.array([0.1, 0.6, 0.3]), 1e-9).tolist() == [1]


def test_nucleus_ends_where_the_probability_is_reached() -> None:
    """0.5 is reached by the first token alone, in transformers (cumulative from below, at most 1 - 0.5) as here."""
    assert nucleus(np.array([0.25, 0.5, 0.25]), 0.5).tolist() == [1]
    kept = TopPLogitsWarper(0.5)(torch.tensor([[0]]), torch.log(torch.tensor([[0.25, 0.5, 0.25]])))
    assert torch.isfinite(kept[0]).tolist() == [False, True, False]


def test_smallest_random_number_never_draws_a_forbidden_token() -> None:
    chooser = Chooser(SamplingParams(seed=1), [0], 3)
    chooser._random = SimpleNamespace(random=lambda: 0.0)  # type: ignore[assignment]
    assert chooser.choose(np.array([-np.inf, 0.5, 0.25], np.float32), 0) == 1


def test_top_k_keeps_ties_with_the_last() -> None:
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    params = SamplingParams(top_k=2)
    np.testing.assert_allclose(ours(logits, params), judged(logits, params), atol=1e-7)
    assert (ours(logits, params) > 0).sum() == 3


def test_forbidden_tokens_are_never_candidates_with_weight() -> None:
    logits = np.array([0.5, -np.inf, 0.25], np.float32)
    np.testing.assert_allclose(
        ours(logits, SamplingParams(temperature=0.7)), judged(logits, SamplingParams(temperature=0.7)), atol=1e-7
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 5), st.lists(st.integers(0, 29), min_size=1, max_size=20))
def test_repetition_penalty_agrees_with_transformers(seed: int, penalty: float, prompt: list[int]) -> None:
    logits = draw_logits(seed, 30)
    chooser = Chooser(SamplingParams(repetition_penalty=penalty, temperature=0.0), prompt, 30)
    known = list(prompt)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for step in range(4):
        row = np.roll(logits, step)
        expected = processor(torch.tensor([known]), torch.from_numpy(row.copy())[None])[0].numpy()
        np.testing.assert_array_equal(chooser._adjust(row, step), expected)
        known.append(chooser.choose(row, step))
        assert known[-1] == int(expected.argmax())


def test_presence_and_frequency_penalties_count_the_continuation_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, temperature=0.0)
    chooser = Chooser(params, [0, 0, 0], 3)
    logits = np.array([1.0, 0.9, -1.0], np.float32)
    assert [chooser.choose(logits, n) for n in range(6)] == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(chooser._adjust(logits, 6), [1 - 0.5 - 0.75, 0.9 - 0.5 - 0.75, -1.0], atol=1e-6)


def test_logit_bias_forces_and_forbids() -> None:
    logits = np.array([1.0, 0.9, -1.0], np.float32)
    assert Chooser(SamplingParams(temperature=0.0, logit_bias={2: 100}), [0], 3).choose(logits, 0) == 2
    assert Chooser(SamplingParams(temperature=0.0, logit_bias={0: -100}), [0], 3).choose(logits, 0) == 1


def test_min_tokens_keeps_end_tokens_out_and_can_leave_nothing() -> None:
    logits = np.array([5.0, 0.9], np.float32)
    chooser = Chooser(SamplingParams(temperature=0.0, min_tokens=2, max_tokens=4), [1], 2, end_tokens=[0, 77])
    assert [chooser.choose(logits, generated) for generated in range(4)] == [1, 1, 0, 0]
    nothing = Chooser(SamplingParams(temperature=0.0, min_tokens=1), [1], 2, end_tokens=[0, 1])
    chosen = choose_all(logits[None], [nothing], [0])
    assert "no token" in chosen.errors[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_damaged_rows_fail_alone(bad: float) -> None:
    logits = np.stack([draw_logits(seed, 40) for seed in range(4)])
    clean = choose_all(logits, [Chooser(SamplingParams(seed=n), [0], 40) for n in range(4)], [0] * 4)
    damaged = logits.copy()
    damaged[1] = bad
    damaged[2, 17] = bad
    damaged[3, 39] = -np.inf  # allowed: a token that cannot be
    with np.errstate(all="raise"):
        chosen = choose_all(damaged, [Chooser(SamplingParams(seed=n, logprobs=2), [0], 40) for n in range(4)], [0] * 4)
    failed = {1} if bad == -np.inf else {1, 2}
    assert set(chosen.errors) == failed
    assert str(bad) in chosen.errors[1]
    assert chosen.token_ids[0] == clean.token_ids[0]
    assert set(chosen.logprobs) == {0, 1, 2, 3} - failed


def test_draws_follow_the_distribution() -> None:
    """20,000 draws: a chi-squared statistic over 12 tokens (11 degrees of freedom) above 40 has a chance below 1e-4."""
    logits = draw_logits(5, 12, 1.0)
    params = SamplingParams(temperature=0.9, top_k=9, seed=11)
    expected = judged(logits, params)
    chooser = Chooser(params, [0], 12)
    counts = np.bincount([chooser.choose(logits, 0) for _ in range(20_000)], minlength=12)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    statistic = ((counts[likely] - 20_000 * expected[likely]) ** 2 / (20_000 * expected[likely])).sum()
    assert statistic < 40


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-5, 1e-3])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    logits = draw_logits(8, 100)
    with np.errstate(all="raise", under="ignore"):
        token = Chooser(SamplingParams(temperature=temperature, seed=1), [0], 100).choose(logits, 0)
    assert token == int(logits.argmax())


@pytest.mark.parametrize("count", [0, 1, 5, 60, 100])
def test_log_probabilities_agree_with_torch(count: int) -> None:
    logits = draw_logits(9, 60)
    chosen = 17
    found = log_probabilities(logits, count, chosen)
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    top = np.argsort(-wanted)[:count].tolist()
    assert list(found) == top + ([] if chosen in top else [chosen])
    assert all(abs(found[token] - wanted[token]) < 2e-6 for token in found)


def test_seeds_of_any_size() -> None:
    logits = draw_logits(1, 50)
    for seed in (0, 2**63, 2**64 - 1):
        tokens = {Chooser(SamplingParams(seed=seed), [0], 50).choose(logits, 0) for _ in range(3)}
        assert len(tokens) == 1
