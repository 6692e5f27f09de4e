"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from zoo.runtime.request import Piece
from zoo.serving import grammars
from zoo.serving.bodies import CompletionBody
from zoo.serving.frontend import Frontend, usage
from zoo.serving.http import read_body
from zoo.serving.logprobs import completion_logprobs
from zoo.serving.reading import FieldError, parse, sampling, unsupported
from zoo.serving.running import Ask, Continuation, collect, follow
from zoo.serving.sse import Events

DEFAULT_TOKENS = 16  # OpenAI's


async def completions(front: Frontend, request: Request) -> Response:
    """Continue prompts: texts or token ids, one or many, whole or as a stream."""
    body = parse(CompletionBody, await read_body(request))
    front.served(body.model)
    unsupported(body)
    prompts = front.texts_or_ids(body.prompt, body.add_special_tokens is not False)
    call = Call(front, body, prompts)
    ask = front.ask(request, body, prompts, call.params, call.candidates)
    if body.stream:
        front.engine.check(len(ask.all))
        return Events(call.events(ask))
    found = await collect(front.engine, ask)
    return JSONResponse(call.answer(found))


class Call:
    """One request's settings, and its answers."""

    def __init__(self, front: Frontend, body: CompletionBody, prompts: list[list[int]]) -> None:
        self.front, self.body, self.prompts = front, body, prompts
        self.count = body.n or 1
        self.candidates = max(self.count, body.best_of or 1)
        wanted = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        self.silent = wanted == 0
        if self.silent and not body.echo:
            raise FieldError("max_tokens is 0; it must be at least 1, or 0 with echo: true", "max_tokens")
        params = sampling(body, front.defaults, max(wanted, 1))
        self.most = body.logprobs
        if self.candidates > self.count and params.logprobs is None:
            params.logprobs = 0  # to choose the best by
        if body.echo and body.logprobs is not None:
            params.prompt_logprobs = body.logprobs
        self.params = grammars.constrain(params, body.response_format)
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or front.name,
        }

    def answer(self, found: Sequence[Continuation]) -> dict[str, Any]:
        """The whole answer; of several candidates the likeliest."""
        choices: list[dict[str, Any]] = []
        for number, prompt in enumerate(self.prompts):
            many = list(found[number * self.candidates : (number + 1) * self.candidates])
            if self.candidates > self.count:
                many.sort(key=lambda one: -one.likelihood)
            for one in many[: self.count]:
                choices.append(self._choice(len(choices), prompt, one))
        generated = 0 if self.silent else sum(len(one.tokens) for one in found)
        return {**self.head, "choices": choices, "usage": usage(self.prompts, generated)}

    def _choice(self, index: int, prompt: list[int], one: Continuation) -> dict[str, Any]:
        text, tokens, scores = one.text, list(one.tokens), list[Any](one.logprobs)
        reason, stop = one.finish_reason, one.stop_reason
        if self.silent:
            text, tokens, scores, reason, stop = "", [], [], "length", None
        if self.body.echo:
            text = self.front.decode(prompt) + text
            tokens, scores = prompt + tokens, (one.prompt_logprobs or []) + scores
        logprobs = None if self.most is None else completion_logprobs(tokens, scores, self.most, self.front.decode)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stop}

    async def events(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        """Chunks of a stream. Texts of each choice joined are its text; the last chunk has its finish_reason."""
        options = self.body.stream_options
        running = bool(options and options.continuous_usage_stats)
        generated = 0
        offsets = [0] * len(ask.all)
        begun: set[int] = set()
        async for index, piece in follow(self.front.engine, ask):
            if piece.error:
                yield {"error": piece.error, "timeout": piece.stop_reason == "timeout"}
                continue
            prompt = self.prompts[index // self.candidates]
            generated += 0 if self.silent else len(piece.token_ids)
            choice = self._piece(index, prompt, piece, offsets, first=index not in begun)
            begun.add(index)
            if choice["text"] or choice["logprobs"] or piece.finished:
                yield {**self.head, "choices": [choice]} | ({"usage": usage(self.prompts, generated)} if running else {})
        if options and options.include_usage:
            yield {**self.head, "choices": [], "usage": usage(self.prompts, generated)}

    def _piece(self, index: int, prompt: list[int], piece: Piece, offsets: list[int], first: bool) -> dict[str, Any]:
        one = Continuation()
        one.add(piece)
        echo = self.body.echo and first
        text, tokens, scores = one.text, list(one.tokens), list[Any](one.logprobs)
        if self.silent:
            text, tokens, scores = "", [], []
        if echo:
            text = self.front.decode(prompt) + text
            tokens, scores = prompt + tokens, (one.prompt_logprobs or []) + scores
        logprobs = None
        if self.most is not None and tokens:
            logprobs = completion_logprobs(tokens, scores, self.most, self.front.decode, offsets[index])
        offsets[index] += len(text)
        reason = ("length" if self.silent else one.finish_reason) if piece.finished else None
        stop = None if self.silent else one.stop_reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stop}
