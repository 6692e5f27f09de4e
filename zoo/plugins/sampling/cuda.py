"""Launches that choose tokens behind the graph, and fill in token ids before it.

R rows of logits, V vocabulary. Tensors by name, which the session gives: logits [R, V] float32, sampling [R] records of 32
bytes, sampled [R] int32 (kept from step to step), token_ids [T] int32, and what ``scratch`` lists.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.plugins.adjusting import cuda as adjusting
from zoo.plugins.kernels import Arg, Kernel, Launch, Size, fixed

KERNELS = "zoo.plugins.sampling.kernels"
GROUP = 64  # logits: 256 bytes, 16 threads with 16 bytes each
BLOCK = 4096  # logits of a program that reads a row: 32 for each thread of 4 warps
SLOTS = 64  # groups that the search among filtered logits holds at once: 16 logits for each thread of 8 warps
RESOLVED = 1024  # token ids of a program


def launches(vocab_size: int) -> dict[str, list[Launch]]:
    """``greedy`` and ``sample`` fill ``sampled`` from ``logits``; ``resolve``, before the graph, completes ``token_ids``. Beside
    them what adjusts ``logits``.
    """
    choosers = {"greedy": greedy(vocab_size), "sample": sample(vocab_size), "resolve": resolve()}
    return choosers | adjusting.launches(vocab_size)


def scratch(vocab_size: int, max_rows: int) -> dict[str, int]:
    """Bytes of the tensors that the launches share between them: name -> size."""
    shape = _Shape(vocab_size)
    rows = {
        "sampling.best": shape.blocks,
        "sampling.place": shape.blocks,
        "sampling.largest": shape.groups,
        "sampling.sums": shape.groups,
        "sampling.listed": shape.groups,
        "sampling.peaks": 1,
        "sampling.bounds": 2,
        "sampling.counts": 1,
    }
    return {name: 4 * max_rows * words for name, words in rows.items()}


@dataclass(frozen=True)
class _Shape:
    """How a row is cut."""

    vocab_size: int

    @property
    def block(self) -> int:
        return min(BLOCK, max(GROUP, _power_of_two(self.vocab_size)))

    @property
    def blocks(self) -> int:
        return -(-self.vocab_size // self.block)

    @property
    def groups(self) -> int:
        return -(-self.vocab_size // GROUP)


def greedy(vocab_size: int) -> list[Launch]:
    """The most likely token of each row."""
    shape = _Shape(vocab_size)
    parts = [("best", "*fp32", "sampling.best"), ("place", "*i32", "sampling.place")]
    sizes = {"VOCAB": vocab_size, "BLOCK": shape.block, "BLOCKS": shape.blocks}
    combined = {"BLOCKS": shape.blocks, "PADDED": _power_of_two(shape.blocks)}
    return [
        _launch("greedy_partial", [("logits", "*fp32", "logits"), *parts], sizes, shape.blocks),
        _launch("greedy_combine", [*parts, ("sampled", "*i32", "sampled")], combined, warps=1),
    ]


def sample(vocab_size: int) -> list[Launch]:
    """Each row's token by its record, greedy ones too."""
    shape = _Shape(vocab_size)
    given = [("logits", "*fp32", "logits"), ("sampling", "*i32", "sampling")]
    groups = [("largest", "*fp32", "sampling.largest"), ("sums", "*fp32", "sampling.sums")]
    found = [
        ("sampled", "*i32", "sampled"),
        ("peaks", "*fp32", "sampling.peaks"),
        ("bounds", "*fp32", "sampling.bounds"),
        ("counts", "*i32", "sampling.counts"),
        ("listed", "*i32", "sampling.listed"),
    ]
    sizes = {"VOCAB": vocab_size, "GROUP": GROUP, "GROUPS": shape.groups}
    padded = _power_of_two(shape.groups)
    return [
        _launch("group_rows", [*given, *groups], {**sizes, "BLOCK": shape.block}, shape.blocks),
        _launch("choose_rows", [*given, *groups, *found], {**sizes, "PADDED": padded}, warps=8 if padded > 2048 else 4),
        _launch("filter_rows", [*given, *found], {**sizes, "SLOTS": min(SLOTS, padded)}, warps=8),
    ]


def resolve() -> list[Launch]:
    """Token ids that name a row of the step before."""
    kernel = Kernel(f"{KERNELS}:resolve", (("token_ids", "*i32"), ("sampled", "*i32"), ("tokens", "i32")), (("BLOCK", RESOLVED),))
    return [Launch(kernel, (Size("T", over=RESOLVED), fixed(1), fixed(1)), ("token_ids", "sampled", Size("T")))]


def _launch(function: str, tensors: list[tuple[str, str, str]], sizes: dict[str, int], blocks: int = 1, warps: int = 4) -> Launch:
    """A program for each row and block of it. tensors: (parameter, Triton type, tensor)."""
    args: tuple[Arg, ...] = tuple(tensor for _, _, tensor in tensors)
    types = tuple((name, kind) for name, kind, _ in tensors)
    kernel = Kernel(f"{KERNELS}:{function}", types, tuple(sizes.items()), num_warps=warps)
    return Launch(kernel, (Size("R"), fixed(blocks), fixed(1)), args)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
