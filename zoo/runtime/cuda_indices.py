"""Index inputs of the ``cuda`` target, and into how many parts a decode step cuts its contexts; see ``zoo.runtime.indices``.

T tokens, B sequences, P blocks a sequence, W prefill tiles, S splits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zoo.runtime.abi import Batch, EngineLimits
from zoo.runtime.indices import GROUP, Indices, token_positions

TILE = 128  # queries of a prefill tile, at most; kernels are compiled for it (``zoo.plugins.cached_attention``)
WANTED = 1056  # programs of a decode step: two for each of the four that each of 132 multiprocessors can hold
LEAST = 128  # positions of one part of a context, below which a program costs more than it saves
WHOLE = 256  # positions up to which no context is split: joining parts is a kernel more, and costs more than it saves
MOST = 128  # parts of one context: what merging them may cost


def token_slots(batch: Batch, limits: EngineLimits) -> Indices:
    """[T] int32: block * block_size + place of each token's key and value in a pool; in block 0 for padding tokens.

    Tokens behind the last sequence, if a step is padded that way, are padding, too.
    """
    slots = np.zeros(len(batch.positions), np.int32)
    sequence, positions = token_positions(batch)
    block = batch.block_tables[GROUP][sequence, positions // limits.block_size]
    slots[: len(sequence)] = block * limits.block_size + positions % limits.block_size
    return slots


def prefill_tiles(batch: Batch, limits: EngineLimits) -> Indices:
    """[W, 4] int32: at most ``TILE`` queries each of the sequences that have several new tokens, longest contexts first.

    sequence, row of its first query in the batch, number of queries, position of its first query. A sequence with more new
    tokens than context is padding, whose output nobody reads, and has no tiles.
    """
    counts = np.diff(batch.query_starts)
    before = batch.kv_lengths - counts
    tiles = np.where((counts > 1) & (before >= 0), -(-counts // TILE), 0)
    sequence = np.repeat(np.arange(len(counts), dtype=np.int32), tiles)
    nth = np.arange(len(sequence), dtype=np.int32) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    begin = nth * TILE
    queries = np.minimum(counts[sequence] - begin, TILE)
    position = before[sequence] + begin
    made = np.stack([sequence, batch.query_starts[sequence] + begin, queries, position], axis=1).astype(np.int32)
    return made[np.argsort(-(position + queries), kind="stable")]


def decode_splits(sequences: int, kv_heads: int, longest: int, limits: EngineLimits) -> int:
    """S: into how many parts, at most, each context of a step is cut for decode, so that a GPU has enough programs.

    sequences  with one new token        kv_heads  of one rank        longest  of their contexts

    Any number gives the same result: kernels cut a context into fewer parts where it is short or scratch is full. A captured
    step takes the number for its bucket of sequences and the longest context that it may meet.
    """
    if min(longest, limits.max_context) <= WHOLE:
        return 1
    wanted = max(WANTED // max(sequences * kv_heads, 1), 1)
    return max(min(wanted, -(-min(longest, limits.max_context) // LEAST), MOST), 1)


CUDA_INDEX_BUILDERS: dict[str, Callable[[Batch, EngineLimits], Indices]] = {
    "token_slots": token_slots,
    "prefill_tiles": prefill_tiles,
}
