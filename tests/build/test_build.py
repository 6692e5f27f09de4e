"""The road from a spec to a stored engine: reuse, what a change rebuilds and why, kills, concurrency, full disks, memory."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest

from zoo import LLM, SamplingParams
from zoo.artifacts.diff import diff
from zoo.artifacts.registry import Registry
from zoo.build import BuildResult, build, identify, open_checkpoint
from zoo.checkpoints.adopt import adopt
from zoo.config import compose_model
from zoo.errors import CheckpointError, DigestError, ResourceError, ZooError
from zoo.spec import BuildSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A private copy of a tiny checkpoint, safe to damage."""
    copy = tmp_path / "tiny"
    shutil.copytree(families.make_checkpoint(tmp_path, "llama"), copy)
    return copy


def spec_of(folder: Path, *overrides: str) -> BuildSpec:
    return compose_model(adopt(folder), ["hardware=cpu", "limits.max_tokens=32", "limits.max_sequences=4", *overrides])


def test_a_second_build_finds_the_first(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first, second = build(spec_of(folder), registry), build(spec_of(folder), registry)
    assert first.built and not second.built
    assert first.entry.ref == second.entry.ref and first.entry.digest == second.entry.digest


def test_one_number_rebuilds_what_depends_on_it_and_diff_says_why(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    plain, quantized = build(spec_of(folder), registry).entry, build(spec_of(folder, "quant=fp8"), registry).entry
    assert plain.version == quantized.version
    changed = spec_of(folder, "quant=fp8", "quant.calibration_tokens=64")
    again = build(changed, registry)
    assert again.built and again.entry.version == quantized.version
    assert not build(spec_of(folder), registry).built, "the unquantized engine does not depend on calibration"
    paths = {change.path for change in diff(quantized, again.entry)}
    assert any(path.endswith("quant.calibration_tokens") for path in paths), paths
    other = build(spec_of(folder, "model.norm_eps=0.001"), registry).entry
    assert other.version != plain.version
    paths = {change.path for change in diff(plain, other)}
    assert any(path.endswith("model.norm_eps") for path in paths), paths


def test_going_back_to_earlier_settings_goes_back_to_their_engine(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first = build(spec_of(folder), registry).entry
    second = build(spec_of(folder, "limits.max_blocks=40"), registry).entry
    assert registry.resolve(first.manifest.model).digest == second.digest
    again = build(spec_of(folder), registry)
    assert not again.built and again.entry.digest == first.digest
    assert registry.resolve(first.manifest.model).digest == first.digest


def test_a_price_is_no_ingredient(folder: Path) -> None:
    spec, checkpoint = open_checkpoint(spec_of(folder))
    dearer = dataclasses.replace(spec, hardware=dataclasses.replace(spec.hardware, price=9.0, power=1.0))
    assert identify(spec, checkpoint).build == identify(dearer, checkpoint).build
    smaller = dataclasses.replace(spec, hardware=dataclasses.replace(spec.hardware, memory=1))
    assert identify(spec, checkpoint).build != identify(smaller, checkpoint).build


def test_the_checkpoint_path_is_no_ingredient_and_its_bytes_are(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    assert identify(*open_checkpoint(spec_of(folder))).build == identify(*open_checkpoint(spec_of(moved))).build
    damaged = bytearray((moved / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (moved / "model.safetensors").write_bytes(damaged)
    assert identify(*open_checkpoint(spec_of(folder))).version != identify(*open_checkpoint(spec_of(moved))).version


def test_a_flipped_byte_is_refused_before_the_engine_is_loaded(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    entry = build(spec_of(folder), registry).entry
    for name, file in entry.manifest.files.items():
        blob = next(registry.root.rglob(file["digest"].removeprefix("sha256:")))
        good = blob.read_bytes()
        blob.chmod(0o644)
        blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DigestError, match=file["digest"]) as caught:
            LLM(entry.ref, registry=registry.root)
        assert name in str(caught.value)
        blob.write_bytes(good)
    with LLM(entry.ref, registry=registry.root, threads=1) as llm:
        assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0.0))[0].finished


BUILDER = """
import sys, time
from pathlib import Path
from zoo.artifacts.registry import Registry
from zoo.build import build
from zoo.checkpoints.adopt import adopt
from zoo.config import compose_model
spec = compose_model(adopt(Path(sys.argv[1])), ["hardware=cpu", "limits.max_tokens=32", "limits.max_sequences=4"])
print("ready", flush=True)
result = build(spec, Registry(Path(sys.argv[2])))
print("built" if result.built else "found", flush=True)
"""


def start_builder(folder: Path, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder), str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_at_any_moment_the_registry_verifies_and_the_next_build_succeeds(folder: Path, tmp_path: Path) -> None:
    root, rng = tmp_path / "registry", random.Random(5)
    timing = start_builder(folder, tmp_path / "timing")
    assert timing.stdout and timing.stdout.readline() == "ready\n"
    started = time.monotonic()
    timing.wait()
    whole = time.monotonic() - started
    killed = 0
    for _ in range(6):
        builder = start_builder(folder, root)
        assert builder.stdout and builder.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, whole))
        builder.send_signal(signal.SIGKILL)
        killed += builder.wait() == -signal.SIGKILL
        registry = Registry(root)
        assert registry.verify() == []
    assert killed, "no build was caught in the act"
    result = build(spec_of(folder), Registry(root))
    assert Registry(root).verify() == []
    Registry(root).gc()
    left = [path for path in root.rglob("*") if ".build-" in path.name]
    assert left == [], "work folders of killed builds stay behind"
    with LLM(result.entry.ref, registry=root, threads=1) as llm:
        assert llm.generate([[1]], SamplingParams(max_tokens=1))[0].finished


def test_two_builds_of_one_engine_at_once_store_one(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    builders = [start_builder(folder, root) for _ in range(2)]
    said = sorted(builder.communicate()[0].split()[-1] for builder in builders)
    assert said in (["built", "found"],)
    assert len(Registry(root).rows()) == 1 and Registry(root).verify() == []


def test_too_little_memory_is_said_before_work_starts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.resources.available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"needs about .* is available"):
        build(spec_of(folder), Registry(tmp_path / "registry"))
    assert Registry(tmp_path / "registry").rows() == []


def test_a_failing_build_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "registry"

    def full(*args: object) -> BuildResult:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoo.compilers.onnxruntime.bind_later", full)
    with pytest.raises(ResourceError, match="disk"):
        build(spec_of(folder), Registry(root))
    assert not [path for path in root.rglob("*") if path.is_file() and path.parent.name != ".locks"]


def test_every_wrong_tensor_is_listed_at_once(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].copy()
    tensors["surprise"] = tensors["model.layers.1.mlp.up_proj.weight"][:2].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        build(spec_of(folder), Registry(tmp_path / "registry"))
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "surprise"):
        assert name in str(caught.value)


def test_an_engine_for_another_machine_is_refused(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    entry = build(spec_of(folder), registry).entry
    data = json.loads(json.dumps(entry.manifest.to_json()))
    assert data["needs"]["kind"] == "cpu"
    rtx = compose_model(adopt(folder), ["hardware=l40s", "limits.max_tokens=16", "limits.max_sequences=2"])
    stored = build(rtx, registry).entry
    if shutil.which("nvidia-smi") is None:
        with pytest.raises(ZooError, match="GPU"):
            LLM(stored.ref, registry=registry.root)
        assert Registry(registry.root).resolve(stored.manifest.model).profile == entry.profile


def test_the_work_folder_is_gone_after_an_interrupt(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    builder = start_builder(folder, root)
    assert builder.stdout and builder.stdout.readline() == "ready\n"
    time.sleep(0.05)
    os.kill(builder.pid, signal.SIGINT)
    builder.wait()
    assert not list(root.glob(".build-*")) if root.exists() else True
