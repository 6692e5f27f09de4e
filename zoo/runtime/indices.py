"""Index inputs: integers that one target's lowering of attention needs, derived from a batch in numpy once a step.

An engine's manifest lists the index inputs it declares; ``INDEX_BUILDERS`` has the function for each name. Those of paged
attention follow the block table of the group ``full``; those of an encoder read ``query_starts`` alone.

T tokens, B sequences, P blocks a sequence, L the longest query of the step, C blocks of all contexts, W work items, N the
longest context of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.runtime.abi import Batch, EngineLimits

Indices = npt.NDArray[Any]
GROUP = "full"
TILE = 64  # queries of one work item: bounds an item's scores to heads x 64 x context
TEXT_TILE = 256  # queries of one tile of a text: bounds scores to heads x 256 x context
WINDOW_TILE = 64  # the same where layers have a window, whose keys are those within half of it of the tile
TOGETHER = 4096  # most places of contexts, padded to the longest, that a decode step gathers at once


def pool_slots(batch: Batch, limits: EngineLimits) -> Indices:
    """[T, 2, 3] int64: where each token's key and value go in a pool, as (block, 0 or 1, place in the block)."""
    sequence, positions = token_positions(batch)
    block = batch.block_tables[GROUP][sequence, positions // limits.block_size]
    return _slots(block, positions % limits.block_size)


def token_positions(batch: Batch) -> tuple[Indices, Indices]:
    """The sequence of each token, and its position there: [T] int64 both.

    ``batch.positions`` may begin elsewhere than at 0, where a model has several rotary tables. Tokens behind the last sequence
    are padding and left out; a padding sequence has more tokens than context, all of which stand at position 0.
    """
    counts = np.diff(batch.query_starts).astype(np.int64)
    sequence = np.repeat(np.arange(len(counts)), counts)
    first = batch.kv_lengths - batch.query_starts[1:]
    return sequence, np.maximum(np.arange(len(sequence)) + first[sequence], 0)


def pool_writes(batch: Batch, limits: EngineLimits) -> Indices:
    """[S, 2, 3] int64: ``pool_slots``, then the places behind each sequence's newest token in its last block.

    The newest token was written by this step, so nobody else reads that block: the lowering fills the rest of it with
    zeros, and what an earlier owner left there cannot reach a sum.
    """
    active, last = _newest(batch)
    block = batch.block_tables[GROUP][active, last // limits.block_size]
    row, place = np.nonzero(np.arange(limits.block_size) > (last % limits.block_size)[:, None])
    return np.concatenate([pool_slots(batch, limits), _slots(block[row], place)])


def pool_blanks(batch: Batch, limits: EngineLimits) -> Indices:
    """[8] int64: the pads that make T rows of new keys and values [T, 2, K, D] the S rows of ``pool_writes``."""
    pads = np.zeros(8, np.int64)
    pads[4] = (limits.block_size - 1 - _newest(batch)[1] % limits.block_size).sum()
    return pads


def _newest(batch: Batch) -> tuple[Indices, Indices]:
    """The sequences with tokens in this step, and the positions of their newest."""
    active = np.flatnonzero(np.diff(batch.query_starts))
    return active, batch.kv_lengths[active].astype(np.int64) - 1


def context_blocks(batch: Batch, limits: EngineLimits) -> Indices:
    """[2, C, 2] int64: the blocks of every sequence's context, one sequence after the other, as (block, 0) and (block, 1)."""
    table = batch.block_tables[GROUP]
    used = _blocks(batch.kv_lengths, limits)
    blocks = table[np.arange(table.shape[1]) < used[:, None]]
    out = np.zeros((2, len(blocks), 2), np.int64)
    out[:, :, 0] = blocks
    out[1, :, 1] = 1
    return out


def row_positions(batch: Batch, limits: EngineLimits) -> Indices:
    """[T] int64: the position of each token."""
    return token_positions(batch)[1]


def work_items(batch: Batch, limits: EngineLimits) -> Indices:
    """[W, 7] int64: tiles of at most ``TILE`` queries of one sequence, in the order of the batch.

    first row, row behind the last; first entry of context_blocks, entry behind the last that the tile sees; context that
    its last query sees, the same rounded up to whole blocks; position of its first query.
    """
    starts = batch.query_starts[:-1].astype(np.int64)
    counts = np.diff(batch.query_starts).astype(np.int64)
    lengths = batch.kv_lengths.astype(np.int64)
    used = _blocks(batch.kv_lengths, limits)
    first_block = np.cumsum(used) - used
    tiles = -(-counts // TILE)
    sequence = np.repeat(np.arange(len(counts)), tiles)
    nth = np.arange(len(sequence)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    begin = nth * TILE
    stop = np.minimum(begin + TILE, counts[sequence])
    before = lengths[sequence] - counts[sequence]
    seen = np.maximum(before + stop, 1)
    blocks = -(-seen // limits.block_size)
    return np.stack(
        [
            starts[sequence] + begin,
            starts[sequence] + stop,
            first_block[sequence],
            first_block[sequence] + blocks,
            seen,
            blocks * limits.block_size,
            np.maximum(before + begin, 0),
        ],
        axis=1,
    )


def decode_step(batch: Batch, limits: EngineLimits) -> Indices:
    """[] bool: whether every sequence has one token and the contexts, padded to the longest, are few places.

    Padding may at most double what is gathered.
    """
    lengths = batch.kv_lengths.astype(np.int64)
    padded = len(lengths) * int(lengths.max(initial=0))
    single = bool((np.diff(batch.query_starts) == 1).all())
    return np.array(single and padded <= TOGETHER and padded <= 2 * int(lengths.sum()))


def decode_keys(batch: Batch, limits: EngineLimits) -> Indices:
    """[N, B, 3] int64: where each position's key lies, as (block, 0, place); N is 0 unless ``decode_step``.

    Positions behind a context name its last one, which is as finite as the sequence.
    """
    position = np.minimum(_decode_positions(batch, limits), batch.kv_lengths.astype(np.int64) - 1)
    out = np.zeros((*position.shape, 3), np.int64)
    out[..., 0] = batch.block_tables[GROUP][np.arange(position.shape[1]), position // limits.block_size]
    out[..., 2] = position % limits.block_size
    return out


def decode_values(batch: Batch, limits: EngineLimits) -> Indices:
    """[N, B, 3] int64: ``decode_keys`` with 1 in the middle: where each position's value lies."""
    out = decode_keys(batch, limits)
    out[..., 1] = 1
    return out


def decode_bias(batch: Batch, limits: EngineLimits) -> Indices:
    """[B, N] float32: 0 for a context's positions, minus infinity behind them."""
    behind = _decode_positions(batch, limits) >= batch.kv_lengths
    return np.ascontiguousarray(np.where(behind, np.float32(-np.inf), np.float32(0)).T)


def _decode_positions(batch: Batch, limits: EngineLimits) -> Indices:
    """[N, B]: 0 to the longest context, once for each sequence."""
    longest = int(batch.kv_lengths.max()) if decode_step(batch, limits) else 0
    return np.repeat(np.arange(longest)[:, None], len(batch.kv_lengths), axis=1)


def query_rows(batch: Batch, limits: EngineLimits) -> Indices:
    """[B, L] int32: the row of each sequence's l-th query; places behind its last query hold row 0."""
    counts = np.diff(batch.query_starts)
    nth = np.arange(max(int(counts.max(initial=0)), 1))
    rows = batch.query_starts[:-1, None] + nth
    return np.where(nth < counts[:, None], rows, 0).astype(np.int32)


def token_rows(batch: Batch, limits: EngineLimits) -> Indices:
    """[T] int32: where each token stands among the B * L places of ``query_rows``."""
    counts = np.diff(batch.query_starts)
    longest = max(int(counts.max(initial=0)), 1)
    sequence = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(sequence)) - batch.query_starts[:-1][sequence]
    return (sequence * longest + nth).astype(np.int32)


def text_tiles(batch: Batch, limits: EngineLimits) -> Indices:
    """[W, 4] int64: tiles of at most ``TEXT_TILE`` tokens of one text, in order: rows of its first token and behind its last;
    rows of its text's first token and behind its last."""
    return _tiles(batch, TEXT_TILE)


def window_tiles(batch: Batch, limits: EngineLimits) -> Indices:
    """[V, 4] int64: as ``text_tiles``, of at most ``WINDOW_TILE`` tokens."""
    return _tiles(batch, WINDOW_TILE)


def _tiles(batch: Batch, most: int) -> Indices:
    """Tiles of a text are equally long but for the last, so that none is a handful of tokens."""
    starts = batch.query_starts.astype(np.int64)
    counts = np.diff(starts)
    tiles = -(-counts // most)
    text = np.repeat(np.arange(len(counts)), tiles)
    nth = np.arange(len(text)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    length = -(-counts // np.maximum(tiles, 1))[text]
    begin = starts[text] + nth * length
    stop = starts[text + 1]
    return np.stack([begin, np.minimum(begin + length, stop), starts[text], stop], axis=1)


def _slots(block: Indices, place: Indices) -> Indices:
    out = np.zeros((len(block), 2, 3), np.int64)
    out[:, :, 0] = block[:, None]
    out[:, 1, 1] = 1
    out[:, :, 2] = place[:, None]
    return out


def _blocks(lengths: Indices, limits: EngineLimits) -> Indices:
    return -(-lengths.astype(np.int64) // limits.block_size)


INDEX_BUILDERS: dict[str, Callable[[Batch, EngineLimits], Indices]] = {
    "pool_slots": pool_slots,
    "pool_writes": pool_writes,
    "pool_blanks": pool_blanks,
    "context_blocks": context_blocks,
    "row_positions": row_positions,
    "work_items": work_items,
    "decode_step": decode_step,
    "decode_keys": decode_keys,
    "decode_values": decode_values,
    "decode_bias": decode_bias,
    "query_rows": query_rows,
    "token_rows": token_rows,
    "text_tiles": text_tiles,
    "window_tiles": window_tiles,
}
