"""GPU kernels as data: which Triton function, specialized how, launched over which grid, with which arguments.

A zoo op's folder may hold ``kernels.py`` (Triton functions, nothing else imports triton) and ``cuda.py`` (a function from a
node of the graph to the launches that carry it out). The ``cuda`` compiler compiles each distinct ``Kernel`` once, ahead of
time, and writes the launches into the engine's plan as JSON; nothing here needs triton or a GPU.

Sizes of a step are symbols that the session knows when it runs one:

    T  tokens    B  sequences    R  rows of logits    W  prefill tiles (``zoo.runtime.indices``)    S  splits of a context
    P  blocks a sequence: the width of this step's block table
    J  1 if contexts are split, so that parts are to be joined; else 0

Every pointer that a kernel gets is aligned to 256 bytes, except that rows inside a tensor follow its shape.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SYMBOLS = ("T", "B", "R", "W", "S", "P", "J")
TRITON_TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8e4m3": "fp8e4nv",
    "int32": "i32",
    "int64": "i64",
}


@dataclass(frozen=True)
class Size:
    """ceil(symbol * times / over), a number of the step that runs; ``symbol`` "" stands for 1."""

    symbol: str = ""
    times: int = 1
    over: int = 1

    def __post_init__(self) -> None:
        assert self.symbol in ("", *SYMBOLS) and self.times > 0 and self.over > 0

    def at(self, sizes: Mapping[str, int]) -> int:
        """The number for a step's sizes."""
        return -(-(sizes[self.symbol] if self.symbol else 1) * self.times // self.over)


def fixed(number: int) -> Size:
    """A number that is the same in every step."""
    return Size("", number)


@dataclass(frozen=True)
class Kernel:
    """One specialization of a Triton function.

    source      "package.module:function"
    args        its run-time parameters in order: (name, Triton type), as "*bf16", "*fp8e4nv", "i32", "fp32"
    constants   its constexpr parameters
    overlaps    it waits for its inputs by itself (``zoo.plugins.overlap``), so it may start while the kernel before it runs
    """

    source: str
    args: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float | bool | str], ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    overlaps: bool = False

    @property
    def name(self) -> str:
        """Unique and readable: the function's name and a digest of all else that machine code is made from."""
        data = [self.source, self.args, self.constants, self.num_warps, self.num_stages]
        return f"{self.source.partition(':')[2]}-{hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Scratch:
    """Device memory that only lives during a node's launches, shared between them by name. ``size`` in bytes."""

    name: str
    size: Size


# A tensor of the graph by name (its address is passed), scratch, a number of the step (i32), or a float (fp32).
Arg = str | Scratch | Size | float


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``args`` has one entry for each of ``kernel.args``. A grid of which one side is 0 is not launched."""

    kernel: Kernel
    grid: tuple[Size, Size, Size]
    args: tuple[Arg, ...]

    def __post_init__(self) -> None:
        assert len(self.args) == len(self.kernel.args), f"{self.kernel.name}: {len(self.args)} arguments"


@dataclass(frozen=True)
class TensorRef:
    """A tensor of the rewritten graph. Sizes are numbers or names (1, "T", "R", ...)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def pointer(self) -> str:
        """Its Triton type: ``*bf16``."""
        return "*" + TRITON_TYPES[self.dtype]

    @property
    def rows(self) -> Size:
        """The product of all sizes but the last, as a step's number: [1, T, E] -> T."""
        times, symbol = 1, ""
        for size in self.shape[:-1]:
            if isinstance(size, int):
                times *= size
            else:
                assert not symbol, f"{self.name}: two symbols in {self.shape}"
                symbol = size
        return Size(symbol, times)


@dataclass(frozen=True)
class CudaNode:
    """A node as ``cuda.py`` files see it. ``inputs`` may hold None for an absent optional input.

    sm      of the target, 90 for SM 9.0
    limits  of the engine: max_tokens, max_sequences, max_rows, max_context, max_blocks, block_size
    tuning  choices from the hardware profile, by key; a kernel's own defaults stand where a key is absent
    scales  an input's place -> [N] float32, by which the kernel multiplies the input's columns first: a float8 GEMM left that
            to it. Only where ``zoo.compilers.cuda.plan.SCALED_INPUTS`` says that the op does so
    """

    op: str
    name: str
    attrs: Mapping[str, Any]
    inputs: tuple[TensorRef | None, ...]
    outputs: tuple[TensorRef, ...]
    sm: int
    limits: Mapping[str, int]
    tuning: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[int, TensorRef] = field(default_factory=dict)


Lower = Callable[[CudaNode], list[Launch]]
