"""A fake session that samples and adjusts logits: what the kernels of ``zoo.plugins.adjusting`` do, token by token.

It looks at what an engine says of slots: each begins before it is used, and no two sequences of a step share one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from fake_session import FakeSampler

from zoo.runtime.abi import SLOT_SHIFT, Batch, EngineLimits, Sampling
from zoo.runtime.adjusting import HEADER


@dataclass
class Held:
    """A slot. ``counts``: of the continuation's tokens; ``prompt``: the prompt's; ``computed``: how many were counted."""

    words: np.ndarray
    computed: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    prompt: set[int] = field(default_factory=set)


class AdjustingSampler(FakeSampler):
    """``room``: how many slots it has memory for. ``asked``: the most that was asked for; ``kinds``: what steps were to do."""

    def __init__(self, limits: EngineLimits, vocab_size: int = 50, end_bias: float = 0.5, room: int = 1 << 30) -> None:
        super().__init__(limits, vocab_size, end_bias)
        self.room, self.asked, self.granted = room, 0, 0
        self.held: dict[int, Held] = {}
        self.kinds: list[tuple[bool, bool, bool]] = []  # counted, listed, penalized

    def reserve(self, slots: int) -> bool:
        assert 0 < slots <= self.limits.max_sequences
        self.asked = max(self.asked, slots)
        self.granted = max(self.granted, min(slots, self.room))
        return slots <= self.room

    def adjust(self, batch: Batch, sampling: Sampling, logits: np.ndarray) -> None:
        adjusting = sampling.adjusting
        if adjusting is None:
            self.kinds.append((False, False, False))
            return
        self.kinds.append((adjusting.counted is not None, adjusting.listed, adjusting.penalized))
        for slot, words in adjusting.started:
            self.held[slot] = Held(words)
        if adjusting.counted is not None:
            self._count(batch, adjusting.counted)
        slots = (sampling.rows["flags"] >> SLOT_SHIFT).tolist()
        used = [slot for slot in slots if slot]
        assert len(set(used)) == len(used) and max(used, default=0) <= self.granted
        for row, slot in enumerate(slots):
            if slot and np.isfinite(logits[row].max()):
                if adjusting.listed:
                    _listed(logits[row], self.held[slot].words, int(sampling.rows["counter"][row]))
                if adjusting.penalized:
                    _penalize(logits[row], self.held[slot])

    def _count(self, batch: Batch, counted: np.ndarray) -> None:
        slots = counted[counted > 0].tolist()
        assert len(counted) == len(batch.kv_lengths) and len(set(slots)) == len(slots) > 0
        for sequence, slot in enumerate(counted.tolist()):
            if not slot:
                continue
            held, (start, end) = self.held[slot], batch.query_starts[sequence : sequence + 2].tolist()
            first = int(batch.kv_lengths[sequence]) - (end - start)
            assert first == held.computed, "a token was counted twice, or left out"
            held.computed += end - start
            for place, token in enumerate(batch.token_ids[start:end].tolist(), first):
                if place < held.words[3]:
                    held.prompt.add(token)
                else:
                    held.counts[token] += 1


def _listed(logits: np.ndarray, words: np.ndarray, counter: int) -> None:
    for at in range(HEADER, HEADER + 2 * int(words[5]), 2):
        token, bias = int(words[at]), words[at + 1 : at + 2].view(np.float32)[0]
        logits[token & 0x7FFFFFFF] += bias
        if token < 0 and counter < words[4]:
            logits[token & 0x7FFFFFFF] = -np.inf


def _penalize(logits: np.ndarray, held: Held) -> None:
    repetition, presence, frequency = held.words[:3].view(np.float32)
    for token in held.prompt | set(held.counts):
        x = logits[token]
        x = x * repetition if x < 0 else x / repetition
        count = np.float32(held.counts[token])
        logits[token] = x - frequency * count - (presence if count else np.float32(0))
