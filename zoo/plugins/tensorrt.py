"""Zoo ops as plugins of datacenter TensorRT, made from their contracts: NVIDIA's quick plugins (``tensorrt.plugin``).

NOT YET RUN: no engine with these plugins has been built or run by anyone. What is checked, without a GPU: kernels against the
reference bodies in Triton's interpreter; that they compile; and that NVIDIA's own 11.4 bindings, on stand-ins for their
libraries, take the functions below, make plugins of them, and call them as they would (tests/plugins/test_tensorrt_plugins.py).

A quick plugin is a handful of Python functions that TensorRT calls back. Here the contract says what they are:

    register    ports and attributes; shapes and dtypes of outputs; which output shares which input's memory
    autotune    one combination: the network's own dtypes, all layouts linear
    aot_impl    "aot": PTX, grid and int32 arguments as expressions of shapes. The engine holds them and needs no Python
    impl        "jit": at every call, from Python, launches a cubin on TensorRT's stream through cuda-bindings

Both implementations launch the same one kernel a node, without workspace, since "aot" has neither more kernels nor workspace.
Its parameters are the inputs, then sizes as int32, then the outputs: the order in which TensorRT passes them.

TensorRT's table of plugins belongs to the process, and so does the table of kernels here (``register`` adds to it).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import GenericAlias
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import CompileError, UnavailableError
from zoo.plugins.contract import NAMESPACE, Plugin, Port
from zoo.plugins.tensorrt_kernels import CODE, LARGE_SHARED, Binding, Code, check_dtypes, enqueue, find

INSTALL = "install it with `pip install 'engine-zoo[trt]'` (its libraries come from NVIDIA's own package index)"


def bindings() -> dict[str, Binding]:
    """The zoo ops that have a plugin, by op type."""
    from zoo.plugins.fp8_linear.tensorrt import BINDING as FP8_LINEAR
    from zoo.plugins.paged_attention.tensorrt import BINDING as PAGED_ATTENTION

    return {binding.plugin.op: binding for binding in (PAGED_ATTENTION, FP8_LINEAR)}


def load() -> Any:
    """The module ``tensorrt.plugin``; UnavailableError with what to install."""
    try:
        return importlib.import_module("tensorrt.plugin")
    except (ImportError, OSError) as error:
        raise UnavailableError(f"TensorRT's quick plugins cannot be imported ({error}); {INSTALL}") from None


def register(trt: Any, ops: Sequence[str], code: Mapping[str, Code]) -> None:
    """Make plugins of zoo ops known to TensorRT, once a process, and add to the kernels that they are run with.

    To be called before a parser sees their nodes, and before an engine with "jit" plugins is loaded. Which of the two
    implementations a node gets is its attribute ``aot``, which the parser reads.
    """
    trtp = load()
    registry = trt.get_plugin_registry()
    for op in ops:
        binding = bindings()[op]
        assert binding.plugin.version == "1", "a quick plugin's version is always 1"
        if registry.get_creator(op, binding.plugin.version, NAMESPACE) is None:
            trtp.register(binding.plugin_id)(register_function(trt, trtp, binding))
            trtp.autotune(binding.plugin_id)(autotune_function(trt, trtp, binding))
            trtp.aot_impl(binding.plugin_id)(aot_function(trt, trtp, binding))
            trtp.impl(binding.plugin_id)(jit_function(trt, binding))
    CODE.update(code)


def register_function(trt: Any, trtp: Any, binding: Binding) -> Callable[..., Any]:
    """The function for ``tensorrt.plugin.register``: descriptions of the inputs, attributes -> descriptions of the outputs."""
    plugin, types = binding.plugin, _types(trt)

    def describe(*given: Any, **attributes: Any) -> tuple[Any, ...]:
        descs = dict(zip((port.name for port in plugin.inputs), given, strict=True))
        compute = next(descs[port.name].dtype for port in plugin.inputs if port.dtype == "T")
        outputs = []
        for port in plugin.outputs:
            if port.alias:
                desc = descs[port.alias]
                outputs.append(desc.aliased())
            else:
                ranks = {name: len(desc.shape_expr) for name, desc in descs.items()}
                sizes = sizes_of(plugin, port, ranks)
                shape = tuple(size if isinstance(size, int) else descs[size[0]].shape_expr[size[1]] for size in sizes)
                outputs.append(trtp.from_shape_expr(shape, compute if port.dtype == "T" else types[port.dtype]))
        return tuple(outputs)

    # As arrays of one number: the bindings let go of a plain number's memory before TensorRT has read it.
    kinds: dict[type, Any] = {int: NDArray[np.int64], float: NDArray[np.float64]}
    attributes = [(attribute.name, kinds[attribute.type]) for attribute in plugin.attributes]
    inputs = [(port.name, trtp.TensorDesc) for port in plugin.inputs]
    made = GenericAlias(tuple, tuple(trtp.TensorDesc for _ in plugin.outputs))
    return _signed(describe, [*inputs, *attributes], made)


def autotune_function(trt: Any, trtp: Any, binding: Binding) -> Callable[..., Any]:
    """The function for ``tensorrt.plugin.autotune``: a strongly typed network leaves nothing to choose."""
    plugin, names = binding.plugin, _names(trt)
    spelled = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "float8e4m3": "FP8", "int32": "INT32"}

    def offer(*given: Any) -> list[Any]:
        ports = (*plugin.inputs, *plugin.outputs)
        descs = (*given[:-1], *given[-1])
        found = [names[desc.dtype] for desc in descs]
        check_dtypes(binding, dict(zip((port.name for port in ports), found, strict=True)))
        return [trtp.AutoTuneCombination(", ".join(spelled[dtype] for dtype in found), "LINEAR")]

    return _signed(
        offer,
        [(port.name, None) for port in plugin.inputs] + [("outputs", None)],
        GenericAlias(list, (trtp.AutoTuneCombination,)),
    )


def aot_function(trt: Any, trtp: Any, binding: Binding) -> Callable[..., Any]:
    """The function for ``tensorrt.plugin.aot_impl``: the kernel's name, its PTX, its launch, its int32 arguments."""
    plugin, names = binding.plugin, _names(trt)

    def embed(*given: Any) -> tuple[bytes, bytes, Any, Any]:
        count = len(plugin.inputs)
        descs = dict(zip((port.name for port in plugin.inputs), given[:count], strict=True))
        attributes = _numbers(plugin, given[count:-2])
        dtypes = {name: names[desc.dtype] for name, desc in descs.items()}
        dtypes |= {port.name: names[desc.dtype] for port, desc in zip(plugin.outputs, given[-2], strict=True)}
        launched, code = find(binding, attributes, dtypes, {name: tuple(desc.shape) for name, desc in descs.items()})
        if code.shared > LARGE_SHARED:
            raise CompileError(
                f"{plugin.op}: its kernel takes {code.shared:,} bytes of shared memory, and a kernel in a TensorRT engine has "
                f'{LARGE_SHARED:,}; choose the implementation "jit"'
            )
        sizes = binding.measure({name: desc.shape_expr for name, desc in descs.items()})
        x, y, z = launched.grid(sizes)
        launch = trtp.KernelLaunchParams(grid_x=x, grid_y=y, grid_z=z, block_x=32 * code.warps, shared_mem=code.shared)
        return code.entry.encode(), code.ptx, launch, trtp.SymIntExprs.from_tuple([trtp.SymInt32(e) for e in sizes.values()])

    names_of_all = [port.name for port in plugin.inputs] + [attribute.name for attribute in plugin.attributes]
    made = GenericAlias(tuple, (bytes, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))
    return _signed(embed, [(name, None) for name in (*names_of_all, "outputs", "tactic")], made)


