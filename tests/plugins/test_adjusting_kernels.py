"""Kernels that adjust logits, in the interpreter: to the bit what the numpy sampler does, however tokens were counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from interpreted import launch

from zoo.plugins.adjusting import cuda
from zoo.runtime.abi import HOST, SAMPLING, SLOT_SHIFT
from zoo.runtime.adjusting import IN_PROMPT, LISTED, adjustment_of, counts_at, slot_words
from zoo.runtime.request import SamplingParams
from zoo.runtime.sampler import Chooser

POISON = 0x7F7F7F7F
KINDS: list[dict[str, object]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6, "presence_penalty": 0.3},
    {"presence_penalty": 1.1},
    {"frequency_penalty": 0.37},
    {"frequency_penalty": -0.71, "presence_penalty": -0.2, "repetition_penalty": 1.07},
    {"repetition_penalty": 1.9, "frequency_penalty": 0.3, "logit_bias": {0: 2.7, 3: -0.1}, "min_tokens": 9},
]
BIASES: list[dict[str, object]] = [
    {"logit_bias": {2: 0.7, 4: -100}},
    {"min_tokens": 9},
    {"logit_bias": {1: 50.0}, "min_tokens": 2},
]


@dataclass
class History:
    """A request with a prompt and new tokens; ``ends`` are banned until min_tokens."""

    params: SamplingParams
    prompt: list[int]
    new: list[int]
    ends: tuple[int, ...] = (1,)

    def judged(self, logits: np.ndarray) -> np.ndarray:
        """Logits [V] as the sampler adjusts them, after it was made to choose the new tokens."""
        chooser = Chooser(self.params, self.prompt, len(logits), self.ends)
        for place, token in enumerate(self.new):
            only = np.full(len(logits), -1e9, np.float32)
            only[token] = 1e9
            assert chooser.choose(only, place) == token
        return chooser._adjust(logits, len(self.new))


class Slots:
    """Slots 1, 2, ... of requests in one tensor, the others' words and those in front of them poisoned."""

    def __init__(self, histories: Sequence[History], vocab: int) -> None:
        self.histories, self.vocab = histories, vocab
        self.words = torch.full((len(histories) + 2, slot_words(vocab)), POISON, dtype=torch.int32)
        for slot, one in enumerate(histories, 1):
            found = adjustment_of(one.params, len(one.prompt), 10**6, one.ends, vocab)
            assert found is not None
            self.words[slot, : len(found.words)] = torch.from_numpy(found.words)
            self.words[slot, counts_at() : counts_at() + vocab] = 0
        self.table = torch.tensor([0, *[row.data_ptr() for row in self.words[1:]]], dtype=torch.int64)

    def counts(self) -> np.ndarray:
        return self.words[1:-1, counts_at() : counts_at() + self.vocab].numpy()

    def count(self, chunks: Sequence[tuple[int, int, int]], padding: int = 0) -> None:
        """A step of chunks (slot or 0, first, last token); ``padding`` sequences have no tokens, but there are some."""
        ids, lengths = [], []
        starts = [0]
        for slot, first, last in chunks:
            one = self.histories[max(slot, 1) - 1]
            ids += (one.prompt + one.new)[first:last]
            starts.append(len(ids))
            lengths.append(last)
        tensors = {
            "token_ids": [*ids, *[0] * padding],
            "query_starts": [*starts, *[len(ids)] * padding],
            "kv_lengths": [*lengths, *[1] * padding],
            "counted": [*(slot for slot, _, _ in chunks), *[0] * padding],
        }
        made = {name: torch.tensor(values, dtype=torch.int32) for name, values in tensors.items()}
        sizes = {"T": len(ids) + padding, "B": len(chunks) + padding}
        launch(cuda.launches(self.vocab)["count"], made | {"slots": self.table}, sizes)

    def adjust(self, logits: np.ndarray, slots: Sequence[int], parts: Sequence[str] = ("listed", "penalized")) -> np.ndarray:
        records = np.zeros(len(slots), SAMPLING)
        records["flags"] = np.array(slots) << SLOT_SHIFT
        records["counter"] = [len(self.histories[max(slot, 1) - 1].new) for slot in slots]
        found = torch.from_numpy(np.concatenate([logits, np.full((1, self.vocab), 7, np.float32)]))
        tensors = {"logits": found, "slots": self.table}
        tensors["sampling"] = torch.from_numpy(records.view(np.int32).reshape(len(slots), 8).copy())
        for part in parts:
            launch(cuda.launches(self.vocab)[part], tensors, {"R": len(slots)})
        assert (found[-1] == 7).all()
        return found[:-1].numpy()


def some_histories(rng: np.random.Generator, vocab: int, kinds: Sequence[dict[str, object]]) -> list[History]:
    made = []
    for kind in kinds:
        prompt = rng.integers(0, vocab, int(rng.integers(1, 30))).tolist()
        new = [token for token in rng.integers(0, min(vocab, 12), 15).tolist() if token != 1]  # token 1 is banned
        made.append(History(SamplingParams(temperature=0.0, max_tokens=None, **kind), prompt, new[: rng.integers(1, 12)]))
    return made


