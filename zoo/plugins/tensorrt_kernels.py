"""The one kernel that a zoo op is as a TensorRT plugin: which, with which arguments, and launched from Python.

NOT YET RUN with TensorRT: see ``zoo.plugins.tensorrt``, whose half without TensorRT this is. The calls of the CUDA driver are
those of ``zoo.runtime.cuda.driver``, which have run.

An engine carries the kernels of its "jit" plugins in a folder: ``plugins.json``, and a cubin for each.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from zoo.errors import ArtifactError, CompileError, EngineError, UnavailableError
from zoo.plugins.contract import NAMESPACE, Plugin
from zoo.plugins.kernels import TRITON_TYPES, Kernel

INDEX = "plugins.json"
LARGE_SHARED = 48 << 10  # bytes of shared memory that a kernel gets without asking, which TensorRT is not known to do
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8e4m3": 1, "int32": 4}
COMPUTE = ("float16", "bfloat16")


@dataclass(frozen=True)
class Launched:
    """The one launch of a node. ``grid`` takes the binding's sizes, numbers or TensorRT's expressions: +, -, * and // only."""

    kernel: Kernel
    grid: Callable[[Mapping[str, Any]], tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Binding:
    """What a zoo op's plugin needs beside its contract.

    sizes    the kernel's int32 parameters in order: name -> (input, axis); axis None: the product of all but the last
    launch   attributes, dtypes by port, shapes by input (-1 for a size that is not fixed) -> the launch
    """

    plugin: Plugin
    sizes: Mapping[str, tuple[str, int | None]]
    launch: Callable[[Mapping[str, Any], Mapping[str, str], Mapping[str, Sequence[int]]], Launched]

    @property
    def plugin_id(self) -> str:
        return f"{NAMESPACE}::{self.plugin.op}"

    def dtypes(self, compute: str) -> dict[str, str]:
        """Dtype names of all ports for a compute type."""
        ports = (*self.plugin.inputs, *self.plugin.outputs)
        return {port.name: compute if port.dtype == "T" else port.dtype for port in ports}

    def kernel_args(self, dtypes: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """The kernel's run-time parameters, with Triton's types."""
        given, made = (
            tuple((port.name, "*" + TRITON_TYPES[dtypes[port.name]]) for port in ports)
            for ports in (self.plugin.inputs, self.plugin.outputs)
        )
        return (*given, *((name, "i32") for name in self.sizes), *made)

    def measure(self, shapes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """The sizes by name, from shapes of numbers or of TensorRT's expressions."""
        found = {}
        for name, (port, axis) in self.sizes.items():
            found[name] = shapes[port][0 if axis is None else axis]
            for size in list(shapes[port])[1:-1] if axis is None else ():
                found[name] = found[name] * size
        return found


@dataclass(frozen=True)
class Code:
    """A compiled kernel. ``hidden``: parameters that Triton added to the cubin's, behind the kernel's own; the PTX has none."""

    cubin: bytes
    ptx: bytes
    entry: str
    warps: int
    shared: int
    hidden: int


CODE: dict[str, Code] = {}  # by the kernel's name, which is a digest of what it was made from
_FUNCTIONS: dict[tuple[int, str], Any] = {}  # by CUDA context and kernel


def float32(number: float) -> float:
    """An attribute as ONNX holds it: a kernel is the same whether it was asked for by a graph or by TensorRT's parser."""
    return ctypes.c_float(number).value


def read_code(folder: Path) -> dict[str, Code]:
    """The kernels that ``zoo.compilers.tensorrt_kernels`` left in a folder. An engine's own folder has no PTX."""
    try:
        index = json.loads((folder / INDEX).read_text())
        found = {}
        for name, one in index["kernels"].items():
            ptx = folder / f"{name}.ptx"
            cubin = (folder / f"{name}.cubin").read_bytes()
            text = ptx.read_bytes() if ptx.exists() else b""
            found[name] = Code(cubin, text, one["entry"], one["warps"], one["shared"], one["hidden"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: the kernels of its plugins cannot be read ({error}); rebuild the engine") from None
    return found


def enqueue(
    binding: Binding,
    attributes: Mapping[str, Any],
    dtypes: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    places: Mapping[str, int],
    stream: int,
) -> None:
    """Launch a node's kernel in the calling thread's CUDA context. ``places``: addresses by port."""
    launched, code = find(binding, attributes, dtypes, shapes)
    driver = _driver()
    for port in binding.plugin.outputs:
        # TensorRT may keep an output apart from the input whose memory it should share: then it begins as a copy.
        if port.alias and places[port.name] != places[port.alias]:
            size = prod(shapes[port.alias]) * ITEM_SIZES[dtypes[port.alias]]
            _do("copy a tensor", driver.cuMemcpyDtoDAsync(places[port.name], places[port.alias], size, stream))
    sizes = binding.measure(shapes)
    grid = launched.grid(sizes)
    if not all(grid):
        return
    cells: list[Any] = [
        ctypes.c_uint64(places[name]) if kind.startswith("*") else ctypes.c_int32(sizes[name])
        for name, kind in launched.kernel.args
    ]
    cells += [ctypes.c_uint64(0) for _ in range(code.hidden)]
    pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(cell) for cell in cells])
    function = _function(driver, launched.kernel.name, code)
    block = 32 * code.warps
    _do(
        "launch a kernel", driver.cuLaunchKernel(function, *grid, block, 1, 1, code.shared, stream, ctypes.addressof(pointers), 0)
    )


def find(
    binding: Binding, attributes: Mapping[str, Any], dtypes: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> tuple[Launched, Code]:
    """A node's launch, and its kernel among those that were registered."""
    check_dtypes(binding, dtypes)
    launched = binding.launch(attributes, dtypes, shapes)
    assert launched.kernel.args == binding.kernel_args(dtypes), f"{launched.kernel.name}: {launched.kernel.args}"
    if launched.kernel.name not in CODE:
        raise EngineError(f"{binding.plugin.op}: the kernel {launched.kernel.name} is not among those of this engine; rebuild it")
    return launched, CODE[launched.kernel.name]


def check_dtypes(binding: Binding, dtypes: Mapping[str, str]) -> None:
    """CompileError unless all ports have the dtypes of the contract, for a compute type that there are kernels for."""
    compute = next(dtypes[port.name] for port in binding.plugin.inputs if port.dtype == "T")
    if compute not in COMPUTE or dict(dtypes) != binding.dtypes(compute):
        raise CompileError(f"{binding.plugin.op}: tensors of {dict(dtypes)}; T of its contract is float16 or bfloat16")


def _function(driver: Any, name: str, code: Code) -> Any:
    """The kernel in the calling thread's context, loaded at its first launch (which no CUDA graph may capture)."""
    key = int(_do("find its context", driver.cuCtxGetCurrent())), name
    if key not in _FUNCTIONS:
        module = _do(f"load kernel {name}", driver.cuModuleLoadData(code.cubin))
        function = _do(f"find kernel {name}", driver.cuModuleGetFunction(module, code.entry.encode()))
        if code.shared > LARGE_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _do(f"set up kernel {name}", driver.cuFuncSetAttribute(function, attribute, code.shared))
        _FUNCTIONS[key] = function
    return _FUNCTIONS[key]


def _driver() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise UnavailableError(
            f"plugins need cuda-python ({error}); install it with `pip install 'cuda-bindings>=13,<14'`"
        ) from None


def _do(what: str, result: tuple[Any, ...]) -> Any:
    if int(result[0]):
        raise EngineError(f"a plugin cannot {what}: CUDA error {int(result[0])}")
    return result[1] if len(result) > 1 else None