def jit_function(trt: Any, binding: Binding) -> Callable[..., Any]:
    """The function for ``tensorrt.plugin.impl``: launches the kernel on TensorRT's stream."""
    plugin, names = binding.plugin, _names(trt)

    def run(*given: Any, stream: int) -> None:
        count = len(plugin.inputs)
        attributes = _numbers(plugin, given[count:-1])
        ports = (*plugin.inputs, *plugin.outputs)
        tensors = dict(zip((port.name for port in ports), (*given[:count], *given[-1]), strict=True))
        dtypes = {name: names[tensor.dtype] for name, tensor in tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        places = {name: int(tensor.data_ptr) for name, tensor in tensors.items()}
        enqueue(binding, attributes, dtypes, shapes, places, stream)

    names_of_all = [port.name for port in plugin.inputs] + [attribute.name for attribute in plugin.attributes]
    return _signed(run, [(name, None) for name in (*names_of_all, "outputs", "stream")], None)


def _numbers(plugin: Plugin, given: Sequence[Any]) -> dict[str, Any]:
    """Attributes by name."""
    return {attribute.name: attribute.type(value[0]) for attribute, value in zip(plugin.attributes, given, strict=True)}


def _types(trt: Any) -> dict[str, Any]:
    return {
        "float32": trt.DataType.FLOAT,
        "float16": trt.DataType.HALF,
        "bfloat16": trt.DataType.BF16,
        "float8e4m3": trt.DataType.FP8,
        "int32": trt.DataType.INT32,
    }


def _names(trt: Any) -> dict[Any, str]:
    return {kind: name for name, kind in _types(trt).items()}


def sizes_of(plugin: Plugin, port: Port, ranks: Mapping[str, int]) -> list[int | tuple[str, int]]:
    """An output's sizes as numbers, or as the (input, axis) that has the same name in the contract."""
    found: list[int | tuple[str, int]] = []
    for size in port.shape:
        if isinstance(size, int):
            found.append(size)
            continue
        source = next(one for one in plugin.inputs if size in one.shape)
        place = source.shape.index(size)
        if size == "...":
            found += [(source.name, axis) for axis in range(ranks[source.name] - len(source.shape) + 1)]
        else:
            behind = len(source.shape) - place
            found.append((source.name, ranks[source.name] - behind))
    return found


def _signed(function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], made: Any) -> Callable[..., Any]:
    """Give a function the signature that TensorRT's decorators read."""
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    given = [inspect.Parameter(name, kind, annotation=empty if type_ is None else type_) for name, type_ in parameters]
    function.__signature__ = inspect.Signature(given, return_annotation=made)  # type: ignore[attr-defined]
    return function
