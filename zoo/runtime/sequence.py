"""``Sequence``: one continuation on its way through the engine, as the scheduler and the sampler see it.

    tokens     [ p p p p p p g g g . . . . ]      p prompt, g generated, . room up to ``limit``
    computed         ^ 3                          the cache holds the tokens before this one
    known                          ^ 9            the tokens that exist; each step computes some of known - computed

A sequence whose computed tokens catch up with the known ones gets a row of logits, and with it one more known token.
A new prompt, a chunk of one, one token after another, a preempted sequence that starts over: all are this one rule.

A token that a submitted step has yet to sample is known by its name, -(r + 1) for row r of that step, until it is there.

A running sequence has a row in the arrays of ``Rows``, which a step reads and writes for all of them at once; a waiting one
keeps its tokens itself.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zoo.runtime.abi import Int32
from zoo.runtime.adjusting import Adjustment
from zoo.runtime.request import SamplingParams

if TYPE_CHECKING:
    from zoo.runtime.rows import Rows


class Sequence:
    """Tokens and progress of one continuation. ``limit``: known tokens never exceed it, so it ends there at the latest."""

    __slots__ = (
        "_rows",
        "_waiting_tokens",
        "adjustment",
        "arrival",
        "finished",
        "first_row",
        "host_until",
        "limit",
        "params",
        "preemptions",
        "priority",
        "prompt_length",
        "request_id",
        "row",
        "sampling",
    )

    def __init__(self, request_id: str, prompt: Items[int], params: SamplingParams, limit: int, priority: int = 0) -> None:
        assert 0 < len(prompt) < limit, (len(prompt), limit)
        self.request_id = request_id
        self.params = params
        self.prompt_length = len(prompt)
        self.limit = limit
        self.priority = priority  # smaller runs first
        self.arrival = 0  # set by the scheduler; settles equal priorities
        self.first_row = 0  # set by the scheduler: where the rotary table of a sequence of this limit begins
        self.row = -1  # while it waits
        self.preemptions = 0
        self.finished = False  # ended or dropped; what a submitted step still gives it is dropped
        self.sampling: npt.NDArray[np.void] | None = None  # its ``SAMPLING`` record, for sessions that sample
        self.adjustment: Adjustment | None = None  # of its logits, by the session
        self.host_until = 0
        self._rows: Rows[Any] | None = None
        self._waiting_tokens: Int32 = np.array(prompt, np.int32)

    @property
    def key(self) -> tuple[int, int]:
        """Order of service: priority, then arrival."""
        return (self.priority, self.arrival)

    @property
    def known(self) -> int:
        """How many tokens there are, named ones included."""
        return len(self._waiting_tokens) if self._rows is None else int(self._rows.known[self.row])

    @property
    def computed(self) -> int:
        """How many tokens the cache holds once the planned steps are over."""
        return 0 if self._rows is None else int(self._rows.computed[self.row])

    @property
    def room(self) -> int:
        """Tokens that its blocks hold."""
        return 0 if self._rows is None else int(self._rows.room[self.row])

    @property
    def tokens(self) -> Int32:
        """The known tokens, not to be written to."""
        return self._waiting_tokens if self._rows is None else self._rows.tokens[self.row, : self.known]

    @property
    def generated(self) -> int:
        """How many new tokens there are, not counting those that are only named."""
        return int((self.tokens[self.prompt_length :] >= 0).sum())

    def put(self, place: int, token: int) -> None:
        """Make ``token`` the one at ``place``, which is known by name only, or the next one."""
        assert self.prompt_length <= place <= self.known, (place, self.known)
        if self._rows is not None:
            self._rows.tokens[self.row, place] = token
            self._rows.known[self.row] = max(self.known, place + 1)
        elif place < self.known:
            self._waiting_tokens[place] = token
        else:
            self._waiting_tokens = np.append(self._waiting_tokens, np.int32(token))

    def append(self, token: int) -> None:
        """One more known token."""
        self.put(self.known, token)

    def sit(self, rows: Rows[Any], row: int) -> None:
        """Take a row that holds its state; ``Rows.seat`` alone calls this."""
        self._rows, self.row, self._waiting_tokens = rows, row, self._waiting_tokens[:0]

    def stand(self) -> None:
        """Keep its tokens itself again; ``Rows.leave`` alone calls this."""
        self._waiting_tokens = self.tokens.copy()
        self._rows, self.row = None, -1
