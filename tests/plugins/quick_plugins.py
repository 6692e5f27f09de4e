"""NVIDIA's own TensorRT 11.4 bindings, on stand-ins for their libraries, carry our quick plugins as far as Python goes.

Run in a process of its own, with a folder that ``pipelines/tensorrt_api.py`` put the bindings into (LD_LIBRARY_PATH names it,
too) and one for kernels. NVIDIA's: checking and keeping the functions, making plugins from a node's attributes, and calling the
functions as the library would. Stand-ins: the registry; expressions of shapes, which are numbers here; and the CUDA driver,
which carries launches out in Triton's interpreter on arrays whose addresses the plugins get. Prints one JSON object of findings.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

folder, kernels = (Path(path) for path in sys.argv[1:3])
sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
sys.path.insert(0, str(folder))
import tensorrt_bindings as trt  # noqa: E402

sys.modules["tensorrt"] = trt  # the package of that name only hands the bindings on

import numpy as np  # noqa: E402
import torch  # noqa: E402
from one_op import FLOAT8, body_session, run_body, run_kernels, tensor  # noqa: E402
from test_tensorrt_kernels import SHAPES, STEPS, arrays_of, operands, ragged  # noqa: E402

from zoo.compilers.tensorrt_kernels import compile_plugins  # noqa: E402
from zoo.plugins.kernels import Kernel, Launch, fixed  # noqa: E402
from zoo.plugins.tensorrt import bindings, register  # noqa: E402
from zoo.plugins.tensorrt_kernels import CODE, Binding, read_code  # noqa: E402

TYPES = {
    torch.float16: trt.DataType.HALF,
    torch.bfloat16: trt.DataType.BF16,
    torch.float32: trt.DataType.FLOAT,
    torch.float8_e4m3fn: trt.DataType.FP8,
    torch.int32: trt.DataType.INT32,
}
SHAPE = SHAPES["window-softcap"]
FINDINGS: dict[str, Any] = {}


class Registry:
    """The process-wide table, which the library keeps."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


class Expr:
    """A dimension's expression, of which only the value is kept, and whether the network fixes it."""

    def __init__(self, value: int, constant: bool = True) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value


