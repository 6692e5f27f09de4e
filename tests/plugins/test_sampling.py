"""Sampling kernels in the interpreter: greedy is argmax, drawn tokens are candidates of the numpy sampler and as likely."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from interpreted import launch

from zoo.plugins.sampling import cuda
from zoo.runtime.abi import HOST, SAMPLING
from zoo.runtime.request import SamplingParams
from zoo.runtime.sampler import candidates
from zoo.runtime.sampling import sampling_record

UNTOUCHED = 7_654_321


def some_logits(rng: np.random.Generator, rows: int, vocab: int, spread: float = 3.0) -> np.ndarray:
    return (spread * rng.standard_normal((rows, vocab))).astype(np.float32)


def records(rows: Sequence[SamplingParams], counter: int = 0) -> np.ndarray:
    made = np.stack([sampling_record(params) for params in rows])
    made["counter"] = counter
    return made


def params(**values: object) -> SamplingParams:
    return SamplingParams(**{"seed": 1, **values})  # type: ignore[arg-type]


def run(kind: str, logits: np.ndarray, sampling: np.ndarray | None = None) -> np.ndarray:
    """The tokens of a step's rows; everything that the kernels share starts poisoned."""
    rows, vocab = logits.shape
    shared = {name: torch.full((size // 4,), -(2**30), dtype=torch.int32) for name, size in cuda.scratch(vocab, rows).items()}
    for name in ("best", "largest", "sums", "peaks", "bounds"):
        shared[f"sampling.{name}"] = torch.full_like(shared[f"sampling.{name}"], np.nan, dtype=torch.float32)
    sampled = torch.full((rows + 1,), UNTOUCHED, dtype=torch.int32)
    words = None if sampling is None else torch.from_numpy(sampling.view(np.int32).reshape(rows, 8).copy())
    tensors = {"logits": torch.from_numpy(logits), "sampled": sampled, **shared} | ({} if words is None else {"sampling": words})
    launch(cuda.launches(vocab)[kind], tensors, {"R": rows})
    assert sampled[rows] == UNTOUCHED
    return sampled[:rows].numpy()


@pytest.mark.parametrize("vocab", [5, 64, 100, 4096, 9001])
@pytest.mark.parametrize("kind", ["greedy", "sample"])
def test_greedy_is_argmax_and_the_lowest_id_wins(vocab: int, kind: str) -> None:
    rng = np.random.default_rng(vocab)
    logits = some_logits(rng, 6, vocab)
    logits[1] = rng.integers(0, 3, vocab)  # many equals
    logits[2] = 4.5
    logits[3, : vocab - 1] = -np.inf
    logits[4] = -1e30
    sampling = records([params(temperature=0.0)] * 6)
    np.testing.assert_array_equal(run(kind, logits, sampling), logits.argmax(axis=1))


@pytest.mark.parametrize("kind", ["greedy", "sample"])
def test_rows_without_a_largest_number_give_minus_one(kind: str) -> None:
    logits = some_logits(np.random.default_rng(0), 6, 200)
    logits[1, 150] = logits[2, 3] = np.nan
    logits[3] = -np.inf
    logits[4, 7] = np.inf
    kinds = [{"temperature": 0.0}, {}, {"top_k": 4}, {"top_p": 0.5}, {}, {"temperature": 0.0}]
    tokens = run(kind, logits, records([params(**kind) for kind in kinds]))
    assert tokens[[1, 2, 3, 4]].tolist() == [-1] * 4 and (tokens[[0, 5]] >= 0).all()


def philox(counter: int, low: int, high: int) -> list[int]:
    """Philox 4x32-10 as its paper has it."""
    words, mask = [counter, 0, 0, 0], 2**32 - 1
    for turn in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        keys = (low + turn * 0x9E3779B9) & mask, (high + turn * 0xBB67AE85) & mask
        words = [(b >> 32) ^ words[1] ^ keys[0], b & mask, (a >> 32) ^ words[3] ^ keys[1], a & mask]
    return words


def test_philox_gives_its_known_answers() -> None:
    """Random123's test vectors."""
    assert [f"{word:08x}" for word in philox(0, 0, 0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def inverted(row: np.ndarray, wanted: SamplingParams, record: np.ndarray) -> int:
    """The token by inversion in float64: a group of 64 ids by the first random number, and an id in it by the second."""
    ids, weights = candidates(row, wanted)
    first, second = ((word >> 8) / 2**24 for word in philox(int(record["counter"]), *record["seed"].tolist())[:2])
    groups = np.bincount(ids // 64, weights)
    group = np.searchsorted(np.cumsum(groups), first * groups.sum(), side="right")
    ids, weights = ids[ids // 64 == group], weights[ids // 64 == group]
    return int(ids[np.searchsorted(np.cumsum(weights), second * weights.sum(), side="right")])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_p": 1e-30},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.7},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
        {"top_k": 150, "temperature": 4.0},
        {"top_p": 0.95, "temperature": 6.0},
        {"top_p": 0.99, "min_p": 0.3},
        {"top_k": 199},
        {"top_k": 5000},
        {"temperature": 1e30},
        {"temperature": 1e-5},
    ],
    ids=lambda values: ",".join(f"{name}={value}" for name, value in values.items()) or "plain",
)
def test_a_token_is_what_inversion_over_the_candidates_gives(values: dict[str, object]) -> None:
    rng = np.random.default_rng(len(str(values)))
    rows = 2
    for vocab in (200, 5000):
        logits = some_logits(rng, rows, vocab, 2.0)
        logits[:, 17] = -np.inf
        wanted = [params(**values, seed=int(seed)) for seed in rng.integers(2**63, size=rows)]
        sampling = records(wanted, counter=int(rng.integers(1000)))
        expected = [inverted(*row) for row in zip(logits, wanted, sampling, strict=True)]
        assert run("sample", logits, sampling).tolist() == expected


@pytest.mark.parametrize(("values", "draws"), [({}, 120), ({"top_k": 6, "top_p": 0.9}, 40)], ids=["plain", "filtered"])
def test_tokens_come_as_often_as_they_are_likely(values: dict[str, object], draws: int) -> None:
    """Chi-square, at five deviations."""
    row = np.log(np.arange(1, 9, dtype=np.float32))
    sampling = records([params(**values, seed=12)] * draws)
    sampling["counter"] = np.arange(draws)
    ids, weights = candidates(row, params(**values))
    found = np.bincount(run("sample", np.tile(row, (draws, 1)), sampling), minlength=8)
    assert found.sum() == found[ids].sum() == draws
    statistic = ((found[ids] - weights * draws) ** 2 / (weights * draws)).sum()
    freedom = len(ids) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_many_rows_each_with_filters_of_its_own() -> None:
    """Larger vocabularies, several blocks and chunks, flat and steep rows: every token is a candidate of its row."""
    rng = np.random.default_rng(5)
    rows, vocab = 10, 9000
    logits = some_logits(rng, rows, vocab) * rng.choice([0.02, 1.0, 4.0], (rows, 1)).astype(np.float32)
    wanted = [
        params(
            seed=int(rng.integers(2**63)),
            temperature=float(rng.choice([0.5, 1.0, 2.0])),
            top_k=int(rng.choice([0, 3, 50, 2000])),
            top_p=float(rng.choice([0.3, 0.9, 1.0])),
            min_p=float(rng.choice([0.0, 0.02])),
        )
        for _ in range(rows)
    ]
    tokens = run("sample", logits, records(wanted))
    for token, row, one in zip(tokens, logits, wanted, strict=True):
        nearly = dataclasses.replace(one, top_p=min(1.0, one.top_p + 1e-4), min_p=one.min_p * (1 - 1e-5))
        assert token in candidates(row, nearly)[0]


def test_ties_with_the_last_of_the_most_likely_are_kept() -> None:
    draws = 10
    logits = np.zeros((draws, 300), np.float32)
    logits[:, [10, 20, 30, 200]] = [3, 2, 2, 2]
    for values, kept in (({"top_k": 2}, {10, 20, 30, 200}), ({"top_k": 4, "top_p": 0.1}, {10}), ({"top_k": 1}, {10})):
        sampling = records([params(**values, temperature=3.0)] * draws)
        sampling["counter"] = np.arange(draws)
        assert set(run("sample", logits, sampling).tolist()) == kept


def test_seed_and_counter_decide_whatever_the_batch() -> None:
    rng = np.random.default_rng(3)
    logits = some_logits(rng, 6, 700)
    wanted = [params(seed=2**63 + index, top_k=(0, 30)[index % 2]) for index in range(6)]
    together = run("sample", logits, records(wanted, counter=5))
    again = [run("sample", logits[[index]], records([wanted[index]], counter=5))[0] for index in range(6)]
    np.testing.assert_array_equal(together, again)
    turned = run("sample", logits[::-1].copy(), records(wanted[::-1], counter=5))
    np.testing.assert_array_equal(together, turned[::-1])
    assert (together != run("sample", logits, records(wanted, counter=6))).any()
    other = [dataclasses.replace(one, seed=one.seed ^ 2**40) for one in wanted if one.seed is not None]
    assert (together != run("sample", logits, records(other, counter=5))).any()


def test_rows_of_the_host_are_left_alone() -> None:
    logits = some_logits(np.random.default_rng(4), 3, 100)
    logits[1] = np.nan
    sampling = records([params(), params(top_k=3), params(temperature=0.0)])
    sampling["flags"][1] = HOST
    tokens = run("sample", logits, sampling)
    assert tokens[1] == UNTOUCHED and tokens[2] == logits[2].argmax()


@pytest.mark.parametrize("tokens", [1, 7, 1025])
def test_names_of_sampled_tokens_are_resolved(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    sampled = rng.integers(0, 1000, 40).astype(np.int32)
    sampled[5] = -1
    ids = rng.integers(-40, 1000, tokens).astype(np.int32)
    ids[0] = -6
    tensors = {"token_ids": torch.from_numpy(np.append(ids, UNTOUCHED)), "sampled": torch.from_numpy(sampled)}
    tensors["token_ids"] = tensors["token_ids"].to(torch.int32)
    launch(cuda.launches(100)["resolve"], tensors, {"T": tokens})
    expected = np.where(ids < 0, np.maximum(sampled[np.where(ids < 0, -1 - ids, 0)], 0), ids)
    np.testing.assert_array_equal(tensors["token_ids"].numpy(), np.append(expected, UNTOUCHED))


def test_a_record_is_eight_words() -> None:
    assert SAMPLING.itemsize == 32 and [SAMPLING.fields[name][1] for name in SAMPLING.names] == [0, 4, 8, 12, 16, 24, 28]  # type: ignore[index, union-attr]
