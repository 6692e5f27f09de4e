"""One thread that steps an engine, and an asyncio face to it.

The engine is not thread-safe, so everything that touches it runs on the worker's thread. Requests and cancellations reach it
through a queue that it empties between steps; pieces come back through the event loop of whoever asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from zoo.errors import RequestError, ZooError
from zoo.runtime.engine import Engine
from zoo.runtime.request import Piece, SamplingParams

Deliver = Callable[[Piece], None]


class Worker:
    """Steps ``engine`` for as long as it has work; sleeps when it has none."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure = ""
        self._ids = itertools.count()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deliver: dict[str, Deliver] = {}
        self._thread = threading.Thread(target=self._run, name="zoo-engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests can be served."""
        return not self.failure and self._thread.is_alive()

    async def stream(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[Piece]:
        """The pieces of one request. Closing the iterator early cancels the request and frees its blocks.

        Raises RequestError at once for a request that the engine cannot serve.
        """
        self.engine.check(prompt_token_ids, params)
        if not self.ready:
            raise RequestError(f"the engine is not running: {self.failure or 'it was closed'}; restart the server")
        request_id = f"request-{next(self._ids)}"
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece] = asyncio.Queue()

        def deliver(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self._commands.put(lambda: self._add(request_id, list(prompt_token_ids), params, deliver))
        finished = False
        try:
            while not finished:
                piece = await pieces.get()
                finished = piece.finished
                yield piece
        finally:
            if not finished:
                self._commands.put(lambda: self._abort(request_id))

    def close(self) -> None:
        """End the thread after the step it is in; unfinished requests get an error."""
        self._commands.put(None)
        self._thread.join()

    def _add(self, request_id: str, prompt: list[int], params: SamplingParams, deliver: Deliver) -> None:
        try:
            self.engine.add_request(request_id, prompt, params)
        except ZooError as error:
            deliver(Piece(request_id, "", [], finish_reason="error", error=str(error)))
        else:
            self._deliver[request_id] = deliver

    def _abort(self, request_id: str) -> None:
        self._deliver.pop(request_id, None)
        self.engine.abort(request_id)

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self.engine.has_work:
                    for piece in self.engine.step():
                        self._give(piece)
            self._fail_all("the server is shutting down")
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._fail_all(f"the engine failed: {self.failure}")
            if not isinstance(error, Exception):
                raise

    def _take_commands(self) -> bool:
        """Carry out what is queued; wait for a command when there is nothing to step. False: close."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _give(self, piece: Piece) -> None:
        deliver = self._deliver.pop(piece.request_id, None) if piece.finished else self._deliver.get(piece.request_id)
        if deliver:
            deliver(piece)

    def _fail_all(self, message: str) -> None:
        for request_id, deliver in self._deliver.items():
            deliver(Piece(request_id, "", [], finish_reason="error", error=message))
        self._deliver.clear()
