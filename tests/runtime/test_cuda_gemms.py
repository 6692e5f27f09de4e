"""Products of a whole engine on a stand-in for a GPU: launches of the plan for few rows, cuBLASLt for more; one answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cuda_engines
import families
import numpy as np
import pytest
from cuda_engines import Traffic, compile_engine, relative
from cuda_on_cpu import Gpu, gpu_on_cpu

from zoo.runtime.cuda.gemms import COUNTERS
from zoo.runtime.cuda.program import Gemm
from zoo.runtime.sessions.cuda import CudaSession

CASE = "llama-grouped"
SHAPES = ("128x64", "64x64", "192x64", "64x96", "262x64")
FOUR = {shape: {"4": [16, 64, 32, 2, 4, 3]} for shape in SHAPES}  # up to four rows, K in two parts
NONE: dict[str, Any] = {shape: {} for shape in SHAPES}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = families.CASES[CASE]
    return families.make_checkpoint(tmp_path_factory.mktemp("checkpoint"), family, **overrides)


def opened(folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, **tuning: Any) -> CudaSession:
    with monkeypatch.context() as patch:
        patch.setattr(cuda_engines, "HOPPER", dataclasses.replace(cuda_engines.HOPPER, tuning=tuning))
        manifest = compile_engine(folder, checkpoint, "fp8-kv")
    return CudaSession(folder, manifest, fill=0xFF)


def run(session: CudaSession, checkpoint: Path) -> np.ndarray:
    """Logits of a step of nine rows, of two sequences, and of three steps of two."""
    traffic = Traffic(session)
    a, b = (families.prompt(checkpoint, 12, seed) for seed in range(2))
    steps = [traffic.step({"a": a[:4], "b": b[:5]})]
    steps += [traffic.step({"a": [a[at]], "b": [b[at + 1]]}) for at in range(4, 7)]
    return np.concatenate(steps)


def counts(gpu: Gpu) -> tuple[int, int]:
    return gpu.ran["skinny_gemm"], gpu.blas.starts


def test_rows_decide_who_multiplies(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu_on_cpu() as gpu:
        session = opened(tmp_path / "engine", checkpoint, monkeypatch, skinny=FOUR)
        products = [step for step in session._engine.programs["graph"]._steps if isinstance(step, Gemm)]
        traffic = Traffic(session)
        ids = families.prompt(checkpoint, 12, 0)
        traffic.step({"a": ids[:5]}, rows=[4])  # five tokens; the head has one row
        assert counts(gpu) == (1, len(products) - 1)
        traffic.step({"a": ids[5:9]})
        assert counts(gpu) == (1 + len(products), len(products) - 1)
        for _ in range(3):  # as it comes, and its graph twice
            traffic.step({"a": ids[9:10]})
        assert counts(gpu) == (1 + 4 * len(products), len(products) - 1)
        place = session._engine.addresses[COUNTERS]
        assert not gpu.view(place, np.int32, max(len(products[-1].small), 5)).any()
        session.close()
        assert gpu.live() == []


def test_all_ways_give_the_numbers_that_one_gives(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows or many is a matter of the last bit of a sum; who scales columns is one of where it is rounded to bfloat16.

    The latter moves float8 values behind it from one to the next now and then, so it is the error that is compared.
    """
    made: dict[tuple[bool, bool], np.ndarray] = {}
    for small, deferred in ((False, False), (True, False), (False, True), (True, True)):
        with gpu_on_cpu() as gpu:
            folder = tmp_path / f"{small}-{deferred}"
            session = opened(folder, checkpoint, monkeypatch, skinny=FOUR if small else NONE, deferred=deferred)
            made[small, deferred] = run(session, checkpoint)
            skinny, blas = counts(gpu)
            assert bool(skinny) == small and blas
            session.close()
    for deferred in (False, True):
        assert relative(made[True, deferred], made[False, deferred]) < 0.02
    a, b = (families.prompt(checkpoint, 12, seed) for seed in range(2))
    first, second = families.reference_logits(checkpoint, a[:7]), families.reference_logits(checkpoint, b[:8])
    singles = [row for at in range(4, 7) for row in (first[at : at + 1], second[at + 1 : at + 2])]
    want = np.concatenate([first[:4], second[:5], *singles])
    errors = [relative(made[True, deferred], want) for deferred in (False, True)]
    assert max(errors) < 0.25 and errors[1] < 1.1 * errors[0]
