"""Answers that follow a grammar: response_format's JSON and regular expressions."""

from __future__ import annotations

import dataclasses
import json

from zoo.runtime.grammar import Grammar
from zoo.runtime.request import SamplingParams
from zoo.serving.bodies import ResponseFormat
from zoo.serving.reading import FieldError


def constrain(params: SamplingParams, form: ResponseFormat | None) -> SamplingParams:
    """Parameters whose answers follow ``form``. FieldError for a form that cannot be followed."""
    if form is None or form.type == "text":
        return params
    if params.ignore_eos:
        raise FieldError("ignore_eos does not go with response_format, which says where the answer ends", "ignore_eos")
    if form.type == "regex":
        grammar = Grammar("regex", form.pattern or "")
    elif form.type == "json_schema" and form.json_schema is not None:
        grammar = Grammar("json_schema", json.dumps(form.json_schema.schema_))
    else:
        grammar = Grammar("json")
    return dataclasses.replace(params, grammar=grammar)
