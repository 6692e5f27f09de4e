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
from typing import Any, Protocol

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
    positions [T]       position of each token in its sequence
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


@dataclass
class StepResult:
    """One step's output. logits [R, vocab] float32; a session that samples gives ``token_ids`` [R] instead."""

    logits: Float32 | None = None
    token_ids: Int32 | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Session(Protocol):
    """A loaded engine. Knows tensors, not requests. Not thread-safe: one thread steps it."""

    limits: EngineLimits
    vocab_size: int

    def step(self, batch: Batch) -> StepResult:
        """Run one batch. The cache pools are the session's own and keep what earlier steps wrote."""
        ...

    def close(self) -> None:
        """Free the engine. Calling it twice is allowed."""
        ...
