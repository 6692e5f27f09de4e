"""The TensorRT session on a stand-in library that runs the parser's model on the CPU: parts, profiles, pools, refusals.

What this cannot show is that TensorRT itself does what its documentation says; nobody here has run it on a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnxruntime
import pytest
from ragged import Traffic
from tensorrt_graphs import hardware
from tensorrt_standin import Cudart, Engine, Library

from zoo.artifacts.machine import Gpu, Machine
from zoo.artifacts.manifest import EngineManifest
from zoo.compilers.base import abi_of
from zoo.compilers.tensorrt_model import WEIGHTS_FILE, parser_model, shapes
from zoo.errors import ArtifactError, IncompatibleError, ResourceError, UnavailableError
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.runtime.abi import Batch
from zoo.runtime.sessions import open_session, tensorrt
from zoo.runtime.sessions.parts import DECODE, PREFILL, split
from zoo.runtime.sessions.tensorrt import TensorRtSession
from zoo.spec import BuildSpec, Limits, ParallelSpec, QuantSpec, to_json
from zoo.targets import TARGETS
from zoo.weights.bind import write_packed
from zoo.weights.reader import Tensors

PLAN = b"vtrt" + bytes(60)
VERSION = "1.7.1.116"
H200 = Gpu("NVIDIA H200", 90, 1 << 37)
L40S = Gpu("NVIDIA L40S", 89, 48_000_000_000, "580.1")


class Stage:
    """A checkpoint's engine as the stand-in holds it, and everything a session is opened with."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str = "llama-grouped") -> None:
        family, overrides = families.CASES[case]
        self.checkpoint, self.folder = families.make_checkpoint(tmp_path, family, **overrides), tmp_path / "engine"
        self.folder.mkdir()
        (self.folder / "engine.plan").write_bytes(PLAN)
        model = families.spec(self.checkpoint)
        limits = Limits(max_tokens=32, max_sequences=9, max_rows=12, block_size=4, max_context=64).resolve(model)
        build = BuildSpec(model, QuantSpec("none"), hardware(), ParallelSpec(), limits, "tensorrt_rtx", "float32")
        graph = run_passes(expand(model, "float32", 64), build, TARGETS["tensorrt_rtx"])
        onnx_model, weights = parser_model(graph)
        (tmp_path / "model.onnx").write_bytes(onnx_model.SerializeToString())
        write_packed(tmp_path / WEIGHTS_FILE, weights, Tensors.open(self.checkpoint), {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.cuda = Cudart()
        self.engine = Engine(session, shapes(graph, limits), self.cuda)
        self.library: Any = Library(self.engine, PLAN)
        self.manifest = EngineManifest(
            model="demo",
            version="0123456789ab",
            profile=build.profile,
            build="sha256:" + "5" * 64,
            made={},
            compiler={"name": "tensorrt_rtx", "version": VERSION},
            spec={},
            needs={"kind": "gpu", "sm": 89, "memory": 1 << 29, "packages": {"tensorrt_rtx": VERSION}},
            limits=to_json(limits),
            abi=abi_of(graph, build),
        )
        monkeypatch.setattr(tensorrt, "_libraries", lambda manifest: (self.library, self.cuda))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        self.cache = tmp_path / "cache" / "engine-zoo" / "tensorrt_rtx" / ("5" * 64 + ".cache")

    def open(self) -> TensorRtSession:
        session = open_session(self.folder, self.manifest)
        assert isinstance(session, TensorRtSession)
        return session

    def logits(self, tokens: list[int]) -> np.ndarray:
        return families.reference_logits(self.checkpoint, tokens)[-1]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


class Poisoned:
    """A session whose current pools ``Traffic`` can see and fill with NaN where the contract leaves them undefined."""

    def __init__(self, session: TensorRtSession, stage: Stage) -> None:
        self.session, self.limits, self.stage = session, session.limits, stage

    def step(self, batch: Batch) -> np.ndarray:
        return self.session.step(batch).logits

    @property
    def pools(self) -> dict[str, np.ndarray]:
        caches = self.stage.manifest.abi.caches
        return {cache.name: self.stage.cuda.view(self.session._pools[cache.name][0], np.float32, cache.shape) for cache in caches}


def test_steps_in_parts_equal_transformers(stage: Stage) -> None:
    """Prefill, a step that mixes prefill, chunks and decode of eight sequences, decode: each row as transformers has it."""
    session = stage.open()
    assert (session.vocab_size, session.limits.max_tokens) == (262, 32)
    traffic = Traffic(Poisoned(session, stage))
    prompts = {name: families.prompt(stage.checkpoint, 24, seed) for seed, name in enumerate("abcdefgh")}
    plans = (
        ({"a": 5, "b": 3}, [(PREFILL, 2, 8)]),
        ({"a": 1, "b": 1}, [(DECODE, 2, 2)]),
        ({"a": 1, "c": 9, "b": 1, "d": 2, "e": 4, "f": 3, "g": 2}, [(DECODE, 2, 2), (PREFILL, 4, 18), (PREFILL, 1, 2)]),
        ({"h": 1, "a": 1, "g": 3, "c": 1}, [(DECODE, 3, 3), (PREFILL, 1, 3)]),
    )
    for lengths, calls in plans:
        stage.engine.calls.clear()
        new = {name: prompts[name][len(traffic.tokens.get(name, [])) :][:count] for name, count in lengths.items()}
        for name, row in zip(new, traffic.step(new), strict=True):
            np.testing.assert_allclose(row, stage.logits(traffic.tokens[name]), rtol=0, atol=1e-4)
        assert [call[:3] for call in stage.engine.calls] == calls
    session.close()


def test_rows_of_any_part_come_back_in_order(stage: Stage) -> None:
    """Several rows of one sequence, none of another, in no order; and a step without any row fills the caches."""
    session = stage.open()
    traffic = Traffic(Poisoned(session, stage))
    ids = families.prompt(stage.checkpoint, 20)
    assert traffic.step({"a": ids[:4], "b": ids[:6]}, rows=[]).shape == (0, 262)
    logits = traffic.step({"a": ids[4:7], "b": ids[6:7], "c": ids[:2]}, rows=[5, 1, 3, 2])
    wanted = [ids[:2], ids[:6], ids[:7], ids[:7]]
    for row, tokens in zip(logits, wanted, strict=True):
        np.testing.assert_allclose(row, stage.logits(tokens), rtol=0, atol=1e-4)
    session.close()


def test_closing_frees_everything_and_keeps_kernels(stage: Stage) -> None:
    session = stage.open()
    used = sum(block.nbytes for block in stage.cuda.memory.values())
    pools = sum(2 * 4 * int(np.prod(cache.shape)) for cache in stage.manifest.abi.caches)
    assert pools < used < stage.manifest.needs["memory"]
    assert stage.engine.used_cache.filled == b""
    session.close()
    session.close()
    assert not stage.cuda.memory and stage.cuda.streams == 0
    assert stage.cache.read_bytes() == b"kernels" and [path.name for path in stage.cache.parent.iterdir()] == [stage.cache.name]
    again = stage.open()
    assert stage.engine.used_cache.filled == b"kernels"
    again.close()


def test_gpu_memory_that_is_short(stage: Stage) -> None:
    stage.cuda.room = 100_000
    with pytest.raises(ResourceError, match=r"the GPU cannot give [\d.]+ kB: out of memory"):
        stage.open()
    assert not stage.cuda.memory and stage.cuda.streams == 0


@pytest.mark.parametrize("plan", [b"something else", b"", None])
def test_plans_that_do_not_load(stage: Stage, plan: bytes | None) -> None:
    path = stage.folder / "engine.plan"
    path.unlink() if plan is None else path.write_bytes(plan)
    with pytest.raises(ArtifactError, match="missing or empty" if not plan else "the library cannot load it: Magic tag"):
        stage.open()
    assert stage.cuda.streams == 0


def test_a_plan_for_something_else_is_refused_by_its_head(stage: Stage) -> None:
    stage.library = Library(stage.engine, PLAN, (2, 0b11))
    with pytest.raises(IncompatibleError, match="TensorRT-RTX says version mismatch, unsupported cc"):
        stage.open()


def test_a_plan_without_the_manifests_caches(stage: Stage) -> None:
    cache = dataclasses.replace(stage.manifest.abi.caches[0], name="kv.7")
    stage.manifest = dataclasses.replace(stage.manifest, abi=dataclasses.replace(stage.manifest.abi, caches=(cache,)))
    with pytest.raises(ArtifactError, match=r"it has no kv\.7, which engine.json names"):
        stage.open()


def test_another_gpu_in_cuda_than_in_the_driver(stage: Stage) -> None:
    stage.cuda.sm = 80
    with pytest.raises(IncompatibleError, match=r"no visible GPU has SM 8\.9"):
        stage.open()


@pytest.mark.parametrize(
    ("gpus", "packages", "error", "said"),
    [
        ((), {}, UnavailableError, r"needs a GPU of SM 8\.9, and this machine has none, or no driver"),
        ((L40S,), {}, UnavailableError, r"pip install 'engine-zoo\[rtx\]'"),
        ((H200,), {"tensorrt-rtx-cu13": VERSION}, IncompatibleError, r"SM 8\.9; this machine has NVIDIA H200 \(SM 9\.0\)"),
        ((L40S,), {"tensorrt-rtx-cu13": "1.6.0"}, IncompatibleError, r"exactly tensorrt_rtx 1\.7\.1\.116; 1\.6\.0 is installed"),
    ],
)
def test_what_the_machine_lacks_is_said_before_the_plan_is_read(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[Gpu, ...],
    packages: dict[str, str],
    error: type[Exception],
    said: str,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tensorrt, "describe_machine", lambda: Machine(2, 1 << 34, gpus, packages))
    (stage.folder / "engine.plan").unlink()
    with pytest.raises(error, match=said):
        open_session(stage.folder, stage.manifest)


def test_cuda_python_is_asked_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tensorrt, "describe_machine", lambda: Machine(2, 1 << 34, (L40S,), {"tensorrt-rtx-cu13": VERSION}))
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(UnavailableError, match="pip install 'cuda-bindings"):
        open_session(stage.folder, stage.manifest)


def test_split_covers_every_token_once() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        counts = np.maximum(1, random.integers(-4, 6, random.integers(1, 12)))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        total = int(starts[-1])
        lengths = (counts + random.integers(0, 20, len(counts))).astype(np.int32)
        rows = random.permutation(total)[: random.integers(0, total + 1)].astype(np.int32)
        ids, table = np.arange(total, dtype=np.int32), np.arange(len(counts) * 8, dtype=np.int32).reshape(-1, 8)
        parts = split(Batch(ids, ids, starts, lengths, {"full": table}, rows), 3, 4)
        assert sorted(token for part in parts for token in part.batch.token_ids.tolist()) == list(range(total))
        assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(len(rows)))
        for part in parts:
            taken = np.diff(part.batch.query_starts)
            assert (taken == 1).all() if part.profile == DECODE else ((taken > 1).all() and len(taken) <= 3)
            found = part.batch.token_ids[part.batch.logit_rows]
            assert (found[: len(part.rows)] == rows[part.rows]).all() and len(found) == max(1, len(part.rows))
            for place, first in enumerate(part.batch.token_ids[part.batch.query_starts[:-1]]):
                sequence = int(np.flatnonzero(starts == first)[0])
                assert part.batch.kv_lengths[place] == lengths[sequence]
                width = part.batch.block_tables["full"].shape[1]
                assert (part.batch.block_tables["full"][place] == table[sequence, :width]).all() and width * 4 >= lengths[
                    sequence
                ]
        assert sum(part.profile == DECODE for part in parts) <= 1
        assert sum(part.profile == PREFILL for part in parts) == -(-int((counts > 1).sum()) // 3)
