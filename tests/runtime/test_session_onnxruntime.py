"""Sessions on ONNX Runtime: ragged batches over poisoned pools against transformers, and what happens when things go wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import families
import numpy as np
import onnx
import pytest
from onnxruntime_engines import compile_engine
from ragged import Traffic
from safetensors.numpy import load_file, save_file

import zoo.resources
from zoo.artifacts import machine
from zoo.artifacts.locks import Lock
from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError, CheckpointError, EngineError, IncompatibleError, RequestError, ResourceError
from zoo.runtime.abi import Batch
from zoo.runtime.sessions import most_threads, open_session
from zoo.runtime.sessions import onnxruntime as onnxruntime_session
from zoo.runtime.sessions.onnxruntime import OrtSession
from zoo.spec import Limits

CASES = ("llama-tied", "mistral-window", "gpt2")
SMALL = Limits(max_tokens=64, max_sequences=8, block_size=4, max_context=64)
Usage = namedtuple("Usage", "total used free")


def checkpoint_of(case: str, root: Path) -> Path:
    family, overrides = families.CASES[case]
    return families.make_checkpoint(root, family, **overrides)


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of("llama-tied", tmp_path_factory.getbasetemp())


@pytest.fixture
def engine(checkpoint: Path, tmp_path: Path) -> tuple[Path, EngineManifest]:
    folder = tmp_path / "engine"
    return folder, compile_engine(folder, checkpoint, SMALL)


class Poisoned:
    """A session whose pools the tests may look into and fill; what ``ragged.Traffic`` drives."""

    def __init__(self, session: OrtSession) -> None:
        self.session, self.limits, self.pools = session, session.limits, session._pools

    def step(self, batch: Batch) -> np.ndarray:
        logits = self.session.step(batch).logits
        assert logits is not None and logits.dtype == np.float32
        return logits


@pytest.fixture(params=CASES)
def traffic(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Traffic, Path]]:
    checkpoint = checkpoint_of(request.param, tmp_path_factory.getbasetemp())
    manifest = compile_engine(tmp_path / "engine", checkpoint, SMALL)
    session = OrtSession(tmp_path / "engine", manifest, threads=1, fill=np.nan)
    assert all(np.isnan(pool).all() for pool in session._pools.values())
    yield Traffic(Poisoned(session)), checkpoint
    session.close()


def close_to(logits: np.ndarray, checkpoint: Path, tokens: list[int]) -> None:
    """The row is the reference's for the last token of a sequence."""
    np.testing.assert_allclose(logits, families.reference_logits(checkpoint, tokens)[-1], atol=3e-5, rtol=1e-5)


def test_prefill_chunks_and_decode_mixed(traffic: tuple[Traffic, Path]) -> None:
    drive, checkpoint = traffic
    a, b, c = (families.prompt(checkpoint, count, seed) for seed, count in enumerate((30, 11, 19)))
    close_to(drive.step({"a": a[:13]})[0], checkpoint, a[:13])
    mixed = drive.step({"a": a[13:14], "b": b[:6], "c": c[:1]})  # a decodes, b is in a chunk, c begins
    for row, tokens in zip(mixed, (a[:14], b[:6], c[:1]), strict=True):
        close_to(row, checkpoint, tokens)
    assert drive.step({"b": b[6:10], "c": c[1:9]}, rows=[]).shape == (0, mixed.shape[1])  # a chunk that wants no logits
    rows = drive.step({"c": c[9:], "a": a[14:], "b": b[10:]}, rows=[0, 9, 25, 26])
    expected = families.reference_logits(checkpoint, c)
    np.testing.assert_allclose(rows[:2], expected[[9, 18]], atol=3e-5, rtol=1e-5)
    close_to(rows[2], checkpoint, a)
    close_to(rows[3], checkpoint, b)


def test_blocks_of_a_gone_sequence_are_reused(traffic: tuple[Traffic, Path]) -> None:
    drive, checkpoint = traffic
    for seed in range(4):
        tokens = families.prompt(checkpoint, 20 + seed, seed)
        drive.step({"x": tokens[:-1]})
        close_to(drive.step({"x": tokens[-1:]})[0], checkpoint, tokens)
        drive.release("x")


