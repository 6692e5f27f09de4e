"""The engine loop: requests go in at any time, and each step gives every running one its next token.

    schedule     which tokens are computed next                     scheduler.py, blocks.py
    run          one ragged batch through the session               sessions/
    postprocess  choose tokens, make text, find the end             sampler.py, detokenizer.py, stops.py

Not thread-safe: one thread at a time adds, aborts and steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zoo.errors import RequestError
from zoo.runtime.abi import EngineLimits, Session, StepResult
from zoo.runtime.detokenizer import Detokenizer, TextStream
from zoo.runtime.request import Piece, SamplingParams
from zoo.runtime.sampler import Chooser, Chosen, choose_all
from zoo.runtime.scheduler import Scheduler, Step
from zoo.runtime.sequence import Sequence as Running
from zoo.runtime.stops import StopMatcher


@dataclass(slots=True)
class _Live:
    """What the engine keeps for a request until it ends."""

    chooser: Chooser
    text: TextStream | None
    stops: StopMatcher | None
    end_tokens: frozenset[int]


class Engine:
    """Runs requests on a session.

    detokenizer     None for an engine without a tokenizer: texts are empty and stop strings are refused
    end_token_ids   the model's own end tokens
    limits          lower ones than the session's, for scheduling
    """

    def __init__(
        self,
        session: Session,
        detokenizer: Detokenizer | None = None,
        end_token_ids: Iterable[int] = (),
        limits: EngineLimits | None = None,
    ) -> None:
        self.session = session
        self.scheduler = Scheduler(limits or session.limits)
        self.end_token_ids = frozenset(end_token_ids)
        self._detokenizer = detokenizer
        self._live: dict[str, _Live] = {}

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return len(self.scheduler) > 0

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if the engine cannot serve this. Reads nothing that changes, so it can be called ahead of time."""
        params.check()
        length, room = len(prompt_token_ids), self.scheduler.max_length
        if not length:
            raise RequestError("the prompt is empty: give at least one token")
        if length >= room:
            raise RequestError(
                f"the prompt has {length} tokens, but this engine holds {room} tokens of one sequence, prompt and "
                f"continuation together; give at most {room - 1}, or build the engine with a larger limits.max_context"
            )
        vocabulary = self.session.vocab_size
        named = [
            ("prompt", prompt_token_ids),
            ("logit_bias", params.logit_bias or ()),
            ("stop_token_ids", params.stop_token_ids or ()),
        ]
        for what, tokens in named:
            if min(tokens, default=0) < 0 or max(tokens, default=0) >= vocabulary:
                wrong = next(token for token in tokens if not 0 <= token < vocabulary)
                raise RequestError(f"{what} has token id {wrong}; the model's ids are 0 to {vocabulary - 1}")
        if params.stop_strings and self._detokenizer is None:
            raise RequestError("stop needs a tokenizer, and this engine has none; use stop_token_ids")

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
        self._live[request_id] = _Live(
            Chooser(params, prompt_token_ids, self.session.vocab_size, ends),
            self._detokenizer.stream(params.skip_special_tokens) if self._detokenizer else None,
            StopMatcher(params.stop_strings, params.include_stop_str_in_output) if params.stop_strings else None,
            ends,
        )
        self.scheduler.add(Running(request_id, prompt_token_ids, params, limit, priority))

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks; nothing more comes of it. False if there is no such request (any more)."""
        self._live.pop(request_id, None)
        return self.scheduler.remove(request_id)

    def step(self) -> list[Piece]:
        """Advance the requests by one step; a piece for each that got a token. Empty if prompts are still being computed.

        If the session fails, the requests of this step end with the finish_reason "error", their blocks are free again, and
        the others go on. A broken invariant (AssertionError) and what is no Exception (an interrupt) drop these requests too,
        and go up.
        """
        step = self.scheduler.schedule()
        if step is None:
            return []
        try:
            result = self._run(step)
        except AssertionError:
            raise
        except Exception as error:  # whatever a session raises: it is the end of this step's requests, not of the engine
            return [self._failed(sequence, f"the engine failed: {error}") for sequence in step.sequences]
        return self._postprocess(step, result)

    def close(self) -> None:
        """Drop all requests and close the session."""
        for request_id in list(self._live):
            self.abort(request_id)
        self.session.close()

    def _run(self, step: Step) -> StepResult:
        try:
            return self.session.step(step.batch)
        except BaseException:
            for sequence in step.sequences:
                self.abort(sequence.request_id)
            raise

    def _postprocess(self, step: Step, result: StepResult) -> list[Piece]:
        lives = [self._live[sequence.request_id] for sequence in step.sampled]
        if result.logits is not None:
            chosen = choose_all(result.logits, [live.chooser for live in lives], [s.generated for s in step.sampled])
        else:
            assert result.token_ids is not None, "a step gives logits or tokens"
            chosen = Chosen(result.token_ids.tolist())
        return [self._advance(row, s, live, chosen) for row, (s, live) in enumerate(zip(step.sampled, lives, strict=True))]

    def _advance(self, row: int, sequence: Running, live: _Live, chosen: Chosen) -> Piece:
        """Give a sequence its next token, and end it if that was the last."""
        if row in chosen.errors:
            return self._failed(sequence, chosen.errors[row])
        token = chosen.token_ids[row]
        sequence.append(token)
        piece = Piece(sequence.request_id, "", [token])
        if row in chosen.logprobs:
            piece.logprobs = [chosen.logprobs[row]]
        if token in live.end_tokens:
            piece.finish_reason = "stop"
            own = token in self.end_token_ids and not sequence.params.ignore_eos
            piece.stop_reason = None if own else token
        elif sequence.known == sequence.limit:
            piece.finish_reason = "length"
        if live.text is not None:
            self._add_text(piece, sequence, live)
        if piece.finish_reason is not None:
            self.abort(sequence.request_id)
        return piece

    def _failed(self, sequence: Running, reason: str) -> Piece:
        """End a sequence by an error."""
        self.abort(sequence.request_id)
        message = f"request {sequence.request_id!r} failed after {sequence.generated} tokens: {reason}"
        return Piece(sequence.request_id, "", [], finish_reason="error", error=message)

    def _add_text(self, piece: Piece, sequence: Running, live: _Live) -> None:
        assert live.text is not None
        silent = piece.finish_reason == "stop" and not sequence.params.include_stop_str_in_output
        text = "" if silent else live.text.push(piece.token_ids[0])
        if piece.finish_reason is not None:
            text += live.text.finish()
        if live.stops is not None and sequence.generated >= sequence.params.min_tokens:
            text, found = live.stops.push(text)
            if found is not None:
                piece.finish_reason, piece.stop_reason = "stop", found
            elif piece.finish_reason is not None:
                text += live.stops.finish()
        piece.text = text
