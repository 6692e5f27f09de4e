"""Registries that are full, may not be written, are no folder, or have lost documents: one clear error, and the rest goes on."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from artifact_engines import make_engine

from zoo.artifacts.machine import Machine
from zoo.artifacts.registry import Registry
from zoo.errors import ArtifactError, DigestError, NotFoundError, ResourceError

CPU_MACHINE = Machine(2, 8 << 30, (), {"onnxruntime": "1.32.0"})
NOBODY = 65534


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def used(root: Path) -> int:
    """Bytes of all files below a folder, hard links once."""
    status = {one.st_ino: one.st_size for path in root.rglob("*") if stat.S_ISREG((one := path.lstat()).st_mode)}
    return sum(status.values())


@pytest.fixture
def fill(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the disk full: from now on no more bytes may lie in the registry than now."""
    flush = os.fsync

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and used(registry.root) > limit[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    limit: list[int] = []

    def start() -> None:
        limit[:] = [used(registry.root)]
        monkeypatch.setattr(os, "fsync", full)

    return start


def test_on_a_full_disk_a_model_goes_and_gc_frees_it(
    tmp_path: Path, registry: Registry, fill: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = registry.store(make_engine(tmp_path / "a"))
    registry.store(make_engine(tmp_path / "b", seed="b"))
    registry.store(make_engine(tmp_path / "c", model="other"))
    fill()
    before = used(registry.root)
    with pytest.raises(ResourceError, match="No space left"):
        registry.store(make_engine(tmp_path / "d", seed="d"))
    monkeypatch.setattr(tempfile, "mkstemp", refuse(errno.ENOSPC))  # not even a file's name can be made
    assert len(registry.remove("tiny")) == 2
    assert registry.verify() == []
    assert registry.gc() > before // 3
    monkeypatch.undo()
    assert [row["model"] for row in registry.rows()] == ["other"]
    assert not (registry.root / "tiny").exists()
    assert registry.store(make_engine(tmp_path / "a")).digest == entry.digest


@pytest.mark.parametrize("what", ["profile", "version"])
def test_on_a_full_disk_an_engine_makes_room_for_its_own_removal(
    tmp_path: Path, registry: Registry, fill: Callable[[], None], what: str
) -> None:
    seed = "a" if what == "profile" else "b"
    gone = registry.store(make_engine(tmp_path / "a", plan=os.urandom(20_000)))
    kept = registry.store(make_engine(tmp_path / "b", seed=seed, quant="fp8", hardware="l40s"))
    fill()
    removed = registry.remove(gone.ref if what == "profile" else f"tiny:{gone.version}")
    assert removed == [gone.ref if what == "profile" else f"tiny:{gone.version}"]
    assert registry.entries() == [kept]
    assert registry.verify() == []
    assert not registry.layout("tiny").blob(gone.image.files["engine.plan"].digest).exists()
    assert registry.layout("tiny").blob(kept.image.files["engine.plan"].digest).exists()


def test_a_disk_that_stays_full_is_one_error_and_other_engines_are_whole(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = registry.store(make_engine(tmp_path / "a"))
    kept = registry.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))
    monkeypatch.setattr(tempfile, "mkstemp", refuse(errno.ENOSPC))
    with pytest.raises(ResourceError, match=r"all other engines are whole.*zoo rm MODEL"):
        registry.remove(gone.ref)
    monkeypatch.undo()
    assert registry.verify(kept.ref) == []
    assert registry.remove(gone.ref) == [gone.ref]
    assert registry.verify() == []


def refuse(code: int) -> Callable[..., None]:
    def raise_it(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return raise_it


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Registry]:
    """A registry with one engine that nobody but root may write, in a folder which everybody may enter."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    registry = Registry(root / "registry")
    registry.store(make_engine(tmp_path / "a"))
    registry.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))
    folders = [path for path in (registry.root, *registry.root.rglob("*")) if path.is_dir()]
    for path in registry.root.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    for path in folders:
        path.chmod(0o555)
    yield registry
    for path in folders:
        path.chmod(0o755)
    shutil.rmtree(root)


def as_nobody(work: Callable[[], None]) -> None:
    """Run work in a forked process that has no rights of root's."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_an_engine_is_served_from_a_registry_that_may_not_be_written(tmp_path: Path, read_only: Registry) -> None:
    engine = make_engine(tmp_path / "a")
    contents = {name: path.read_bytes() for name, path in engine.files.items()}
    before = {path: path.lstat().st_mtime_ns for path in read_only.root.rglob("*")}
    temporary = read_only.root.parent / "temporary"
    temporary.mkdir()
    temporary.chmod(0o777)

    def work() -> None:
        tempfile.tempdir = str(temporary)
        with read_only.open("tiny", machine=CPU_MACHINE) as opened:
            assert not opened.folder.is_relative_to(read_only.root)
            for name, data in contents.items():
                assert (opened.folder / name).read_bytes() == data, name
            assert (opened.folder / "checkpoint/model.safetensors").is_symlink()
            assert not (opened.folder / "model.onnx").is_symlink()
            (opened.folder / "weights.bin").write_bytes(b"a session's")
        assert not any(temporary.iterdir())
        opened.close()

        killed = os.fork()
        if killed == 0:
            held = read_only.open("tiny", machine=CPU_MACHINE)
            os.kill(os.getpid(), 9 if held.folder.is_dir() else 15)
        os.waitpid(killed, 0)
        (left,) = temporary.iterdir()
        with read_only.open("tiny", machine=CPU_MACHINE), read_only.open("tiny", machine=CPU_MACHINE):
            assert not left.exists()
            assert len(list(temporary.iterdir())) == 2
        assert not any(temporary.iterdir())

    as_nobody(work)
    assert {path: path.lstat().st_mtime_ns for path in read_only.root.rglob("*")} == before


def test_a_bad_blob_in_a_registry_that_may_not_be_written_is_refused(read_only: Registry) -> None:
    plan = read_only.layout("tiny").blob(read_only.resolve("tiny", CPU_MACHINE).image.files["engine.plan"].digest)
    plan.chmod(0o644)
    plan.write_bytes(b"plaN")

    def work() -> None:
        with pytest.raises(DigestError, match=r"engine\.plan"):
            read_only.open("tiny", machine=CPU_MACHINE)

    as_nobody(work)


def test_writing_to_a_registry_that_may_not_be_written_is_one_error(read_only: Registry) -> None:
    engine = make_engine(read_only.root.parent / "c", seed="c")
    entry = read_only.resolve("tiny", CPU_MACHINE)

    def building() -> None:
        with read_only.building("sha256:" + "a" * 64):
            pass

    def work() -> None:
        for attempt in (
            lambda: read_only.remove("tiny"),
            lambda: read_only.remove(entry.ref),
            lambda: read_only.gc(),
            lambda: read_only.promote(entry),
            building,
            lambda: read_only.store(engine),
        ):
            with pytest.raises(ArtifactError, match=r"may not be written \((Permission denied|Read-only)"):
                attempt()
        assert len(read_only.rows()) == 2
        assert read_only.verify() == []

    as_nobody(work)


@pytest.mark.parametrize("kind", ["a file", "below a file", "nowhere"])
def test_a_registry_that_cannot_be_a_folder_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    root = {"a file": tmp_path / "file", "below a file": tmp_path / "file/registry", "nowhere": Path("/proc/x/registry")}[kind]
    registry = Registry(root)
    attempts: list[Callable[[], object]] = [
        lambda: registry.store(make_engine(tmp_path / "a")),
        lambda: registry.building("sha256:" + "a" * 64).__enter__(),
    ]
    if kind != "nowhere":
        attempts += [registry.rows, registry.gc, registry.verify]
    for attempt in attempts:
        with pytest.raises(ArtifactError, match=f"registry {root}: .*ZOO_HOME"):
            attempt()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "index garbage": lambda folder: (folder / "index.json").write_text("{"),
    "index empty": lambda folder: (folder / "index.json").write_text(""),
    "index no object": lambda folder: (folder / "index.json").write_text("[1]"),
    "index a folder": lambda folder: ((folder / "index.json").unlink(), (folder / "index.json").mkdir()),
    "index gone": lambda folder: (folder / "index.json").unlink(),
    "oci-layout gone": lambda folder: (folder / "oci-layout").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_does_not_hinder_the_others_and_can_be_removed(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    broken = registry.store(make_engine(tmp_path / "a", model="broken"))
    sound = registry.store(make_engine(tmp_path / "b"))
    garbage = registry.store(make_engine(tmp_path / "c", seed="c"))
    registry.remove(f"tiny:{garbage.version}")
    folder = registry.root / "broken"
    DAMAGE[damage](folder)
    blobs = set((folder / "blobs/sha256").iterdir())

    assert [row["ref"] for row in registry.rows()] == [sound.ref]
    assert "model broken is left out" in caplog.text and "`zoo rm broken`" in caplog.text
    caplog.clear()
    assert [problem.ref for problem in registry.verify()] == ["broken"]
    assert registry.gc() > 0
    assert "broken: its blobs are kept" in caplog.text
    assert set((folder / "blobs/sha256").iterdir()) == blobs
    with pytest.raises(ArtifactError, match="`zoo rm broken`"):
        registry.resolve("broken", CPU_MACHINE)

    assert registry.remove("broken") in (["broken"], [f"broken:{broken.version}"])
    assert registry.verify() == []
    with pytest.raises(NotFoundError):
        registry.remove("broken")
    assert registry.gc() > 0
    assert not folder.exists()
    assert registry.store(make_engine(tmp_path / "a", model="broken")).digest == broken.digest
    assert [row["model"] for row in registry.rows()] == ["broken", "tiny"]
    assert registry.verify() == []


def test_verify_of_a_registry_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no such folder; nothing was verified"):
        Registry(tmp_path / "nowhere").verify()
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "fresh"))
    assert Registry(tmp_path / "fresh/registry").verify() == []  # the user's own, before anything is stored


def test_gc_keeps_an_open_engine_of_a_removed_model(tmp_path: Path, registry: Registry) -> None:
    registry.store(make_engine(tmp_path / "a"))
    with registry.open("tiny", machine=CPU_MACHINE) as opened:
        registry.remove("tiny")
        registry.gc()
        assert (opened.folder / "engine.plan").read_bytes() == b"plan"
        assert registry.rows() == [] and registry.verify() == []
    registry.gc()
    assert not (registry.root / "tiny").exists()
