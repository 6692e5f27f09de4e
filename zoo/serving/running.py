"""Continuations of one HTTP request: all of them together, or piece by piece as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from zoo.runtime.request import Piece, SamplingParams
from zoo.serving.client import EngineClient, NotReady, Overloaded


class Failed(Exception):
    """A continuation failed while it ran. ``timeout``: because its time was over."""

    def __init__(self, message: str, timeout: bool = False) -> None:
        super().__init__(message)
        self.timeout = timeout


@dataclass(frozen=True)
class Ask:
    """What an HTTP request wants: prompts, parameters of each continuation by prompt, who asks, how long it may take."""

    prompts: list[list[int]]
    params: list[list[SamplingParams]]
    client: str
    priority: int
    timeout: float | None

    @property
    def all(self) -> list[tuple[int, list[int], SamplingParams]]:
        """(index of the choice, prompt, parameters), prompt by prompt."""
        pairs = [(prompt, one) for prompt, many in zip(self.prompts, self.params, strict=True) for one in many]
        return [(index, prompt, one) for index, (prompt, one) in enumerate(pairs)]


@dataclass
class Continuation:
    """What one gave in all."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.token_ids
        self.logprobs += piece.logprobs or []
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt_logprobs
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens, by which ``best_of`` chooses."""
        chosen = [of[token] for of, token in zip(self.logprobs, self.tokens, strict=True)]
        return sum(chosen) / max(len(chosen), 1)


async def collect(engine: EngineClient, ask: Ask) -> list[Continuation]:
    """Every continuation, complete. Raises Failed if one fails; the others are dropped then."""
    engine.check(len(ask.all))

    async def one(prompt: list[int], params: SamplingParams) -> Continuation:
        made = Continuation()
        async with aclosing(engine.stream(prompt, params, ask.client, ask.priority, ask.timeout)) as pieces:
            async for piece in pieces:
                _raise(piece)
                made.add(piece)
        return made

    tasks = [asyncio.create_task(one(prompt, params)) for _, prompt, params in ask.all]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def follow(engine: EngineClient, ask: Ask) -> AsyncIterator[tuple[int, Piece]]:
    """(index of the choice, piece) as they come; NotReady or Overloaded at once if nothing can.

    A continuation that fails gives a piece with an error, and the others go on.
    """
    merged: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue(maxsize=2 * len(ask.all))

    async def one(index: int, prompt: list[int], params: SamplingParams) -> None:
        try:
            async with aclosing(engine.stream(prompt, params, ask.client, ask.priority, ask.timeout)) as pieces:
                async for piece in pieces:
                    await merged.put((index, piece))
        except (NotReady, Overloaded) as error:  # it was there when the request was checked
            await merged.put((index, Piece("", "", [], finish_reason="error", error=str(error))))

    tasks = [asyncio.create_task(one(*each)) for each in ask.all]
    try:
        left = len(tasks)
        while left:
            index, piece = await merged.get()
            left -= piece.finished
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise(piece: Piece) -> None:
    if piece.error:
        raise Failed(piece.error, piece.stop_reason == "timeout")
