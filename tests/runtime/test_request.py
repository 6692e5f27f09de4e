"""What SamplingParams accept, and what they say when they do not."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from zoo.errors import RequestError
from zoo.runtime.request import CompletionOutput, RequestOutput, SamplingParams

BAD: list[tuple[str, object, str]] = [
    ("n", 0, "at least 1"),
    ("n", True, "whole number"),
    ("n", 1025, "at most 1024"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", -5, "at least 1"),
    ("max_tokens", 1.5, "whole number"),
    ("min_tokens", -1, "at least 0"),
    ("temperature", -0.1, "at least 0"),
    ("temperature", math.inf, "finite"),
    ("temperature", math.nan, "finite"),
    ("temperature", "hot", "finite number"),
    ("top_k", -2, "0 or -1"),
    ("top_k", 1.0, "whole number"),
    ("top_p", 0.0, "above 0"),
    ("top_p", 1.01, "at most 1"),
    ("min_p", -0.1, "between 0 and 1"),
    ("min_p", 2, "between 0 and 1"),
    ("seed", 1.5, "whole number"),
    ("seed", -1, "at least 0 and below 2**64"),
    ("seed", 2**64, "at least 0 and below 2**64"),
    ("repetition_penalty", 0.0, "between 0.01 and 100"),
    ("repetition_penalty", 5e-324, "between 0.01 and 100"),
    ("repetition_penalty", 1e39, "between 0.01 and 100"),
    ("presence_penalty", 2.1, "between -2 and 2"),
    ("frequency_penalty", -3, "between -2 and 2"),
    ("logprobs", -1, "at least 0"),
    ("logprobs", True, "whole number"),
    ("logit_bias", [3], "dict"),
    ("logit_bias", {"a": 1.0}, "token id in logit_bias"),
    ("logit_bias", {3: 101}, "between -100 and 100"),
    ("stop", "", "1 to 1024 characters"),
    ("stop", ["ok", ""], "1 to 1024 characters"),
    ("stop", ["x" * 2000], "1 to 1024 characters"),
    ("stop", [3], "strings"),
    ("stop", ["x"] * 65, "at most 64"),
    ("stop", 3, "must be a list"),
    ("stop_token_ids", 3, "must be a list"),
    ("stop_token_ids", [-1], "at least 0"),
    ("stop_token_ids", ["</s>"], "whole number"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD, ids=lambda value: str(value)[:20])
def test_wrong_values_are_refused_by_name(field: str, value: object, allowed: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert field in str(caught.value) and allowed in str(caught.value)


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(RequestError, match="min_tokens is 9; it must be at most max_tokens, which is 8"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


def test_edges_are_accepted() -> None:
    SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=1, max_tokens=None, min_tokens=5, seed=2**64 - 1, logprobs=0)
    SamplingParams(seed=0, repetition_penalty=0.01)
    SamplingParams(stop="x", stop_token_ids=[0], logit_bias={0: -100.0, 5: 100}, repetition_penalty=0.5, n=4, max_tokens=1)


def test_numbers_larger_than_any_float_are_refused() -> None:
    with pytest.raises(RequestError, match="temperature is 1000"):
        SamplingParams(temperature=10**400)


def test_copies_are_checked() -> None:
    with pytest.raises(RequestError, match="max_tokens is 0"):
        dataclasses.replace(SamplingParams(), max_tokens=0)


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.n) == (16, 1.0, 1.0, 0, 1)
    assert params.stop_strings == [] and SamplingParams(stop="a").stop_strings == ["a"]


def test_a_request_is_finished_when_all_its_continuations_are() -> None:
    one, two = CompletionOutput(0, finish_reason="stop"), CompletionOutput(1)
    output = RequestOutput("0", "hi", [1], [one, two])
    assert not output.finished
    two.finish_reason = "length"
    assert output.finished


def test_numpy_integers_are_whole_numbers_too() -> None:
    assert SamplingParams(max_tokens=np.int64(3)).max_tokens == 3  # type: ignore[arg-type]
