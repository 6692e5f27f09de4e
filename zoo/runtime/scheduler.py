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

Where more belongs: prefix caching starts ``computed`` above 0 in ``_admit``; speculation makes a sequence several tokens known
at once and asks for several rows; overlapped scheduling appends -(row + 1) as a token that the session knows, which works
because ``computed`` moves on when a step is planned, not when it is done.

T tokens, B sequences, P blocks of the longest of them, R rows.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from zoo.runtime.abi import Batch, EngineLimits
from zoo.runtime.blocks import BlockManager
from zoo.runtime.sequence import Sequence


@dataclass(slots=True)
class Step:
    """A planned step: its batch, the batch's sequences in order, and those that get a row of logits, in order of rows."""

    batch: Batch
    sequences: list[Sequence]
    sampled: list[Sequence]


class Scheduler:
    """Plans steps for any number of sequences within an engine's limits. Pure bookkeeping: no tensors, no clock."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.max_blocks, limits.block_size)
        # A running sequence may want a token and a row in every step, so no more run than fit.
        self.capacity = min(limits.max_sequences, limits.max_rows, limits.max_tokens)
        # The longest sequence that can be served when it is alone.
        self.max_length = min(limits.max_context, self.blocks.total_blocks * limits.block_size)
        self.running: list[Sequence] = []  # in order of service
        self.preemptions = 0
        self._waiting: list[tuple[int, int, Sequence]] = []  # a heap in order of service
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._tables = np.zeros((self.capacity, self.blocks.blocks_for(self.max_length)), np.int32)
        self._rows = list(range(self.capacity))[::-1]

    def __len__(self) -> int:
        """Sequences that are not finished."""
        return len(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    @property
    def waiting(self) -> int:
        """Sequences that are not running."""
        return len(self._sequences) - len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its id must be new and its limit at most ``max_length``."""
        assert sequence.request_id not in self._sequences and sequence.limit <= self.max_length
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[sequence.request_id] = sequence
        heappush(self._waiting, (*sequence.key, sequence))

    def remove(self, request_id: str) -> bool:
        """Forget a sequence, finished or not, and take its blocks back. False if there is no such sequence."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence.row >= 0:
            self._release(sequence)
            self.running.remove(sequence)
        return True  # a waiting one is dropped from the heap when it comes up

    def schedule(self) -> Step | None:
        """Plan the next step; None when there is nothing to do. The planned tokens count as computed from here on."""
        budget = self.limits.max_tokens
        chunks: list[tuple[Sequence, int]] = []
        behind: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.known - sequence.computed > 1:
                behind.append(sequence)  # also one that was preempted just now
            elif sequence.known <= sequence.room or self._grow(sequence):
                chunks.append((sequence, 1))
        budget -= len(chunks)
        for sequence in behind:
            if budget and sequence.row >= 0:
                count = min(sequence.known - sequence.computed, budget)
                chunks.append((sequence, count))
                budget -= count
        while budget and len(self.running) < self.capacity and (admitted := self._admit()):
            count = min(admitted.known - admitted.computed, budget)
            chunks.append((admitted, count))
            budget -= count
        assert chunks or not self._sequences, "sequences are left, but none can go on"
        return self._step(chunks) if chunks else None

    def _admit(self) -> Sequence | None:
        while self._waiting and self._sequences.get(self._waiting[0][2].request_id) is not self._waiting[0][2]:
            heappop(self._waiting)  # it was removed
        if not self._waiting:
            return None
        sequence = self._waiting[0][2]
        if not self._hold(sequence, sequence.known, spare=len(self.running), row=self._rows[-1]):
            return None
        heappop(self._waiting)
        sequence.row = self._rows.pop()
        insort(self.running, sequence, key=lambda other: other.key)
        return sequence

    def _grow(self, sequence: Sequence) -> bool:
        """Blocks for all known tokens, at the cost of later sequences; False if it was itself the last and had to go."""
        while not self._hold(sequence, sequence.known, spare=0, row=sequence.row):
            victim = self.running.pop()
            self._release(victim)
            victim.computed = 0
            victim.preemptions += 1
            self.preemptions += 1
            heappush(self._waiting, (*victim.key, victim))
            if victim is sequence:
                return False
        return True

    def _hold(self, sequence: Sequence, tokens: int, spare: int, row: int) -> bool:
        new = self.blocks.allocate(sequence, tokens, spare)
        if new is None:
            return False
        held = sequence.room // self.limits.block_size
        self._tables[row, held : held + len(new)] = new
        sequence.room += len(new) * self.limits.block_size
        return True

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        self._tables[sequence.row] = 0
        self._rows.append(sequence.row)
        sequence.row, sequence.room = -1, 0

    def _step(self, chunks: list[tuple[Sequence, int]]) -> Step:
        """Lay the chunks out as one ragged batch, and count their tokens as computed."""
        sequences = [sequence for sequence, _ in chunks]
        counts = np.array([count for _, count in chunks], np.int32)
        computed = np.array([sequence.computed for sequence in sequences], np.int32)
        query_starts = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        positions = np.arange(query_starts[-1], dtype=np.int32) - np.repeat(query_starts[:-1] - computed, counts)
        kv_lengths = computed + counts
        width = self.blocks.blocks_for(int(kv_lengths.max()))
        token_ids = np.concatenate([sequence.tokens[(at := sequence.computed) : at + count] for sequence, count in chunks])
        sampled, rows = [], []
        for index, (sequence, count) in enumerate(chunks):
            sequence.computed += count
            if sequence.computed == sequence.known:
                sampled.append(sequence)
                rows.append(index)
        batch = Batch(
            token_ids=token_ids,
            positions=positions,
            query_starts=query_starts,
            kv_lengths=kv_lengths,
            block_tables={"full": self._tables[[sequence.row for sequence in sequences], :width]},
            logit_rows=query_starts[1:][rows] - np.int32(1),
        )
        return Step(batch, sequences, sampled)
