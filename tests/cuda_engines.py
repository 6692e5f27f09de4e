"""Tiny ``cuda`` engines in folders, laid out as an opened artifact, and sequences that are fed to them in pieces."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_on_cpu
import families
import numpy as np
import pytest
import torch
import transformers
from cuda_on_cpu import Gpu, gpu_on_cpu
from ragged import Ragged, engine_limits
from ragged import Traffic as RaggedTraffic

from zoo.artifacts.manifest import EngineManifest
from zoo.calibration import calibrate
from zoo.compilers.cuda import CudaCompiler
from zoo.errors import ZooError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.runtime.abi import Batch
from zoo.runtime.cuda_indices import CUDA_INDEX_BUILDERS
from zoo.runtime.sessions.cuda import CudaSession
from zoo.spec import BuildSpec, HardwareSpec, Limits, ModelSpec, ParallelSpec, QuantSpec, to_json
from zoo.targets import TARGETS
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors

LIMITS = Limits(max_tokens=96, max_sequences=6, max_rows=96, max_context=64, block_size=8)
QUANTS = {
    "none": QuantSpec("none"),
    "fp8": QuantSpec("fp8", "fp8"),
    "fp8-kv": QuantSpec("fp8-kv", "fp8", kv_cache="fp8"),
}
HOPPER = HardwareSpec("h100-sxm", "gpu", sm=90, memory=85_520_809_984, dtypes=("bfloat16", "float16"), quants=("none", "fp8"))


def build_spec(model: ModelSpec, quant: str = "none", limits: Limits = LIMITS, **changes: Any) -> BuildSpec:
    """A BuildSpec for Hopper in bfloat16."""
    return BuildSpec(
        model, QUANTS[quant], **{"hardware": HOPPER, "parallel": ParallelSpec(), "limits": limits.resolve(model),
        "compiler": "cuda", "dtype": "bfloat16", **changes},
    )  # fmt: skip


def rewritten(build: BuildSpec) -> ModelGraph:
    return run_passes(expand(build.model, build.dtype, build.limits.max_context), build, TARGETS["cuda"])


@functools.cache
def scales_of(checkpoint: Path) -> dict[str, float]:
    with Tensors.open(checkpoint) as tensors:
        return calibrate(families.spec(checkpoint), tensors, families.prompt(checkpoint, 64, seed=6), cache=True)


def compile_engine(
    folder: Path,
    checkpoint: Path,
    quant: str = "none",
    limits: Limits = LIMITS,
    bound: bool = True,
    real: bool = False,
    dtype: str = "bfloat16",
) -> EngineManifest:
    """Compile into ``folder``, which gets the checkpoint's file and scales as an opened artifact has them.

    bound  False: as an engine that was built without a checkpoint    real  True: with real cubins
    """
    build = build_spec(families.spec(checkpoint), quant, limits, dtype=dtype)
    folder.mkdir(parents=True)
    scales = scales_of(checkpoint) if build.calibrated and bound else {}
    compiler, stand_in = CudaCompiler(), mock.patch("zoo.compilers.cuda.engine.compile_kernels", cuda_on_cpu.compile_kernels)
    with Tensors.open(checkpoint) as tensors, mock.patch.dict({}) if real else stand_in:
        compiled = compiler.compile(rewritten(build), build, tensors if bound else None, scales, folder)
        if bound:
            (folder / "checkpoint").mkdir()
            for file in tensors.files:
                os.link(file, folder / "checkpoint" / file.name)
    if scales:
        (folder / "scales.json").write_text(json.dumps(scales))
    assert all(path.is_file() for path in compiled.files.values())
    return EngineManifest(
        model=build.model.name,
        version="0" * 12,
        profile=build.profile,
        build="sha256:" + "0" * 64,
        made={},
        compiler={"name": compiler.name, "version": compiler.version()},
        spec={},
        needs=compiled.needs,
        limits={key: int(value) for key, value in to_json(build.limits).items()},
        abi=compiled.abi,
        weights=compiled.weights,
        scratch=compiled.scratch,
    )


@dataclasses.dataclass(frozen=True)
class Made:
    """An engine, and the checkpoint that it came from. Not to be changed: ``shared`` engines serve a whole test run."""

    folder: Path
    manifest: EngineManifest
    checkpoint: Path


_MADE: dict[tuple[str, ...], Made] = {}
_OPENED: dict[tuple[str, ...], tuple[Made, Gpu, CudaSession]] = {}


def shared(base: Path, case: str, quant: str = "none", dtype: str = "bfloat16") -> Made:
    """The engine of a case of ``families.CASES``, made once a process. ``base``: a folder that outlives the test."""
    key = (case, quant, dtype)
    if key not in _MADE:
        family, overrides = families.CASES[case]
        checkpoint = families.make_checkpoint(base, family, **overrides)
        folder = base / f"cuda-{case}-{quant}-{dtype}"
        _MADE[key] = Made(folder, compile_engine(folder, checkpoint, quant, dtype=dtype), checkpoint)
    return _MADE[key]


def opened(base: Path, case: str, quant: str = "none", dtype: str = "bfloat16") -> tuple[Made, Gpu, CudaSession]:
    """A session of a shared engine, opened once a process; its pools and arena are full of NaN again. Not to be closed."""
    key = (case, quant, dtype)
    if key not in _OPENED:
        made = shared(base, case, quant, dtype)
        with gpu_on_cpu() as gpu:
            _OPENED[key] = made, gpu, CudaSession(made.folder, made.manifest, blocks=48, fill=0xFF)
    made, gpu, session = _OPENED[key]
    session._device.use()
    engine = session._engine
    for place in (engine.arena, *(engine.addresses[cache.name] for cache in made.manifest.abi.caches)):
        gpu.memory[place][:] = 0xFF
    return made, gpu, session


def copied(made: Made, folder: Path) -> Made:
    shutil.copytree(made.folder, folder)
    return Made(folder, copy.deepcopy(made.manifest), made.checkpoint)


def open_engine(made: Made, gpu: Gpu | None = None, checkpoint: Path | None = None, blocks: Any = 20) -> CudaSession:
    with gpu_on_cpu(gpu):
        return CudaSession(made.folder, made.manifest, checkpoint, blocks)


def refused(kind: type[ZooError], match: str, made: Made, gpu: Gpu | None = None, **options: Any) -> str:
    """The message of an engine that does not open; one line, and everything is given back."""
    gpu = gpu or Gpu()
    with pytest.raises(kind, match=match) as caught:
        open_engine(made, gpu, **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert gpu.live() == [] and not gpu.blas.things
    return str(caught.value)


def change_plan(made: Made, change: Callable[[dict[str, Any]], None]) -> None:
    path = made.folder / "plan.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))


class Traffic:
    """Sequences and the blocks they own, in random order. ``step`` runs any number of new tokens of each."""

    def __init__(self, session: CudaSession, seed: int = 0) -> None:
        self.session, self.size = session, session.limits.block_size
        self.free = np.random.default_rng(seed).permutation(np.arange(1, session.limits.max_blocks)).tolist()
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}

    def batch(self, new: Mapping[str, Sequence[int]], rows: Sequence[int] | None = None) -> Batch:
        """The batch that gives each named sequence its new tokens. ``rows``: whose logits are wanted; None: all."""
        ids: list[int] = []
        positions: list[int] = []
        starts, lengths = [0], []
        for name, added in new.items():
            done = self.tokens.setdefault(name, [])
            owned = self.blocks.setdefault(name, [])
            positions += range(len(done), len(done) + len(added))
            done += added
            ids += added
            while len(owned) * self.size < len(done):
                owned.append(self.free.pop())
            starts.append(len(ids))
            lengths.append(len(done))
        table = np.zeros((len(new), max(len(self.blocks[name]) for name in new)), np.int32)
        for row, name in enumerate(new):
            table[row, : len(self.blocks[name])] = self.blocks[name]
        wanted = range(len(ids)) if rows is None else rows
        arrays = [np.array(values, np.int32) for values in (ids, positions, starts, lengths)]
        return Batch(*arrays, {"full": table}, np.array(wanted, np.int32))

    def step(self, new: Mapping[str, Sequence[int]], rows: Sequence[int] | None = None) -> np.ndarray:
        logits = self.session.step(self.batch(new, rows)).logits
        assert logits is not None
        return logits.copy()


def feed(session: CudaSession, tokens: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Logits [S, V] of three sequences a, b and c, fed in pieces: all kinds of steps that a scheduler makes.

    a, b and c have 15, 36 and 43 tokens.
    """
    traffic, rows = Traffic(session, seed), {name: [] for name in tokens}  # type: ignore[var-annotated]
    steps: list[dict[str, int]] = [
        {"a": 9},  # a prompt alone
        {"a": 1, "b": 33, "c": 40},  # decode beside prompts: more rows than kernels of few rows take
        {"b": 1, "a": 3, "c": 1},  # a chunk of a prompt between sequences that decode
        {"a": 1, "b": 1, "c": 1},  # decode: captured,
        {"a": 1, "b": 1, "c": 1},  # and replayed
    ]
    for counts in steps:
        new = {name: tokens[name][(at := len(traffic.tokens.get(name, []))) : at + count] for name, count in counts.items()}
        logits, start = traffic.step(new), 0
        for name, added in new.items():
            rows[name].append(logits[start : start + len(added)])
            start += len(added)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def some_tokens(checkpoint: Path, seed: int = 0) -> dict[str, list[int]]:
    """Three sequences for ``feed``, exactly as long as it takes."""
    lengths = {"a": 15, "b": 36, "c": 43}
    return {name: families.prompt(checkpoint, length, seed + place) for place, (name, length) in enumerate(lengths.items())}


