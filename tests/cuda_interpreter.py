"""Kernels of a launch plan in Triton's interpreter, over addresses of host memory, rounding as SM 9.0 does.

Every address that a kernel reads or writes must lie inside one allocation. Knows the insides of Triton 3.6 and 3.7.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from plugins.interpreted import gpu_arithmetic

SCALARS = {"i32": (ctypes.c_int32, np.int32), "i64": (ctypes.c_int64, np.int64), "fp32": (ctypes.c_float, np.float32)}


def interpret(data: dict[str, Any], grid: tuple[int, int, int], values: Sequence[Any], memory: dict[int, np.ndarray]) -> None:
    """Run a kernel of a plan over a grid. ``values`` are addresses and numbers in the order of its arguments."""
    module, _, name = data["source"].partition(":")
    function = getattr(importlib.import_module(module), name)
    named = [(one, kind) for one, kind in data["args"]]
    constants = dict(data["constants"])
    assert [one for one in function.arg_names if one not in constants] == [one for one, _ in named], f"{name}: other parameters"
    for (one, kind), value in zip(named, values, strict=True):
        assert not kind.startswith("*") or value % 16 == 0, f"{name} is compiled for multiples of 16, and {one} is {value:#x}"
    args = {one: _argument(kind, value) for (one, kind), value in zip(named, values, strict=True)}
    builder = interpreter.interpreter_builder
    with _patched(function.fn), gpu_arithmetic(), _guarded(builder, memory, name):
        program = function.rewrite()
        builder.set_grid_dim(*grid)
        for x in range(grid[0]):
            for y in range(grid[1]):
                for z in range(grid[2]):
                    builder.set_grid_idx(x, y, z)
                    program(**args, **constants)


def _argument(kind: str, value: Any) -> tl.tensor:
    """An argument as a kernel sees it."""
    ty = tl.str_to_ty(kind, None)
    if kind.startswith("*"):
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.uint64), ty), ty)
    return tl.tensor(interpreter.TensorHandle(np.array([value], SCALARS[kind][1]), ty), ty)


_PATCHES: list[tuple[Any, str, Any]] = []  # of triton.language, as the interpreter makes them for every call anew


@contextlib.contextmanager
def _patched(function: Any) -> Iterator[None]:
    """The interpreter's language, put in place at once: calls within a kernel look it up some hundred times."""
    if not _PATCHES:
        scopes = [interpreter._patch_lang(one) for one in (function, tl.zeros.fn)]  # the language, and its own library's core
        _PATCHES.extend((thing, name, getattr(thing, name)) for scope in scopes for thing, name, _ in scope._changes)
        for scope in reversed(scopes):
            scope.restore()
    scope = interpreter._LangPatchScope()
    for thing, name, value in _PATCHES:
        scope.set_attr(thing, name, value)
    scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())  # numpy 2.4 has no int of arrays
    scope.set_attr(tl.tensor, "__init__", _tensor)
    scope.set_attr(tl.block_type, "__init__", _block)
    try:
        with (
            mock.patch.object(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope()),
            mock.patch.object(interpreter, "_get_np_dtype", _numpy_type),
        ):
            yield
    finally:
        scope.restore()


# What Triton makes anew for every value is made once for every shape: half of the interpreter's time.
_SHAPES: dict[tuple[int, ...], tuple[Any, Any]] = {}
_BLOCKS: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_make_block = tl.block_type.__init__
_NUMPY: dict[str, Any] = {}
_make_numpy = interpreter._get_np_dtype


def _tensor(self: Any, handle: Any, type: Any) -> None:
    sizes = type.sizes if type.is_block() else ()
    if sizes not in _SHAPES:
        _SHAPES[sizes] = tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _SHAPES[sizes]


def _block(self: Any, element: Any, shape: Sequence[Any]) -> None:
    sizes = tuple([getattr(size, "value", size) for size in shape])
    if (element.name, sizes) not in _BLOCKS:
        _make_block(self, element, shape)
        _BLOCKS[element.name, sizes] = self.shape, self.numel, self.name
    self.element_ty, self.sizes = element, sizes
    self.shape, self.numel, self.name = _BLOCKS[element.name, sizes]


def _numpy_type(kind: Any) -> Any:
    if kind.name not in _NUMPY:
        _NUMPY[kind.name] = _make_numpy(kind)
    return _NUMPY[kind.name]


@contextlib.contextmanager
def _guarded(builder: Any, memory: dict[int, np.ndarray], kernel: str) -> Iterator[None]:
    """Loads and stores that stay inside one allocation."""
    starts = sorted(memory)
    load, store = builder.create_masked_load, builder.create_masked_store

    def check(what: str, pointers: Any, mask: Any) -> None:
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not places.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(places.min()), int(places.max()) + size
        start = starts[max(0, bisect.bisect_right(starts, low) - 1)]
        assert start <= low and high <= start + memory[start].nbytes, f"{kernel} {what} bytes that are not one allocation's"

    def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        check("reads", pointers, mask)
        return load(pointers, mask, *rest)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("writes", pointers, mask)
        return store(pointers, value, mask, *rest)

    with (
        mock.patch.object(builder, "create_masked_load", checked_load),
        mock.patch.object(builder, "create_masked_store", checked_store),
    ):
        yield
