"""Sequences fed to a session in random pieces: prefill, chunks and decode, mixed in one step. Needs no torch."""

from __future__ import annotations

import numpy as np

from zoo.runtime.abi import Batch
from zoo.runtime.sessions.cuda import CudaSession


class Feeder:
    """Feeds sequences in random pieces and collects every row of logits."""

    def __init__(self, session: CudaSession, rng: np.random.Generator) -> None:
        self.session, self.rng, self.size = session, rng, session.limits.block_size

    def run(self, prompts: list[list[int]]) -> list[np.ndarray]:
        limits = self.session.limits
        free = list(self.rng.permutation(np.arange(1, limits.max_blocks))[: 64 * len(prompts)])
        blocks: list[list[int]] = [[] for _ in prompts]
        done, rows = [0] * len(prompts), [[] for _ in prompts]  # type: ignore[var-annotated]
        while any(at < len(ids) for at, ids in zip(done, prompts, strict=True)):
            picked, budget = [], limits.max_tokens
            for number in self.rng.permutation(len(prompts)):
                left = min(len(prompts[number]) - done[number], budget)
                if left > 0 and self.rng.random() < 0.8 and len(picked) < limits.max_sequences:
                    count = 1 if self.rng.random() < 0.4 else int(self.rng.integers(1, left + 1))
                    picked.append((int(number), count))
                    budget -= count
            if not picked:
                continue
            for number, count in picked:
                while len(blocks[number]) * self.size < done[number] + count:
                    blocks[number].append(int(free.pop()))
            result = self.session.step(self.batch(picked, prompts, done, blocks))
            assert result.logits is not None
            at = 0
            for number, count in picked:
                rows[number].append(result.logits[at : at + count].copy())
                at += count
                done[number] += count
        return [np.concatenate(parts) for parts in rows]

    def batch(self, picked: list[tuple[int, int]], prompts: list[list[int]], done: list[int], blocks: list[list[int]]) -> Batch:
        ids = [token for number, count in picked for token in prompts[number][done[number] : done[number] + count]]
        first = [next((row for length, row in self.session.rope_tables if length >= len(ids)), 0) for ids in prompts]
        positions = np.concatenate([first[number] + np.arange(done[number], done[number] + count) for number, count in picked])
        width = max(len(blocks[number]) for number, _ in picked)
        table = np.zeros((len(picked), width), np.int32)
        for row, (number, _) in enumerate(picked):
            table[row, : len(blocks[number])] = blocks[number]
        starts = np.cumsum([0, *(count for _, count in picked)]).astype(np.int32)
        lengths = np.array([done[number] + count for number, count in picked], np.int32)
        rows = np.arange(len(ids), dtype=np.int32)
        return Batch(np.array(ids, np.int32), positions.astype(np.int32), starts, lengths, {"full": table}, rows)
