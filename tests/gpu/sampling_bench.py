"""Sampling kernels on a GPU, and those that adjust logits before: right first, then microseconds.

    python tests/gpu/sampling_bench.py [--quick]

Needs torch with CUDA, triton and numpy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from adjusting_bench import bench_adjusting, check_adjusting
from attention_on_gpu import Load, carry_out, prepare

from zoo.plugins.sampling import cuda
from zoo.runtime.abi import SAMPLING
from zoo.runtime.request import SamplingParams
from zoo.runtime.sampler import candidates

VOCAB = 128256
DRAWN = 5000  # vocabulary of the distributions that are checked
GREEDY = ((1, VOCAB), (64, VOCAB), (1024, 1000), (3, 50257), (5, 262144))  # rows, vocabulary
REPEATS = 50
# name, launches, parameters, spread of the logits
CASES: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("greedy", "greedy", {"temperature": 0.0}, 2.5),
    ("temperature only", "sample", {}, 2.5),
    ("top_k 50, top_p 0.9", "sample", {"top_k": 50, "top_p": 0.9}, 2.5),
    ("top_p 0.9, steep rows", "sample", {"top_p": 0.9}, 8.0),
    ("top_p 0.9, flat rows", "sample", {"top_p": 0.9}, 1.0),
    ("min_p 0.05", "sample", {"min_p": 0.05}, 2.5),
)


class Rows:
    """Tensors of a step with R rows."""

    def __init__(self, logits: torch.Tensor, params: dict[str, Any], seed: int = 0) -> None:
        rows, vocab = logits.shape
        record = np.zeros(rows, SAMPLING)
        record["temperature"], record["top_k"] = params.get("temperature", 1.0), params.get("top_k", 0)
        record["top_p"], record["min_p"] = params.get("top_p", 1.0), params.get("min_p", 0.0)
        record["seed"][:, 0], record["counter"] = seed, np.arange(rows)
        self.rows, self.vocab = rows, vocab
        self.tensors = {"logits": logits, "sampled": torch.full((rows,), -7, dtype=torch.int32, device="cuda")}
        self.tensors["sampling"] = torch.from_numpy(record.view(np.int32).reshape(rows, 8)).cuda()
        for name, size in cuda.scratch(vocab, rows).items():
            kind = torch.int32 if name.split(".")[1] in ("place", "listed", "counts") else torch.float32
            self.tensors[name] = torch.zeros(size // 4, dtype=kind, device="cuda")

    def run(self, kind: str) -> torch.Tensor:
        carry_out(cuda.launches(self.vocab)[kind], self.tensors, {"R": self.rows})
        return self.tensors["sampled"]


def normal(rows: int, vocab: int, spread: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return spread * torch.randn(rows, vocab, generator=generator, device="cuda")


def load(rows: int, params: dict[str, Any], spread: float) -> Load:
    """Moved is one reading of the logits."""
    return Load([Rows(normal(rows, VOCAB, spread), params).tensors], {"R": rows}, 4 * rows * VOCAB)


def check_greedy(shapes: Sequence[tuple[int, int]] = GREEDY) -> None:
    for rows, vocab in shapes:
        logits = normal(rows, vocab, 3.0)
        logits[0, : vocab // 2] = logits[0].max()  # the lowest id of many equals
        expected = logits.cpu().numpy().argmax(axis=1)
        for kind in ("greedy", "sample"):
            found = Rows(logits, {"temperature": 0.0}).run(kind).cpu().numpy()
            assert (found == expected).all(), (kind, rows, vocab)
    logits = normal(4, VOCAB, 3.0)
    logits[1, 77], logits[2] = float("nan"), float("-inf")
    for params in ({"temperature": 0.0}, {}, {"top_k": 5}):
        found = Rows(logits, params).run("sample").tolist()
        assert found[1] == found[2] == -1 and min(found[0], found[3]) >= 0, (params, found)
    print("greedy: right")


def check_candidates(rows: int = 24) -> None:
    """Every token is one that the numpy sampler may draw, with the least slack for sums in another order."""
    for spread in (0.05, 1.0, 4.0):
        logits = normal(rows, VOCAB, spread, seed=3)
        host = logits.cpu().numpy()
        for params in (
            {"top_k": 1},
            {"top_k": 50},
            {"top_k": 3000},
            {"top_p": 0.5},
            {"top_p": 0.95, "temperature": 0.6},
            {"min_p": 0.05},
            {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 1.4},
        ):
            found = Rows(logits, params, seed=9).run("sample").cpu().numpy()
            nearly = SamplingParams(
                temperature=params.get("temperature", 1.0),
                top_k=int(params.get("top_k", 0)),
                top_p=min(1.0, params.get("top_p", 1.0) + 1e-4),
                min_p=params.get("min_p", 0.0) * 0.9999,
            )
            for token, row in zip(found.tolist(), host, strict=True):
                assert token in candidates(row, nearly)[0], (spread, params, token)
    print("filters: every token is a candidate")


def check_distribution() -> None:
    """Chi-square of 16384 draws, and the same draws whatever the batch."""
    vocab, draws = DRAWN, 16384
    row = normal(1, vocab, 2.0, seed=5)
    logits = row.repeat(draws, 1)
    for params in ({}, {"temperature": 0.5}, {"top_k": 40}, {"top_p": 0.8}, {"top_k": 100, "top_p": 0.9}, {"min_p": 0.02}):
        tokens = Rows(logits, params, seed=77).run("sample").clone()
        ids, weights = candidates(row[0].cpu().numpy(), SamplingParams(**params))
        expected = np.zeros(vocab)
        expected[ids] = weights * draws
        found = np.bincount(tokens.cpu().numpy(), minlength=vocab)
        often = expected >= 8
        freedom = int(often.sum())
        statistic = ((found[often] - expected[often]) ** 2 / expected[often]).sum()
        assert statistic <= freedom + 5 * np.sqrt(2 * freedom), (params, statistic, freedom)
        part = Rows(logits[:3], params, seed=77).run("sample")
        assert (part == tokens[:3]).all(), f"{params}: batch mates change tokens"
    print("distributions: as the numpy sampler's")


def check_resolve() -> None:
    ids = torch.tensor([5, -1, -3, 0, -2] * 500, dtype=torch.int32, device="cuda")
    sampled = torch.tensor([11, -1, 13], dtype=torch.int32, device="cuda")
    carry_out(cuda.launches(VOCAB)["resolve"], {"token_ids": ids, "sampled": sampled}, {"T": len(ids)})
    assert ids.tolist() == [5, 11, 13, 0, 0] * 500
    print("resolve: right")


def microseconds(call: Callable[[], Any]) -> float:
    """Median of replays of a CUDA graph of one call, each timed by itself."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for _ in range(5):
        graph.replay()
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return 1000 * float(np.median([before.elapsed_time(after) for before, after in events]))


