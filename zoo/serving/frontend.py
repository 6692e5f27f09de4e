"""What endpoints know: the engine, its tokenizer and defaults, and how a request becomes an ``Ask``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from zoo.errors import RequestError
from zoo.runtime.checks import check_request
from zoo.runtime.request import SamplingParams, unfold
from zoo.runtime.tokenizer import GenerationConfig, Tokenizer
from zoo.serving.bodies import Generation
from zoo.serving.client import EngineClient
from zoo.serving.host import Facts
from zoo.serving.http import client_of
from zoo.serving.metrics import Metrics
from zoo.serving.reading import FieldError
from zoo.serving.running import Ask
from zoo.serving.templates import Templates


class Frontend:
    """One engine behind HTTP."""

    def __init__(
        self, engine: EngineClient, facts: Facts, metrics: Metrics, templates: Templates, timeout: float | None = None
    ) -> None:
        self.engine, self.facts, self.metrics, self.templates, self.timeout = engine, facts, metrics, templates, timeout
        self.name = facts.ref.partition(":")[0]
        folder = facts.tokenizer_folder
        self.tokenizer = Tokenizer(folder) if folder else None
        self.defaults = GenerationConfig(folder, self.tokenizer).default_params() if folder else SamplingParams()
        self.created = int(time.time())

    def served(self, model: str | None) -> None:
        """FieldError unless the name is this model's, or none."""
        if model not in (None, self.name, self.facts.ref):
            raise FieldError(f"model {model!r} is not served here; {self.name!r} is", "model", "model_not_found")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; FieldError for one without tokens."""
        if self.tokenizer is None:
            raise FieldError("text needs a tokenizer, and this model came without one; send token ids", "prompt")
        if not (ids := self.tokenizer.encode(text, add_special_tokens=special)):
            raise FieldError("a prompt is empty: give some text, or at least one token id", "prompt")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones too; "" without a tokenizer."""
        return self.tokenizer.decode(ids, skip_special_tokens=False) if self.tokenizer else ""

    def texts_or_ids(self, given: Any, special: bool = True) -> list[list[int]]:
        """A text, token ids, or a list of either, as lists of token ids."""
        many = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        return [self.encode(one, special) if isinstance(one, str) else list(one) for one in many]

    async def chat_prompt(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """A chat as token ids, through the model's template."""
        if self.tokenizer is None:
            raise FieldError("a chat needs a tokenizer, and this model came without one", "messages")
        return self.encode(await self.templates.render(messages, **options), special=False)

    def ask(self, request: Request, body: Generation, prompts: list[list[int]], params: SamplingParams, count: int) -> Ask:
        """``count`` continuations of each prompt. Raises RequestError for what the engine could not take."""
        for prompt in prompts:
            check_request(prompt, params, self.facts.max_length, self.facts.vocab_size, self.tokenizer is not None)
        if len(prompts) * count > MAX_CHOICES:
            raise RequestError(f"{len(prompts)} prompts with {count} continuations each; at most {MAX_CHOICES} choices a request")
        limits = [limit for limit in (body.timeout, self.timeout) if limit is not None]
        many = [unfold(params, count) for _ in prompts]
        return Ask(prompts, many, client_of(request), body.priority or 0, min(limits, default=None))


MAX_CHOICES = 1024


def usage(prompts: Sequence[Sequence[int]], generated: int) -> dict[str, int]:
    """OpenAI's usage: each prompt counts once, however many continuations it has."""
    asked = sum(map(len, prompts))
    return {"prompt_tokens": asked, "completion_tokens": generated, "total_tokens": asked + generated}