def test_greedy_continuation_is_transformers(engine: tuple[Path, EngineManifest], checkpoint: Path) -> None:
    session = open_session(*engine)
    drive, prompt = Traffic(Poisoned(session)), families.prompt(checkpoint, 12, 5)
    made, new = [], prompt
    for _ in range(20):
        new = [int(drive.step({"a": new})[0].argmax())]
        made += new
    session.close()
    assert made == families.reference_greedy(checkpoint, prompt, 20)


def test_logits_are_the_callers_own(engine: tuple[Path, EngineManifest], checkpoint: Path) -> None:
    session = open_session(*engine)
    drive, prompt = Traffic(Poisoned(session)), families.prompt(checkpoint, 8)
    first = drive.step({"a": prompt})
    kept = first.copy()
    drive.step({"b": prompt[::-1]})
    np.testing.assert_array_equal(first, kept)


def test_pools_are_written_in_place(checkpoint: Path, tmp_path: Path) -> None:
    """A step neither copies a pool nor touches what it does not use: 2 x 536 MB of pools take no memory."""
    limits = Limits(max_tokens=64, max_sequences=8, block_size=16, max_context=64, max_blocks=131073)
    session = OrtSession(tmp_path / "e", compile_engine(tmp_path / "e", checkpoint, limits), threads=1)
    (pool, _) = session._pools.values()
    assert pool.nbytes == 131073 * 2 * 16 * 2 * 16 * 4
    session._pools["kv.0"][5] = session._pools["kv.1"][5] = 7.0
    prompt = families.prompt(checkpoint, 20)
    drive = Traffic(Poisoned(session))
    drive.free, drive.poison = [9], lambda: None
    before = resident()
    for start in range(0, 12, 4):
        drive.step({"a": prompt[start : start + 4]})
    assert resident() - before < 20_000_000
    assert (pool[9, :, :12] != 0).all() and (pool[5] == 7.0).all()
    session.close()


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_two_sessions_at_once_and_close_twice(engine: tuple[Path, EngineManifest], checkpoint: Path) -> None:
    folder, manifest = engine
    first, second = open_session(folder, manifest), open_session(folder, manifest, threads=1)
    one, two = Traffic(Poisoned(first), seed=1), Traffic(Poisoned(second), seed=2)
    a, b = families.prompt(checkpoint, 10, 1), families.prompt(checkpoint, 10, 2)
    one.step({"x": a[:5]})
    two.step({"x": b[:7]})
    close_to(one.step({"x": a[5:]})[0], checkpoint, a)
    first.close()
    first.close()
    with pytest.raises(AssertionError, match="closed"):
        one.step({"x": a[:1]})
    close_to(two.step({"x": b[7:]})[0], checkpoint, b)
    second.close()


def test_nothing_is_left_in_the_folder(engine: tuple[Path, EngineManifest]) -> None:
    folder, manifest = engine
    before = tree(folder)
    session = open_session(folder, manifest)
    assert tree(folder) == before
    session.close()
    assert tree(folder) == before


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_threads(engine: tuple[Path, EngineManifest]) -> None:
    folder, manifest = engine
    assert OrtSession(folder, manifest).threads == 1, "what the engine was built for"
    assert OrtSession(folder, manifest, threads=2).threads == 2
    manifest.spec["threads"] = 0
    assert OrtSession(folder, manifest).threads == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("threads", [-1, 1_000_000, 2**70, True, "2", None])
def test_threads_out_of_range(engine: tuple[Path, EngineManifest], threads: object) -> None:
    with pytest.raises(RequestError, match=rf"threads is .*from 0 \(all cores\) to {most_threads()} "):
        OrtSession(*engine, threads=threads)  # type: ignore[arg-type]


def test_threads_of_a_larger_machine_are_cut(engine: tuple[Path, EngineManifest]) -> None:
    folder, manifest = engine
    manifest.spec["threads"] = 1_000_000
    assert OrtSession(folder, manifest).threads == most_threads() <= 4 * len(os.sched_getaffinity(0))


def test_pools_beyond_the_machine_are_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    manifest = compile_engine(folder, checkpoint, dataclasses.replace(SMALL, max_blocks=10**9))
    before = tree(folder)
    with pytest.raises(ResourceError, match=r"KV pools of max_blocks=1000000000 need 2048\.0 GB.*limits\.max_blocks=\d+ or less"):
        open_session(folder, manifest)
    assert tree(folder) == before


