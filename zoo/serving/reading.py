"""From a checked body to what the engine takes: token ids, and one ``SamplingParams`` for each continuation."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from zoo.errors import RequestError
from zoo.runtime.request import SEEDS, SamplingParams
from zoo.serving.bodies import ChatBody, CompletionBody, Generation

Body = TypeVar("Body", bound=BaseModel)

# Fields that a body and SamplingParams share.
SHARED = (
    "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "include_stop_str_in_output", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens",
)  # fmt: skip


class FieldError(RequestError):
    """A request that cannot be served, and the field that is why."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field, self.code = field, code


def parse(kind: type[Body], data: bytes) -> Body:
    """A body of this kind; FieldError that names the first wrong field, what it is and what is allowed."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _said(kind, error) from None


def _said(kind: type[BaseModel], error: ValidationError) -> FieldError:
    """The most useful of pydantic's complaints: of a union, those about the member that came nearest."""
    errors = error.errors(include_url=False, include_context=False, include_input=True)
    extra = [one for one in errors if one["type"] == "extra_forbidden" and len(one["loc"]) == 1]
    if extra:
        names = ", ".join(str(one["loc"][0]) for one in extra)
        return FieldError(f"unknown fields: {names}; known are {', '.join(sorted(_names(kind)))}", str(extra[0]["loc"][0]))
    first = max(errors, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    if first["type"] == "json_invalid":
        return FieldError(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return FieldError("the body must be a JSON object")
    field = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return FieldError(f"{field} is missing", field)
    found = repr(first["input"])
    shown = found if len(found) <= 80 else found[:77] + "..."
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier())
    return FieldError(f"{where} is {shown}: {first['msg'][:1].lower()}{first['msg'][1:]}", field)


def _names(kind: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in kind.model_fields.items()]


def sampling(body: Generation, defaults: SamplingParams, max_tokens: int | None) -> SamplingParams:
    """The parameters of a body over the model's own defaults. FieldError for a value that does not fit beside the others."""
    values: dict[str, Any] = {name: value for name in SHARED if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        values["seed"] = body.seed % SEEDS  # OpenAI's seeds may be negative
    if body.logit_bias:
        values["logit_bias"] = _bias(body.logit_bias)
    values["max_tokens"] = max_tokens
    values["logprobs"] = _logprobs(body)
    try:
        return dataclasses.replace(defaults, n=1, **values)
    except FieldError:
        raise
    except RequestError as error:
        raise FieldError(str(error), next((name for name in values if str(error).startswith(name)), None)) from None


def _bias(given: dict[str, float]) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        if not token.isascii() or not token.isdigit() or len(token) > 10:
            raise FieldError(f"logit_bias has the key {token[:40]!r}; its keys are token ids", "logit_bias")
        bias[int(token)] = value
    return bias


def _logprobs(body: Generation) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs is not None and not body.logprobs:
        raise FieldError("top_logprobs needs logprobs: true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def max_tokens_of(body: ChatBody) -> int | None:
    """``max_completion_tokens``, or its older name; FieldError where both are given and differ."""
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise FieldError(f"max_completion_tokens is {new} and max_tokens is {old}; give one of them", "max_tokens")
    return old if new is None else new


def unsupported(body: Generation) -> None:
    """FieldError for what a body may say and this server does not do."""
    if isinstance(body, CompletionBody):
        if body.suffix:
            raise FieldError("suffix is not supported: this server continues prompts and fills no middles", "suffix")
        if body.best_of is not None and body.best_of < (body.n or 1):
            raise FieldError(f"best_of is {body.best_of}; it must be at least n, which is {body.n or 1}", "best_of")
        if body.stream and (body.best_of or 1) > (body.n or 1):
            raise FieldError("best_of over n cannot be streamed: all continuations must end before the best are known", "best_of")
    if body.stream_options is not None and not body.stream:
        raise FieldError("stream_options is only for stream: true", "stream_options")
    form = body.response_format
    if form is not None and form.type == "json_schema" and form.json_schema is None:
        raise FieldError("response_format of type json_schema needs json_schema", "response_format")
    if form is not None and form.type == "regex" and not form.pattern:
        raise FieldError("response_format of type regex needs pattern", "response_format")


def compact(data: Any) -> str:
    """JSON as it goes over the wire."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