def bench() -> None:
    print(f"microseconds, V={VOCAB}; logits are normal, times 2.5; one reading of 1024 rows at 4.3 TB/s: 122")
    print(f"{'':24}" + "".join(f"{f'R={rows}':>10}" for rows in (1, 64, 1024)))
    for name, kind, params, spread in CASES:
        times = []
        for rows in (1, 64, 1024):
            step = Rows(normal(rows, VOCAB, spread), params)
            times.append(microseconds(lambda step=step, kind=kind: step.run(kind)))
        print(f"{name:24}" + "".join(f"{time:>10.1f}" for time in times), flush=True)
    for name, call in (
        ("torch argmax", lambda logits: logits.argmax(dim=1)),
        ("torch softmax, draw", lambda logits: (logits.softmax(dim=1) / torch.empty_like(logits).exponential_()).argmax(dim=1)),
    ):
        times = []
        for rows in (1, 64, 1024):
            logits = normal(rows, VOCAB, 2.5)
            times.append(microseconds(lambda call=call, logits=logits: call(logits)))
        print(f"{name:24}" + "".join(f"{time:>10.1f}" for time in times), flush=True)


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only check")
    quick = parser.parse_args().quick
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    vocabularies = {DRAWN, *(vocab for _, vocab in GREEDY)}
    prepare(one for vocab in vocabularies for launches in cuda.launches(vocab).values() for one in launches)
    check_greedy()
    check_candidates()
    check_distribution()
    check_resolve()
    check_adjusting()
    if not quick:
        bench()
        bench_adjusting()


if __name__ == "__main__":
    main()
