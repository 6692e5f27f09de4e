"""What a step sends to the GPU and how large it is, as it comes or padded to a shape that is captured.

A captured step has one token for each of ``size`` sequences. Those behind the batch's own have no tokens (query_starts stays
where it is), so attention passes over them; their tokens are 0 and go into block 0, and nobody reads their logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zoo.runtime.abi import SAMPLING, Batch, EngineLimits, Sampling
from zoo.runtime.cuda_indices import CUDA_INDEX_BUILDERS, decode_splits
from zoo.runtime.indices import GROUP

Array = np.ndarray[Any, Any]
CAPTURED = 1024  # sequences up to which a decode step is captured


class Shape(Protocol):
    """What of an engine decides the sizes of a step."""

    index_inputs: tuple[str, ...]
    kv_heads: int


@dataclass
class Step:
    """arrays: inputs by name, in the order they are sent. sizes: T, B, R, W, S, P and J. chooser: which sampling follows.

    adjusting: what runs behind the graph and before that; nothing in a step without a request whose logits are adjusted.
    """

    arrays: dict[str, Array]
    sizes: dict[str, int]
    chooser: str
    adjusting: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured graph of it depends on."""
        return (self.chooser, *self.sizes.values(), *self.adjusting)


def bucket(sequences: int, most: int) -> int:
    """``sequences`` rounded up to one of few numbers: 1, 2, 4, 8, then four steps for each doubling; 0 over ``most``."""
    step = 1 << max(0, (sequences - 1).bit_length() - 3) if sequences > 8 else 1
    size = -(-sequences // step) * step if sequences > 8 else 1 << (sequences - 1).bit_length()
    return min(size, most) if sequences <= most else 0


def power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def captured_size(batch: Batch, limits: EngineLimits) -> int:
    """To how many sequences a step is padded and captured; 0 for one that is launched as it comes.

    A captured step has as many tokens and rows as sequences, so that all three limits bound it.
    """
    count = len(batch.kv_lengths)
    if len(batch.token_ids) != count or len(batch.logit_rows) > count or np.diff(batch.query_starts).min() != 1:
        return 0
    return bucket(count, min(limits.max_sequences, limits.max_tokens, limits.max_rows, CAPTURED))


def eager_step(batch: Batch, sampling: Sampling | None, limits: EngineLimits, shape: Shape) -> Step:
    """A step as it comes."""
    table = batch.block_tables[GROUP]
    arrays = {
        "token_ids": batch.token_ids,
        "positions": batch.positions,
        "query_starts": batch.query_starts,
        "kv_lengths": batch.kv_lengths,
        "block_table.full": np.ascontiguousarray(table),
        "logit_rows": batch.logit_rows,
        **{name: CUDA_INDEX_BUILDERS[name](batch, limits) for name in shape.index_inputs},
    }
    if sampling is not None:
        arrays["sampling"] = sampling.rows
    if sampling is not None and sampling.adjusting is not None and sampling.adjusting.counted is not None:
        arrays["counted"] = sampling.adjusting.counted
    single = np.diff(batch.query_starts) == 1
    longest = int(batch.kv_lengths[single].max(initial=0))
    sizes = {
        "T": len(batch.token_ids),
        "B": len(batch.kv_lengths),
        "R": len(batch.logit_rows),
        "W": len(arrays["prefill_tiles"]) if "prefill_tiles" in arrays else 0,
        "S": decode_splits(max(1, int(single.sum())), shape.kv_heads, max(1, longest), limits),
        "P": table.shape[1],
    }
    sizes["J"] = int(sizes["S"] > 1)
    return Step(arrays, sizes, _chooser(sampling), _adjusting(sampling))


def captured_step(batch: Batch, sampling: Sampling | None, limits: EngineLimits, shape: Shape, size: int) -> Step:
    """A step of one token a sequence, padded to ``size`` sequences and a table of a power of two of blocks."""
    made = eager_step(batch, sampling, limits, shape)
    count, width = len(batch.kv_lengths), min(power_of_two(made.sizes["P"]), -(-limits.max_context // limits.block_size))
    width = max(width, made.sizes["P"])
    arrays = made.arrays
    table = np.zeros((size, width), np.int32)
    table[:count, : made.sizes["P"]] = arrays["block_table.full"]
    arrays["block_table.full"] = table
    arrays["query_starts"] = _longer(arrays["query_starts"], size + 1, count)
    arrays["kv_lengths"] = _longer(arrays["kv_lengths"], size, 1)
    for name in ("token_ids", "positions", "logit_rows", "token_slots", "sampling", "counted"):
        if name in arrays:
            arrays[name] = _longer(arrays[name], size, np.zeros((), SAMPLING) if name == "sampling" else 0)
    longest = power_of_two(int(batch.kv_lengths.max()))
    splits = decode_splits(size, shape.kv_heads, min(longest, limits.max_context), limits)
    sizes = {"T": size, "B": size, "R": size, "W": 0, "S": splits, "P": width, "J": int(splits > 1)}
    return Step(arrays, sizes, made.chooser, made.adjusting)


def _longer(array: Array, size: int, value: Any) -> Array:
    out: Array = np.full(size, value, array.dtype)
    out[: len(array)] = array
    return out


def _chooser(sampling: Sampling | None) -> str:
    if sampling is None:
        return ""
    return "greedy" if sampling.greedy else "sample"


def _adjusting(sampling: Sampling | None) -> tuple[str, ...]:
    if sampling is None or (adjusting := sampling.adjusting) is None:
        return ()
    wanted = {"count": adjusting.counted is not None, "listed": adjusting.listed, "penalized": adjusting.penalized}
    return tuple(name for name, runs in wanted.items() if runs)


def input_bytes(inputs: Mapping[str, tuple[str, ...]], limits: EngineLimits) -> dict[str, int]:
    """The most bytes of each input."""
    blocks = -(-limits.max_context // limits.block_size)
    sides = {"T": limits.max_tokens, "B": limits.max_sequences, "R": limits.max_rows, "P": blocks, "W": limits.max_tokens}
    sides["B+1"] = limits.max_sequences + 1
    sizes = {}
    for name, shape in inputs.items():
        total = 4
        for side in shape:
            total *= int(side) if str(side).isdigit() else sides[side]
        sizes[name] = total
    return sizes | {"sampling": limits.max_rows * SAMPLING.itemsize, "counted": 4 * limits.max_sequences}
