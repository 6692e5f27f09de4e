"""The argument block of a kernel launch, made once and changed in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

# Triton's names of scalar types -> C types. Pointers are "*T" for any T.
SCALARS: dict[str, Any] = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "u8": ctypes.c_uint8,
    "i16": ctypes.c_int16,
    "u16": ctypes.c_uint16,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
HIDDEN = 2  # pointers that Triton 3.6 and 3.7 add behind a kernel's own parameters: scratch in global memory, for profiling

Value = Any  # an int, a float, or a ctypes scalar


class Arguments:
    """What ``cuLaunchKernel`` reads: a C array of pointers, ``address``, each to a cell that holds one argument.

        types      of the kernel's run-time parameters in order, by Triton's names: "*bf16", "i32", "fp32"
        values     their first values; 0 where left out. A ctypes scalar is shared rather than copied: launches that share
                   a cell all see what is written to it, so a step's token count is written once for all of its launches
        hidden     parameters that Triton added behind them. They are null: kernels that want such scratch are not compiled

    The driver copies the arguments when it launches, so a block may be changed as soon as a launch returns; a captured graph
    keeps those it was captured with.
    """

    __slots__ = ("_cells", "_own", "_pointers", "address")

    def __init__(self, types: Sequence[str], values: Sequence[Value] = (), hidden: int = HIDDEN) -> None:
        assert len(values) <= len(types), f"{len(values)} values for {len(types)} arguments"
        self._cells: list[Any] = []
        given = [*values, *[0] * (len(types) - len(values))]
        for kind, value in zip(types, given, strict=True):
            of: Any = ctypes.c_uint64 if kind.startswith("*") else SCALARS[kind]
            if isinstance(value, ctypes._SimpleCData):
                assert type(value) is of, f"a shared cell of {type(value).__name__} for an argument of type {kind}"
                self._cells.append(value)
            else:
                self._cells.append(of(value))
        self._own = len(self._cells)
        self._cells += [ctypes.c_uint64() for _ in range(hidden)]
        self._pointers = (ctypes.c_void_p * len(self._cells))(*[ctypes.addressof(cell) for cell in self._cells])
        self.address = ctypes.addressof(self._pointers)

    def __setitem__(self, index: int, value: float) -> None:
        """Write one argument; all launches that share its cell see it."""
        self._cells[index].value = value

    def __getitem__(self, index: int) -> Any:
        return self._cells[index].value

    def __len__(self) -> int:
        """How many arguments the kernel itself has."""
        return self._own
