"""What this machine has to give: memory that a build may take, disk that a store may fill."""

from __future__ import annotations

import shutil
from pathlib import Path

from zoo.errors import ResourceError

GIB = 1 << 30


def size_text(size: float) -> str:
    """Bytes for people: 1.5 GB, 42.0 MB, 3.1 kB, 12 B (powers of ten)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def available_memory() -> int:
    """Bytes of memory a process can still take: the kernel's estimate, or less if a control group allows less."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    available = values["MemAvailable"]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def check_memory(needed: int, what: str) -> None:
    """Raise ResourceError before work starts that this machine cannot hold."""
    available = available_memory()
    if needed > available:
        raise ResourceError(
            f"{what} needs about {size_text(needed)} of memory and {size_text(available)} is available; "
            "use a machine with more, or a smaller model"
        )


def check_disk(needed: int, folder: Path, what: str) -> None:
    """Raise ResourceError before writing what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{what} needs {size_text(needed)} of disk at {folder} and {size_text(free)} is free; "
            "free some (`zoo gc` removes what nothing refers to) or set ZOO_HOME to another disk"
        )
