"""Machines that cannot run a ``cuda`` engine, too little memory, limits, NaN: one line that says what to do, and no remains."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from cuda_engines import LIMITS, Made, change_plan, compile_engine, copied, open_engine, opened, refused, shared
from cuda_on_cpu import Gpu, gpu_on_cpu
from safetensors.numpy import load_file, save_file

from zoo import LLM, SamplingParams
from zoo.artifacts.manifest import EngineManifest
from zoo.errors import (
    ArtifactError,
    IncompatibleError,
    RequestError,
    ResourceError,
    UnavailableError,
)
from zoo.runtime.cuda import cublaslt
from zoo.runtime.cuda.loading import SPARE
from zoo.runtime.sessions import open_session
from zoo.runtime.sessions.cuda import CudaSession


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def engine(base: Path, tmp_path: Path) -> Made:
    """A copy that may be damaged."""
    return copied(shared(base, "llama-grouped"), tmp_path / "engine")


# the machine


def test_another_gpu(engine: Made) -> None:
    refused(
        IncompatibleError, r"no visible GPU has SM 9\.0, only 8\.0, 8\.9; set CUDA_VISIBLE_DEVICES, or", engine, Gpu((89, 80))
    )
    change_plan(engine, lambda plan: plan.update(sm=100))
    refused(IncompatibleError, r"plan\.json is for SM 100, the GPU has 90; choose another profile", engine)
    del engine.manifest.needs["sm"]
    refused(ArtifactError, r"engine\.json: needs has no sm, which a cuda engine is for; rebuild", engine)


def test_no_gpu_driver_or_packages(engine: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        UnavailableError, "this machine has no GPU that may be used: no CUDA-capable device is detected; choose", engine, Gpu(())
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(
            UnavailableError, match=r"needs cuda-python .*; install it with `pip install 'cuda-bindings>=13,<14'`"
        ):
            open_session(engine.folder, engine.manifest)
    gpu = Gpu()
    with monkeypatch.context() as patch, gpu_on_cpu(gpu):
        patch.undo()
        patch.setattr(cublaslt, "library", LIBRARY)
        patch.setitem(sys.modules, "cuda.pathfinder", None)
        patch.setattr(ctypes, "CDLL", no_library)
        with pytest.raises(UnavailableError, match=r"cuBLASLt cannot be loaded \(no such file\); install it with `pip install"):
            CudaSession(engine.folder, engine.manifest)
    assert gpu.live() == []


LIBRARY = cublaslt.library


def no_library(path: str) -> Any:
    raise OSError("no such file")


def test_an_old_driver(engine: Made) -> None:
    gpu = Gpu(version=12040)
    refused(UnavailableError, r"knows CUDA 12\.4, and the engine needs 13\.0; update the driver to 580 or newer", engine, gpu)
    gpu = Gpu()
    gpu.blas.status = 1
    refused(UnavailableError, r"cuBLASLt 13\.1\.0 does not start with this driver; update the driver", engine, gpu)


# memory


def needed(made: Made) -> int:
    """The least memory that opens an engine with one context, found by trying."""
    low, high = SPARE, SPARE + (1 << 28)
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            open_engine(made, Gpu(room=middle), blocks=0).close()
            high = middle
        except ResourceError:
            low = middle
    return high


def test_too_little_memory_says_what_is_missing_and_what_would_fit(engine: Made, tmp_path: Path) -> None:
    least = needed(engine)
    text = refused(
        ResourceError,
        r"NVIDIA Standin has 33\d\.\d MB of memory free, and llama\S+ none-h100-sxm-cuda-tp1 needs 33\d\.\d MB \(weights "
        r"194\.\d kB, activations 6\d\.\d MB, KV pools of one context of 64 tokens 18\.4 kB, spare 268\.4 MB\), \d\.\d kB more: "
        r"build the engine with limits\.max_context=32 or less, or use a GPU with more memory",
        engine,
        Gpu(room=least - 8000),
        blocks=0,
    )
    context = int(text.partition("max_context=")[2].split()[0])
    smaller = tmp_path / "smaller"
    manifest = compile_engine(smaller, engine.checkpoint, limits=dataclasses.replace(LIMITS, max_context=context))
    open_engine(Made(smaller, manifest, engine.checkpoint), Gpu(room=least - 8000), blocks=0).close()

    text = refused(
        ResourceError,
        r"KV pools of 30 blocks 61\.4 kB, .* more: give max_blocks=\d or less, or",
        engine,
        Gpu(room=least),
        blocks=30,
    )
    blocks = int(text.partition("max_blocks=")[2].split()[0])
    assert open_engine(engine, Gpu(room=least), blocks=blocks).limits.max_blocks == blocks
    text = refused(
        ResourceError, r"needs .* 200\.0 MB more: use a GPU with more memory", engine, Gpu(room=least - 200_000_000), blocks=0
    )


def test_another_process_on_the_gpu(engine: Made) -> None:
    class Shared(Gpu):
        def cuMemGetInfo(self) -> tuple[int, int, int]:
            code, free, total = super().cuMemGetInfo()
            return code, max(0, free - 900_000_000), total

    refused(
        ResourceError,
        r"has 173\.7 MB of memory free.* more: stop what else runs on it \(900\.0 MB are taken\), or",
        engine,
        Shared(),
    )


def test_memory_that_goes_while_weights_are_loaded(engine: Made) -> None:
    class Filling(Gpu):
        def cuModuleLoadData(self, cubin: bytes) -> tuple[int, int | None]:
            if self.room == 1 << 30:
                self.room = 500_000_000
                self.cuMemAlloc(self.cuMemGetInfo()[1] - SPARE - 200_000)
            return super().cuModuleLoadData(cubin)

    gpu = Filling()
    with pytest.raises(ResourceError, match=r"has \d\.\d kB left beside the weights; KV pools of 9 blocks need 18\.4 kB, "):
        open_engine(engine, gpu, blocks=0)
    assert not gpu.blas.things


def test_blocks(engine: Made) -> None:
    for blocks in (-1, 1, True, "4", 2.0):
        with pytest.raises(RequestError, match=r"max_blocks is .*; block 0 is reserved, so give 2 or more, or 0 for as many as"):
            open_engine(engine, blocks=blocks)
    whole = engine.manifest.limits["max_blocks"]
    for blocks, count in ((0, whole), (2, 2), (np.int64(20), 20), (10**6, whole)):
        session = open_engine(engine, blocks=blocks)
        assert session.limits.max_blocks == count
        session.close()
    session = open_engine(engine, Gpu(room=needed(engine) + 5 * 2048), blocks=0)
    assert session.limits.max_blocks == 9 + 5, "one context, and what memory is left"
    session.close()


# a running engine


def test_nan_logits_end_their_request_and_no_other(base: Path, tmp_path: Path) -> None:
    """A token whose embedding is NaN: its request ends by name; its blocks, full of NaN, go to the next one."""
    checkpoint = families.make_checkpoint(base, "llama")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][13] = np.nan
    save_file(tensors, broken / "model.safetensors")
    manifest = compile_engine(tmp_path / "engine", broken, dtype="float32")
    session = open_engine(Made(tmp_path / "engine", manifest, broken), blocks=5)
    prompts = [families.prompt(checkpoint, 9, seed) for seed in range(4)]
    prompts = [[token if token != 13 else 14 for token in prompt] for prompt in prompts]
    prompts[1][4] = 13
    with LLM.from_session(session) as llm:
        for host in ({}, {"logprobs": 1}):  # chosen on the device, and on the host
            outputs = llm.generate(prompts, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, **host))
            for place, output in enumerate(outputs):
                found = output.outputs[0]
                if place == 1:
                    assert found.finish_reason == "error" and found.token_ids == []
                    words = r"request '\d' failed after 0 tokens: the engine gave nan .*; its weights or its cache are damaged"
                    assert re.fullmatch(words, str(found.error).replace("NaN", "nan"))
                else:
                    assert found.token_ids == families.reference_greedy(checkpoint, prompts[place], 3)


def test_lower_limits_than_the_engines(base: Path) -> None:
    made, _, session = opened(base, "llama-grouped", dtype="float32")
    for name, value in (("max_tokens", 97), ("max_blocks", 0), ("block_size", 4), ("max_context", 65)):
        with pytest.raises(RequestError, match=f"{name} is {value}, but the engine was built with"):
            LLM.from_session(session, **{name: value})
    llm = LLM.from_session(session, max_tokens=4, max_sequences=2, max_rows=2, max_context=16, max_blocks=4)
    prompts = [families.prompt(made.checkpoint, 7, seed) for seed in range(3)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == families.reference_greedy(made.checkpoint, prompt, 2)
    with pytest.raises(RequestError, match=r"the prompt has 16 tokens, but this engine holds 16 tokens of one sequence"):
        llm.generate([list(range(16))], SamplingParams())


def test_open_session_finds_it(engine: Made) -> None:
    assert isinstance(engine.manifest, EngineManifest)
    with gpu_on_cpu():
        session = open_session(engine.folder, engine.manifest, blocks=12)
    assert session.limits.max_blocks == 12 and session.vocab_size == 262
    session.close()
