"""Choosing the engine for a machine, and saying of each other engine why it was not chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from zoo.artifacts.entries import Entry
from zoo.artifacts.machine import Gpu, Machine, describe_machine
from zoo.artifacts.manifest import EngineManifest
from zoo.errors import IncompatibleError

__all__ = ["Gpu", "Machine", "check_compatible", "choose", "describe_machine", "why_not"]

# A card reports less memory than its name says (a 48 GB card: 46,068 MiB), because the driver keeps some.
MEMORY_SLACK = 0.08
# Runtimes whose engines load in the version that built them and later ones. All others want the same version: a plan is
# tied to its builder.
FORWARD = ("onnxruntime", "cuda-bindings")


@dataclass(frozen=True)
class Needs:
    """What an engine must find. ``memory`` in bytes for each rank; 0: not known."""

    kind: str
    sm: int = 0
    memory: int = 0
    ranks: int = 1
    packages: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Entry | EngineManifest) -> Needs:
        """The needs of a stored engine (from its index) or of a manifest."""
        if isinstance(engine, EngineManifest):
            needs, parallel = engine.needs, engine.spec.get("parallel", {})
            ranks = int(parallel.get("tp", 1)) * int(parallel.get("pp", 1))
            packages = needs.get("packages", {})
            return cls(needs.get("kind", "cpu"), int(needs.get("sm", 0)), int(needs.get("memory", 0)), ranks, dict(packages))
        try:
            found: Any = json.loads(engine.get("packages") or "{}")
        except (ValueError, RecursionError):
            found = {}
        packages = {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
        ranks = engine.number("tp") * engine.number("pp")
        return cls(engine.get("kind"), engine.number("sm"), engine.number("memory"), ranks, packages)


def why_not(needs: Needs, machine: Machine) -> str:
    """Empty when the machine can run an engine with these needs, else the reason it cannot."""
    if needs.kind == "gpu":
        if not machine.gpus:
            return f"it is for a GPU of SM {_sm(needs.sm)}; this machine has no GPU"
        fitting = [gpu for gpu in machine.gpus if gpu.sm == needs.sm]
        if not fitting:
            here = ", ".join(f"{gpu.name} (SM {_sm(gpu.sm)})" for gpu in machine.gpus)
            return f"it is for SM {_sm(needs.sm)}; this machine has {here}"
        large = [gpu for gpu in fitting if gpu.memory >= needs.memory * (1 - MEMORY_SLACK)]
        if len(large) < needs.ranks:
            most = max(gpu.memory for gpu in fitting)
            if len(fitting) < needs.ranks:
                return f"it needs {needs.ranks} GPUs of SM {_sm(needs.sm)}; this machine has {len(fitting)}"
            return f"it needs {needs.memory / 1e9:.1f} GB of GPU memory; the GPU has {most / 1e9:.1f} GB"
    elif needs.memory > machine.memory:
        return f"it needs {needs.memory / 1e9:.1f} GB of memory; this machine has {machine.memory / 1e9:.1f} GB"
    for name, wanted in needs.packages.items():
        found = machine.package(name)
        if not found:
            return f"it needs {name} {wanted}, which is not installed"
        if name in FORWARD and _number(found)[:2] < _number(wanted)[:2]:
            return f"it needs {name} {wanted} or newer; {found} is installed"
        if name not in FORWARD and _number(found)[:3] != _number(wanted)[:3]:
            return f"it needs exactly {name} {wanted}; {found} is installed"
    return ""


def _sm(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def _number(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def check_compatible(engine: Entry | EngineManifest, machine: Machine) -> None:
    """Raise IncompatibleError when an engine that was named explicitly cannot run on a machine."""
    if reason := why_not(Needs.of(engine), machine):
        name = engine.ref if isinstance(engine, Entry) else f"{engine.model}:{engine.version}@{engine.profile}"
        raise IncompatibleError(f"engine {name} cannot run here: {reason}. Name no profile and the best that fits is taken")


def choose(entries: list[Entry], machine: Machine, asked: str) -> Entry:
    """The best of some engines for a machine. IncompatibleError gives the reason for each when none fits.

    GPU engines come before CPU engines; then the largest GPU; the engine made for a card of its memory; the compiler that
    its hardware file prefers; on a GPU the quantized engine (it is why one was built), on a CPU the plain one; the fewest
    ranks; the newest.
    """
    reasons = {entry.ref: why_not(Needs.of(entry), machine) for entry in entries}
    fitting = [entry for entry in entries if not reasons[entry.ref]]
    if fitting:
        ranked = [(_rank(entry, machine), place, entry) for place, entry in enumerate(fitting)]
        return max(ranked)[2]
    text = "".join(f"\n  {ref}: {reason}" for ref, reason in reasons.items())
    raise IncompatibleError(f"no engine of {asked} can run on this machine ({machine}):{text}\nBuild one for it: zoo engines")


def _rank(entry: Entry, machine: Machine) -> tuple[bool, int, int, int, bool, int]:
    gpu = entry.get("kind") == "gpu"
    sizes = [one.memory for one in machine.gpus if gpu and one.sm == entry.number("sm")]
    distance = min((abs(size - entry.number("hardware_memory")) for size in sizes), default=0)
    order = entry.get("compilers").split(",")
    preferred = -order.index(entry.get("compiler")) if entry.get("compiler") in order else -len(order)
    plain = entry.get("quant") == "none"
    return gpu, max(sizes, default=0), -(distance >> 30), preferred, plain != gpu, -entry.number("tp") * entry.number("pp")
