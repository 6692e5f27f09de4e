"""Storing, finding, opening, removing: what goes in comes out, and nothing else does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from artifact_engines import CHECKPOINT, make_engine
from registry_server import need

from zoo.artifacts.machine import Gpu, Machine
from zoo.artifacts.registry import Registry, default_root
from zoo.errors import ArtifactError, DigestError, IncompatibleError, NotFoundError

CPU_MACHINE = Machine(2, 8 << 30, (), {"onnxruntime": "1.32.0"})
GPU_MACHINE = Machine(2, 8 << 30, (Gpu("L40S", 89, 48 << 30),), {"onnxruntime": "1.32.0", "tensorrt-rtx-cu13": "1.7.1.116"})


def blobs(registry: Registry, model: str = "tiny") -> list[Path]:
    return sorted((registry.root / model / "blobs" / "sha256").iterdir())


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_an_engine_comes_out_as_it_went_in(tmp_path: Path, registry: Registry) -> None:
    engine = make_engine(tmp_path / "e")
    entry = registry.store(engine)
    assert entry.ref == f"tiny:{engine.manifest.version}@none-cpu-onnxruntime-tp1"
    with registry.open("tiny", machine=CPU_MACHINE) as opened:
        assert opened.entry == entry
        for name, path in engine.files.items():
            assert (opened.folder / name).read_bytes() == path.read_bytes()
        assert opened.manifest == dataclasses.replace(engine.manifest, files=opened.manifest.files)
        assert json.loads((opened.folder / "engine.json").read_text())["files"]["checkpoint/model.safetensors"] == {
            "digest": "sha256:" + hashlib.sha256(CHECKPOINT).hexdigest(),
            "size": len(CHECKPOINT),
        }
    row = registry.rows()[0]
    assert row == entry.row()
    assert list(row) == ["ref", "model", "version", "profile", "quant", "hardware", "compiler", "tp", "digest", "size", "created"]
    assert row["size"] == sum(path.stat().st_size for path in opened.folder.rglob("*") if path.is_file())
    assert registry.verify() == []


def test_blobs_are_named_by_their_bytes_and_shared_by_profiles_and_versions(tmp_path: Path, registry: Registry) -> None:
    registry.store(make_engine(tmp_path / "a"))
    before = len(blobs(registry))
    registry.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))
    registry.store(make_engine(tmp_path / "c", seed="other"))
    for blob in blobs(registry):
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
        assert blob.stat().st_mode & 0o222 == 0
    assert sum(blob.read_bytes() == CHECKPOINT for blob in blobs(registry)) == 1
    assert len(blobs(registry)) < 3 * before


def test_users_files_are_copied_never_linked(tmp_path: Path, registry: Registry) -> None:
    engine = make_engine(tmp_path / "e")
    registry.store(engine)
    for path in engine.files.values():
        assert path.stat().st_nlink == 1
        path.write_bytes(b"changed afterwards")
    assert registry.verify() == []


def test_the_registrys_own_work_files_are_linked(tmp_path: Path, registry: Registry) -> None:
    engine = make_engine(registry.root / ".build-x")
    inode = engine.files["engine.plan"].stat().st_ino
    registry.store(engine)
    with registry.open("tiny", machine=CPU_MACHINE) as opened:
        assert (opened.folder / "engine.plan").stat().st_ino == inode


def test_the_first_manifest_of_a_build_wins(tmp_path: Path, registry: Registry) -> None:
    first = registry.store(make_engine(tmp_path / "a", plan=b"one run of the compiler"))
    engine = make_engine(tmp_path / "b", plan=b"another run, other bytes", created="2026-12-01T00:00:00+00:00")
    assert registry.store(engine) == first
    assert registry.find_build("tiny", first.version, first.build) == first
    assert len(registry.rows()) == 1
    assert not any(blob.read_bytes() == b"another run, other bytes" for blob in blobs(registry))
    assert registry.find_build("tiny", first.version, "sha256:" + "0" * 64) is None
    assert registry.find_build("tiny", "nothing", first.build) is None
    assert registry.find_build("nothing", first.version, first.build) is None


def test_a_profile_built_again_with_other_limits_keeps_the_older_one_by_digest(tmp_path: Path, registry: Registry) -> None:
    old = registry.store(make_engine(tmp_path / "a", max_tokens=256))
    new = registry.store(make_engine(tmp_path / "b", max_tokens=512))
    assert (old.version, old.profile) == (new.version, new.profile)
    refs = [row["ref"] for row in registry.rows()]
    assert len(set(refs)) == 2
    assert registry.resolve(new.ref).digest == new.digest
    assert {registry.resolve(ref).digest for ref in refs} == {old.digest, new.digest}
    assert registry.resolve(f"tiny@{old.digest[:13]}").digest == old.digest
    registry.promote(registry.resolve(f"tiny@{old.digest}"))
    assert registry.resolve(new.ref).digest == old.digest
    assert registry.verify() == []


def test_latest_is_the_version_published_last(tmp_path: Path, registry: Registry) -> None:
    a = registry.store(make_engine(tmp_path / "a", seed="a"))
    b = registry.store(make_engine(tmp_path / "b", seed="b"))
    assert registry.resolve("tiny", CPU_MACHINE).version == b.version == registry.resolve("tiny:latest", CPU_MACHINE).version
    registry.promote(a)
    assert registry.resolve("tiny", CPU_MACHINE).version == a.version
    registry.remove(a.ref)
    assert registry.resolve("tiny", CPU_MACHINE).version == b.version


def test_a_version_may_be_abbreviated_when_only_one_begins_so(tmp_path: Path, registry: Registry) -> None:
    entry = registry.store(make_engine(tmp_path / "a"))
    assert registry.resolve(f"tiny:{entry.version[:6]}@{entry.profile}") == entry
    for ref in (f"tiny:{entry.version[:5]}@{entry.profile}", "tiny:ffffff", f"tiny:{entry.version}@none-gpu-x-tp1", "other"):
        with pytest.raises(NotFoundError):
            registry.resolve(ref, CPU_MACHINE)


def test_two_versions_that_begin_alike_are_both_named(tmp_path: Path, registry: Registry) -> None:
    for number, seed in enumerate("ab"):
        engine = make_engine(tmp_path / seed, seed=seed)
        engine.manifest = dataclasses.replace(engine.manifest, version=f"abcdef{number}")
        registry.store(engine)
    with pytest.raises(NotFoundError, match="abcdef0, abcdef1"):
        registry.resolve("tiny:abcdef", CPU_MACHINE)


@pytest.mark.parametrize("which", range(8))
def test_a_flipped_byte_in_any_blob_is_refused_by_digest_and_file(tmp_path: Path, registry: Registry, which: int) -> None:
    """Config, manifest, engine.json and five files: eight blobs beside the version's index."""
    entry = registry.store(make_engine(tmp_path / "a"))
    named = {blob.digest: name for name, blob in entry.image.files.items()} | {entry.image.config.digest: "config"}
    named[entry.digest] = "manifest"
    digest, name = sorted(named.items())[which]
    path = registry.layout("tiny").blob(digest)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(DigestError) as caught:
        registry.open(entry.ref, machine=CPU_MACHINE)
    assert digest in str(caught.value)
    assert name == "manifest" or name in str(caught.value)
    assert not (registry.root / "tiny" / ".zoo" / "open").exists()
    problems = registry.verify()
    assert [problem.digest for problem in problems] == [digest]
    assert registry.find_build("tiny", entry.version, entry.build) is None
    again = registry.store(make_engine(tmp_path / "a", plan=b"rebuilt"))  # heals, though the blob has the right size
    assert registry.verify() == []
    registry.open(again.ref, machine=CPU_MACHINE).close()
    assert len(registry.rows()) == 1


