"""The OpenAI-compatible HTTP face of one engine, narrow: /v1/models, /v1/completions, /health, /version.

Errors come in OpenAI's JSON shape. Bodies are limited to 4 MiB. A client that goes away cancels its request.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from zoo import __version__
from zoo.errors import RequestError
from zoo.runtime.request import Piece, SamplingParams
from zoo.serving.worker import Worker

MAX_BODY = 4 << 20
MAX_PROMPTS = 128
# Field of a request body -> SamplingParams field.
FIELDS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
KNOWN = {*FIELDS, "model", "prompt", "stream", "stream_options", "echo", "n", "user", "best_of", "suffix"}


class Server:
    """One engine behind HTTP. ``encode`` turns text into token ids as the model's tokenizer does."""

    def __init__(self, name: str, worker: Worker, encode: Callable[[str], list[int]], defaults: SamplingParams) -> None:
        self.name, self.worker, self.encode, self.defaults = name, worker, encode, defaults
        self.started = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/version", self.version),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if self.worker.ready else JSONResponse({"status": self.worker.failure}, 503)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def models(self, request: Request) -> Response:
        card = {"id": self.name, "object": "model", "created": self.started, "owned_by": "engine-zoo"}
        return JSONResponse({"object": "list", "data": [card]})

    async def completions(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            prompts, params = self._prompts(body), self._params(body)
            for prompt in prompts:
                self.worker.engine.check(prompt, params)
        except RequestError as error:
            return _error(400, str(error))
        except ClientDisconnect:
            return Response(status_code=499)
        if not self.worker.ready:
            return _error(503, f"the engine is not running: {self.worker.failure}")
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": self.name}
        if body.get("stream"):
            wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            events = self._events(head, prompts, params, wants_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            pieces = await asyncio.gather(*(self._collect(prompt, params) for prompt in prompts))
        except RequestError as error:
            return _error(500, str(error))
        choices = [_choice(index, "".join(p.text for p in got), got[-1]) for index, got in enumerate(pieces)]
        generated = sum(len(p.token_ids) for got in pieces for p in got)
        return JSONResponse({**head, "choices": choices, "usage": _usage(prompts, generated)})

    async def _body(self, request: Request) -> dict[str, Any]:
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BODY:
                raise RequestError(f"the body is larger than {MAX_BODY} bytes; send fewer prompts at once")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise RequestError("the body is not JSON") from None
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        if unknown := sorted(set(body) - KNOWN):
            raise RequestError(f"unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(KNOWN))}")
        if body.get("model") not in (None, self.name):
            raise RequestError(f"model {body['model']!r} is not served here; {self.name!r} is")
        for field, neutral in (("n", 1), ("best_of", 1), ("echo", False), ("suffix", None)):
            if body.get(field) not in (None, neutral):
                raise RequestError(f"{field} is {body[field]!r}; this server does not support it, leave it out")
        if not isinstance(body.get("stream_options") or {}, dict):
            raise RequestError("stream_options must be an object")
        return body

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        prompt = body.get("prompt")
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_ids(prompt)):
            prompt = [prompt]
        if not isinstance(prompt, list) or not 1 <= len(prompt) <= MAX_PROMPTS:
            raise RequestError(f"prompt must be text, token ids, or a list of 1 to {MAX_PROMPTS} of either")
        prompts = []
        for one in prompt:
            if not isinstance(one, str) and not _is_ids(one):
                raise RequestError("each prompt must be text or a list of token ids")
            if not one:
                raise RequestError("a prompt is empty: give some text, or at least one token id")
            prompts.append(self.encode(one) if isinstance(one, str) else list(one))
        return prompts

    def _params(self, body: dict[str, Any]) -> SamplingParams:
        import dataclasses

        values = {field: body[field] for field in FIELDS if body.get(field) is not None}
        values.setdefault("max_tokens", 16)  # OpenAI's default for completions
        return dataclasses.replace(self.defaults, **values)

    async def _collect(self, prompt: list[int], params: SamplingParams) -> list[Piece]:
        pieces = []
        async for piece in self.worker.stream(prompt, params):
            if piece.error:
                raise RequestError(piece.error)
            pieces.append(piece)
        return pieces

    async def _events(
        self, head: dict[str, Any], prompts: Sequence[list[int]], params: SamplingParams, wants_usage: bool
    ) -> AsyncIterator[str]:
        merged: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        async def follow(index: int, prompt: list[int]) -> None:
            async for piece in self.worker.stream(prompt, params):
                await merged.put((index, piece))

        tasks = [asyncio.create_task(follow(index, prompt)) for index, prompt in enumerate(prompts)]
        open_streams, generated = len(tasks), 0
        try:
            while open_streams:
                index, piece = await merged.get()
                open_streams -= piece.finished
                generated += len(piece.token_ids)
                if piece.error:
                    yield _event({"error": {"message": piece.error, "type": "server_error", "param": None, "code": None}})
                elif piece.text or piece.finished:
                    yield _event({**head, "choices": [_choice(index, piece.text, piece)]})
            if wants_usage:
                yield _event({**head, "choices": [], "usage": _usage(prompts, generated)})
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _choice(index: int, text: str, last: Piece) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": last.finish_reason}


def _usage(prompts: Sequence[list[int]], generated: int) -> dict[str, int]:
    asked = sum(map(len, prompts))
    return {"prompt_tokens": asked, "completion_tokens": generated, "total_tokens": asked + generated}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
