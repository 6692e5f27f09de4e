"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from zoo.runtime.request import Piece
from zoo.serving import grammars
from zoo.serving.bodies import ChatBody
from zoo.serving.frontend import Frontend, usage
from zoo.serving.http import read_body
from zoo.serving.logprobs import chat_logprobs
from zoo.serving.reading import max_tokens_of, parse, sampling, unsupported
from zoo.serving.running import Ask, Continuation, collect, follow
from zoo.serving.sse import Events


async def chat(front: Frontend, request: Request) -> Response:
    """Answer a chat, through the model's own template; tools are handed to it as they are."""
    body = parse(ChatBody, await read_body(request))
    front.served(body.model)
    unsupported(body)
    call = Call(front, body)
    options: dict[str, Any] = {
        **(body.chat_template_kwargs or {}),
        "add_generation_prompt": body.add_generation_prompt is not False,
    }
    if body.tools and body.tool_choice != "none":
        options["tools"] = body.tools
    prompt = await front.chat_prompt(body.messages, **options)
    ask = front.ask(request, body, [prompt], call.params, body.n or 1)
    if body.stream:
        front.engine.check(len(ask.all))
        return Events(call.events(ask, prompt))
    return JSONResponse(call.answer(await collect(front.engine, ask), prompt))


class Call:
    """One request's settings, and its answers."""

    def __init__(self, front: Frontend, body: ChatBody) -> None:
        self.front, self.body = front, body
        self.params = grammars.constrain(sampling(body, front.defaults, max_tokens_of(body)), body.response_format)
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model or front.name}

    def answer(self, found: list[Continuation], prompt: list[int]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one),
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for index, one in enumerate(found)
        ]
        counted = usage([prompt], sum(len(one.tokens) for one in found))
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": counted}

    def _logprobs(self, one: Continuation) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(one.tokens, one.logprobs, self.body.top_logprobs or 0, self.front.decode)

    async def events(self, ask: Ask, prompt: list[int]) -> AsyncIterator[dict[str, Any]]:
        """Chunks of a stream: the role first, then text, then the finish_reason with an empty delta's choice."""
        head = {**self.head, "object": "chat.completion.chunk"}
        options = self.body.stream_options
        running = bool(options and options.continuous_usage_stats)
        generated = 0
        for index in range(len(ask.all)):
            yield {**head, "choices": [_delta(index, {"role": "assistant", "content": ""})]}
        async for index, piece in follow(self.front.engine, ask):
            if piece.error:
                yield {"error": piece.error, "timeout": piece.stop_reason == "timeout"}
                continue
            generated += len(piece.token_ids)
            choice = self._piece(index, piece)
            if piece.text or choice["logprobs"] or piece.finished:
                yield {**head, "choices": [choice]} | ({"usage": usage([prompt], generated)} if running else {})
        if options and options.include_usage:
            yield {**head, "choices": [], "usage": usage([prompt], generated)}

    def _piece(self, index: int, piece: Piece) -> dict[str, Any]:
        one = Continuation()
        one.add(piece)
        delta = {"content": piece.text} if piece.text or not piece.finished else {}
        return {
            **_delta(index, delta, self._logprobs(one)),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }


def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