@functools.cache
def rounded_reference(checkpoint: Path) -> transformers.PreTrainedModel:
    """The checkpoint as transformers runs it in bfloat16."""
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="eager").eval()


def rounded_logits(checkpoint: Path, token_ids: Sequence[int]) -> np.ndarray:
    """Logits [S, V] of one sequence by transformers in bfloat16."""
    with torch.no_grad():
        return rounded_reference(checkpoint)(torch.tensor([list(token_ids)])).logits[0].float().numpy()


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """RMS of the error over RMS; infinite for what is no number."""
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean())) if np.isfinite(got).all() else float("inf")


class JudgedGraph(Ragged):
    """The graph that becomes a plan, in ONNX Runtime through the bodies of its zoo ops."""

    def __init__(self, made: Made, quant: str) -> None:
        build = build_spec(families.spec(made.checkpoint), quant, dataclasses.replace(LIMITS, max_blocks=24), dtype="float32")
        graph = rewritten(build)
        with Tensors.open(made.checkpoint) as tensors:
            weights = {name: materialize(one, tensors, scales_of(made.checkpoint)) for name, one in graph.weights.items()}
        super().__init__(graph, weights, engine_limits(build.limits))
        self.index_inputs = []

    def feeds(self, batch: Batch) -> dict[str, Any]:
        made = {name: families.ort_value(build(batch, self.limits)) for name, build in CUDA_INDEX_BUILDERS.items()}
        return super().feeds(batch) | {name: value for name, value in made.items() if name in self.wanted}


def graph_logits(made: Made, quant: str, tokens: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Logits [S, V] of each sequence by that graph in float32, all of them in one step."""
    logits = RaggedTraffic(JudgedGraph(made, quant)).step(tokens, rows=range(sum(map(len, tokens.values()))))
    ends = np.cumsum([len(one) for one in tokens.values()])
    return dict(zip(tokens, np.split(logits, ends[:-1]), strict=True))
