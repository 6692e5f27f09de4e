"""What was measured, and on what: enough to repeat a run, and to tell two runs apart."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.artifacts.machine import Gpu, Machine, describe_machine
from zoo.artifacts.manifest import EngineManifest
from zoo.runtime.abi import EngineLimits

# compiler -> distributions that an engine of it runs through
RUNTIMES = {
    "onnxruntime": ("onnxruntime",),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "cuda-bindings"),
    "tensorrt": ("tensorrt-cu13", "cuda-bindings"),
    "cuda": ("cuda-bindings", "nvidia-cublas"),
}


def configuration(
    ref: str, manifest: EngineManifest, limits: EngineLimits, command: Sequence[str], threads: int = 0
) -> dict[str, Any]:
    """The effective one: limits as the scheduler keeps them, versions as they are installed."""
    machine = describe_machine()
    spec, compiler = manifest.spec, str(manifest.compiler.get("name", ""))
    return {
        "ref": ref,
        "model": manifest.model,
        "version": manifest.version,
        "profile": manifest.profile,
        "quant": _part(spec, "quant", "method"),
        "kv_cache": _part(spec, "quant", "kv_cache"),
        "hardware": _part(spec, "hardware", "name"),
        "dtype": spec.get("dtype"),
        "limits": dataclasses.asdict(limits),
        "compiler": dict(manifest.compiler),
        "packages": _packages(compiler),
        "machine": describe(machine, gpu_of(machine, manifest), threads),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def gpu_of(machine: Machine, manifest: EngineManifest) -> Gpu | None:
    """The GPU that a session of this engine takes: the first visible one of its SM; None for a CPU engine."""
    if manifest.needs.get("kind") != "gpu":
        return None
    return next((gpu for gpu in machine.gpus if gpu.sm == manifest.needs.get("sm")), None)


def describe(machine: Machine, gpu: Gpu | None, threads: int = 0) -> dict[str, Any]:
    """CPU or GPU by name, with what else decides speed."""
    data: dict[str, Any] = {"cpu": cpu_name(), "cores": machine.cores, "memory": machine.memory, "system": platform.platform()}
    if gpu is None:
        return data | {"threads": threads or machine.cores}
    return data | {"gpu": gpu.name, "sm": gpu.sm, "gpu_memory": gpu.memory, "driver": gpu.driver}


def cpu_name() -> str:
    """As Linux tells it; the architecture where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def notes(configured: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know: a GPU that is not the one that the profile, and with it the roofline, is of."""
    machine, hardware = configured["machine"], spec.get("hardware", {})
    memory, stated = machine.get("gpu_memory", 0), hardware.get("memory", 0)
    if memory and stated and abs(memory / stated - 1) > 0.05:
        return [
            f"the profile is {hardware.get('name')} with {stated / 1e9:.0f} GB, and {machine['gpu']} has {memory / 1e9:.0f} GB: "
            "roofline and cost are those of the profile"
        ]
    return []


def _part(spec: dict[str, Any], part: str, key: str) -> Any:
    return spec.get(part, {}).get(key)


def _packages(compiler: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("engine-zoo", "numpy", *RUNTIMES.get(compiler, ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
