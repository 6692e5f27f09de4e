"""The server's side of the engine process: requests in, pieces out, on one asyncio loop; and another process when one ends.

A request waits here (``WaitingRoom``: fair between clients, bounded) until the engine has room for it soon, so that what a
client sends in bulk stands in nobody's way. Its pieces arrive in one call for each step, however many requests the step had. A
reader that is slow finds them joined: what waits for it is never more than its own answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import multiprocessing
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from zoo.runtime.request import Piece, SamplingParams
from zoo.serving.fair import WaitingRoom
from zoo.serving.host import EngineLoad, EngineOptions, Facts, main

AHEAD = 8  # requests that wait in the engine itself, so that a place that becomes free is taken in the next step
PAUSES = (0.5, 2.0, 10.0, 30.0)  # seconds before the process is started again, by how often that failed in a row
log = logging.getLogger("zoo.serving")


class Overloaded(Exception):
    """The waiting room is full; ``retry_after`` seconds may help."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many requests wait; try again later")
        self.retry_after = retry_after


class NotReady(Exception):
    """There is no engine now; the reason is the message."""


class Observer(Protocol):
    """Who counts what happens: ``zoo.serving.metrics.Metrics``."""

    def tokens(self, count: int, first: bool, seconds: float) -> None: ...

    def end(self, reason: str, prompt: int, generated: int, seconds: float) -> None: ...


