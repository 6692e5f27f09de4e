"""The engine loop: requests go in at any time, and each step gives every running one its next token.

    schedule     which tokens are computed next                     scheduler.py, blocks.py
    run          one ragged batch through the session               sessions/
    postprocess  choose tokens, make text, find the end             sampling.py, sampler.py, detokenizer.py, stops.py

With a session that samples, the next step is planned and submitted before the tokens of the last one are read, so that the
host works while the device does:

    host     plan 2  post 1  plan 3  post 2  plan 4  post 3
    device   | step 1       | step 2        | step 3        | ...

Step 2 then names tokens that step 1 has yet to sample. A sequence that turns out to have ended with such a token has been
computed one token too far; what comes of it is dropped. Ends by length are known ahead. A sequence whose next token is
chosen on the host sits out a step until it is.

Not thread-safe: one thread at a time adds, aborts and steps.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from zoo.errors import RequestError
from zoo.runtime.abi import STEPS_AHEAD, EngineLimits, Sampling, Session, StepResult, Ticket, rope_tables, sampling_session
from zoo.runtime.checks import check_request
from zoo.runtime.detokenizer import Detokenizer, TextStream
from zoo.runtime.grammar import Grammar, Grammars, Walk
from zoo.runtime.request import Piece, SamplingParams
from zoo.runtime.rows import Step
from zoo.runtime.sampler import Chosen
from zoo.runtime.sampling import Request, choose
from zoo.runtime.scheduler import Scheduler
from zoo.runtime.stops import StopMatcher

T = TypeVar("T")


@dataclass(slots=True)
class _Flight:
    """A step that was submitted. ``sampling`` is None for a session that gives logits."""

    step: Step[Request]
    sampling: Sampling | None
    ticket: Ticket


@dataclass(slots=True)
class _Done:
    """The ticket of a step that is over."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class Engine:
    """Runs requests on a session.

    detokenizer     None for an engine without a tokenizer: texts are empty and stop strings are refused
    end_token_ids   the model's own end tokens
    limits          lower ones than the session's, for scheduling
    grammars        makes what compiles grammars, when first needed; None: requests with a grammar are refused
    steps_ahead     how many steps are submitted before the result of the one before is read, where the session samples
    """

    def __init__(
        self,
        session: Session,
        detokenizer: Detokenizer | None = None,
        end_token_ids: Iterable[int] = (),
        limits: EngineLimits | None = None,
        steps_ahead: int = STEPS_AHEAD,
        grammars: Callable[[], Grammars] | None = None,
    ) -> None:
        self.session = session
        self.scheduler: Scheduler[Request] = Scheduler(limits or session.limits, rope_tables(session))
        self.end_token_ids = frozenset(end_token_ids)
        self._detokenizer = detokenizer
        self._grammars = functools.cache(grammars) if grammars else None
        self._sampler = sampling_session(session)
        self._ahead = min(steps_ahead, STEPS_AHEAD) if self._sampler else 0
        self._adjusted: set[str] = set()  # requests, not finished, whose logits the session adjusts
        self._flights: deque[_Flight] = deque()
        self._stalled = False  # something went up: steps that are under way come first

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return len(self.scheduler) > 0

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if the engine cannot serve this. Reads nothing that changes, so it can be called ahead of time."""
        has_tokenizer = self._detokenizer is not None
        check_request(prompt_token_ids, params, self.scheduler.max_length, self.session.vocab_size, has_tokenizer)

    def add_request(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int = 0) -> None:
        """Queue a request for one continuation (``params.n`` is for the caller to unfold). Smaller priorities run first.

        Raises RequestError for an id that is in use and for what ``check`` finds. A continuation that reaches the engine's
        context ends there with "length".
        """
        if request_id in self.scheduler:
            raise RequestError(f"request id {request_id!r} is in use; give each request its own")
        self.check(prompt_token_ids, params)
        room = self.scheduler.max_length
        limit = room if params.max_tokens is None else min(room, len(prompt_token_ids) + params.max_tokens)
        ends = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.end_token_ids)
        request = Request(request_id, prompt_token_ids, params, limit, priority)
        request.end_tokens = ends
        request.text = self._detokenizer.stream(params.skip_special_tokens) if self._detokenizer else None
        request.stops = StopMatcher(params.stop_strings, params.include_stop_str_in_output) if params.stop_strings else None
        walk = self._compile(params.grammar) if params.grammar is not None else None
        request.choose_by(prompt_token_ids, self.session.vocab_size, self._sampler is not None, self._reserve, walk)
        if request.adjustment is not None:
            self._adjusted.add(request_id)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks; nothing more comes of it. False if there is no such request (any more)."""
        self._adjusted.discard(request_id)
        return self.scheduler.remove(request_id)

    def _compile(self, grammar: Grammar) -> Walk:
        if self._grammars is None:
            raise RequestError("this engine takes no grammars; leave it out")
        return self._grammars().compile(grammar)

    def _reserve(self) -> bool:
        """Whether the session can adjust the logits of one request more."""
        slots = min(len(self._adjusted) + 1, self.scheduler.capacity)
        return self._sampler is not None and self._sampler.reserve(slots)

    def step(self) -> list[Piece]:
        """Advance the requests by one step; a piece for each that got a token. Empty if prompts are still being computed, and
        while the first step of a session that samples is.

        If the session fails, the requests of this step end with the finish_reason "error", their blocks are free again, and
        the others go on. A broken invariant (AssertionError) and what is no Exception (an interrupt) drop these requests too,
        and go up.
        """
        step = None if self._stalled else self.scheduler.schedule()
        self._stalled = False
        failure = self._submit(step) if step is not None else None
        pieces: list[Piece] = []
        try:
            while self._flights and (len(self._flights) > self._ahead or step is None or failure is not None):
                pieces += self._land(self._flights.popleft())
        finally:
            if step is not None and failure is not None:
                pieces += self._fail(step, failure)
        return pieces

    def close(self) -> None:
        """Drop all requests and close the session."""
        for request_id in self.scheduler.request_ids:
            self.abort(request_id)
        self._flights.clear()
        self.session.close()

    def _submit(self, step: Step[Request]) -> str | None:
        """Start a step; the reason if that fails."""
        sampler = self._sampler
        if sampler is None:
            result = self._attempt(step, lambda: self.session.step(step.batch))
            if isinstance(result, str):
                return result
            self._flights.append(_Flight(step, None, _Done(result)))
            return None
        sampling = self.scheduler.rows.sample(step)
        ticket = self._attempt(step, lambda: sampler.submit(step.batch, sampling))
        if isinstance(ticket, str):
            return ticket
        self._flights.append(_Flight(step, sampling, ticket))
        self.scheduler.rows.expect(step, sampling)
        return None

    def _land(self, flight: _Flight) -> list[Piece]:
        """Wait for a step, and give its pieces."""
        result = self._attempt(flight.step, flight.ticket.result)
        if isinstance(result, str):
            return self._fail(flight.step, result)
        return self._postprocess(flight.step, flight.sampling, result)

    def _attempt(self, step: Step[Request], call: Callable[[], T]) -> T | str:
        """What the session gives, or why it failed. Bugs and interrupts drop the step's requests and go up."""
        try:
            return call()
        except BaseException as error:
            if isinstance(error, AssertionError) or not isinstance(error, Exception):
                self._stalled = True
                self._fail(step, str(error))
                raise
            return f"the engine failed: {error}"  # whatever it is, it is the end of the step's requests, not of the engine

    def _fail(self, step: Step[Request], reason: str) -> list[Piece]:
        """End a step's requests by an error."""
        return [self._failed(request, reason) for request in step.sequences if not request.finished]

    def _failed(self, request: Request, reason: str) -> Piece:
        message = f"request {request.request_id!r} failed after {request.generated} tokens: {reason}"
        self.abort(request.request_id)
        return Piece(request.request_id, "", [], finish_reason="error", error=message)

    def _postprocess(self, step: Step[Request], sampling: Sampling | None, result: StepResult) -> list[Piece]:
        chosen = choose(step, sampling, result)
        tokens = np.array(chosen.token_ids, np.int32)
        special = chosen.errors.keys() | chosen.logprobs.keys()
        if chosen.errors:
            tokens[list(chosen.errors)] = -1
        if step.last is not None:
            special |= set(np.flatnonzero(step.last).tolist())
        self.scheduler.rows.settle(step, tokens)
        pieces = []
        for row, (request, token) in enumerate(zip(step.sampled, chosen.token_ids, strict=True)):
            if request.finished:
                continue  # while this step was under way
            if token in request.end_tokens or request.stops is not None or row in special:
                pieces.append(self._advance(step, row, chosen))
            else:
                text = request.text
                pieces.append(Piece(request.request_id, "" if text is None else text.push(token), [token]))
        return pieces

    def _advance(self, step: Step[Request], row: int, chosen: Chosen) -> Piece:
        """The piece of a request that may end here."""
        request = step.sampled[row]
        if row in chosen.errors:
            return self._failed(request, chosen.errors[row])
        token = chosen.token_ids[row]
        piece = Piece(request.request_id, "", [token])
        if row in chosen.logprobs:
            piece.logprobs = [chosen.logprobs[row]]
        if token in request.end_tokens:
            piece.finish_reason = "stop"
            own = token in self.end_token_ids and not request.params.ignore_eos
            piece.stop_reason = None if own else token
        elif step.last is not None and step.last[row]:
            piece.finish_reason = "length"
        if request.text is not None:
            self._add_text(piece, request, request.text, int(step.places[row]) + 1 - request.prompt_length)
        if piece.finish_reason is not None:
            self.abort(request.request_id)
        return piece

    def _add_text(self, piece: Piece, request: Request, stream: TextStream, generated: int) -> None:
        silent = piece.finish_reason == "stop" and not request.params.include_stop_str_in_output
        text = "" if silent else stream.push(piece.token_ids[0])
        if piece.finish_reason is not None:
            text += stream.finish()
        if request.stops is not None and generated >= request.params.min_tokens:
            text, found = request.stops.push(text)
            if found is not None:
                piece.finish_reason, piece.stop_reason = "stop", found
            elif piece.finish_reason is not None:
                text += request.stops.finish()
        piece.text = text
