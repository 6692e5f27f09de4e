"""What this machine is, as far as choosing an engine goes: cores, memory, GPUs, runtimes. Works without any GPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# The package that an engine names -> the distributions that provide it.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
}


@dataclass(frozen=True)
class Gpu:
    """One GPU: SM as 89 for 8.9, memory in bytes, the driver's version."""

    name: str
    sm: int
    memory: int
    driver: str = ""
    uuid: str = ""


@dataclass(frozen=True)
class Machine:
    """A machine. ``packages``: installed runtimes by distribution name; None asks this interpreter."""

    cores: int
    memory: int
    gpus: tuple[Gpu, ...] = ()
    packages: Mapping[str, str] | None = None

    def package(self, name: str) -> str:
        """The installed version of a runtime by the name engines use for it; empty when it is missing."""
        for distribution in DISTRIBUTIONS.get(name, (name,)):
            if self.packages is not None:
                if distribution in self.packages:
                    return self.packages[distribution]
                continue
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return ""

    def __str__(self) -> str:
        gpus = ", ".join(f"{gpu.name} (SM {gpu.sm // 10}.{gpu.sm % 10}, {gpu.memory / 1e9:.0f} GB)" for gpu in self.gpus)
        return f"{self.cores} cores, {self.memory / 1e9:.0f} GB of memory, {gpus or 'no GPU'}"


def describe_machine() -> Machine:
    """This machine, as far as this process may use it (CPU affinity, control group, CUDA_VISIBLE_DEVICES)."""
    gpus = visible(gpus_by_nvml() or gpus_by_smi(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(len(os.sched_getaffinity(0)), _memory(), gpus)


def _memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: indices or heads of UUIDs, up to the first that is neither."""
    if setting is None:
        return gpus
    chosen: list[Gpu] = []
    for part in (part.strip() for part in setting.split(",")):
        if part.isdigit() and int(part) < len(gpus):
            chosen.append(gpus[int(part)])
        elif part and (found := [gpu for gpu in gpus if gpu.uuid.startswith(part)]):
            chosen.append(found[0])
        else:
            break
    return tuple(chosen)


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpus_by_nvml() -> tuple[Gpu, ...]:
    """All GPUs as NVIDIA's management library tells; none when it is missing or does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return ()
    except (OSError, AttributeError):
        return ()
    try:
        count = ctypes.c_uint()
        driver = ctypes.create_string_buffer(96)
        nvml.nvmlSystemGetDriverVersion(driver, ctypes.c_uint(len(driver)))
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return ()
        found = (_nvml_gpu(nvml, index, driver.value.decode()) for index in range(count.value))
        return tuple(gpu for gpu in found if gpu)
    finally:
        nvml.nvmlShutdown()


def _nvml_gpu(nvml: ctypes.CDLL, index: int, driver: str) -> Gpu | None:
    handle, major, minor, memory = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int(), _Memory()
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    failed = (
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
        or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
        or nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(len(uuid)))
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    sm = major.value * 10 + minor.value
    return None if failed else Gpu(name.value.decode(), sm, memory.total, driver, uuid.value.decode())


def gpus_by_smi() -> tuple[Gpu, ...]:
    """All GPUs as ``nvidia-smi`` lists them; none when it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ()
    query = "--query-gpu=name,compute_cap,memory.total,driver_version,uuid"
    try:
        command = [program, query, "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_smi(done.stdout) if done.returncode == 0 else ()


def parse_smi(text: str) -> tuple[Gpu, ...]:
    """The rows of nvidia-smi's CSV (memory in MiB); rows without numbers are left out."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and parts[1].replace(".", "", 1).isdigit() and parts[2].isdigit():
            gpus.append(Gpu(parts[0], round(float(parts[1]) * 10), int(parts[2]) << 20, parts[3], parts[4]))
    return tuple(gpus)
