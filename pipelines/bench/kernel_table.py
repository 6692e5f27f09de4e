"""What kernels reach beside what the GPU can do: the arithmetic, and the table. See ``pipelines.bench.kernels``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

FP8 = "float8e4m3"


@dataclass(frozen=True)
class Ceilings:
    """Of this GPU: bytes a second copied (read and written) and read, and operations a second of large products."""

    copied: float
    read: float
    bfloat16: float
    float8e4m3: float

    def bound(self, row: Row) -> tuple[float, bool]:
        """Seconds that a row cannot go below, and whether it is memory that it waits for."""
        memory = row.moved / (self.copied if row.writes else self.read)
        work = row.flops / (self.float8e4m3 if row.math == FP8 else self.bfloat16)
        return max(memory, work), memory >= work


@dataclass(frozen=True)
class Row:
    """What was measured. ``writes``: about as much is written as read. ``math``: the dtype that is multiplied."""

    kernel: str
    case: str
    seconds: float
    moved: int
    flops: int = 0
    writes: bool = False
    math: str = "bfloat16"
    beside: str = ""


def rate(row: Row, memory: bool) -> str:
    return f"{row.moved / row.seconds / 1e12:.2f} TB/s" if memory else f"{row.flops / row.seconds / 1e12:,.0f} TFLOP/s"


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.{1 if seconds < 1e-4 else 0}f} µs"


def table(rows: Sequence[Row], ceilings: Ceilings) -> list[str]:
    """Lines of Markdown; the ceilings come first."""
    lines = ["| kernel | case | reached | of the ceiling |", "| --- | --- | --- | --- |"]
    for name, value in (("copy", ceilings.copied), ("read", ceilings.read)):
        lines.append(f"| ceiling | {name} | {value / 1e12:.2f} TB/s | |")
    for name, value in (("bfloat16", ceilings.bfloat16), ("FP8", ceilings.float8e4m3)):
        lines.append(f"| ceiling | {name} products, cuBLASLt | {value / 1e12:,.0f} TFLOP/s | |")
    for row in rows:
        bound, memory = ceilings.bound(row)
        beside = f"; {row.beside}" if row.beside else ""
        reached = f"{micro(row.seconds)}, {rate(row, memory)}{beside}"
        lines.append(f"| {row.kernel} | {row.case} | {reached} | {bound / row.seconds:.0%} |")
    return lines


def as_json(rows: Sequence[Row], ceilings: Ceilings) -> dict[str, Any]:
    """The same in base units, and each row's part of its ceiling."""
    shares = [asdict(row) | {"share": ceilings.bound(row)[0] / row.seconds} for row in rows]
    return {"ceilings": asdict(ceilings), "rows": shares}
