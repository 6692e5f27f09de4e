"""The engine's process: it opens an engine, steps it while it has work, and speaks with the server through one pipe.

    server                                    engine process
      ── ("add", id, token ids, params) ──▶     between two steps it takes what has come
      ── ("abort", id) ──────────────────▶
      ◀── ("ready", Facts) ───────────────      once, when the engine is open
      ◀── ("pieces", [Piece], Load) ──────      after each step, by a thread of its own: a slow server stalls no step
      ◀── ("failed", reason) ─────────────      and it ends

HTTP, JSON and chat templates run in the server's process and take no time from a step. What breaks the engine (a GPU that is in
an error state, a crash in a library) ends this process alone, and the server starts another. Both ends are this package; nothing
else writes to the pipe.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.runtime.request import Piece

MOST_FAILURES = 3  # steps in a row that gave nothing but failures: the engine is beyond help


@dataclass(frozen=True)
class EngineOptions:
    """What ``LLM`` is opened with."""

    ref: str
    registry: Path | None = None
    threads: int = 0
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Facts:
    """What the server needs to know of an engine to check requests without it."""

    ref: str
    max_length: int  # tokens of one sequence, prompt and continuation together
    max_sequences: int
    vocab_size: int
    tokenizer_folder: Path | None


@dataclass(frozen=True)
class EngineLoad:
    """What an engine is busy with; counts are since it was opened."""

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    steps: int = 0
    step_seconds: float = 0.0


def main(pipe: Connection, options: EngineOptions) -> None:
    """The process. Ends when the pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the server's to handle
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sender = threading.Thread(target=_send, args=(pipe, outbox), daemon=True)
    sender.start()
    try:
        from zoo.llm import LLM

        with LLM(options.ref, registry=options.registry, threads=options.threads, checkpoint=options.checkpoint) as llm:
            outbox.put(("ready", facts_of(llm)))
            Host(llm, pipe, outbox).run()
    except (EOFError, BrokenPipeError):
        return  # the server is gone
    except ZooError as error:
        outbox.put(("failed", str(error)))
    except BaseException as error:
        outbox.put(("failed", f"{type(error).__name__}: {error}"))
        raise
    finally:
        outbox.put(None)
        sender.join(timeout=5)


def _send(pipe: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            pipe.send(message)


def facts_of(llm: Any) -> Facts:
    """Of an open ``LLM``."""
    engine = llm.engine
    folder = llm.tokenizer.folder if llm.tokenizer else None
    limits = engine.scheduler.limits
    return Facts(llm.ref, engine.scheduler.max_length, limits.max_sequences, engine.session.vocab_size, folder)


class Host:
    """Carries out what the server asks, between steps."""

    def __init__(self, llm: Any, pipe: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        self._engine, self._pipe, self._outbox = llm.engine, pipe, outbox
        self._failures = self._steps = 0
        self._seconds = 0.0

    def run(self) -> None:
        """Until the pipe ends. Raises what breaks the engine."""
        while True:
            while self._pipe.poll(0 if self._engine.has_work else None):
                self._do(*self._pipe.recv())
            if self._engine.has_work:
                self._step()

    def _step(self) -> None:
        started = time.perf_counter()
        pieces = self._engine.step()
        self._seconds += time.perf_counter() - started
        self._steps += 1
        if pieces:
            self._outbox.put(("pieces", pieces, self._load()))
            self._failures = self._failures + 1 if all(piece.error for piece in pieces) else 0
            if self._failures >= MOST_FAILURES:
                raise RuntimeError(f"{MOST_FAILURES} steps in a row failed; the last: {pieces[0].error}")

    def _do(self, what: str, *rest: Any) -> None:
        if what == "add":
            request_id, prompt, params, priority = rest
            try:
                self._engine.add_request(request_id, prompt, params, priority)
            except ZooError as error:  # whatever is wrong with one request ends no other's engine
                failed = Piece(request_id, "", [], finish_reason="error", error=str(error))
                self._outbox.put(("pieces", [failed], self._load()))
        elif what == "abort" and self._engine.abort(*rest):
            self._outbox.put(("pieces", [], self._load()))

    def _load(self) -> EngineLoad:
        scheduler = self._engine.scheduler
        running, blocks = len(scheduler.running), scheduler.blocks
        return EngineLoad(
            running=running,
            waiting=len(scheduler) - running,
            cache_usage=1 - blocks.free_blocks / blocks.total_blocks,
            preemptions=scheduler.preemptions,
            prefix_queries=getattr(scheduler, "prefix_queries", 0),
            prefix_hits=getattr(scheduler, "prefix_hits", 0),
            steps=self._steps,
            step_seconds=self._seconds,
        )
