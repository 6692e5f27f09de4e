"""Which sequences compute which tokens in the next step, and the batch that says so.

There is no prefill phase and no decode phase. Every sequence catches up its computed tokens with its known ones, and a step
is a budget of tokens spent in this order:

1. running sequences that are one token behind, so that nobody's stream stalls behind somebody's long prompt,
2. running sequences that are further behind (chunks of prompts, and of sequences that start over),
3. waiting sequences, first come first served, as long as tokens, rows and blocks last.

A sequence gets the blocks of all its known tokens when it is admitted, so only one that grows can find the pool empty. Then
the last in order of service (lowest priority, last come) is preempted: it gives its blocks back and catches up again later
from nothing, its generated tokens included, so it goes on with the same tokens. Admission leaves one block free for each
running sequence, so a newcomer is not preempted by those that are there already before they have filled a block.

A step may be planned before the tokens of the one before it are there (``Rows.expect``): they are known by their names, and
``computed`` moves on when a step is planned, not when it is done. ``Rows.settle`` puts the tokens in the places of the names.
A sequence whose next token is not even named, because it is to be its last one or is chosen on the host, sits out.

Where more belongs: prefix caching starts ``computed`` above 0 in ``_admit``; speculation makes a sequence several tokens known
at once and asks for several rows.
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from typing import Generic

import numpy as np

from zoo.runtime.abi import EngineLimits, Int32, RopeTables
from zoo.runtime.blocks import BlockManager
from zoo.runtime.rows import Indices, Rows, S, Step


class Scheduler(Generic[S]):
    """Plans steps for any number of sequences within an engine's limits. Pure bookkeeping: no tensors, no clock."""

    def __init__(self, limits: EngineLimits, rope_tables: RopeTables = ()) -> None:
        self.limits = limits
        self.rope_tables = rope_tables
        self.blocks = BlockManager(limits.max_blocks, limits.block_size)
        # A running sequence may want a token and a row in every step, so no more run than fit.
        self.capacity = min(limits.max_sequences, limits.max_rows, limits.max_tokens)
        # The longest sequence that can be served when it is alone.
        self.max_length = min(limits.max_context, self.blocks.total_blocks * limits.block_size)
        self.running: list[S] = []  # in order of service
        self.preemptions = 0
        self.rows: Rows[S] = Rows(self.capacity, self.max_length, limits.block_size)
        self._waiting: list[tuple[int, int, S]] = []  # a heap in order of service
        self._sequences: dict[str, S] = {}
        self._arrivals = 0
        self._order: Indices | None = np.empty(0, np.intp)  # rows of ``running``; None when it has changed

    def __len__(self) -> int:
        """Sequences that are not finished."""
        return len(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    @property
    def request_ids(self) -> list[str]:
        """Of the sequences that are not finished."""
        return list(self._sequences)

    @property
    def waiting(self) -> int:
        """Sequences that are not running."""
        return len(self._sequences) - len(self.running)

    def add(self, sequence: S) -> None:
        """Queue a sequence. Its id must be new and its limit at most ``max_length``."""
        assert sequence.request_id not in self._sequences and sequence.limit <= self.max_length
        sequence.arrival = self._arrivals
        # Its length at most, known from the start, decides for good: what is in the cache was rotated by one table.
        sequence.first_row = next((row for length, row in self.rope_tables if length >= sequence.limit), 0)
        self._arrivals += 1
        self._sequences[sequence.request_id] = sequence
        heappush(self._waiting, (*sequence.key, sequence))

    def remove(self, request_id: str) -> bool:
        """Forget a sequence, finished or not, and take its blocks back. False if there is no such sequence.

        A later step may use the blocks at once, though a submitted one still writes to them: sessions run steps in order.
        """
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        sequence.finished = True
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._release(sequence)
        return True  # a waiting one is dropped from the heap when it comes up

    def schedule(self) -> Step[S] | None:
        """Plan the next step; None when nothing can be computed now. The planned tokens count as computed from here on."""
        preemptions = self.preemptions
        order, todo = self._todo()
        one = todo == 1
        single = order if np.count_nonzero(one) == len(order) else order[one]
        if len(full := self.rows.full(single)):
            self._grow(full)
            if self.preemptions > preemptions:
                order, todo = self._todo()
                single = order[todo == 1]
        admit = self._waiting and len(self.running) < self.capacity
        if single is order and len(order) and not admit:
            return self.rows.decode(order)
        chunks, counts = [single], [np.ones(len(single), np.int32)]
        budget = self.limits.max_tokens - len(single)
        if len(single) < len(order):
            behind, wanted = order[todo > 1], todo[todo > 1]
            given = np.clip(budget - (np.cumsum(wanted, dtype=np.int32) - wanted), 0, wanted)
            chunks.append(behind[given > 0])
            counts.append(given[given > 0])
            budget -= int(given.sum())
        if admit:
            admitted, given = self._admit_within(budget)
            chunks.append(admitted)
            counts.append(given)
        rows = np.concatenate(chunks)
        if not len(rows):
            assert not self._sequences or (todo == 0).any(), "sequences are left, but none can go on"
            return None
        return self.rows.mixed(rows, np.concatenate(counts))

    def _todo(self) -> tuple[Indices, Int32]:
        """The running sequences' rows in order of service, and how many tokens each has to compute."""
        if self._order is None:
            self._order = np.array([sequence.row for sequence in self.running], np.intp)
        return self._order, self.rows.known.take(self._order) - self.rows.computed.take(self._order)

    def _admit_within(self, budget: int) -> tuple[Indices, Int32]:
        """Let waiting sequences run. Gives their rows and how many tokens each computes."""
        rows, counts = [], []
        while budget and len(self.running) < self.capacity and (admitted := self._admit()):
            rows.append(admitted.row)
            counts.append(min(admitted.known - admitted.computed, budget))
            budget -= counts[-1]
        return np.array(rows, np.intp), np.array(counts, np.int32)

    def _admit(self) -> S | None:
        while self._waiting and self._waiting[0][2].finished:
            heappop(self._waiting)  # it was removed
        if not self._waiting:
            return None
        sequence = self._waiting[0][2]
        if not self._hold(sequence, spare=len(self.running), row=self.rows.next_free):
            return None
        heappop(self._waiting)
        self.rows.seat(sequence)
        insort(self.running, sequence, key=lambda other: other.key)
        self._order = None
        return sequence

    def _grow(self, full: Indices) -> None:
        """A block for each of these rows that is full, at the cost of the last sequences in order of service.

        None of those comes back in the same step: it would need as many blocks as it gave back, and one of them is taken.
        """
        owners: list[S] = self.rows.owners.take(full).tolist()
        if (new := self.blocks.extend(owners)) is not None:
            self.rows.give(full, new)
            return
        for sequence in owners:
            while sequence.row >= 0 and not self._hold(sequence, spare=0, row=sequence.row):
                victim = self.running.pop()
                self._release(victim)
                victim.preemptions += 1
                self.preemptions += 1
                heappush(self._waiting, (*victim.key, victim))

    def _hold(self, sequence: S, spare: int, row: int) -> bool:
        """Blocks for all known tokens of a sequence that has the row, or is to get it."""
        new = self.blocks.allocate(sequence, sequence.known, spare)
        if new is None:
            return False
        self.rows.give(row, new)
        return True

    def _release(self, sequence: S) -> None:
        self.blocks.free(sequence)
        self.rows.leave(sequence)
        self._order = None
