"""A ragged step in parts, for engines that pad queries: one token of many sequences, or many tokens of a few.

T tokens, B sequences, P blocks a sequence, R rows of logits, L queries a sequence after padding.

Padded attention costs B x L, so its plans have two profiles (``zoo.compilers.tensorrt_model``): "decode" with L = 1, and
"prefill" with a small B. A step that mixes them becomes several calls, and each call's logits go to their rows. Sequences
share no blocks that a step writes, so the order of the calls does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.runtime.abi import Batch, Int32

DECODE, PREFILL = 0, 1  # profiles, in the order that a plan has them


@dataclass(frozen=True)
class Part:
    """Some sequences of a step as a batch of their own. ``rows``: where its logits belong among the step's."""

    profile: int
    batch: Batch
    rows: Int32


def split(batch: Batch, prefill_sequences: int, block_size: int) -> list[Part]:
    """A step as calls that each fit one profile: sequences of one token together, longer ones a few at a time.

    Longer ones are grouped by length, so that little is padded. Block tables are cut to the blocks that are in use.
    """
    counts = np.diff(batch.query_starts)
    single = np.flatnonzero(counts == 1)
    several = sorted(np.flatnonzero(counts > 1), key=lambda index: -int(counts[index]))
    groups = [(DECODE, single)] if len(single) else []
    for start in range(0, len(several), prefill_sequences):
        groups.append((PREFILL, np.array(several[start : start + prefill_sequences])))
    return [_part(profile, batch, np.sort(sequences), block_size) for profile, sequences in groups]


def _part(profile: int, batch: Batch, sequences: Any, block_size: int) -> Part:
    starts = batch.query_starts
    tokens = np.concatenate([np.arange(starts[one], starts[one + 1]) for one in sequences])
    local = np.full(len(batch.token_ids), -1, np.int32)
    local[tokens] = np.arange(len(tokens))
    rows = np.flatnonzero(local[batch.logit_rows] >= 0).astype(np.int32)
    lengths = batch.kv_lengths[sequences]
    blocks = max(1, -(-int(lengths.max()) // block_size))
    part = Batch(
        token_ids=batch.token_ids[tokens],
        positions=batch.positions[tokens],
        query_starts=np.concatenate([[0], np.cumsum(np.diff(starts)[sequences])]).astype(np.int32),
        kv_lengths=lengths,
        block_tables={name: np.ascontiguousarray(table[sequences, :blocks]) for name, table in batch.block_tables.items()},
        # An engine has at least one row; a part without any computes one that nobody reads.
        logit_rows=local[batch.logit_rows[rows]] if len(rows) else np.zeros(1, np.int32),
    )
    return Part(profile, part, rows)