def test_a_flipped_byte_in_a_versions_index_is_refused_and_can_be_removed(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    entry = registry.store(make_engine(tmp_path / "a"))
    layout = registry.layout("tiny")
    digest = layout.tags()[entry.version].digest
    path = layout.blob(digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"none-cpu", b"nine-cpu"))
    assert registry.rows() == []
    assert digest in caplog.text and f"zoo rm tiny:{entry.version}" in caplog.text
    with pytest.raises(DigestError, match=digest):
        registry.resolve("tiny")
    assert [problem.digest for problem in registry.verify()] == [digest]
    registry.remove(f"tiny:{entry.version}")
    assert registry.store(make_engine(tmp_path / "a")).digest == entry.digest
    assert registry.verify() == []


def test_a_missing_blob_is_named(tmp_path: Path, registry: Registry) -> None:
    entry = registry.store(make_engine(tmp_path / "a"))
    blob = entry.image.files["engine.plan"]
    registry.layout("tiny").blob(blob.digest).unlink()
    with pytest.raises(DigestError, match=f"engine.plan: blob {blob.digest} is missing"):
        registry.open(entry.ref, machine=CPU_MACHINE)


def test_an_opened_folder_is_checked_again_and_repaired(tmp_path: Path, registry: Registry) -> None:
    entry = registry.store(make_engine(tmp_path / "a"))
    with registry.open(entry.ref, machine=CPU_MACHINE) as opened:
        folder = opened.folder
    (folder / "weights.bin").write_bytes(b"a session's cache")
    (folder / "engine.plan").unlink()
    (folder / "engine.plan").write_bytes(b"swapped")
    with registry.open(entry.ref, machine=CPU_MACHINE) as opened:
        assert opened.folder == folder
        assert (folder / "engine.plan").read_bytes() == b"plan"
        assert (folder / "weights.bin").exists()


