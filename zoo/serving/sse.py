"""Server-sent events: what a stream of an answer looks like on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from zoo.serving.http import error_detail
from zoo.serving.reading import compact

DONE = "data: [DONE]\n\n"


class Events(StreamingResponse):
    """One event a chunk, then [DONE]. When the client goes away the chunks' iterator is closed, and with it the request.

    A client that reads slowly holds up nothing but its own stream: writing waits for it, and its pieces are joined meanwhile.
    """

    def __init__(self, chunks: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(_written(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _written(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            if "error" in chunk:
                code = "timeout" if chunk["timeout"] else None
                yield f"data: {compact({'error': error_detail(chunk['error'], code=code)})}\n\n"
            else:
                yield f"data: {compact(chunk)}\n\n"
        yield DONE
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()
