"""``zoo bench`` from outside, on the demo model: clean JSON, a table, a plot, mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path

import pytest

from zoo.artifacts.registry import Registry
from zoo.build import build
from zoo.commands.bench import measure
from zoo.config import compose
from zoo.llm import LLM

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    limits = ["limits.max_context=64", "limits.max_tokens=32", "limits.max_sequences=4"]
    build(compose(["models=zoo-demo", "hardware=cpu", *limits]), Registry(home / "registry"))
    return home


def run(home: Path, *arguments: str, module: str = "zoo.cli") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    env = {**os.environ, "ZOO_HOME": str(home)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


def test_json_alone_on_stdout(home: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    done = run(
        home, "bench", "zoo-demo", "--cases", "8/4/6,20/2/2", "--rate", "200", "--seed", "3", "--plot", str(plot), "--json"
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [case["case"] for case in data["cases"]] == ["8/4/6", "20/2/2"]
    assert all(case["rate"] == 200 and case["seed"] == 3 and case["output_tokens_per_s"] > 0 for case in data["cases"])
    configured = data["configuration"]
    assert configured["ref"] == data["ref"] and configured["profile"] == "none-cpu-onnxruntime-tp1"
    assert configured["limits"]["max_context"] == 64 and configured["machine"]["cpu"] and "onnxruntime" in configured["packages"]
    assert "--cases 8/4/6,20/2/2" in configured["command"]
    for part in ("energy", "cost", "roofline"):
        assert data["cases"][0][part]["reason"], "a CPU has no price, no NVML and no stated rates"
    ElementTree.parse(plot)


def test_a_table_for_people(home: Path) -> None:
    done = run(home, "bench", "zoo-demo", "--requests", "3", "--input-tokens", "5", "--output-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert "5/2/3" in done.stdout and "TTFT ms" in done.stdout and "threads" in done.stdout
    assert "no cost: the hardware profile cpu states no price" in done.stderr and "no cost" not in done.stdout


def test_as_a_pipeline(home: Path) -> None:
    done = run(home, "zoo-demo", "--requests", "2", "--input-tokens", "5", "--output-tokens", "2", module="pipelines.bench")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cases"][0]["requests"] == 2


def test_measuring_an_open_llm(home: Path) -> None:
    with LLM("zoo-demo", registry=home / "registry") as llm:
        data = measure(llm, Namespace(requests=2, input_tokens=6, output_tokens=3))
        assert data["output_tokens_per_s"] > 0 and data["steps"] >= 3 and data["inter_token_ms_p50"] > 0
        again = measure(llm, Namespace(requests=2, input_tokens=6, output_tokens=3, rate=50.0, seed=1))
        assert again["rate"] == 50.0
        assert llm.generate([[1, 2]])[0].outputs[0].token_ids, "the LLM is as it was"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "8/4"], ["8/4", "128/128/64"]),
        (["--cases", "8/4/1", "--requests", "3"], ["--cases", "--requests"]),
        (["--requests", "0"], ["requests is 0"]),
        (["--rate", "-2"], ["rate is -2"]),
        (["--input-tokens", "64"], ["128 tokens", "64", "max_context"]),
        (["--plot", "/no/such/folder/x.svg"], ["/no/such/folder"]),
        (["--plot", "/tmp"], ["/tmp", "a folder"]),
    ],
)
def test_mistakes_are_one_clear_message(home: Path, arguments: list[str], words: list[str]) -> None:
    done = run(home, "bench", "zoo-demo", *arguments)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