def test_an_engine_for_another_machine_is_refused_before_anything_is_read(tmp_path: Path, registry: Registry) -> None:
    entry = registry.store(make_engine(tmp_path / "a", quant="fp8", hardware="l40s"))
    with pytest.raises(IncompatibleError, match=r"it is for a GPU of SM 8\.9; this machine has no GPU"):
        registry.open(entry.ref, machine=CPU_MACHINE)
    registry.open(entry.ref, check=False).close()
    registry.open(entry.ref, machine=GPU_MACHINE).close()


def test_remove_takes_a_profile_a_version_or_a_model(tmp_path: Path, registry: Registry) -> None:
    a = registry.store(make_engine(tmp_path / "a"))
    b = registry.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))
    c = registry.store(make_engine(tmp_path / "c", seed="c"))
    assert registry.remove(a.ref) == [a.ref]
    assert {entry.digest for entry in registry.entries()} == {b.digest, c.digest}
    assert registry.resolve("tiny", CPU_MACHINE) == c
    assert registry.remove(f"tiny:{b.version}") == [f"tiny:{b.version}"]
    assert registry.remove("tiny") == [f"tiny:{c.version}"]
    assert registry.rows() == []
    assert registry.gc() > 0
    assert not (registry.root / "tiny").exists()
    with pytest.raises(NotFoundError):
        registry.remove("tiny")


def test_gc_takes_only_what_nothing_refers_to(tmp_path: Path, registry: Registry) -> None:
    a = registry.store(make_engine(tmp_path / "a"))
    b = registry.store(make_engine(tmp_path / "b", seed="b"))
    registry.gc()
    held = registry.open(a.ref, machine=CPU_MACHINE)
    registry.open(b.ref, machine=CPU_MACHINE).close()
    registry.remove(a.ref)
    registry.gc()
    assert (held.folder / "engine.plan").read_bytes() == b"plan"  # still open: it stays
    assert [path.name for path in held.folder.parent.iterdir() if path.is_dir()] == [held.folder.name]
    assert registry.verify() == []
    held.close()
    registry.gc()
    assert not held.folder.exists()
    wanted = {b.digest, registry.layout("tiny").tags()[b.version].digest, *(blob.digest for blob in b.image.blobs)}
    assert {f"sha256:{path.name}" for path in blobs(registry)} == wanted


