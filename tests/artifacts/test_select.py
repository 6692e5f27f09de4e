"""The engine that a machine gets, and why it does not get the others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from artifact_engines import CPU, GPU, make_engine

from zoo.artifacts import machine as machine_module
from zoo.artifacts.machine import Gpu, Machine, describe_machine, parse_smi, visible
from zoo.artifacts.registry import Entry, Registry
from zoo.artifacts.select import check_compatible
from zoo.errors import IncompatibleError

GB = 10**9
RUNTIMES = {"onnxruntime": "1.32.0", "tensorrt-rtx-cu13": "1.7.1.116", "tensorrt-cu13": "11.4.0.106"}
L40S = Gpu("NVIDIA L40S", 89, 46_068 << 20)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 89, 24_564 << 20)
H200 = Gpu("NVIDIA H200", 90, 143_771 << 20)


def machine(*gpus: Gpu, memory: int = 32 * GB, packages: dict[str, str] = RUNTIMES) -> Machine:
    return Machine(8, memory, gpus, packages)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """One version for a CPU and three GPUs, plain and FP8."""
    registry = Registry(tmp_path / "registry")
    tensorrt = GPU | {"packages": {"tensorrt": "11.4.0.106"}, "sm": 90, "memory": 100 * GB}
    for hardware, memory, needs in (
        ("cpu", 0, CPU),
        ("l40s", 48 * GB, GPU),
        ("rtx-4090", 24 * GB, GPU),
        ("h200-sxm", 141 * GB, tensorrt),
    ):
        for quant in ("fp8", "none"):
            registry.store(make_engine(tmp_path / "e", hardware=hardware, memory=memory, quant=quant, needs=needs))
    return registry


@pytest.mark.parametrize(
    ("here", "profile"),
    [
        (machine(), "none-cpu-onnxruntime-tp1"),
        (machine(L40S), "fp8-l40s-tensorrt_rtx-tp1"),
        (machine(RTX_4090), "fp8-rtx-4090-tensorrt_rtx-tp1"),
        (machine(H200), "fp8-h200-sxm-tensorrt-tp1"),
        (machine(H200, RTX_4090), "fp8-h200-sxm-tensorrt-tp1"),
        (machine(Gpu("Tesla T4", 75, 16 << 30)), "none-cpu-onnxruntime-tp1"),
        (machine(Gpu("small Ada", 89, 8 << 30)), "none-cpu-onnxruntime-tp1"),
        (machine(L40S, packages={"onnxruntime": "1.33.0"}), "none-cpu-onnxruntime-tp1"),
        (machine(L40S, packages=RUNTIMES | {"tensorrt-rtx-cu13": "1.8.0"}), "none-cpu-onnxruntime-tp1"),
    ],
)
def test_the_best_for_a_machine(registry: Registry, here: Machine, profile: str) -> None:
    chosen = registry.resolve("tiny", here)
    assert chosen.profile == profile
    check_compatible(chosen, here)
    check_compatible(chosen.manifest, here)


def reason(entry: Entry, here: Machine) -> str:
    with pytest.raises(IncompatibleError) as caught:
        check_compatible(entry, here)
    assert entry.ref in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("needs", "here", "expected"),
    [
        (GPU, machine(), "it is for a GPU of SM 8.9; this machine has no GPU"),
        (GPU, machine(H200), "it is for SM 8.9; this machine has NVIDIA H200 (SM 9.0)"),
        (GPU | {"memory": 47 * GB}, machine(RTX_4090), "it needs 47.0 GB of GPU memory; the GPU has 25.8 GB"),
        (GPU, machine(L40S, packages={}), "it needs tensorrt_rtx 1.7.1.116, which is not installed"),
        (
            GPU,
            machine(L40S, packages={"tensorrt-rtx-cu13": "1.7.2"}),
            "it needs exactly tensorrt_rtx 1.7.1.116; 1.7.2 is installed",
        ),
        (CPU, machine(packages={"onnxruntime": "1.31.9"}), "it needs onnxruntime 1.32.0 or newer; 1.31.9 is installed"),
        (CPU | {"memory": 64 * GB}, machine(), "it needs 64.0 GB of memory; this machine has 32.0 GB"),
    ],
)
def test_each_reason_names_what_is_missing(tmp_path: Path, needs: dict[str, Any], here: Machine, expected: str) -> None:
    entry = Registry(tmp_path / "registry").store(make_engine(tmp_path / "e", needs=needs, hardware=str(needs["kind"])))
    assert expected in reason(entry, here)


def test_a_rank_needs_a_gpu_of_its_own(tmp_path: Path) -> None:
    entry = Registry(tmp_path / "registry").store(make_engine(tmp_path / "e", hardware="l40s", tp=2))
    assert "it needs 2 GPUs of SM 8.9; this machine has 1" in reason(entry, machine(L40S, H200))
    check_compatible(entry, machine(L40S, L40S))


def test_a_card_may_report_a_little_less_than_its_name_says(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    check_compatible(registry.store(make_engine(tmp_path / "e", hardware="l40s", needs=GPU | {"memory": 48 * GB})), machine(L40S))


def test_when_nothing_fits_every_candidate_has_its_reason(registry: Registry) -> None:
    here = machine(packages={})
    with pytest.raises(IncompatibleError) as caught:
        registry.resolve("tiny", here)
    lines = str(caught.value).splitlines()
    candidates = {entry.ref for entry in registry.entries()}
    assert {re.split(r": (?=it )", line)[0].strip() for line in lines[1:-1]} == candidates
    assert all(" it " in line for line in lines[1:-1])


def test_the_newer_build_of_a_profile_is_taken(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.store(make_engine(tmp_path / "a", max_tokens=1))
    newer = registry.store(make_engine(tmp_path / "a", max_tokens=2))
    assert registry.resolve("tiny", machine()) == newer


def test_this_machine_is_described_with_or_without_a_gpu() -> None:
    here = describe_machine()
    assert here.cores >= 1
    assert here.memory > 1 << 28
    assert all(gpu.sm >= 50 and gpu.memory > 1 << 30 for gpu in here.gpus)
    assert here.package("onnxruntime")
    assert here.package("no-such-package-anywhere") == ""


def test_no_driver_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(machine_module.ctypes, "CDLL", missing)
    monkeypatch.setattr(machine_module.shutil, "which", lambda _: None)
    assert describe_machine().gpus == ()


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA L40S, 8.9, 46068, 580.95, GPU-aa'\necho 'NVIDIA GeForce RTX 5090, 12.0, 32607, 580.95, GPU-bb'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(machine_module, "gpus_by_nvml", lambda: ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert describe_machine().gpus == (Gpu("NVIDIA GeForce RTX 5090", 120, 32607 << 20, "580.95", "GPU-bb"),)
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert describe_machine().gpus == ()


def test_rows_without_numbers_are_left_out() -> None:
    assert parse_smi("GPU, [N/A], [N/A], 1, x\n\nA, 9.0, 10, 1, y\n") == (Gpu("A", 90, 10 << 20, "1", "y"),)


@pytest.mark.parametrize(
    ("setting", "names"),
    [(None, "ab"), ("", ""), ("0", "a"), ("1,0", "ba"), ("-1", ""), ("0,7,1", "a"), ("GPU-b", "b"), ("NoDevFiles", "")],
)
def test_cuda_visible_devices(setting: str | None, names: str) -> None:
    gpus = (Gpu("a", 80, 1, uuid="GPU-a0"), Gpu("b", 80, 1, uuid="GPU-b0"))
    assert "".join(gpu.name for gpu in visible(gpus, setting)) == names


NVML = """
#include <string.h>
typedef void *device; static int opened;
int nvmlInit_v2(void) { opened++; return 0; }
int nvmlShutdown(void) { opened--; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "580.95", size); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return opened == 1 ? 0 : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out) { *out = (device)(0x7f0000000000ul + index); return 0; }
static unsigned place(device it) { return (unsigned)((unsigned long)it - 0x7f0000000000ul); }
int nvmlDeviceGetName(device it, char *text, unsigned size) {
    strncpy(text, place(it) ? "NVIDIA L40S" : "NVIDIA H200", size); return 0;
}
int nvmlDeviceGetUUID(device it, char *text, unsigned size) { strncpy(text, place(it) ? "GPU-b" : "GPU-a", size); return 0; }
int nvmlDeviceGetCudaComputeCapability(device it, int *major, int *minor) {
    *major = place(it) ? 8 : 9; *minor = place(it) ? 9 : 0; return place(it) == 2 ? 15 : 0; /* the third is lost */
}
int nvmlDeviceGetMemoryInfo(device it, unsigned long long *memory) {
    memory[0] = place(it) ? 48305799168ull : 150754820096ull; return 0;
}
"""


def test_nvml_is_called_as_its_header_says(tmp_path: Path) -> None:
    """A stand-in with NVIDIA's signatures, in C, loaded by another process under the library's own name."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    (tmp_path / "nvml.c").write_text(NVML)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", tmp_path / "nvml.c"], check=True)
    code = "from zoo.artifacts.machine import gpus_by_nvml; print(*gpus_by_nvml(), sep='\\n')"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    h200, l40s = Gpu("NVIDIA H200", 90, 150754820096, "580.95", "GPU-a"), Gpu("NVIDIA L40S", 89, 48305799168, "580.95", "GPU-b")
    assert done.stdout.splitlines() == [repr(h200), repr(l40s)]
