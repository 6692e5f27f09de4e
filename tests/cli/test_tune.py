"""``zoo tune`` from the command line, on a GPU that is a CPU: a table, JSON, a profile that composes, mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_on_cpu
import pytest
from tuning_sweeps import shorten

from zoo.artifacts.machine import Gpu, Machine
from zoo.artifacts.registry import Registry
from zoo.build import build
from zoo.cli import main
from zoo.compilers.cuda import aot
from zoo.config import compose
from zoo.tuning import trial

ROOT = Path(__file__).parents[2]
H100 = Machine(8, 1 << 36, (Gpu("NVIDIA H100", 90, 85_520_809_984, "580.1", "GPU-1"),))
LIMITS = ["limits.max_tokens=32", "limits.max_context=64", "limits.max_sequences=3"]
SHAPE = ["model.num_layers=1", "model.checkpoint=", "model.vocab_size=128", "model.hidden_size=64", "model.intermediate_size=96"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with an engine of the cuda compiler, and one for the CPU."""
    root = tmp_path_factory.mktemp("home") / "registry"
    with mock.patch("zoo.compilers.cuda.engine.compile_kernels", cuda_on_cpu.compile_kernels):
        for hardware in ("cpu", "h100-sxm"):
            build(compose(["models=llama-3.2-1b", f"hardware={hardware}", *SHAPE, *LIMITS]), Registry(root))
    return root


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    monkeypatch.setattr("zoo.artifacts.registry.describe_machine", lambda: H100)
    monkeypatch.setattr(aot, "compile_kernels", cuda_on_cpu.compile_kernels)
    monkeypatch.setattr(trial._Trial, "seconds", lambda self: [1.0 + (self.timing.variant.label == "default")] * len(self._loads))


def run(home: Path, *arguments: str) -> int:
    with cuda_on_cpu.gpu_on_cpu():
        return main(["tune", *arguments, "--registry", str(home)])


def test_a_profile_is_written_that_composes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "conf" / "hardware" / "mine.yaml"
    file.parent.mkdir(parents=True)
    shutil.copy(ROOT / "conf" / "hardware" / "h100-sxm.yaml", file)
    file.write_text(file.read_text().replace("name: h100-sxm", "name: mine"))
    assert run(home, "llama-3.2-1b", "--write", str(file)) == 0
    out, err = capsys.readouterr()
    assert "decode" in out and "tuning:" in out and f"wrote {file}" in err and "build the engine again" in err
    with mock.patch.dict("os.environ", {"ZOO_CONF": str(file.parents[1])}):
        spec = compose(["models=llama-3.2-1b", "hardware=mine"])
    assert spec.hardware.tuning["attention"] and spec.hardware.build_fields()["tuning"] == spec.hardware.tuning


def test_json_alone_on_stdout(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "llama-3.2-1b", "--json", "--seconds", "1e-9") == 0
    out, err = capsys.readouterr()
    data: dict[str, Any] = json.loads(out)
    assert data["gpu"] == "NVIDIA Standin" and data["rows"] == [] and data["tuning"] == {} and data["written"] is None
    assert "no time for product" in err and "raise --seconds" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama-3.2-1b@none-cpu-onnxruntime-tp1"], ["onnxruntime", "cuda"]),
        (["llama-3.2-1b", "--seconds", "0"], ["--seconds is 0.0"]),
        (["llama-3.2-1b", "--write", "/no/such/folder/x.yaml"], ["/no/such/folder"]),
        (["no-such-model"], ["no-such-model"]),
    ],
)
def test_mistakes_are_one_clear_message(
    home: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and all(word in err for word in words), err


def test_a_strange_section_is_said_before_anything_runs(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("tuning: {a: 1}\n")
    assert run(home, "llama-3.2-1b", "--write", str(tmp_path / "mine.yaml")) == 1
    assert "not as `zoo tune` writes it" in capsys.readouterr().err


def test_without_a_gpu(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("zoo.artifacts.registry.describe_machine", lambda: Machine(8, 1 << 36))
    assert main(["tune", "llama-3.2-1b@none-h100-sxm-cuda-tp1", "--registry", str(home)]) == 1
    assert "GPU" in capsys.readouterr().err
