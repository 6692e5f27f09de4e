"""The small endpoints: models, tokens, state, metrics, the OpenAPI document."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from zoo import __version__
from zoo.serving.bodies import DetokenizeBody, TokenizeBody
from zoo.serving.frontend import Frontend
from zoo.serving.http import error, read_body
from zoo.serving.metrics import CONTENT_TYPE
from zoo.serving.openapi import document
from zoo.serving.reading import FieldError, parse


async def health(front: Frontend, request: Request) -> Response:
    """200 while the server lives and its engine does or is being started again; 503 when there is none to come."""
    state = front.engine
    lost = bool(state.failure) and not state.ready and not state.restarting
    return JSONResponse({"status": "ok" if state.ready else state.failure or "shutting down"}, 503 if lost else 200)


async def ready(front: Frontend, request: Request) -> Response:
    """200 when a request would be served now."""
    state = front.engine
    return JSONResponse({"status": "ready" if state.ready else state.failure or "shutting down"}, 200 if state.ready else 503)


async def version(front: Frontend, request: Request) -> Response:
    return JSONResponse({"version": __version__})


def card(front: Frontend) -> dict[str, Any]:
    return {
        "id": front.name,
        "object": "model",
        "created": front.created,
        "owned_by": "engine-zoo",
        "max_model_len": front.facts.max_length,
    }


async def models(front: Frontend, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [card(front)]})


async def model(front: Frontend, request: Request) -> Response:
    front.served(request.path_params["model"])
    return JSONResponse(card(front))


async def tokenize(front: Frontend, request: Request) -> Response:
    """Token ids of a text or of a chat."""
    body = parse(TokenizeBody, await read_body(request))
    front.served(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise FieldError("give either prompt or messages", "prompt")
    if front.tokenizer is None:
        raise FieldError("this model came without a tokenizer", "prompt")
    if body.messages is not None:
        ids = await front.chat_prompt(body.messages, add_generation_prompt=body.add_generation_prompt is not False)
    else:
        ids = front.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": front.facts.max_length})


async def detokenize(front: Frontend, request: Request) -> Response:
    """The text of token ids."""
    body = parse(DetokenizeBody, await read_body(request))
    front.served(body.model)
    if front.tokenizer is None:
        raise FieldError("this model came without a tokenizer", "tokens")
    return JSONResponse({"prompt": front.decode(body.tokens)})


async def metrics(front: Frontend, request: Request) -> Response:
    return Response(front.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def openapi(front: Frontend, request: Request) -> Response:
    return JSONResponse(document())


async def not_found(request: Request, wrong: Exception) -> Response:
    return error(404, f"there is no {request.method} {request.url.path}; /openapi.json lists what there is")


async def not_allowed(request: Request, wrong: Exception) -> Response:
    return error(405, f"{request.method} is not for {request.url.path}", headers=getattr(wrong, "headers", None))


async def broken(request: Request, wrong: Exception) -> Response:
    return error(500, "the server failed with this request; its log has the reason")
