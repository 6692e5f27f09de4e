"""The running sequences' state as arrays, a row each, and the steps that are laid out from it without a loop over sequences.

C rows, L tokens of the longest sequence, P blocks of it; T tokens, B sequences, R rows of logits of a step.

A step of nothing but decode is what a step is most of the time, so what does not change between two of them is kept.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from zoo.runtime.abi import HOST, SAMPLING, SLOT_SHIFT, Adjusting, Batch, Int32, Sampling
from zoo.runtime.sequence import Sequence

S = TypeVar("S", bound=Sequence)
Indices = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]
NOBODY = np.empty(0, np.int32)


class Group(Generic[S]):
    """Some rows in order, and what stays the same as long as their sequences run."""

    def __init__(self, state: Rows[S], rows: Indices) -> None:
        self.rows = rows
        self.sequences: list[S] = state.owners.take(rows).tolist()
        self.starts = rows * state.length  # of their tokens in ``flat_tokens``
        self.limit = state.limit.take(rows)
        self.prompt = state.prompt.take(rows)
        self.host_until = state.host_until.take(rows)
        self.hosted = bool(self.host_until.any())
        self.records = state.sampling.take(rows)
        self.greedy = not self.records["temperature"].any()
        self.first_row = state.first_rows(rows)
        self.listed_until = state.listed_until.take(rows) if state.adjusts else None
        self.counted = state.counted(rows)
        self.names = -1 - np.arange(len(rows), dtype=np.int32)


@dataclass(slots=True)
class Step(Generic[S]):
    """A planned step: its batch, the batch's sequences in order, and those that get a row of logits, in order of rows.

    group        the sampled sequences' rows
    places [R]   where their new tokens go
    last [R]     whether those are the last ones, by the sequences' limits; None if none is
    departures   of all rows until the step was planned
    counted [B]  the slots in which its sequences' tokens are counted; None if nobody's are
    started      slots that begin with it, and their words
    """

    batch: Batch
    sequences: list[S]
    sampled: list[S]
    group: Group[S]
    places: Int32
    last: Bools | None
    departures: int
    counted: Int32 | None = None
    started: list[tuple[int, Int32]] = field(default_factory=list)

    @property
    def counters(self) -> Int32:
        """Which new token of its sequence each row's is, from 0. [R]"""
        return self.places - self.group.prompt


