"""The engine ABI, as numpy sees it: one ragged batch goes in, logits come out. ``docs/engine-format.md`` is the contract.

T tokens, B sequences, P blocks a sequence, R rows of logits.

Every sequence contributes the tokens it has not computed yet: many in prefill, one in decode, and a step mixes both.

    token_ids      [ a0 a1 a2 | b0 | c0 c1 ]        T = 6
    positions      [  0  1  2 | 57 | 16 17 ]
    query_starts   [ 0          3    4       6 ]    B + 1
    kv_lengths     [ 3          58   18 ]           tokens in the cache after this step
    logit_rows     [ 2, 3, 5 ]                      rows of the batch whose logits are wanted
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EngineLimits:
    """What a session accepts in one step and holds in its pools; see ``zoo.spec.Limits``."""

    max_tokens: int
    max_sequences: int
    max_rows: int
    max_context: int
    max_blocks: int
    block_size: int


@dataclass
class Batch:
    """One step's input. All arrays are int32 and C-contiguous.

    token_ids [T]       an id >= 0; -(r + 1) names "the token sampled in row r of the previous step" (sessions that sample)
    positions [T]       row of the position tables for each token: its position in its sequence, plus, where an engine has
                        several rotary tables, the row where the sequence's begins (``RopeTables``)
    query_starts [B+1]  where each sequence's tokens begin; query_starts[B] == T
    kv_lengths [B]      tokens of each sequence in the cache after this step
    block_tables        group -> [B, P]; unused entries are 0, the reserved block
    logit_rows [R]      which of the T rows to give logits for
    """

    token_ids: Int32
    positions: Int32
    query_starts: Int32
    kv_lengths: Int32
    block_tables: dict[str, Int32]
    logit_rows: Int32


# How one row of logits becomes a token: 32 bytes a row, so that a step's rows are one copy to the device.
#
#   temperature   logits are divided by it; 0 is greedy, and then the rest does not matter
#   top_k         0: all
#   top_p         1: all
#   min_p         0: none
#   seed          low and high half of 64 bits
#   counter       which new token of its request this is, from 0: (seed, counter) decide the draw, batch mates do not
#   flags         HOST; and, shifted by SLOT_SHIFT, the slot of a request whose logits are adjusted (``Adjusting``), 0 for others
SAMPLING = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed", np.uint32, (2,)),
        ("counter", np.int32),
        ("flags", np.int32),
    ]
)
HOST = 1  # the row's token is chosen on the host from its logits; what the device gives for it means nothing
SLOT_SHIFT = 1


@dataclass
class Adjusting:
    """What a step does for requests whose logits are adjusted on the device: penalties, logit_bias, min_tokens.

    Such a request has a slot, from 1, as long as it runs. There the session keeps its words (``zoo.runtime.adjusting``) and, if
    it has penalties, counts the tokens that steps compute for it. By then names are resolved: a count needs nothing that the
    host may not know yet.

    started      slots that begin with this step, at their sequences' first tokens, each with its words
    counted [B]  the slot in which each sequence's tokens are counted, 0: none; None if no sequence's are
    listed       some row has words that change single logits
    penalized    some row has penalties
    """

    started: list[tuple[int, Int32]]
    counted: Int32 | None
    listed: bool
    penalized: bool


@dataclass
class Sampling:
    """How a session that samples is to choose a step's tokens.

    rows [R]        ``SAMPLING`` records, in the order of ``Batch.logit_rows``
    host_rows [H]   rows, rising, whose logits are wanted instead of a token; those with the flag HOST
    greedy          no row draws: every row that the device chooses has temperature 0
    adjusting       None if no request of the step has a slot
    """

    rows: npt.NDArray[np.void]
    host_rows: Int32
    greedy: bool
    adjusting: Adjusting | None = None


@dataclass
class StepResult:
    """One step's output.

    logits [R, vocab]   float32; of a step with a ``Sampling`` [H, vocab], the rows ``host_rows``; None if H is 0
    token_ids [R]       int32, of a step with a ``Sampling``; -1 for a row whose largest logit is no finite number (NaN counts
                        as largest). Those of ``host_rows`` mean nothing
    """

    logits: Float32 | None = None
    token_ids: Int32 | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Session(Protocol):
    """A loaded engine. Knows tensors, not requests. Not thread-safe: one thread steps it."""

    limits: EngineLimits
    vocab_size: int

    def step(self, batch: Batch) -> StepResult:
        """Run one batch and give the logits of its ``logit_rows``. The pools are the session's own and keep what was written."""
        ...

    def close(self) -> None:
        """Free the engine, once the steps that were submitted are over. Calling it twice is allowed."""
        ...


class Ticket(Protocol):
    """A step that was submitted."""

    def result(self) -> StepResult:
        """Wait for the step. To be called once; the arrays are valid until the next ``submit``. Raises what the step raised."""
        ...


class SamplingSession(Session, Protocol):
    """A session that chooses tokens itself, and runs a step while its caller does something else; ``samples`` is True.

    Steps run in the order they are submitted, each as if the one before were over. So a block may go to another sequence as
    soon as the last step that uses it is submitted, and a step may name tokens that the step before it has yet to sample:
    its token_ids may hold -(r + 1) for row r of the step submitted last. (Where that token is -1, 0 is computed in its
    place: the caller will drop what comes of it.)

    At most ``STEPS_AHEAD`` + 1 tickets are open at a time, and their results are asked for in order.
    """

    samples: bool

    def reserve(self, slots: int) -> bool:
        """Whether requests may have the slots 1 to ``slots`` (``Adjusting``), which are at most as many as sequences fit a step.

        What was granted once stays. Where it is refused, the host chooses the tokens of such a request.
        """
        ...

    def submit(self, batch: Batch, sampling: Sampling | None = None) -> Ticket:
        """Start a step and return at once; what is handed over may be changed as soon as this returns.

        Without a ``Sampling`` the result has the logits of all rows and no tokens, and the next step names none of them:
        ``step(batch)`` is ``submit(batch).result()``. After a submit that raised, the caller waits for all open tickets
        before it submits again, and names no tokens then.
        """
        ...


RopeTables = tuple[tuple[int, int], ...]  # (length, first row): the first that is as long as a sequence may become is its own


def rope_tables(session: Session) -> RopeTables:
    """The rotary tables among which a sequence's length decides; empty for a session without the attribute ``rope_tables``.

    See ``rope_tables`` in docs/engine-format.md.
    """
    return cast(RopeTables, getattr(session, "rope_tables", ()))


STEPS_AHEAD = 1  # steps that may be submitted before the result of the one before is read


def sampling_session(session: Session) -> SamplingSession | None:
    """The session, if it samples. A session without the attribute ``samples`` does not."""
    return cast(SamplingSession, session) if getattr(session, "samples", False) else None
