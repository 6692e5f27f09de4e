"""The run itself: requests go in when they are due, the engine steps, and notes are taken.

Beside ``engine.step`` a step costs two looks at the clock, two list comprehensions over its pieces, and a tuple that refers to
what the session was given; what it all means is worked out when the run is over. The notes take 16 bytes for each token.
``Recording.noting`` says what they cost in this run.

T tokens, B sequences, R rows of logits of a step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.benchmark.workload import Floats
from zoo.errors import RequestError
from zoo.runtime.abi import Batch, Int32, Session, sampling_session
from zoo.runtime.engine import Engine
from zoo.runtime.request import Piece, SamplingParams

REPORT_EVERY = 1.0  # seconds between two calls of ``report``, which draws on a terminal
Progress = Callable[[int], None]  # output tokens so far


@dataclass(slots=True)
class StepNote:
    """What a step computed: query_starts [B+1], kv_lengths [B], and how many rows of logits."""

    query_starts: Int32
    kv_lengths: Int32
    rows: int


@dataclass
class Recording:
    """One run. Times in seconds from its start.

    due          when each request was due; waiting for a step that was under way then counts as latency
    times        when each call of ``engine.step`` returned
    receivers    the requests that got a token with it, by their place in ``due``
    tokens       output tokens
    steps        what the session was given
    seconds      from the start to the last token; adding requests to the queue included
    queueing     seconds of that in which requests were added
    noting       seconds of that spent on the notes, and on letting go of the engine's pieces
    preemptions  how often a sequence gave its blocks back and began again
    """

    due: Floats
    times: list[float] = field(default_factory=list)
    receivers: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    steps: list[StepNote] = field(default_factory=list)
    seconds: float = 0.0
    queueing: float = 0.0
    noting: float = 0.0
    preemptions: int = 0


@contextlib.contextmanager
def noted_steps(session: Session) -> Iterator[list[StepNote]]:
    """While this lasts, every step that the session is given is noted. Batches are not copied: nobody writes to them again."""
    name = "step" if sampling_session(session) is None else "submit"
    call, notes = getattr(session, name), []  # type: ignore[var-annotated]
    note = notes.append

    def noting(batch: Batch, *rest: Any) -> Any:
        note((batch.query_starts, batch.kv_lengths, len(batch.logit_rows)))
        return call(batch, *rest)

    setattr(session, name, noting)
    found: list[StepNote] = []
    try:
        yield found
    finally:
        delattr(session, name)
        found += [StepNote(*one) for one in notes]


def run(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, due: Floats, report: Progress | None = None
) -> Recording:
    """Serve all prompts, each added when it is ``due`` (rising seconds). The engine must have nothing else to do.

    Raises RequestError if one of them is refused or fails.
    """
    assert len(prompts) == len(due) and len(engine.scheduler) == 0
    made = Recording(due)
    names = [f"bench-{index}" for index in range(len(prompts))]
    when, clock = due.tolist(), time.perf_counter
    times, receivers, tokens, noting, queueing, added = made.times, [], 0, 0.0, 0.0, 0
    preemptions = engine.scheduler.preemptions
    with noted_steps(engine.session) as made.steps:
        start = after = clock()
        reported = start
        while True:
            if added < len(names):
                before = clock()
                while added < len(names) and when[added] <= before - start:
                    engine.add_request(names[added], prompts[added], params)
                    added += 1
                after = clock()
                queueing += after - before
            if not engine.has_work:
                if added == len(names):
                    break
                time.sleep(max(0.0, when[added] - (clock() - start)))
                continue
            pieces = engine.step()
            now = clock()
            counts = [len(piece.token_ids) for piece in pieces]
            if not all(counts):
                _raise_failure(pieces)
            tokens += sum(counts)
            times.append(now - start)
            receivers.append([piece.request_id for piece in pieces])
            if report is not None and now - reported > REPORT_EVERY:
                report(tokens)
                reported = now
            del pieces  # before the next ones are made: their memory is used again
            noting += clock() - now
    made.seconds = times[-1]
    places = {name: place for place, name in enumerate(names)}
    made.receivers = [[places[name] for name in step] for step in receivers]
    made.tokens, made.noting, made.queueing = tokens, noting, queueing
    made.preemptions = engine.scheduler.preemptions - preemptions
    return made


def _raise_failure(pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if piece.error is not None:
            raise RequestError(piece.error)
