"""What all endpoints share: reading bodies within limits, errors in OpenAI's JSON shape, keys, and who a client is."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from zoo.errors import RequestError
from zoo.serving.client import NotReady, Overloaded
from zoo.serving.reading import FieldError
from zoo.serving.running import Failed

MAX_BODY = 8 << 20
OPEN = ("/health", "/ready", "/version", "/metrics", "/openapi.json")  # paths that need no key
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
Endpoint = Callable[[Request], Awaitable[Response]]


def error(status: int, message: str, field: str | None = None, code: str | None = None, headers: Any = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": error_detail(message, kind, field, code)}, status, headers=headers)


def error_detail(message: str, kind: str = "server_error", field: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": field, "code": code}


async def read_body(request: Request, most: int = MAX_BODY) -> bytes:
    """The body; FieldError with status 413 in mind for one that is too large."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise TooLarge(f"the body is larger than {most} bytes; send less at once")
    return bytes(data)


class TooLarge(RequestError):
    """A body over the limit."""


def guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with what goes wrong in it as an answer."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except TooLarge as wrong:
            return error(413, str(wrong))
        except FieldError as wrong:
            return error(404 if wrong.code == "model_not_found" else 400, str(wrong), wrong.field, wrong.code)
        except RequestError as wrong:
            return error(400, str(wrong))
        except Overloaded as wrong:
            return error(429, str(wrong), code="overloaded", headers={"Retry-After": str(wrong.retry_after)})
        except NotReady as wrong:
            return error(503, f"the engine is not running: {wrong}", code="not_ready", headers={"Retry-After": "5"})
        except Failed as wrong:
            return error(504 if wrong.timeout else 500, str(wrong), code="timeout" if wrong.timeout else None)
        except ClientDisconnect:
            return Response(status_code=499)

    return answer


class Gate:
    """ASGI middleware: asks for a key where keys are set, in constant time, and refuses bodies that announce too much.

    keys   any of these opens; none: open to all
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str] = (), most: int = MAX_BODY) -> None:
        self._app, self._keys, self._most = app, [key.encode() for key in keys], most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused: Response | None = None
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most:
            refused = error(413, f"the body is larger than {self._most} bytes; send less at once")
        elif self._keys and scope["path"] not in OPEN and not self._opens(headers.get(b"authorization", b"")):
            refused = error(
                401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        await (refused or self._app)(scope, receive, send)

    def _opens(self, header: bytes) -> bool:
        kind, _, given = header.partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]  # all of them, whichever fits
        return kind.lower() == b"bearer" and any(found)


def client_of(request: Request) -> str:
    """Who asks, for fair turns: the key if there is one, else the address."""
    return request.headers.get("authorization") or (request.client.host if request.client else "")