def test_pools_that_are_used_in_part_may_be_large(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "engine"
    manifest = compile_engine(folder, checkpoint, dataclasses.replace(SMALL, max_blocks=1000))
    here = machine.Machine(1, 1_000_000)
    monkeypatch.setattr(onnxruntime_session, "describe_machine", lambda: here)
    with pytest.raises(ResourceError, match=r"max_blocks=1000 need 2\.0 MB and this machine has 1\.0 MB"):
        open_session(folder, manifest, 1)
    session, prompt = open_session(folder, manifest, 1, blocks=400), families.prompt(checkpoint, 9)
    close_to(Traffic(Poisoned(session)).step({"a": prompt})[0], checkpoint, prompt)
    session.close()


def test_address_space_that_the_system_does_not_give(
    engine: tuple[Path, EngineManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_session, "_check_pools", lambda *given: None)
    folder, manifest = engine
    caches = [dataclasses.replace(cache, shape=(10**12, *cache.shape[1:])) for cache in manifest.abi.caches]
    large = dataclasses.replace(manifest, abi=dataclasses.replace(manifest.abi, caches=caches))
    with pytest.raises(ResourceError, match=r"does not give 1024000\.0 GB for a KV pool of 1000000000000 blocks"):
        open_session(folder, large)


def test_memory_runs_out_while_weights_are_written(engine: tuple[Path, EngineManifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another process takes what was there."""
    monkeypatch.setattr(onnxruntime_session, "write_packed", lambda *given: np.empty((10**15, 7)))
    before = tree(engine[0])
    with pytest.raises(ResourceError, match=r"not enough memory to load the engine's 352\.5 kB of weights \(Unable to allocate"):
        open_session(*engine)
    assert tree(engine[0]) == before


def test_failing_step_is_a_users_error_and_the_session_goes_on(
    engine: tuple[Path, EngineManifest], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, prompt = OrtSession(*engine, threads=1), families.prompt(checkpoint, 9)
    good = Traffic(Poisoned(session)).batch({"a": prompt})
    name = next(tensor.name for tensor in engine[1].abi.index_inputs if len(tensor.shape) > 1)
    builder = onnxruntime_session.INDEX_BUILDERS[name]
    with monkeypatch.context() as patch:  # ONNX Runtime itself refuses the rank
        patch.setitem(onnxruntime_session.INDEX_BUILDERS, name, lambda *given: builder(*given)[0])
        with pytest.raises(EngineError, match=r"onnxruntime failed in a step of 9 tokens: .*rank"):
            session.step(good)
    with monkeypatch.context() as patch:
        patch.setitem(onnxruntime_session.INDEX_BUILDERS, name, lambda *given: np.empty((10**15, 7)))
        with pytest.raises(ResourceError, match="not enough memory for a step of 9 tokens"):
            session.step(good)
    close_to(np.asarray(session.step(good).logits)[0], checkpoint, prompt)
    session.close()


def test_folders_of_killed_processes_are_removed(engine: tuple[Path, EngineManifest]) -> None:
    folder, manifest = engine
    for name in (".session-dead", ".session-live"):
        (folder / name).mkdir()
        (folder / name / "lock").touch()
        (folder / name / "weights.bin").write_bytes(b"x" * 100)
    with Lock(folder / ".session-live" / "lock"):
        open_session(folder, manifest).close()
    assert not (folder / ".session-dead").exists() and (folder / ".session-live").exists()


def test_read_only_folder(engine: tuple[Path, EngineManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = engine
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(elsewhere))
    monkeypatch.setattr("zoo.runtime.sessions.onnxruntime.check_disk", lambda *_: seen.append(tree(folder)))
    before = tree(folder)
    open_session(folder, manifest).close()
    assert seen == [before] and tree(folder) == before and not list(elsewhere.iterdir())


@pytest.mark.parametrize("case", ["no checkpoint", "no model", "no table", "cut table", "moved", "other model", "no float"])
def test_folders_that_do_not_fit(engine: tuple[Path, EngineManifest], case: str) -> None:
    folder, manifest = engine
    table = json.loads((folder / "weights.json").read_text())
    expected, message = ArtifactError, ""
    match case:
        case "no checkpoint":
            shutil.rmtree(folder / "checkpoint")
            message = "no checkpoint came with it; build it with model.checkpoint"
        case "no model":
            (folder / "model.onnx").unlink()
            message = "model.onnx is missing"
        case "no table":
            (folder / "weights.json").unlink()
            message = "weights.json is missing"
        case "cut table":
            (folder / "weights.json").write_text(json.dumps(table)[:-9])
            message = "weights.json: malformed"
        case "moved":
            table["weights"][1]["offset"] += 4096
            (folder / "weights.json").write_text(json.dumps(table))
            message = "offsets do not follow from the recipes"
        case "other model":
            model = onnx.load(folder / "model.onnx", load_external_data=False)
            model.metadata_props[0].value = "sha256:" + "1" * 64
            (folder / "model.onnx").write_bytes(model.SerializeToString())
            message = "compiled with another weights.json"
        case "no float":
            table["weights"][0]["dtype"] = "float7"
            (folder / "weights.json").write_text(json.dumps(table))
            message = "float7"
    before = tree(folder)
    with pytest.raises(expected, match=message):
        open_session(folder, manifest)
    assert tree(folder) == before


def test_another_checkpoint_is_refused(engine: tuple[Path, EngineManifest], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, manifest = engine
    other = families.make_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=True, vocab_size=309)
    (folder / "checkpoint" / "model.safetensors").unlink()
    os.link(other / "model.safetensors", folder / "checkpoint" / "model.safetensors")
    before = tree(folder)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*309.*307"):
        open_session(folder, manifest)
    assert tree(folder) == before


def test_sharded_checkpoint(engine: tuple[Path, EngineManifest], checkpoint: Path) -> None:
    folder, manifest = engine
    tensors = load_file(checkpoint / "model.safetensors")
    (folder / "checkpoint" / "model.safetensors").unlink()
    for shard in range(3):
        part = {name: array for number, (name, array) in enumerate(tensors.items()) if number % 3 == shard}
        save_file(part, folder / "checkpoint" / f"model-0000{shard + 1}-of-00003.safetensors")
    session, prompt = open_session(folder, manifest), families.prompt(checkpoint, 9)
    close_to(Traffic(Poisoned(session)).step({"a": prompt})[0], checkpoint, prompt)
    session.close()


def test_unknown_compiler(engine: tuple[Path, EngineManifest]) -> None:
    folder, manifest = engine
    manifest.compiler["name"] = "abacus"
    with pytest.raises(IncompatibleError, match="'abacus'"):
        open_session(folder, manifest)


def test_too_little_memory(engine: tuple[Path, EngineManifest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.resources, "available_memory", lambda: 1_000_000)
    with pytest.raises(ResourceError, match=r"running llama.* 1\.0 MB is available"):
        open_session(*engine)


def test_too_little_disk_is_seen_first(engine: tuple[Path, EngineManifest], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = engine
    before = tree(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000, 9_000, 1_000))
    with pytest.raises(ResourceError, match=r"1\.0 kB is free"):
        open_session(folder, manifest)
    assert tree(folder) == before


def test_disk_fills_up_while_weights_are_written(
    engine: tuple[Path, EngineManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real file system of 256 kB, with the look at free space blinded, as when another process takes the room."""
    folder, manifest = engine
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(full)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        for file in ("model.onnx", "weights.json"):
            shutil.copyfile(folder / file, full / file)
        (full / "checkpoint").symlink_to(folder / "checkpoint")
        before = tree(full)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
        with pytest.raises(ResourceError, match=r"disk is full|No space left"):
            open_session(full, manifest)
        assert tree(full) == before
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_batches_beyond_the_limits_are_bugs(engine: tuple[Path, EngineManifest], checkpoint: Path) -> None:
    session = open_session(*engine)
    drive = Traffic(Poisoned(session))
    good = drive.batch({"a": families.prompt(checkpoint, 5)})
    assert session.step(good).logits is not None

    def broken(**changes: object) -> None:
        with pytest.raises(AssertionError):
            session.step(Batch(**(vars(good) | changes)))

    broken(token_ids=np.full(5, 307, np.int32))
    broken(token_ids=np.full(5, -1, np.int32))
    broken(token_ids=good.token_ids.astype(np.int64))
    broken(query_starts=np.array([0, 4], np.int32))
    broken(logit_rows=np.zeros(9, np.int32))
    broken(block_tables={"full": np.full((1, 2), session.limits.max_blocks, np.int32)})
    session.close()
