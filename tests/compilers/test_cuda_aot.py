"""Compiling kernels ahead of time, in processes of their own: the same bytes from anywhere, and clear words for what fails."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.compilers.cuda.aot import ENVIRONMENT, compile_kernels, from_json, to_json
from zoo.errors import CompileError
from zoo.plugins.kernels import Kernel
from zoo.plugins.sampling import cuda as sampling
from zoo.plugins.weight_kernels import weight_kernels

RESOLVE = sampling.launches(300)["resolve"][0].kernel
COMBINE = sampling.launches(300)["greedy"][1].kernel
QUANTIZE = weight_kernels()["quantize", "bfloat16"]
FEW = [RESOLVE, COMBINE, QUANTIZE]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.cubin"))}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton keeps what it compiled under the digest of its source: each test starts without."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def test_cubins_are_the_same_bytes_again_and_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    done: list[int] = []
    described = compile_kernels(FEW, 90, tmp_path / "a", done.append)
    assert sorted(described) == sorted(kernel.name for kernel in FEW) and done[-1] == 3
    assert set(digests(tmp_path / "a")) == {f"{kernel.name}.cubin" for kernel in FEW}
    assert all((tmp_path / "a" / f"{name}.cubin").read_bytes().startswith(b"\x7fELF") for name in described)
    for kernel in FEW:
        told = described[kernel.name]
        assert told["entry"] == kernel.source.partition(":")[2] and told["warps"] == kernel.num_warps and told["hidden"] == 2

    elsewhere, out = tmp_path / "somewhere" / "else" / "entirely", tmp_path / "b"
    shutil.copytree(Path(zoo.__file__).parent, elsewhere / "zoo", ignore=shutil.ignore_patterns("__pycache__"))
    out.mkdir()
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(elsewhere), "TRITON_CACHE_DIR": str(tmp_path / "other")}
    run = subprocess.run(
        [sys.executable, "-m", "zoo.compilers.cuda.aot", "90", str(out)],
        cwd=elsewhere, env=environment, input=json.dumps([to_json(kernel) for kernel in FEW]), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == described
    assert digests(out) == digests(tmp_path / "a")


def test_nothing_of_this_machine_is_in_a_cubin(tmp_path: Path) -> None:
    compile_kernels([RESOLVE], 90, tmp_path)
    cubin = (tmp_path / f"{RESOLVE.name}.cubin").read_bytes()
    for text in (str(Path(zoo.__file__).parent), str(tmp_path), "kernels.py"):
        assert text.encode() not in cubin


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (dataclasses.replace(RESOLVE, source="zoo.plugins.sampling.kernels:resolved"), "resolved"),
        (dataclasses.replace(RESOLVE, source="zoo.plugins.sampled.kernels:resolve"), "zoo.plugins.sampled"),
        (dataclasses.replace(RESOLVE, args=RESOLVE.args[:2]), "resolve"),
        (dataclasses.replace(RESOLVE, args=(RESOLVE.args[0], ("sampled", "fp32"), RESOLVE.args[2])), "resolve"),
        (dataclasses.replace(COMBINE, constants=(("BLOCKS", 1), ("PADDED", 3))), "power of 2"),
    ],
    ids=["no function", "no module", "an argument short", "another type", "no power of two"],
)
def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path, kernel: Kernel, words: str) -> None:
    with pytest.raises(CompileError, match=r"kernels for SM 9\.0 do not compile") as caught:
        compile_kernels([kernel], 90, tmp_path)
    assert words in str(caught.value)


def test_kernels_travel_as_json() -> None:
    for kernel in FEW:
        again = from_json(json.loads(json.dumps(to_json(kernel))))
        assert again == kernel and again.name == kernel.name
    assert len({kernel.name for kernel in (RESOLVE, dataclasses.replace(RESOLVE, num_warps=8), COMBINE)}) == 3
