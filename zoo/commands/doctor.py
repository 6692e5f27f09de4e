"""``zoo doctor``: what this machine can build and run, and what is missing in one line each."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

from zoo.commands.output import open_registry, print_json, print_table
from zoo.resources import available_memory, size_text

PACKAGES = ("numpy", "onnx", "onnx-graphsurgeon", "hydra-core", "onnxruntime", "tensorrt-rtx-cu13", "tensorrt-cu13", "triton")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def doctor(arguments: argparse.Namespace) -> int:
    """Machine, packages, compilers by hardware. Never fails: what is missing is what it reports."""
    from zoo.artifacts.select import describe_machine

    machine = describe_machine()
    registry = open_registry(arguments)
    root = registry.root
    while not root.exists():
        root = root.parent
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_available": available_memory(),
        "disk_free": shutil.disk_usage(root).free,
        "registry": str(registry.root),
        "gpus": [{"name": gpu.name, "sm": gpu.sm, "memory": gpu.memory, "driver": gpu.driver} for gpu in machine.gpus],
        "packages": {name: _version(name) for name in PACKAGES},
        "compilers": _compilers({gpu.sm for gpu in machine.gpus}),
    }
    if arguments.json:
        print_json(data)
        return 0
    print_table(
        ("MACHINE", ""),
        [
            ("python", data["python"]),
            ("cpus", data["cpus"]),
            ("memory available", size_text(available_memory())),
            ("disk free", f"{size_text(shutil.disk_usage(root).free)} at {root}"),
            ("registry", data["registry"]),
            *[("gpu", f"{gpu.name}, SM {gpu.sm // 10}.{gpu.sm % 10}, {size_text(gpu.memory)}") for gpu in machine.gpus],
            *([] if machine.gpus else [("gpu", "none")]),
            *[(name, version or "not installed") for name, version in data["packages"].items()],
        ],
    )
    print()
    print_table(
        ("COMPILER", "HERE", "BUILDS FOR", "RUNS HERE"),
        [(name, one["state"], ", ".join(one["hardware"]) or "-", one["runs"]) for name, one in data["compilers"].items()],
    )
    return 0


def _compilers(sms: set[int]) -> dict[str, dict[str, Any]]:
    if importlib.util.find_spec("onnx_graphsurgeon") is None or importlib.util.find_spec("hydra") is None:
        text = "no builder here: pip install 'engine-zoo[build]'"
        return {"all": {"state": text, "hardware": [], "runs": ""}}
    from zoo.compilers import COMPILERS
    from zoo.config import hardware_specs
    from zoo.targets import TARGETS

    out: dict[str, dict[str, Any]] = {}
    for name, compiler in COMPILERS.items():
        reason = compiler.available()
        fits = [hardware.name for hardware in hardware_specs() if name in hardware.compilers and not compiler.supports(hardware)]
        wanted = TARGETS[name].sms
        runs = "yes" if not wanted or sms & set(wanted) else "no: no GPU it builds for"
        out[name] = {"state": reason or f"ready, {compiler.version()}", "hardware": fits, "runs": runs}
    return out
