"""The ASGI application: which endpoint answers what."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from zoo.serving import plain
from zoo.serving.chat import chat
from zoo.serving.completions import completions
from zoo.serving.frontend import Frontend
from zoo.serving.http import Gate, guarded

Handler = Callable[[Frontend, Request], Awaitable[Response]]
GENERATING: dict[str, tuple[str, Handler]] = {
    "/v1/completions": ("POST", completions),
    "/v1/chat/completions": ("POST", chat),
}
COMMON: dict[str, tuple[str, Handler]] = {
    "/v1/models": ("GET", plain.models),
    "/v1/models/{model:path}": ("GET", plain.model),
    "/tokenize": ("POST", plain.tokenize),
    "/detokenize": ("POST", plain.detokenize),
    "/health": ("GET", plain.health),
    "/ready": ("GET", plain.ready),
    "/version": ("GET", plain.version),
    "/metrics": ("GET", plain.metrics),
    "/openapi.json": ("GET", plain.openapi),
}


def application(front: Frontend, keys: Sequence[str] = ()) -> Starlette:
    """The application of one engine. ``keys``: any of them opens; none: no key is asked for."""
    routes = []
    for path, (method, handler) in (GENERATING | COMMON).items():
        routes.append(Route(path, guarded(functools.partial(handler, front)), methods=[method]))
    handlers = {404: plain.not_found, 405: plain.not_allowed, 500: plain.broken}
    return Starlette(routes=routes, middleware=[Middleware(Gate, keys=keys)], exception_handlers=handlers)