def test_a_file_that_changed_since_its_digest_was_taken_is_refused(tmp_path: Path, registry: Registry) -> None:
    engine = make_engine(tmp_path / "a")
    engine.files["checkpoint/model.safetensors"].write_bytes(CHECKPOINT.replace(b"share", b"spare"))
    with pytest.raises(DigestError, match=r"checkpoint/model\.safetensors"):
        registry.store(engine)
    assert registry.rows() == []


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../b", "a//b", ".", "a\\b", "a\nb", "c:d", "", "x" * 300, "engine.json", "model.onnx/x"]
)
def test_file_names_that_could_leave_the_folder_are_refused(tmp_path: Path, registry: Registry, name: str) -> None:
    engine = make_engine(tmp_path / "a")
    engine.files[name] = engine.files["engine.plan"]
    with pytest.raises(ArtifactError):
        registry.store(engine)
    assert registry.rows() == []


def test_an_engine_that_lies_about_its_build_is_refused(tmp_path: Path, registry: Registry) -> None:
    engine = make_engine(tmp_path / "a")
    engine.manifest = dataclasses.replace(engine.manifest, build="sha256:" + "1" * 64)
    with pytest.raises(ArtifactError, match="is not the digest of 'made'"):
        registry.store(engine)


@pytest.mark.parametrize(
    ("field", "value"), [("model", "Upper"), ("model", "../up"), ("version", "latest"), ("version", "a b"), ("profile", "a/b")]
)
def test_names_that_could_not_be_found_again_are_refused(tmp_path: Path, registry: Registry, field: str, value: str) -> None:
    engine = make_engine(tmp_path / "a")
    engine.manifest = dataclasses.replace(engine.manifest, **{field: value})
    with pytest.raises(ArtifactError):
        registry.store(engine)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path, registry: Registry) -> None:
    engine = make_engine(tmp_path / "a")
    engine.files["folder"] = tmp_path
    with pytest.raises(ArtifactError, match="folder"):
        registry.store(engine)
    engine.files["folder"] = tmp_path / "missing"
    with pytest.raises(ArtifactError, match="No such file"):
        registry.store(engine)
    assert registry.rows() == []


def test_an_empty_registry_answers(registry: Registry) -> None:
    registry.create()
    assert registry.rows() == []
    assert registry.verify() == []
    assert registry.gc() == 0
    with pytest.raises(NotFoundError, match="zoo engines models=tiny"):
        registry.resolve("tiny")


def test_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", "/somewhere")
    assert default_root() == Path("/somewhere/registry")
    monkeypatch.delenv("ZOO_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_root() == Path("/data/zoo/registry")


def test_building_locks_one_build_and_not_another(tmp_path: Path, registry: Registry) -> None:
    from zoo.artifacts.locks import Lock

    build = "sha256:" + "a" * 64
    with registry.building(build), registry.building("sha256:" + "b" * 64):
        assert not Lock(registry.root / ".locks" / f"build-{'a' * 64}").acquire(wait=False)
        (registry.root / ".build-running").mkdir()
        registry.gc()
        assert (registry.root / ".build-running").exists()
    assert [path.name for path in (registry.root / ".locks").iterdir()] == ["builders"]
    registry.gc()
    assert not (registry.root / ".build-running").exists()


def test_skopeo_reads_the_layout(tmp_path: Path, registry: Registry) -> None:
    need("skopeo")
    entry = registry.store(make_engine(tmp_path / "a"))
    text = subprocess.run(
        ["skopeo", "inspect", "--raw", f"oci:{registry.root / 'tiny'}:{entry.version}"], capture_output=True, check=True
    ).stdout
    assert "sha256:" + hashlib.sha256(text).hexdigest() == registry.layout("tiny").tags()["latest"].digest
