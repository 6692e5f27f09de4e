"""A launch plan with addresses in it: what a step does on the GPU, in order, for any sizes.

A product (``Gemm``) is cuBLASLt's, or launches of the plan's own where its rows are few enough for them. A launch may overlap
the one before it, where the plan says that its kernel waits for its inputs by itself.

Arguments that change from step to step are shared cells: a token count or the place of an input is written once, and all
launches that read it see it (``zoo.runtime.cuda.arguments``). A launch costs one call of the driver and no Python arithmetic.

Symbols of a step: T tokens, B sequences, R rows of logits, W prefill tiles, S splits of a context, P blocks a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import ArtifactError
from zoo.runtime.cuda.arguments import Arguments
from zoo.runtime.cuda.driver import Device

Key = tuple[str, int, int]  # (symbol, times, over): ceil(symbol * times / over); symbol "" stands for 1
GemmRunner = Callable[[int, int], None]  # rows, stream


@dataclass(frozen=True)
class Function:
    """A compiled kernel on the GPU."""

    handle: int
    warps: int
    shared: int
    types: tuple[str, ...]


class Symbols:
    """The sizes of the step at hand: numbers for grids, and a cell for each that kernels read."""

    def __init__(self) -> None:
        self._numbers: dict[Key, int] = {}
        self.cells: dict[Key, Any] = {}

    def number(self, key: Key) -> Key:
        """Have a size computed for each step."""
        self._numbers.setdefault(key, 0)
        return key

    def cell(self, key: Key) -> Any:
        """The cell that holds a size."""
        return self.cells.setdefault(self.number(key), ctypes.c_int32())

    def set(self, sizes: Mapping[str, int]) -> dict[Key, int]:
        """Enter a step's sizes; gives every number that was asked for."""
        for key in self._numbers:
            symbol, times, over = key
            self._numbers[key] = -(-(sizes[symbol] if symbol else 1) * times // over)
        for key, cell in self.cells.items():
            cell.value = self._numbers[key]
        return self._numbers


@dataclass
class Launch:
    function: Function
    grid: tuple[Key, Key, Key]
    arguments: Arguments
    overlap: bool


@dataclass
class Gemm:
    """``run`` for any number of rows; ``small``: (most rows, launches) in the order of rows, which go before it."""

    rows: Key
    n: int
    k: int
    run: GemmRunner
    small: Sequence[tuple[int, Sequence[Launch]]] = ()


class Program:
    """Steps of one part of a plan. ``addresses``: tensor -> its address, or a cell that holds it."""

    def __init__(
        self,
        device: Device,
        steps: Sequence[Mapping[str, Any]],
        functions: Mapping[str, Function],
        symbols: Symbols,
        addresses: Mapping[str, Any],
        arena: int,
        make_gemm: Callable[[Mapping[str, Any], Callable[[Any], int]], GemmRunner] | None = None,
    ) -> None:
        self._device, self._symbols = device, symbols
        self._addresses, self._arena = addresses, arena
        self._steps: list[Launch | Gemm] = []
        for step in steps:
            if step["op"] == "gemm":
                assert make_gemm is not None, "a plan part without products"
                self._steps.append(self._gemm(step, functions, make_gemm))
            else:
                self._steps.append(self._launch(step, functions))

    def _gemm(self, step: Mapping[str, Any], functions: Mapping[str, Function], make_gemm: Callable[..., GemmRunner]) -> Gemm:
        runner = make_gemm(step, self._fixed)
        small = [(int(one["most"]), [self._launch(each, functions) for each in one["launches"]]) for one in step.get("small", ())]
        return Gemm(self._symbols.number(_key(step["rows"])), int(step["n"]), int(step["k"]), runner, small)

    def _launch(self, step: Mapping[str, Any], functions: Mapping[str, Function]) -> Launch:
        if step["kernel"] not in functions:
            raise ArtifactError(f"plan.json: it launches {step['kernel']}, which is not among its kernels; rebuild the engine")
        function = functions[step["kernel"]]
        if len(step["args"]) != len(function.types):
            raise ArtifactError(f"plan.json: {step['kernel']} takes {len(function.types)} arguments, not {len(step['args'])}")
        x, y, z = (self._symbols.number(_key(side)) for side in step["grid"])
        arguments = Arguments(function.types, [self._value(arg) for arg in step["args"]])
        return Launch(function, (x, y, z), arguments, bool(step.get("overlap", False)))

    def _value(self, arg: Mapping[str, Any]) -> Any:
        match arg:
            case {"arena": int(offset)}:
                return self._arena + offset
            case {"float": float(value)}:
                return value
            case {"size": side}:
                return self._symbols.cell(_key(side))
            case {"tensor": name} if name in self._addresses:
                return self._addresses[name]
        raise ArtifactError(f"plan.json: nothing here is meant by the argument {str(arg)[:80]}; rebuild the engine")

    def _fixed(self, arg: Any) -> int:
        """The address of a tensor that never moves; 0 for none."""
        if arg is None:
            return 0
        value = self._value(arg)
        if not isinstance(value, int):
            raise ArtifactError(f"plan.json: a GEMM reads {str(arg)[:80]}, which is an input of the step; rebuild the engine")
        return value

    def run(self, numbers: Mapping[Key, int], stream: int) -> None:
        """Queue all steps. ``numbers`` as ``Symbols.set`` gave them for this step."""
        self.run_steps(self._steps, numbers, stream)

    def run_steps(self, steps: Sequence[Launch | Gemm], numbers: Mapping[Key, int], stream: int) -> None:
        """Queue some steps."""
        launch = self._device.launch
        for step in steps:
            if isinstance(step, Gemm):
                if rows := numbers[step.rows]:
                    for most, few in step.small:
                        if rows <= most:
                            self.run_steps(few, numbers, stream)
                            break
                    else:
                        step.run(rows, stream)
                continue
            x, y, z = step.grid
            grid = (numbers[x], numbers[y], numbers[z])
            if grid[0] and grid[1] and grid[2]:
                function = step.function
                launch(function.handle, grid, function.warps, function.shared, step.arguments, stream, step.overlap)

    def __len__(self) -> int:
        return len(self._steps)


def _key(side: Any) -> Key:
    match side:
        case [str(symbol), int(times), int(over)] if times > 0 and over > 0:
            return symbol, times, over
    raise ArtifactError(f"plan.json: a size is {str(side)[:80]}, not [symbol, times, over]; rebuild the engine")
