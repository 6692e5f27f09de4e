"""Launches that adjust logits. Of a session's tensors they take token_ids [T], query_starts [B + 1], kv_lengths [B], counted [B],
the slot of each sequence, int32; logits [R, V] float32; sampling [R], whose records name slots; slots, addresses of 64 bits.
"""

from __future__ import annotations

from zoo.plugins.kernels import Arg, Kernel, Launch, Size, fixed

KERNELS = "zoo.plugins.adjusting.kernels"
# A slot's layout is zoo.runtime.adjusting's.
HEADER = 8
LISTED = 512
COUNTS = HEADER + 2 * LISTED
IN_PROMPT = 1 << 30
TOKENS = 1024  # of a program that counts
BLOCK = 4096  # logits of a program that penalizes


def launches(vocab_size: int) -> dict[str, list[Launch]]:
    """``count``, behind ``resolve``; then ``listed``, then ``penalized``, between the graph and a token's choice."""
    return {"count": count(), "listed": listed(vocab_size), "penalized": penalized(vocab_size)}


def count() -> list[Launch]:
    """The tokens of sequences with penalties."""
    names = ("token_ids", "query_starts", "kv_lengths", "counted")
    types = (*((name, "*i32") for name in names), ("slots", "*i64"))
    constants = (("COUNTS", COUNTS), ("IN_PROMPT", IN_PROMPT), ("BLOCK", TOKENS))
    kernel = Kernel(f"{KERNELS}:count_tokens", types, constants)
    return [Launch(kernel, (Size("B"), Size("T", over=TOKENS), fixed(1)), (*names, "slots"))]


def listed(vocab_size: int) -> list[Launch]:
    """Biases and bans."""
    return [_rows("adjust_listed", {"VOCAB": vocab_size, "HEADER": HEADER, "LISTED": LISTED})]


def penalized(vocab_size: int) -> list[Launch]:
    """Penalties."""
    block = min(BLOCK, 1 << (vocab_size - 1).bit_length())
    sizes = {"VOCAB": vocab_size, "COUNTS": COUNTS, "IN_PROMPT": IN_PROMPT, "BLOCK": block}
    return [_rows("penalize", sizes, -(-vocab_size // block))]


def _rows(function: str, sizes: dict[str, int], blocks: int = 1) -> Launch:
    """A program for each row and block of it."""
    args: tuple[Arg, ...] = ("logits", "sampling", "slots")
    types = (("logits", "*fp32"), ("sampling", "*i32"), ("slots", "*i64"))
    return Launch(Kernel(f"{KERNELS}:{function}", types, tuple(sizes.items())), (Size("R"), fixed(blocks), fixed(1)), args)