class Rows(Generic[S]):
    """What the scheduler keeps for running sequences.

    tokens [C, L]    tables [C, P]    known, computed, limit, prompt [C] as in ``Sequence``
    room [C]         tokens that the row's blocks hold
    sampling [C]     ``SAMPLING`` records, their counters and flags aside
    host_until [C]   while it knows fewer tokens than this, its tokens are chosen on the host
    listed_until [C] and counting [C], the slot or 0, as in ``Adjustment``; a row whose logits are adjusted has a slot
    first_row [C]    where the row's rotary table begins, as in ``Sequence``
    owners [C]       the sequences
    """

    def __init__(self, capacity: int, length: int, block_size: int) -> None:
        self.length, self.block_size = length, block_size
        self.tokens = np.empty((capacity, length), np.int32)
        self.flat_tokens = self.tokens.reshape(-1)
        self.tables = np.zeros((capacity, -(-length // block_size)), np.int32)
        self.known, self.computed, self.room, self.limit, self.prompt, self.host_until = np.zeros((6, capacity), np.int32)
        self.sampling = np.zeros(capacity, SAMPLING)
        self.first_row = np.zeros(capacity, np.int32)
        self.slots, self.listed_until, self.counting = np.zeros((3, capacity), np.int32)
        self._free_slots = list(range(1, capacity + 1))[::-1]
        self.owners = np.full(capacity, None, object)
        self._free = list(range(capacity))[::-1]
        self._departures = 0
        self._last_left = np.zeros(capacity, np.int64)  # which departure was the last one from each row
        self._decode: Group[S] | None = None  # the rows of the last step that was nothing but decode
        self._table: Int32 | None = None  # its block table, as long as nobody has got a block

    @property
    def adjusts(self) -> bool:
        """Whether some row has a slot."""
        return len(self._free_slots) < len(self.slots)

    def counted(self, rows: Indices) -> Int32 | None:
        """The slots in which these rows' tokens are counted; None if nobody's are."""
        counting = self.counting.take(rows) if self.adjusts else NOBODY
        return counting if counting.any() else None

    @property
    def next_free(self) -> int:
        """The row that the next sequence gets."""
        return self._free[-1]

    def seat(self, sequence: S) -> None:
        """Give a waiting sequence the next free row."""
        row, tokens = self._free.pop(), sequence.tokens
        self.known[row], self.computed[row] = len(tokens), sequence.computed
        self.tokens[row, : len(tokens)] = tokens
        self.limit[row], self.prompt[row], self.host_until[row] = sequence.limit, sequence.prompt_length, sequence.host_until
        self.first_row[row] = sequence.first_row
        if sequence.sampling is not None:
            self.sampling[row] = sequence.sampling
        if (adjustment := sequence.adjustment) is not None:
            slot = self.slots[row] = self._free_slots.pop()
            self.sampling["flags"][row] = slot << SLOT_SHIFT
            self.listed_until[row], self.counting[row] = adjustment.listed_until, slot if adjustment.counts else 0
        self.owners[row] = sequence
        sequence.sit(self, row)

    def leave(self, sequence: S) -> None:
        """Take the row of a sequence, which keeps its tokens and has nothing computed any more."""
        row = sequence.row
        sequence.stand()
        self.tables[row] = 0
        self.room[row] = 0
        if slot := int(self.slots[row]):
            self._free_slots.append(slot)
            self.slots[row] = self.listed_until[row] = self.counting[row] = 0
        self.owners[row] = None
        self._departures += 1
        self._last_left[row] = self._departures
        self._free.append(row)

    def give(self, rows: int | Indices, blocks: Items[int]) -> None:
        """More blocks: one for each of these rows, or all for one row."""
        held = self.room[rows] // self.block_size
        if isinstance(rows, int):
            self.tables[rows, held : held + len(blocks)] = blocks
            self.room[rows] += len(blocks) * self.block_size
        else:
            self.tables[rows, held] = blocks
            self.room[rows] += self.block_size
        self._table = None

    def first_rows(self, rows: Indices) -> Int32 | None:
        """Where these rows' rotary tables begin; None if all begin at 0, as they do in most models."""
        first = self.first_row.take(rows)
        return first if np.count_nonzero(first) else None

    def full(self, rows: Indices) -> Indices:
        """Those of these rows whose blocks do not hold their known tokens."""
        over = self.known.take(rows) > self.room.take(rows)
        return rows[over] if np.count_nonzero(over) else rows[:0]

    def decode(self, rows: Indices) -> Step[S]:
        """The step in which each of these rows computes the one token it is behind, and is sampled."""
        group = self._decode
        if group is None or group.rows is not rows:
            group = self._decode = Group(self, rows)
            self._table = None
        places = self.known.take(rows)
        positions = places - np.int32(1)
        self.computed[rows] = places
        if self._table is None:
            self._table = self.tables[rows, : int(self.room.take(rows).max()) // self.block_size]
        starts = np.arange(len(rows) + 1, dtype=np.int32)
        batch = Batch(
            token_ids=self.flat_tokens.take(group.starts + positions),
            positions=positions if group.first_row is None else positions + group.first_row,
            query_starts=starts,
            kv_lengths=places,
            block_tables={"full": self._table},
            logit_rows=starts[:-1],
        )
        return self._sampled(batch, group.sequences, group, places, group.counted)

    def mixed(self, rows: Indices, counts: Int32) -> Step[S]:
        """The step in which each of these rows computes so many tokens; those that catch up are sampled."""
        computed = self.computed.take(rows)
        kv_lengths = computed + counts
        self.computed[rows] = kv_lengths
        query_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        positions = np.arange(query_starts[-1], dtype=np.int32) - np.repeat(query_starts[:-1] - computed, counts)
        first_row, caught_up = self.first_rows(rows), kv_lengths == self.known.take(rows)
        batch = Batch(
            token_ids=self.flat_tokens.take(np.repeat(rows * self.length, counts) + positions),
            positions=positions if first_row is None else positions + np.repeat(first_row, counts),
            query_starts=query_starts,
            kv_lengths=kv_lengths,
            block_tables={"full": self.tables[rows, : -(-int(kv_lengths.max()) // self.block_size)]},
            logit_rows=query_starts[1:][caught_up] - np.int32(1),
        )
        group, places = Group(self, rows[caught_up]), kv_lengths[caught_up]
        step = self._sampled(batch, self.owners.take(rows).tolist(), group, places, self.counted(rows))
        if self.adjusts:
            step.started = self._started(rows[computed == 0])
        return step

    def _started(self, rows: Indices) -> list[tuple[int, Int32]]:
        """Slots that begin. Their counts are right because all that the cache will hold of these rows is yet to be computed."""
        found = zip(self.slots.take(rows).tolist(), self.owners.take(rows).tolist(), strict=True)
        return [(slot, owner.adjustment.words) for slot, owner in found if slot]

    def _sampled(self, batch: Batch, sequences: list[S], group: Group[S], places: Int32, counted: Int32 | None) -> Step[S]:
        last = places + 1 == group.limit
        ends = last if np.count_nonzero(last) else None
        return Step(batch, sequences, group.sequences, group, places, ends, self._departures, counted)

    def sample(self, step: Step[S]) -> Sampling:
        """How the step's rows become tokens."""
        group = step.group
        records = group.records.copy()
        records["counter"] = step.counters
        adjusting = self._adjusting(step)
        if not group.hosted:
            return Sampling(records, NOBODY, group.greedy, adjusting)
        hosted = step.places < group.host_until
        records["flags"][hosted] = HOST
        greedy = not records["temperature"][~hosted].any()
        return Sampling(records, np.flatnonzero(hosted).astype(np.int32), greedy, adjusting)

    def _adjusting(self, step: Step[S]) -> Adjusting | None:
        until, penalized = step.group.listed_until, step.group.counted is not None
        listed = until is not None and bool(np.count_nonzero(step.places < until))
        if listed or step.counted is not None or step.started:
            return Adjusting(step.started, step.counted, listed, penalized)
        return None

    def expect(self, step: Step[S], sampling: Sampling) -> None:
        """Let the tokens that the submitted step will sample be known by their names, unless they are the last ones."""
        named = None
        if step.last is not None or len(sampling.host_rows):
            named = np.ones(len(step.places), np.bool_) if step.last is None else ~step.last
            named[sampling.host_rows] = False
        self._put(step, step.group.names, named)

    def settle(self, step: Step[S], token_ids: Int32) -> None:
        """Put the tokens [R] that a step gave in their places."""
        stayed = None
        if self._departures > step.departures:  # since the step was planned
            stayed = self._last_left.take(step.group.rows) <= step.departures
            for index in np.flatnonzero(~stayed).tolist():
                if not step.sampled[index].finished:  # it was preempted
                    step.sampled[index].put(int(step.places[index]), int(token_ids[index]))
        self._put(step, token_ids, stayed)

    def _put(self, step: Step[S], token_ids: Int32, which: Bools | None) -> None:
        rows, starts, places = step.group.rows, step.group.starts, step.places
        if which is not None:
            rows, starts, places, token_ids = rows[which], starts[which], places[which], token_ids[which]
        self.flat_tokens[starts + places] = token_ids
        self.known[rows] = np.maximum(self.known.take(rows), places + 1)  # it may know the name of the next one already