def some_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    return (4 * rng.standard_normal((rows, vocab))).astype(np.float32)


@pytest.mark.parametrize("vocab", [5, 100, 4096, 5000])
def test_logits_are_the_samplers_to_the_bit(vocab: int) -> None:
    """All kinds in one step, beside rows without a slot and one of the host's; tokens counted whole and one by one."""
    rng = np.random.default_rng(vocab)
    histories = some_histories(rng, vocab, KINDS + BIASES)
    slots = Slots(histories, vocab)
    ends = [len(one.prompt) + len(one.new) for one in histories]
    slots.count([(slot, 0, end - 2) for slot, end in enumerate(ends, 1)] + [(0, 0, 3)])
    for back in (2, 1):
        slots.count([(slot, end - back, end - back + 1) for slot, end in enumerate(ends, 1)], padding=3)
    rows = [*range(1, len(histories) + 1), 0]
    rows = [rows[place] for place in rng.permutation(len(rows))]
    logits = some_logits(rng, len(rows), vocab)
    found = slots.adjust(logits, rows)
    for slot, row, got in zip(rows, logits, found, strict=True):
        np.testing.assert_array_equal(got, histories[slot - 1].judged(row) if slot else row)


def test_however_tokens_are_cut_into_steps_their_counts_are_the_same() -> None:
    """Among them a step of more tokens than a program counts, and one in which a sequence computes its own tokens again."""
    rng, vocab = np.random.default_rng(1), 40
    prompt, new = rng.integers(0, vocab, 1500).tolist(), rng.integers(0, vocab, 700).tolist()
    one = History(SamplingParams(presence_penalty=1.0), prompt, new)
    expected = np.bincount(new, minlength=vocab) + IN_PROMPT * np.isin(np.arange(vocab), prompt)
    for cuts in ([0, 2200], [0, 1499, 1500, 1501, 2200], [0, 1, 1024, 2047, 2049, 2200], [0, 700, 2200]):
        slots = Slots([one, one], vocab)
        for first, last in pairwise(cuts):
            slots.count([(0, 5, 9), (2, first, last), (0, 0, 1)])
        np.testing.assert_array_equal(slots.counts(), [np.zeros(vocab), expected])
    whole = slots.words.clone()
    assert (whole[[0, -1]] == POISON).all() and (whole[1:-1, counts_at() + vocab :] == POISON).all()


def test_parts_that_a_row_does_not_need_change_nothing() -> None:
    """Penalties of a request with biases alone, whose counts nobody keeps; lists of one without; bans that are over."""
    rng, vocab = np.random.default_rng(2), 64
    plain = History(SamplingParams(min_tokens=2), [5], [3, 4])  # so no ban any more
    biased = History(SamplingParams(logit_bias={7: 1.5}), [5, 6], [3])
    counted = History(SamplingParams(repetition_penalty=1.5), [5, 6], [3])
    slots = Slots([plain, biased, counted], vocab)
    slots.words[1:3, counts_at() : counts_at() + vocab] = POISON
    slots.count([(3, 0, 3)])
    logits = some_logits(rng, 3, vocab)
    np.testing.assert_array_equal(slots.adjust(logits, [1, 2, 3], ["penalized"])[:2], logits[:2])
    np.testing.assert_array_equal(slots.adjust(logits, [1, 2, 3], ["listed"])[[0, 2]], logits[[0, 2]])
    np.testing.assert_array_equal(slots.adjust(logits, [1, 2, 3])[1], biased.judged(logits[1]))


def test_what_no_row_may_hold_stays() -> None:
    """NaN and infinity are found by who chooses, even at a banned or a penalized token; a token that cannot be stays so."""
    vocab = 64
    one = History(SamplingParams(min_tokens=9, repetition_penalty=0.5, frequency_penalty=-2.0, logit_bias={2: -100.0}), [5], [3])
    slots = Slots([one] * 3, vocab)
    slots.count([(slot, 0, 2) for slot in (1, 2, 3)])
    logits = np.zeros((3, vocab), np.float32)
    for row, value in enumerate((np.nan, np.inf, -np.inf)):
        logits[row, [1, 2, 3, 5]] = value
    found = slots.adjust(logits, [1, 2, 3])
    assert np.isnan(found[0, [1, 2, 3, 5]]).all() and (found[1, [1, 2, 3, 5]] == np.inf).all()
    assert (found[2, [1, 2, 3, 5]] == -np.inf).all() and (found[:, 6:] == 0).all()


def test_a_full_list() -> None:
    rng, vocab = np.random.default_rng(3), 2000
    ids = rng.permutation(vocab)[:LISTED].tolist()
    bias = {token: float(value) for token, value in zip(ids[:-5], rng.uniform(-50, 50, LISTED), strict=False)}
    one = History(SamplingParams(min_tokens=3, logit_bias=bias), [5], [], tuple(ids[-20:]))
    logits = some_logits(rng, 1, vocab)
    np.testing.assert_array_equal(Slots([one], vocab).adjust(logits, [1])[0], one.judged(logits[0]))


def test_a_slot_stands_above_the_flags() -> None:
    assert 1 << SLOT_SHIFT > HOST and SAMPLING.fields is not None and SAMPLING.fields["flags"][1] == 28
