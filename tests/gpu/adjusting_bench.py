"""Kernels that adjust logits on a GPU: to the bit what the numpy sampler makes of them, then microseconds. Run by
``sampling_bench.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from attention_on_gpu import carry_out, microseconds, prepare

from zoo.plugins.adjusting import cuda
from zoo.runtime.abi import SAMPLING, SLOT_SHIFT
from zoo.runtime.adjusting import IN_PROMPT, adjustment_of, counts_at, slot_words
from zoo.runtime.request import SamplingParams
from zoo.runtime.sampler import Chooser

VOCAB = 128256
SMALL = (1000, 50257, VOCAB)
END = 3
KINDS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "presence_penalty": 0.3, "frequency_penalty": -0.4},
    {"frequency_penalty": 0.37},
    {"presence_penalty": -1.1},
    {"logit_bias": {7: 2.5, 11: -100.0}},
    {"min_tokens": 1000},
    {"repetition_penalty": 1.07, "frequency_penalty": 0.2, "logit_bias": {token: 0.01 * token for token in range(300)}},
    {"repetition_penalty": 1.9, "min_tokens": 1000},
)


class Requests:
    """R requests with slots 1 to R on the GPU, each with a prompt and new tokens."""

    def __init__(self, rows: int, vocab: int, prompt: int, new: int, kinds: Sequence[dict[str, Any]] = KINDS) -> None:
        rng = np.random.default_rng(rows + vocab)
        self.rows, self.vocab, self.prompt, self.new = rows, vocab, prompt, new
        self.tokens = rng.integers(END + 1, vocab, (rows, prompt + new), dtype=np.int32)
        self.tokens[:, prompt:] = rng.integers(END + 1, min(vocab, 40), (rows, new))  # again and again
        self.params = [SamplingParams(temperature=0.0, max_tokens=None, **kinds[row % len(kinds)]) for row in range(rows)]
        words = np.full((rows + 1, slot_words(vocab)), 0x7F7F7F7F, np.int32)
        for slot, params in enumerate(self.params, 1):
            found = adjustment_of(params, prompt, 1 << 30, {END}, vocab)
            assert found is not None
            words[slot, : len(found.words)] = found.words
            words[slot, counts_at() : counts_at() + vocab] = 0
        self.words = torch.from_numpy(words).cuda()
        records = np.zeros(rows, SAMPLING)
        records["flags"] = np.arange(1, rows + 1) << SLOT_SHIFT
        records["counter"] = new
        self.tensors = {
            "slots": torch.tensor([0, *(row.data_ptr() for row in self.words[1:])], dtype=torch.int64, device="cuda"),
            "sampling": torch.from_numpy(records.view(np.int32).reshape(rows, 8)).cuda(),
        }

    def step(self, first: int, last: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Tensors and sizes of a step that computes these tokens of every request."""
        count = last - first
        made = {
            "token_ids": self.tokens[:, first:last].reshape(-1),
            "query_starts": np.arange(self.rows + 1, dtype=np.int32) * count,
            "kv_lengths": np.full(self.rows, last, np.int32),
            "counted": np.arange(1, self.rows + 1, dtype=np.int32),
        }
        tensors = {name: torch.from_numpy(array.copy()).cuda() for name, array in made.items()}
        return self.tensors | tensors, {"T": self.rows * count, "B": self.rows, "R": self.rows}

    def count(self, cuts: Sequence[int]) -> None:
        """All tokens in steps that end at these."""
        for first, last in zip([0, *cuts], cuts, strict=False):
            carry_out(cuda.launches(self.vocab)["count"], *self.step(first, last))

    def adjust(self, logits: torch.Tensor, parts: Sequence[str] = ("listed", "penalized")) -> None:
        for part in parts:
            carry_out(cuda.launches(self.vocab)[part], self.tensors | {"logits": logits}, {"R": self.rows})

    def judged(self, row: int, logits: np.ndarray) -> np.ndarray:
        prompt, new = self.tokens[row, : self.prompt].tolist(), self.tokens[row, self.prompt :].tolist()
        chooser = Chooser(self.params[row], prompt, self.vocab, (END,))
        for place, token in enumerate(new):
            only = np.full(self.vocab, -1e9, np.float32)
            only[token] = 1e9
            assert chooser.choose(only, place) == token
        return chooser._adjust(logits, len(new))


def normal(rows: int, vocab: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator("cuda").manual_seed(rows), device="cuda")


def check_adjusting() -> None:
    """Counts and logits to the bit, however tokens were cut into steps; twice the same."""
    prepare(one for vocab in SMALL for launches in cuda.launches(vocab).values() for one in launches)
    for vocab in SMALL:
        logits = normal(2 * len(KINDS), vocab)
        expected: np.ndarray | None = None
        for cuts in ([1540], [1, 700, 1500, 1539, 1540], [*range(1500, 1541)]):
            requests = Requests(2 * len(KINDS), vocab, 1500, 40)
            requests.count(cuts)
            counts = requests.words[1:, counts_at() : counts_at() + vocab].cpu().numpy()
            for row, tokens in enumerate(requests.tokens):
                want = np.bincount(tokens[1500:], minlength=vocab)
                want[tokens[:1500]] += IN_PROMPT * (np.bincount(tokens[:1500], minlength=vocab)[tokens[:1500]] > 0)
                assert (counts[row] == want).all(), (vocab, cuts, row)
            if expected is None:
                host = logits.cpu().numpy()
                expected = np.stack([requests.judged(row, one) for row, one in enumerate(host)])
            found = logits.clone()
            requests.adjust(found)
            assert (found.cpu().numpy() == expected).all(), f"V={vocab}, steps that end at {cuts}: not the sampler's logits"
        plain = logits.clone()
        requests.tensors["sampling"].zero_()
        requests.adjust(plain)
        assert (plain == logits).all(), "rows without a slot"
    print("adjusting: counts and logits as the numpy sampler's, to the bit")


def bench_adjusting(rows: Sequence[int] = (1, 64, 1024)) -> None:
    """Each part by itself, after 1,000 tokens of prompt and 200 new ones."""
    print(f"{'':24}" + "".join(f"{f'R={count}':>10}" for count in rows))
    times: dict[str, list[float]] = {}
    for count in rows:
        requests = Requests(count, VOCAB, 1000, 200, KINDS[1:2])
        requests.count([1199, 1200])
        step, logits = requests.step(1199, 1200), normal(count, VOCAB)
        calls = {
            "count, a token each": lambda step=step: carry_out(cuda.launches(VOCAB)["count"], *step),
            "penalties": lambda requests=requests, logits=logits: requests.adjust(logits, ["penalized"]),
        }
        listed = Requests(count, VOCAB, 1, 1, KINDS[6:7])
        calls["300 biases"] = lambda listed=listed, logits=logits: listed.adjust(logits, ["listed"])
        for name, call in calls.items():
            times.setdefault(name, []).append(microseconds([call]))
    for name, found in times.items():
        print(f"{name:24}" + "".join(f"{time:>10.1f}" for time in found), flush=True)
