"""The command line from outside: clean JSON on stdout, one-line errors on stderr, exit codes, no tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import families
import onnx
import pytest

ROOT = Path(__file__).parent.parent.parent
SMALL = ["limits.max_tokens=32", "limits.max_context=128", "limits.max_sequences=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with the demo model built for the CPU."""
    home = tmp_path_factory.mktemp("home")
    done = zoo(home, "engines", "models=zoo-demo", "hardware=cpu", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)
    assert row["built"] and row["profile"] == "none-cpu-onnxruntime-tp1"
    return home


def zoo(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zoo.cli", *arguments]
    env = {**os.environ, "ZOO_HOME": str(home), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


def fails(home: Path, *arguments: str, **environment: str) -> str:
    done = zoo(home, *arguments, **environment)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr


def test_generate_prints_text_and_json(home: Path) -> None:
    text = zoo(home, "generate", "zoo-demo", "def ", "--max-tokens", "8", "--temperature", "0")
    assert text.returncode == 0 and text.stdout.startswith("def ")
    data = json.loads(zoo(home, "generate", "zoo-demo", "def ", "--max-tokens", "8", "--temperature", "0", "--json").stdout)
    assert text.stdout == data["prompt"] + data["text"] + "\n"
    assert len(data["token_ids"]) == 8 and data["finish_reason"] == "length"


def test_rows_carry_what_was_promised(home: Path) -> None:
    [row] = json.loads(zoo(home, "list", "--json").stdout)
    keys = ("ref", "model", "version", "profile", "quant", "hardware", "compiler", "tp", "digest", "size", "created")
    assert set(keys) <= set(row)
    shown = json.loads(zoo(home, "show", row["ref"], "--json").stdout)
    assert shown["manifest"]["build"].startswith("sha256:")
    counts = {one["name"]: one["counts"] for one in shown["manifest"]["passes"]}
    assert any(8 in found.values() for found in counts.values()), "eight layers, eight attention nodes replaced"
    assert zoo(home, "verify", row["ref"]).returncode == 0
    assert json.loads(zoo(home, "diff", row["ref"], row["ref"], "--json").stdout) == []


def test_a_second_build_is_found(home: Path) -> None:
    [row] = json.loads(zoo(home, "engines", "models=zoo-demo", "hardware=cpu", *SMALL, "--json").stdout)
    assert not row["built"]


@pytest.mark.parametrize("model", ["gpt2", "qwen3-8b"])
def test_graph_writes_a_checked_weightless_file(tmp_path: Path, model: str) -> None:
    file = tmp_path / "model.onnx"
    data = json.loads(zoo(tmp_path, "graph", f"models={model}", "hardware=cpu", "--plain", "-o", str(file), "--json").stdout)
    onnx.checker.check_model(str(file))
    assert data["weights"] > 100 and file.stat().st_size < 2_000_000


def test_plan_of_a_model_without_a_checkpoint(tmp_path: Path) -> None:
    data = json.loads(zoo(tmp_path, "plan", "models=llama-3.1-8b", "hardware=rtx-4090", "quant=fp8", "--json").stdout)
    assert 8.0e9 < data["parameters"] < 8.1e9
    assert data["weights_bytes"] < 10e9 and data["kv_per_token_bytes"] == 2 * 8 * 128 * 32 * 2


def test_doctor_speaks_on_any_machine(tmp_path: Path) -> None:
    data = json.loads(zoo(tmp_path, "doctor", "--json").stdout)
    assert data["compilers"]["onnxruntime"]["state"].startswith("ready")


def test_add_writes_a_model_that_composes(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "qwen2")
    conf = tmp_path / "conf"
    (conf / "models").mkdir(parents=True)
    done = zoo(tmp_path, "add", str(folder), "--name", "my-model", "--json", ZOO_CONF=str(conf))
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["file"]) == conf / "models" / "my-model.yaml"
    plan = zoo(tmp_path, "plan", "models=my-model", "hardware=cpu", "--json", ZOO_CONF=str(conf))
    assert json.loads(plan.stdout)["model"] == "my-model"
    assert "my-model" in fails(tmp_path, "add", str(folder), "--name", "my-model", ZOO_CONF=str(conf)), "never replaced unasked"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["engines", "models=nope"], ["nope", "zoo-demo"]),
        (["engines", "models=zoo-demo", "quant=fp9"], ["fp9", "fp8", "none"]),
        (["engines", "models=zoo-demo", "limits.max_tokens=many"], ["max_tokens", "many"]),
        (["engines", "models=zoo-demo", "limits.max_tokns=3"], ["max_tokns", "max_tokens"]),
        (["engines", "models=zoo-demo", "model.num_kv_heads=3"], ["num_kv_heads", "3"]),
        (["engines", "models=zoo-demo", "model.name=${oc.env:HOME}"], ["oc.env"]),
        (["engines", "models=zoo-demo", "hardware=a100-80g", "quant=fp8"], ["fp8", "a100-80g"]),
        (["generate", "no-such-model", "x"], ["no-such-model"]),
        (["generate", "zoo-demo", ""], ["empty"]),
        (["generate", "zoo-demo", "x", "--max-tokens", "0"], ["max_tokens"]),
        (["generate", "zoo-demo", "word " * 400], ["tokens", "127"]),
        (["show", "zoo-demo:ffffffffffff"], ["ffffffffffff"]),
        (["add", "/no/such/folder"], ["/no/such/folder"]),
        (["graph", "models=gpt2", "-o", "/no/such/folder/x.onnx"], ["/no/such/folder"]),
        (["graph", "models=gpt2", "hardware=cpu", "-o", "/dev"], ["/dev", "not a file"]),
        (["serve", "zoo-demo", "--host", "192.0.2.1", "--port", "9"], ["192.0.2.1:9"]),
    ],
)
def test_mistakes_are_one_clear_message(home: Path, arguments: list[str], words: list[str]) -> None:
    message = fails(home, *arguments)
    for word in words:
        assert word in message, message


def test_a_registry_of_the_configuration_is_used(tmp_path: Path) -> None:
    (tmp_path / "conf" / "registry").mkdir(parents=True)
    (tmp_path / "conf" / "registry" / "mine.yaml").write_text(f"# @package registry\nname: mine\npath: {tmp_path / 'here'}\n")
    done = zoo(tmp_path, "engines", "models=zoo-demo", "hardware=cpu", "registry=mine", *SMALL, ZOO_CONF=str(tmp_path / "conf"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here").is_dir() and not (tmp_path / "registry").exists()
    assert len(json.loads(zoo(tmp_path, "list", "--registry", str(tmp_path / "here"), "--json").stdout)) == 1


def test_a_full_standard_output_is_no_traceback(home: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "zoo.cli", "list", "--json"]
        env = {**os.environ, "ZOO_HOME": str(home)}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 1 and done.stderr.startswith("zoo: No space left") and "Traceback" not in done.stderr


def test_a_sweep_is_every_engine_that_differs_in_anything_and_each_once() -> None:
    from zoo.commands.engines import compose_all

    assert [spec.threads for spec in compose_all(["hardware=cpu", "threads=1,2"], True)] == [1, 2]
    assert len(compose_all(["hardware=cpu", "threads=1", "+", "threads=1"], True)) == 1
    skipped = compose_all(["quant=fp8", "quant.skip=[lm_head],[o]"], True)
    assert [spec.quant.skip for spec in skipped] == [("lm_head",), ("o",)]