@dataclass(eq=False)
class Subscription:
    """One continuation of one prompt, from its arrival to its end."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    arrived: float
    pieces: list[Piece] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    last: float = 0.0  # when it got its last tokens; 0: none yet
    generated: int = 0
    done: bool = False
    timer: asyncio.TimerHandle | None = None


class EngineClient:
    """An engine behind a process of its own. All methods but ``close`` are for the loop that ``start`` ran on."""

    def __init__(self, options: EngineOptions, max_waiting: int = 1024) -> None:
        self.options = options
        self.facts: Facts | None = None
        self.load = EngineLoad()
        self.failure = "the engine is being opened"
        self.draining = False
        self.restarts = -1
        self.observer: Observer | None = None
        self._room: WaitingRoom[Subscription] = WaitingRoom(max_waiting)
        self._inside: dict[str, Subscription] = {}  # sent to the engine, not finished
        self._ids = itertools.count()
        self._rate = 0.0  # finished requests a second, smoothed
        self._finished_at = 0.0
        self._closing = False
        self._supervisor: asyncio.Task[None] | None = None
        self._opened: asyncio.Event = asyncio.Event()
        self._pipe: Connection | None = None
        self._process: Any = None

    @property
    def ready(self) -> bool:
        """Whether a request would be served now."""
        return not self.failure and not self.draining

    @property
    def restarting(self) -> bool:
        """Whether an engine that was lost is being started again, or the first one is being opened."""
        return not self._closing and self._supervisor is not None and not self._supervisor.done()

    @property
    def waiting(self) -> int:
        """Requests that wait, here and in the engine."""
        return len(self._room) + self.load.waiting

    @property
    def gauges(self) -> EngineLoad:
        """The engine's load, with what waits here among what waits."""
        return dataclasses.replace(self.load, waiting=self.waiting)

    async def start(self) -> Facts:
        """Start the process and wait until its engine is open. Raises NotReady with the reason if it cannot be opened."""
        self._supervisor = asyncio.create_task(self._supervise())
        while not self._opened.is_set():
            opened = asyncio.create_task(self._opened.wait())
            await asyncio.wait({opened, self._supervisor}, return_when=asyncio.FIRST_COMPLETED)
            opened.cancel()
            if self._supervisor.done():
                raise NotReady(self.failure)
        assert self.facts
        return self.facts

    async def close(self) -> None:
        """End the process; open requests get an error."""
        self._closing = True
        self.failure = self.failure or "the server is shutting down"
        self._fail_all("the server is shutting down")
        if self._pipe:
            self._pipe.close()
        if self._supervisor:
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    def check(self, prompts: int) -> None:
        """Raise NotReady or Overloaded if so many continuations cannot be taken now."""
        if not self.ready:
            raise NotReady(self.failure or "the server is shutting down")
        places = self.facts.max_sequences + AHEAD - len(self._inside) if self.facts else 0
        if len(self._room) + prompts > self._room.most + max(places, 0):
            raise Overloaded(self._retry_after())

    async def stream(
        self, prompt: list[int], params: SamplingParams, client: str = "", priority: int = 0, timeout: float | None = None
    ) -> AsyncGenerator[Piece]:
        """The pieces of one continuation; the last one has a finish_reason. Closing the iterator drops the request.

        timeout   seconds from now after which it ends with an error
        """
        self.check(1)
        now = time.monotonic()
        request = Subscription(f"r{next(self._ids)}", prompt, params, priority, now)
        if timeout is not None:
            request.timer = asyncio.get_running_loop().call_later(timeout, self._expire, request, timeout)
        self._room.put(request, client, priority)
        self._feed()
        try:
            while True:
                await request.news.wait()
                request.news.clear()
                joined = _join(request.pieces)
                request.pieces.clear()
                if joined is not None:
                    yield joined
                    if joined.finished:
                        return
        finally:
            self._leave(request)

    def _feed(self) -> None:
        """Send the engine what it has room for soon."""
        if self.failure or self.facts is None or self._pipe is None:
            return
        while len(self._inside) < self.facts.max_sequences + AHEAD and (request := self._room.take()) is not None:
            self._inside[request.request_id] = request
            self._tell("add", request.request_id, request.prompt, request.params, request.priority)

    def _tell(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # the process ended; its supervisor is about to hear of it
            assert self._pipe
            self._pipe.send(message)

    def _leave(self, request: Subscription) -> None:
        """The reader went away, or has all."""
        if request.timer:
            request.timer.cancel()
        if request.done:
            return
        self._end(request, "abort")
        if not self._room.remove(request) and self._inside.pop(request.request_id, None) is not None:
            self._tell("abort", request.request_id)
        self._feed()

    def _expire(self, request: Subscription, timeout: float) -> None:
        if request.done:
            return
        if not self._room.remove(request) and self._inside.pop(request.request_id, None) is not None:
            self._tell("abort", request.request_id)
        reason = f"the request's time is over: {timeout:g} s"
        self._give(request, Piece(request.request_id, "", [], finish_reason="error", error=reason, stop_reason="timeout"))
        self._feed()

    def _give(self, request: Subscription, piece: Piece) -> None:
        now = time.monotonic()
        if piece.token_ids:
            if self.observer:
                self.observer.tokens(len(piece.token_ids), not request.last, now - (request.last or request.arrived))
            request.last = now
            request.generated += len(piece.token_ids)
        request.pieces.append(piece)
        request.news.set()
        if piece.finished:
            self._end(request, piece.finish_reason or "error")

    def _end(self, request: Subscription, reason: str) -> None:
        request.done = True
        now = time.monotonic()
        if self._finished_at:
            self._rate += 0.1 * (1 / max(now - self._finished_at, 1e-3) - self._rate)
        self._finished_at = now
        if self.observer:
            self.observer.end(reason, len(request.prompt), request.generated, now - request.arrived)

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self.waiting / self._rate))) if self._rate > 0 else 1

    def _fail_all(self, reason: str, waiting: bool = True) -> None:
        """End what is in the engine by an error, and what waits here too, unless another engine may still take it."""
        failed = [*self._inside.values(), *(self._room.drain() if waiting else ())]
        self._inside.clear()
        for request in failed:
            if not request.done:
                self._give(request, Piece(request.request_id, "", [], finish_reason="error", error=reason))

    def _receive(self, message: tuple[Any, ...]) -> None:
        """One message of the process, on the loop."""
        match message:
            case ("ready", facts):
                self.facts, self.failure = facts, ""
                self.restarts += 1
                self._opened.set()
            case ("pieces", pieces, load):
                self.load = load
                for piece in pieces:
                    request = self._inside.get(piece.request_id)
                    if request is None:
                        continue  # dropped while the step was under way
                    if piece.finished:
                        del self._inside[piece.request_id]
                    self._give(request, piece)
            case ("failed", reason):
                self.failure = reason
        self._feed()

    async def _supervise(self) -> None:
        """Run the process, again when it ends. Ends itself when the first one cannot be opened, or ``close`` asks it to."""
        failures = 0
        while not self._closing:
            ready = self.restarts
            await self._run_process()
            if self._is_closing():
                return
            self._lost()
            if self.restarts < 0:
                return  # it never opened: an error of the user's, which starting again does not mend
            failures = 0 if self.restarts > ready else failures + 1
            pause = PAUSES[min(failures, len(PAUSES) - 1)]
            log.error("%s; starting it again in %g s", self.failure, pause)
            await asyncio.sleep(pause)

    def _is_closing(self) -> bool:
        return self._closing  # it changes while others run

    def _lost(self) -> None:
        """The process is gone: its requests end, those that wait go on waiting for the next one."""
        self.failure = self.failure or "the engine's process ended unexpectedly"
        self.load = EngineLoad()
        self._fail_all(f"the engine failed: {self.failure}", waiting=self.restarts < 0)

    async def _run_process(self) -> None:
        context, loop = multiprocessing.get_context("spawn"), asyncio.get_running_loop()
        ours, theirs = context.Pipe()
        self._pipe, ended = ours, asyncio.Event()
        self.failure = "" if self._closing else "the engine is being opened"
        process = self._process = context.Process(target=main, args=(theirs, self.options), name="zoo-engine", daemon=True)
        await loop.run_in_executor(None, process.start)
        theirs.close()
        reader = threading.Thread(target=_read, args=(ours, loop, self._receive, ended.set), daemon=True)
        reader.start()
        await ended.wait()
        ours.close()
        await loop.run_in_executor(None, process.join, 5)
        if process.is_alive():
            process.kill()
        if not self.failure and process.exitcode:
            self.failure = f"the engine's process ended with status {process.exitcode}"


def _read(pipe: Connection, loop: asyncio.AbstractEventLoop, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
    """Hand messages over to the loop until the pipe ends."""
    with contextlib.suppress(EOFError, OSError, RuntimeError):
        while True:
            loop.call_soon_threadsafe(receive, pipe.recv())
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(ended)


def _join(pieces: list[Piece]) -> Piece | None:
    """Several pieces of one request as one."""
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    logprobs = [one for piece in pieces for one in piece.logprobs or ()]
    last = pieces[-1]
    return Piece(
        last.request_id,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        logprobs if any(piece.logprobs is not None for piece in pieces) else None,
        last.finish_reason,
        last.stop_reason,
        last.error,
        next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None), None),
    )
