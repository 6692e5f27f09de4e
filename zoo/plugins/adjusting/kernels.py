"""Kernels that adjust logits in place; ``zoo.runtime.adjusting`` says what a slot holds.

T tokens, B sequences, R rows, V vocabulary, S slots. ``slots`` [S + 1] are addresses, the first one nobody's.

Every operation is rounded as numpy rounds it on the host: a division to nearest, and no product that melts into the sum after it
(an fma with 0 is a product, rounded once). So logits are the host's to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.plugins.sampling.kernels import WORDS

SLOT_SHIFT = tl.constexpr(1)  # zoo.runtime.abi.SLOT_SHIFT
REPETITION = tl.constexpr(0)  # words of a slot's header
PRESENCE = tl.constexpr(1)
FREQUENCY = tl.constexpr(2)
PROMPT = tl.constexpr(3)
LEAST = tl.constexpr(4)
ENTRIES = tl.constexpr(5)


@triton.jit
def words_of(slots, slot):
    """Where a slot's words begin."""
    return tl.load(slots + slot).to(tl.pointer_type(tl.int32))


@triton.jit
def slot_of(record):
    """The slot of a row, 0 if it has none."""
    return tl.load(record + 7) >> SLOT_SHIFT


@triton.jit
def float_of(words, index):
    return tl.load(words + index).to(tl.float32, bitcast=True)


@triton.jit
def count_tokens(
    token_ids, query_starts, kv_lengths, counted, slots,
    COUNTS: tl.constexpr, IN_PROMPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the tokens that a step computes: token_ids [T] with no names left; query_starts [B + 1]; kv_lengths, counted [B].

    A token's place in its sequence says whether it belongs to the prompt. Sums of integers come out the same in any order.
    """
    sequence, block = tl.program_id(0), tl.program_id(1)
    slot = tl.load(counted + sequence)
    if slot > 0:
        words = words_of(slots, slot)
        end = tl.load(query_starts + sequence + 1)
        at = tl.load(query_starts + sequence) + block * BLOCK + tl.arange(0, BLOCK)
        mine = at < end
        token = tl.load(token_ids + at, mine, other=0)
        prompt = tl.load(kv_lengths + sequence) - (end - at) < tl.load(words + PROMPT)
        counts = words + COUNTS + token
        tl.atomic_or(counts, tl.full([BLOCK], IN_PROMPT, tl.int32), mine & prompt)
        tl.atomic_add(counts, tl.full([BLOCK], 1, tl.int32), mine & (prompt == 0))


@triton.jit
def adjust_listed(
    logits, sampling, slots,
    VOCAB: tl.constexpr, HEADER: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Biases, and bans until min_tokens, of the tokens that a slot lists: logits [R, V].

    A ban leaves what no row may hold, NaN and infinity, to be found.
    """
    row = tl.program_id(0).to(tl.int64)
    record = sampling + row * WORDS
    slot = slot_of(record)
    if slot > 0:
        words = words_of(slots, slot)
        entry = tl.arange(0, LISTED)
        there = entry < tl.load(words + ENTRIES)
        token = tl.load(words + HEADER + 2 * entry, there, other=0)
        bias = tl.load(words + HEADER + 2 * entry + 1, there, other=0).to(tl.float32, bitcast=True)
        banned = (token < 0) & (tl.load(record + 6) < tl.load(words + LEAST))
        place = logits + row * VOCAB + (token & 0x7FFFFFFF)
        x = tl.load(place, there, other=0.0)
        tl.store(place, tl.where(banned & (x < float("inf")), float("-inf"), x + bias), there)


@triton.jit
def penalize(
    logits, sampling, slots,
    VOCAB: tl.constexpr, COUNTS: tl.constexpr, IN_PROMPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Repetition, frequency and presence penalties of the tokens that a slot has counted: logits [R, V]."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = slot_of(sampling + row * WORDS)
    if slot > 0:
        words = words_of(slots, slot)
        repetition, frequency, presence = float_of(words, REPETITION), float_of(words, FREQUENCY), float_of(words, PRESENCE)
        if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
            column = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(words + COUNTS + column, column < VOCAB, other=0)
            seen = value != 0
            count = (value & (IN_PROMPT - 1)).to(tl.float32)
            place = logits + row * VOCAB + column
            x = tl.load(place, seen, other=0.0)
            x = tl.where(x < 0.0, tl.fma(x, repetition, 0.0), tl.div_rn(x, repetition))
            x = x - tl.fma(count, frequency, 0.0)
            x = x - tl.where(count > 0.0, presence, 0.0)
            tl.store(place, x, seen)
