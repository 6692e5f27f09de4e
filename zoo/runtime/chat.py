"""Chat templates: messages to a prompt, as transformers' ``apply_chat_template`` does it, without transformers.

A template is a program that came with a checkpoint. It runs in Jinja's immutable sandbox and sees plain JSON data only.
Its source and the number of loop steps that Jinja's ``range`` allows are limited; its running time is not: a service that
loads checkpoints it does not trust renders in a process of its own.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from zoo.errors import RequestError

MAX_TEMPLATE = 1 << 20  # characters
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message's reasoning travels


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what the model writes; for a prompt it is just its contents."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads a plain set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _fail(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _plain(value: Any) -> Any:
    """JSON data rebuilt from plain types, so that the template sees no methods but theirs."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise RequestError(f"chat messages hold a {type(value).__name__}; they must be made of strings, numbers, lists and dicts")


class ChatTemplate:
    """One compiled template. ``special_tokens`` (bos_token, eos_token, ...) are variables in it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise RequestError(f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE} are read")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _fail
        environment.globals["strftime_now"] = _now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template is not valid Jinja: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for these messages (each a dict with role and content).

        ``add_generation_prompt`` opens the assistant's turn. ``tools`` are JSON schemas. Other ``variables`` are handed to the
        template. The prompt holds the special tokens: encode it with ``add_special_tokens=False``. Raises RequestError for
        messages that are not messages and for what the template itself refuses.
        """
        if not messages:
            raise RequestError("the chat has no messages: give at least one")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"chat message {index} is {message!r}; it must be a dict with a role and a content")
        try:
            return self._template.render(
                messages=[_with_reasoning(_plain(message)) for message in messages],
                tools=None if tools is None else _plain(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **_plain(variables)},
            )
        except RequestError:
            raise
        except Exception as error:  # whatever a template does wrong is the request's failure, not the engine's
            raise RequestError(f"the model's chat template refuses these messages: {error}") from None


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read a message's reasoning under one name or another; give it under both, as transformers does."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
