"""Killed, out of disk, at the same time, in any order: what was published stays whole and nothing else stays for good."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from artifact_engines import make_engine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zoo.artifacts import staging
from zoo.artifacts.machine import Machine
from zoo.artifacts.registry import Registry
from zoo.errors import ResourceError

CPU_MACHINE = Machine(2, 8 << 30, (), {"onnxruntime": "1.32.0"})


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked process; its wait status. An exception there gives exit status 1."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def count_steps(work: Callable[[], None], die_at: int = 0) -> int:
    """Run work and count the lines of zoo.artifacts it executes; kill -9 this process at line ``die_at`` of them."""
    steps = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        if "/zoo/artifacts/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return steps


def snapshot(folder: Path) -> set[str]:
    """Everything in a registry but its own notes and locks."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not {".zoo", ".locks"} & set(path.parts)}


def test_kill_9_at_any_line_leaves_a_registry_that_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 lines spread over storing twice, opening, promoting, removing and collecting are each the last of some process."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the kernel outlives the process: only time is saved
    engines = {seed: make_engine(tmp_path / seed, seed=seed) for seed in "abc"}

    def work_in(registry: Registry) -> None:
        b = registry.store(engines["b"])
        registry.open(b, machine=CPU_MACHINE).close()
        c = registry.store(engines["c"])
        registry.promote(b)
        registry.remove(c.ref)
        registry.gc()

    total = count_steps(lambda: work_in(Registry(tmp_path / "counted")))
    assert total > 1000
    killed = 0
    for number, die_at in enumerate(range(1, total, total // 70)):
        registry = Registry(tmp_path / f"r{number % 7}")  # registries live on through many kills
        first = registry.store(engines["a"])
        status = in_child(lambda: count_steps(lambda: work_in(registry), die_at))  # noqa: B023 - runs before the next round
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or status == 0, f"line {die_at}: the child failed"
        assert registry.verify() == [], f"killed at line {die_at}"
        assert first in registry.entries(), f"killed at line {die_at}"
    assert killed >= 65
    clean = Registry(tmp_path / "clean")
    clean.store(engines["a"])
    work_in(clean)
    wanted = {path.name for path in (clean.root / "tiny/blobs/sha256").iterdir()}
    for number in range(7):
        registry = Registry(tmp_path / f"r{number}")
        work_in(registry)
        left = {path.name for path in (registry.root / "tiny" / ".zoo").iterdir()} - {"lock"}
        assert not any(any((registry.root / "tiny" / ".zoo" / name).iterdir()) for name in left)
        assert {path.name for path in (registry.root / "tiny/blobs/sha256").iterdir()} == wanted
        assert not list((registry.root / "tiny").glob(".index.json-*"))


def test_a_killed_process_leaves_nothing_that_the_next_store_keeps(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")

    def die_while_copying() -> None:
        staging.copy_hashed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        registry.store(make_engine(tmp_path / "a"))

    assert os.WIFSIGNALED(in_child(die_while_copying))
    folder = registry.root / "tiny" / ".zoo" / "staging"
    assert len(list(folder.iterdir())) == 1
    assert registry.rows() == []
    registry.store(make_engine(tmp_path / "b"))
    assert not any(folder.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after", range(9))
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    """The disk fills at the n-th file: four of the engine's, engine.json, config, manifest, version index, index."""
    registry = Registry(tmp_path / "registry")
    kept = registry.store(make_engine(tmp_path / "kept", seed="kept"))
    before = snapshot(registry.root)
    flush, flushed = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal flushed
        flushed += stat.S_ISREG(os.fstat(descriptor).st_mode)
        if flushed > after:
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="zoo gc"):
        registry.store(make_engine(tmp_path / "a"))
    monkeypatch.setattr(os, "fsync", flush)
    assert not any((registry.root / "tiny" / ".zoo" / "staging").iterdir())
    assert registry.verify() == []
    assert registry.entries() == [kept]
    registry.gc()
    assert snapshot(registry.root) == before
    registry.store(make_engine(tmp_path / "a"))


def test_a_limit_of_the_kernel_leaves_nothing(tmp_path: Path) -> None:
    """A real refusal from the kernel in the middle of a file: the process may not write files beyond 100 kB."""
    registry = Registry(tmp_path / "registry")
    engine = make_engine(tmp_path / "a", plan=os.urandom(300_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(ResourceError, match="nothing was stored"):
            registry.store(engine)

    assert in_child(limited) == 0
    assert registry.rows() == []
    assert not any((registry.root / "tiny" / ".zoo" / "staging").iterdir())


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    registry = Registry(tmp_path / "registry")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"1\.0 kB is free"):
        registry.store(make_engine(tmp_path / "a"))
    assert not (registry.root / "tiny" / "blobs").exists()


def test_many_processes_store_at_once(tmp_path: Path) -> None:
    """Six processes, two engines, one model, with collections in between: one entry for each engine."""
    registry = Registry(tmp_path / "registry")
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for round_ in range(3):
                    registry.store(make_engine(tmp_path / f"{number}-{round_}", seed="ab"[number % 2], plan=os.urandom(64)))
                    registry.gc()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert len(registry.rows()) == 2
    assert registry.verify() == []
    registry.gc()
    wanted = {blob.digest for entry in registry.entries() for blob in entry.image.blobs}
    wanted |= {entry.digest for entry in registry.entries()} | {one.digest for one in registry.layout("tiny").tags().values()}
    assert {f"sha256:{path.name}" for path in (registry.root / "tiny" / "blobs" / "sha256").iterdir()} == wanted


class AnyOrder(RuleBasedStateMachine):
    """Stores, removals, promotions and collections in any order, against a list of what should be there."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.registry = Registry(Path(self.folder.name) / "registry")
        self.registry.create()
        self.wanted: dict[str, list[str]] = {}  # version -> builds, newest last

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(
        seed=st.sampled_from("ab"),
        quant=st.sampled_from(["none", "fp8"]),
        tokens=st.sampled_from([1, 2]),
        plan=st.binary(max_size=2),
    )
    def store(self, seed: str, quant: str, tokens: int, plan: bytes) -> None:
        engine = make_engine(Path(self.folder.name) / "e", seed=seed, quant=quant, max_tokens=tokens, plan=plan)
        entry = self.registry.store(engine)
        assert entry.build == engine.manifest.build
        builds = self.wanted.pop(engine.manifest.version, [])
        self.wanted[engine.manifest.version] = [build for build in builds if build != entry.build] + [entry.build]

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), what=st.sampled_from(["digest", "version", "promote"]))
    def change(self, data: st.DataObject, what: str) -> None:
        entry = data.draw(st.sampled_from(self.registry.entries()))
        builds = self.wanted[entry.version]
        if what == "digest":
            self.registry.remove(f"tiny:{entry.version}@{entry.digest}")
            builds.remove(entry.build)
        elif what == "version":
            self.registry.remove(f"tiny:{entry.version}")
            builds.clear()
        else:
            self.registry.promote(entry)
            builds.remove(entry.build)
            builds.append(entry.build)
            self.wanted[entry.version] = self.wanted.pop(entry.version)
        if not builds:
            del self.wanted[entry.version]

    @rule()
    def gc(self) -> None:
        self.registry.gc()

    @invariant()
    def holds(self) -> None:
        found: dict[str, list[str]] = {}
        for entry in self.registry.entries():
            found.setdefault(entry.version, []).append(entry.build)
        assert list(found.items()) == list(self.wanted.items())
        assert self.registry.verify() == []


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=12, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
