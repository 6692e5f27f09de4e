"""``Sequence``: one continuation on its way through the engine, as the scheduler and the sampler see it.

    tokens     [ p p p p p p g g g . . . . ]      p prompt, g generated, . room up to ``limit``
    computed         ^ 3                          the cache holds the tokens before this one
    known                          ^ 9            the tokens that exist; each step computes some of known - computed

A sequence whose computed tokens catch up with the known ones gets a row of logits, and with it one more known token.
A new prompt, a chunk of one, one token after another, a preempted sequence that starts over: all are this one rule.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from zoo.runtime.request import SamplingParams


class Sequence:
    """Tokens and progress of one continuation. ``limit``: known tokens never exceed it, so it ends there at the latest."""

    __slots__ = (
        "arrival",
        "computed",
        "known",
        "limit",
        "params",
        "preemptions",
        "priority",
        "prompt_length",
        "request_id",
        "room",
        "row",
        "tokens",
    )

    def __init__(self, request_id: str, prompt: Items[int], params: SamplingParams, limit: int, priority: int = 0) -> None:
        assert 0 < len(prompt) < limit, (len(prompt), limit)
        self.request_id = request_id
        self.params = params
        self.prompt_length = len(prompt)
        self.limit = limit
        self.tokens = np.empty(limit, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.known = len(prompt)
        self.computed = 0
        self.priority = priority  # smaller runs first
        self.arrival = 0  # set by the scheduler; settles equal priorities
        self.row = -1  # row of the scheduler's block tables while it runs
        self.room = 0  # tokens that its blocks hold
        self.preemptions = 0

    @property
    def key(self) -> tuple[int, int]:
        """Order of service: priority, then arrival."""
        return (self.priority, self.arrival)

    @property
    def generated(self) -> int:
        """How many new tokens there are."""
        return self.known - self.prompt_length

    def append(self, token: int) -> None:
        """One more known token."""
        self.tokens[self.known] = token
        self.known += 1
