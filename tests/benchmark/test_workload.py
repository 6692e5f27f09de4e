"""Cases and arrivals."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.benchmark.workload import Case, parse_cases
from zoo.errors import RequestError


def test_cases_are_read() -> None:
    assert parse_cases("128/256/64, 1000/1000/32") == [Case(128, 256, 64), Case(1000, 1000, 32)]
    assert str(Case(128, 256, 64)) == "128/256/64"


@pytest.mark.parametrize("text", ["", "128/128", "128/128/1/1", "128/x/1", "-1/2/3", "1/2/3,", "1.5/2/3", "²/2/3"])
def test_what_is_no_case_is_quoted(text: str) -> None:
    with pytest.raises(RequestError, match=r"give input tokens/output tokens/requests, such as 128/128/64"):
        parse_cases(text)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ((0, 1, 1), "input_tokens is 0; give at least 1"),
        ((1, 1, 0), "requests is 0; give at least 1"),
        ((1, 1, 1, -1.0), "rate is -1.0"),
        ((1, 1, 1, float("nan")), "rate is nan"),
        ((1, 1, 1, float("inf")), "rate is inf"),
        ((1, 1, 1, 0.0, -1), "seed is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(case: tuple[float, ...], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Case(*case)  # type: ignore[arg-type]


def test_prompts_are_those_of_the_seed() -> None:
    prompts = Case(7, 1, 5).prompts(50)
    assert [len(prompt) for prompt in prompts] == [7] * 5
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert prompts == Case(7, 1, 5).prompts(50) != Case(7, 1, 5, seed=1).prompts(50)


def test_without_a_rate_all_come_at_once() -> None:
    assert Case(1, 1, 3).arrivals().tolist() == [0, 0, 0]


def test_arrivals_are_a_poisson_process() -> None:
    due = Case(1, 1, 20_001, rate=50.0).arrivals()
    gaps = np.diff(due)
    assert due[0] == 0 and (gaps > 0).all()
    # of exponential gaps mean and deviation are equal; 20,000 of them tell both to about 1 %
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05) and gaps.std() == pytest.approx(1 / 50, rel=0.05)
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.05)
    assert (due == Case(9, 9, 20_001, rate=50.0).arrivals()).all(), "the seed alone decides them"
