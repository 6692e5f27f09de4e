"""Answers that follow a grammar: response_format's JSON and regular expressions."""

from __future__ import annotations

from zoo.runtime.request import SamplingParams
from zoo.serving.bodies import ResponseFormat
from zoo.serving.reading import FieldError


def constrain(params: SamplingParams, form: ResponseFormat | None) -> SamplingParams:
    """Parameters whose answers follow ``form``. FieldError for a form that cannot be followed."""
    if form is None or form.type == "text":
        return params
    raise FieldError(f"response_format of type {form.type} is not supported by this engine", "response_format")