class Builder:
    """``IExprBuilder``."""

    def constant(self, value: int) -> Expr:
        return Expr(value)

    def operation(self, kind: Any, first: Expr, second: Expr) -> Expr:
        a, b = first.value, second.value
        found = {"SUM": a + b, "SUB": a - b, "PROD": a * b, "FLOOR_DIV": a // b if b else 0}[kind.name]
        return Expr(found, first.constant and second.constant)


class SymExpr:
    """``ISymExpr``, which only takes the library's own expressions."""

    def __init__(self) -> None:
        self.expr: Any = None


class Driver:
    """``cuda.bindings.driver``: a function is a kernel, carried out in the interpreter on the arrays at the given addresses."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        self.memory: dict[int, torch.Tensor] = {}
        self.kernels: dict[str, Kernel] = {}
        self.calls: list[tuple[Any, ...]] = []

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, 1

    def cuModuleLoadData(self, image: bytes) -> tuple[int, str]:
        (name,) = [name for name, code in CODE.items() if code.cubin == image]
        return 0, name

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, str]:
        assert CODE[module].entry.encode() == name
        return 0, module

    def cuFuncSetAttribute(self, function: str, attribute: int, value: int) -> tuple[int]:
        return (0,)

    def cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        assert size == self.memory[to].nbytes == self.memory[source].nbytes and stream == 7
        self.memory[to].copy_(self.memory[source])
        self.calls.append(("copy", size))
        return (0,)

    def cuLaunchKernel(self, function: str, *rest: Any) -> tuple[int]:
        *sides, threads, y, z, shared, stream, place, extra = rest
        kernel, code = self.kernels[function], CODE[function]
        assert (threads, y, z, shared, stream, extra) == (32 * code.warps, 1, 1, code.shared, 7, 0)
        count = len(kernel.args) + code.hidden
        pointers = (ctypes.c_void_p * count).from_address(place)
        tensors, args = {}, []
        for (name, kind), cell in zip(kernel.args, pointers, strict=False):
            if kind.startswith("*"):
                tensors[name] = self.memory[ctypes.c_uint64.from_address(cell).value]
                args.append(name)
            else:
                args.append(fixed(ctypes.c_int32.from_address(cell).value))
        assert all(ctypes.c_uint64.from_address(cell).value == 0 for cell in pointers[len(kernel.args) :])
        grid = tuple(fixed(side) for side in sides)
        run_kernels(lambda node: [Launch(kernel, grid, tuple(args))], None, tensors, {})
        self.calls.append(("launch", *sides))
        return (0,)


def fields(binding: Binding, attributes: dict[str, Any], keep: list[Any]) -> Any:
    """As the ONNX parser hands attributes over: int64 and float32. A field does not keep its data; ``keep`` does."""
    known = binding.plugin.attrs("n", attributes)
    made = []
    for attribute in binding.plugin.attributes:
        whole = attribute.type is int
        keep.append(np.array([known[attribute.name]], np.int64 if whole else np.float32))
        made.append(trt.PluginField(attribute.name, keep[-1], getattr(trt.PluginFieldType, "INT64" if whole else "FLOAT32")))
    return trt.PluginFieldCollection(made)


def variable(one: torch.Tensor) -> list[bool]:
    """Which sizes of a tensor a step decides: all of tables, the middle one of [1, T, width]."""
    return [one.dtype == torch.int32 or (one.dim() == 3 and axis == 1) for axis in range(one.dim())]


def described(one: torch.Tensor) -> Any:
    """``PluginTensorDesc``, of a tensor at run time."""
    desc = trt.PluginTensorDesc()
    desc.dims, desc.type, desc.format = tuple(one.shape), TYPES[one.dtype], trt.TensorFormat.LINEAR
    return desc


def ranged(one: torch.Tensor) -> Any:
    """``DynamicPluginTensorDesc``, of a tensor of the network, whose variable sizes are -1."""
    whole, desc = trt.DynamicPluginTensorDesc(), described(one)
    desc.dims = tuple(-1 if free else size for size, free in zip(one.shape, variable(one), strict=True))
    whole.desc = desc
    return whole


def expressions(one: torch.Tensor) -> list[Expr]:
    return [Expr(size, not free) for size, free in zip(one.shape, variable(one), strict=True)]


def strides(tensors: list[torch.Tensor]) -> list[Any]:
    return [one.stride() for one in tensors]


def as_built(binding: Binding, attributes: dict[str, Any], tensors: dict[str, torch.Tensor], request: str) -> tuple[Any, Any]:
    """A plugin as the builder takes it: from a node's fields, asked for dtypes, aliases, shapes and formats."""
    op = binding.plugin.op
    creator = trt.get_plugin_registry().get_creator(op, "1", "zoo")
    names = [field.name for field in creator.field_names]
    assert names == [attribute.name for attribute in binding.plugin.attributes]
    keep: list[Any] = []
    plugin = creator.create_plugin(
        op, "zoo", fields(binding, attributes, keep), trt.TensorRTPhase.BUILD, getattr(trt.QuickPluginCreationRequest, request)
    )
    given, made = ([tensors[port.name] for port in ports] for ports in (binding.plugin.inputs, binding.plugin.outputs))
    dtypes = plugin.get_output_data_types([TYPES[one.dtype] for one in given], [one.dim() for one in given])
    assert list(dtypes) == [TYPES[one.dtype] for one in made] and plugin.get_num_outputs() == len(made)
    aliases = [plugin.get_aliased_input(place) for place in range(len(made))]
    shapes = plugin.get_output_shapes([expressions(one) for one in given], [], Builder())
    assert [[size.value for size in shape] for shape in shapes] == [list(one.shape) for one in made]
    combination = plugin.get_supported_format_combinations([ranged(one) for one in (*given, *made)], len(given))
    assert [one.type for one in combination] == [TYPES[one.dtype] for one in (*given, *made)]
    assert {one.format for one in combination} == {trt.TensorFormat.LINEAR}
    plugin.configure_plugin([ranged(one) for one in given], [ranged(one) for one in made])
    assert plugin.get_valid_tactics() == []
    return plugin, aliases


def launch_of(plugin: Any, binding: Binding, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What an "aot" plugin hands over for the engine."""
    given, made = ([tensors[port.name] for port in ports] for ports in (binding.plugin.inputs, binding.plugin.outputs))
    plugin.set_tactic(0)
    params, extra = SimpleNamespace(), {}
    setter = type(
        "Setter", (), {"__setitem__": lambda self, place, value: extra.update({place: value.expr.value})}
    )()  # ISymExprs
    plugin.get_launch_params([], [ranged(one) for one in (*given, *made)], len(given), params, setter, Builder())
    name, ptx = plugin.get_kernel([described(one) for one in given], [described(one) for one in made])
    assert setter.nbSymExprs == len(extra)
    return {
        "entry": name.decode(),
        "parameters": ptx.decode().partition(f".entry {name.decode()}(")[2].partition(")")[0].count(".param"),
        "grid": [params.grid_x.expr.value, params.grid_y.expr.value, params.grid_z.expr.value],
        "block": [params.block_x.expr.value, params.block_y.expr.value, params.block_z.expr.value],
        "shared": params.shared_mem.expr.value,
        "scalars": [extra[place] for place in sorted(extra)],
    }


def run(plugin: Any, binding: Binding, tensors: dict[str, torch.Tensor], driver: Driver) -> None:
    """One call, as the library makes it; the deserialized plugin gets the fields that the built one gave."""
    op = binding.plugin.op
    creator = trt.get_plugin_registry().get_creator(op, "1", "zoo")
    again = creator.create_plugin(op, "zoo", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    given, made = ([tensors[port.name] for port in ports] for ports in (binding.plugin.inputs, binding.plugin.outputs))
    driver.memory = {one.data_ptr(): one for one in (*given, *made)}
    descs = [described(one) for one in given], [described(one) for one in made]
    places = [one.data_ptr() for one in given], [one.data_ptr() for one in made]
    again.clone().enqueue(*descs, *places, strides(given), strides(made), 7)


def attention(dtype: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, np.ndarray]]:
    binding = bindings()["ZooPagedAttention"]
    given = arrays_of(SHAPE, ragged(*STEPS["mixture"], SHAPE.block_size, seed=1))
    tensors = {name: tensor(array, "int32" if array.dtype == np.int32 else dtype) for name, array in given.items()}
    rounded = {name: one.float().numpy() if one.is_floating_point() else one.numpy() for name, one in tensors.items()}
    want = run_body(body_session(binding.plugin, **SHAPE.attributes), rounded)
    tensors["out"] = torch.full(tensors["q"].shape, float("nan"), dtype=tensors["q"].dtype)
    return SHAPE.attributes, tensors, want


def distance(found: torch.Tensor, expected: np.ndarray) -> float:
    """The largest error as a part of the largest value; NaN in ``found`` gives NaN."""
    return float(np.abs(found.float().numpy() - expected).max() / np.abs(expected).max())


def main() -> None:
    registry, driver = Registry(), Driver()
    FINDINGS["registry"] = trt.get_plugin_registry() is None  # the stand-in for the library has none
    trt.get_plugin_registry = lambda: registry
    trt.IDimensionExpr, trt.DimsExprs, trt.ISymExpr = Expr, lambda count: [None] * count, SymExpr
    cuda = importlib.import_module("cuda.bindings")
    sys.modules["cuda.bindings.driver"] = cuda.driver = driver

    attributes, tensors, want = attention("bfloat16")
    paged, linear = (bindings()[op] for op in ("ZooPagedAttention", "ZooFp8Linear"))
    product = operands(70, 200, 112, "float16")
    made = [
        paged.launch(attributes, paged.dtypes("bfloat16"), {}).kernel,
        linear.launch({}, linear.dtypes("float16"), {"weight": (200, 112)}).kernel,
    ]
    compile_plugins({kernel.name: kernel for kernel in made}, 90, kernels)
    driver.kernels = {kernel.name: kernel for kernel in made}
    for _ in range(2):  # the second time everything is known
        register(trt, list(bindings()), read_code(kernels))
    FINDINGS["creators"] = sorted(registry.creators)

    # A pool apart from kv_out is copied first; a pool that is kv_out is not.
    for apart in (True, False):
        driver.calls.clear()
        mine = {name: one.clone() for name, one in tensors.items()}
        mine["kv_out"] = torch.full_like(mine["kv"], float("nan")) if apart else mine["kv"]
        plugin, aliases = as_built(paged, attributes, mine, "STRICT_JIT")
        run(plugin, paged, mine, driver)
        pool = np.array_equal(mine["kv_out"].float().numpy()[1:], want["kv_out"][1:], equal_nan=True)
        FINDINGS["apart" if apart else "in place"] = {
            "aliases": aliases,
            "error": distance(mine["out"], want["out"]),
            "pool": pool,
            "calls": list(driver.calls),
            "kind": type(plugin).__name__,
        }

    mine = dict(tensors, kv_out=tensors["kv"])
    plugin, _ = as_built(paged, attributes, mine, "STRICT_AOT")
    FINDINGS["aot attention"] = launch_of(plugin, paged, mine) | {"kind": type(plugin).__name__}

    plugin, aliases = as_built(linear, {}, product, "STRICT_JIT")
    run(plugin, linear, product, driver)
    given = {name: product[name].float().numpy() for name in ("weight_scale", "x_scale")} | {"x": product["x"][0].float().numpy()}
    given["weight"] = product["weight"].view(torch.uint8).numpy().view(FLOAT8)
    expected = run_body(body_session(linear.plugin), given)["y"]
    FINDINGS["linear"] = {"aliases": aliases, "error": distance(product["y"][0], expected), "calls": driver.calls[-1:]}
    plugin, _ = as_built(linear, {}, product, "STRICT_AOT")
    FINDINGS["aot linear"] = launch_of(plugin, linear, product)

    wrong = {name: one.float() if one.dtype == torch.bfloat16 else one for name, one in mine.items()}
    try:
        as_built(paged, attributes, wrong, "STRICT_JIT")
    except Exception as error:
        FINDINGS["float32"] = f"{type(error).__name__}: {error}"
    print(json.dumps(FINDINGS))


if __name__ == "__main__":
    main()
