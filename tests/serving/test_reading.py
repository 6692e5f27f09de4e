"""Bodies become parameters, or an error that names the field, what it is and what is allowed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from zoo.runtime.request import SamplingParams, unfold
from zoo.serving.bodies import ChatBody, CompletionBody
from zoo.serving.reading import FieldError, max_tokens_of, parse, sampling, unsupported


def completion(**fields: Any) -> CompletionBody:
    return parse(CompletionBody, json.dumps({"prompt": "x", **fields}).encode())


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode())


def test_fields_become_parameters_over_the_models_defaults() -> None:
    body = completion(temperature=0, top_k=5, stop=["a", "b"], seed=-1, logit_bias={"7": -100}, logprobs=3, presence_penalty=1)
    params = sampling(body, SamplingParams(temperature=0.7, top_p=0.5), 9)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0, 0.5, 5, 9)
    assert params.stop == ["a", "b"] and params.logit_bias == {7: -100} and params.logprobs == 3
    assert params.seed == 2**64 - 1 and [one.seed for one in unfold(params, 2)] == [2**64 - 1, 0]
    assert sampling(chat(logprobs=True, top_logprobs=4), SamplingParams(), None).logprobs == 4
    assert max_tokens_of(chat(max_completion_tokens=5)) == 5 and max_tokens_of(chat()) is None


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"temperature": "0"}, "temperature", "temperature is '0'"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": True}, "max_tokens", "max_tokens is True"),
        ({"max_tokens": 1.5}, "max_tokens", "1.5"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"stop": ["x"] * 65}, "stop", "64"),
        ({"prompt": [["a"], [1]]}, "prompt", "prompt"),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"prompt": None}, "prompt", "None"),
        ({"temprature": 1}, "temprature", "known are"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"n": 0}, "n", "n is 0"),
        ({"min_tokens": 20}, "min_tokens", "at most max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"n": 2, "best_of": 1}, "best_of", "at least n"),
        ({"stream": True, "best_of": 2}, "best_of", "streamed"),
        ({"response_format": {"type": "yaml"}}, "response_format", "yaml"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(FieldError) as error:
        body = completion(**fields)
        unsupported(body)
        sampling(body, SamplingParams(), 16)
    assert error.value.field == field and words in str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"temperature": 1}', "prompt is missing"),
    ],
)
def test_bodies_that_are_no_bodies(data: bytes, words: str) -> None:
    with pytest.raises(FieldError) as error:
        parse(CompletionBody, data)
    assert words in str(error.value)
