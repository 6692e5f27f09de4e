"""RMS norm zoo ops: bodies against float64 numpy and the separate nodes, kernels in the interpreter, launches."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import ort_value
from interpreted import ROUNDING, TORCH, assert_rounds_to8, column_scales, exact, from_bits8, launch, node, poisoned, ref
from onnx import helper

from zoo.errors import CompileError
from zoo.graph import IR_VERSION, ONNX_TYPES, OPSET
from zoo.plugins.contract import Plugin
from zoo.plugins.rms_norm import ADD_RMS_NORM, ADD_RMS_NORM_FP8, RMS_NORM_FP8
from zoo.plugins.rms_norm.cuda import lower

EPSILON, SCALE = 1e-5, 0.0123
PLUGINS = {plugin.op: plugin for plugin in (RMS_NORM_FP8, ADD_RMS_NORM, ADD_RMS_NORM_FP8)}
OPS = ["RMSNormalization", *PLUGINS]
DTYPES = ["float32", "float16", "bfloat16"]


def names(op: str) -> tuple[list[str], list[str]]:
    inputs = ["x", *(["residual"] if "Add" in op else []), "weight", *(["y_scale"] if "Fp8" in op else [])]
    return inputs, ["sum", "y"] if "Add" in op else ["y"]


def arrays(op: str, rows: int, width: int, dtype: str, seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x, residual = (3 * torch.randn(1, rows, width, generator=rng) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(width, generator=rng)
    given = {name: value.to(TORCH[dtype]) for name, value in (("x", x), ("residual", residual), ("weight", weight))}
    given["y_scale"] = torch.tensor(SCALE)
    return {name: given[name] for name in names(op)[0]}


def wanted(given: dict[str, torch.Tensor], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """sum and norm in float64; the sum is rounded to its dtype first."""
    total = given["x"]
    if "residual" in given:
        total = (given["x"].float() + given["residual"].float()).to(TORCH[dtype])
    x = exact(total)
    return x, x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * exact(given["weight"])


def session(plugin: Plugin, width: int) -> onnxruntime.InferenceSession:
    """One node with its body, in float32."""
    inputs, outputs = names(plugin.op)
    shapes = {"weight": [width], "y_scale": []}
    given = [helper.make_tensor_value_info(name, ONNX_TYPES["float32"], shapes.get(name, [1, "T", width])) for name in inputs]
    kind = {"y": "float8e4m3" if "Fp8" in plugin.op else "float32"}
    made = [helper.make_tensor_value_info(n, ONNX_TYPES[kind.get(n, "float32")], [1, "T", width]) for n in outputs]
    one = helper.make_node(plugin.op, inputs, outputs, domain="zoo", **plugin.attrs("n", {"epsilon": EPSILON}))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("zoo", 1)]
    graph = helper.make_graph([one], "one", given, made)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[plugin.body])
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("op", PLUGINS)
def test_the_body_is_the_formula(op: str) -> None:
    given = arrays(op, 5, 48, "float32", 0)
    feeds = {name: ort_value(value.numpy()) for name, value in given.items()}
    values = session(PLUGINS[op], 48).run_with_ort_values(names(op)[1], feeds)
    total, normed = wanted(given, "float32")
    *sums, y = (value.numpy() for value in values)
    for got in sums:
        np.testing.assert_array_equal(got, total)
    if "Fp8" in op:
        assert_rounds_to8(from_bits8(y), normed, SCALE)
    else:
        np.testing.assert_allclose(y, normed, rtol=2e-6, atol=0)


def run(op: str, rows: int, width: int, dtype: str, seed: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The kernel's inputs and outputs; one more row behind the outputs must stay as it was."""
    inputs, outputs = names(op)
    given = arrays(op, rows, width, dtype, seed)
    shapes = {"weight": (width,), "y_scale": ()}
    refs = [ref(n, "float32" if n == "y_scale" else dtype, *shapes.get(n, (1, "T", width))) for n in inputs]
    kinds = {"y": "float8e4m3" if "Fp8" in op else dtype, "sum": dtype}
    made = {n: poisoned(ref(n, kinds[n], 1, "T", width), {"T": rows + 1}) for n in outputs}
    axis = {"axis": -1} if op == "RMSNormalization" else {}
    launches = lower(node(op, refs, [ref(n, kinds[n], 1, "T", width) for n in outputs], epsilon=EPSILON, **axis))
    launch(launches, given | made, {"T": rows})
    for name in outputs:
        assert np.isnan(exact(made[name])[:, rows:]).all()
        made[name] = made[name][:, :rows]
    return given, made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (9, 100), (2, 1030)])
@pytest.mark.parametrize("op", OPS)
def test_kernels_in_the_interpreter(op: str, rows: int, width: int, dtype: str) -> None:
    """Several rows a program, widths that are no power of two, more than one warp's columns."""
    given, made = run(op, rows, width, dtype)
    total, normed = wanted(given, dtype)
    if "sum" in made:
        np.testing.assert_array_equal(exact(made["sum"]), total)
    if "Fp8" in op:
        assert_rounds_to8(exact(made["y"]), normed, SCALE)
    else:  # one rounding to the dtype, and float32 noise
        np.testing.assert_allclose(exact(made["y"]), normed, rtol=1.01 * ROUNDING[dtype] + 2e-6, atol=1e-7)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (9, 100), (2, 1030)])
@pytest.mark.parametrize("op", ["ZooAddRmsNorm", "ZooAddRmsNormFp8"])
def test_columns_are_scaled_first(op: str, rows: int, width: int, place: int) -> None:
    """What a float8 GEMM left to do, of either side of the sum, which is rounded once."""
    given = arrays(op, rows, width, "bfloat16", 2)
    scales, name = column_scales(width), ("x", "residual")[place]
    given[name] = (given[name].float() / scales).to(torch.bfloat16)
    inputs, _ = names(op)
    shapes = {"weight": (width,), "y_scale": ()}
    refs = [ref(n, "float32" if n == "y_scale" else "bfloat16", *shapes.get(n, (1, "T", width))) for n in inputs]
    made = [ref("sum", "bfloat16", 1, "T", width), ref("y", "float8e4m3" if "Fp8" in op else "bfloat16", 1, "T", width)]
    out = {one.name: poisoned(one, {"T": rows}) for one in made}
    one = dataclasses.replace(node(op, refs, made, epsilon=EPSILON), scales={place: ref("scales", "float32", width)})
    launch(lower(one), given | out | {"scales": scales}, {"T": rows})
    total, normed = wanted(given | {name: given[name].float() * scales}, "bfloat16")
    np.testing.assert_array_equal(exact(out["sum"]), total)
    if "Fp8" in op:
        assert_rounds_to8(exact(out["y"]), normed, SCALE)
    else:
        np.testing.assert_allclose(exact(out["y"]), normed, rtol=1.01 * 2**-8 + 2e-6, atol=1e-7)


def test_a_row_of_zeros_and_large_values() -> None:
    given = {"x": torch.tensor([[[0.0] * 64, [1e15] * 64]]), "weight": torch.ones(64)}
    y = torch.full((1, 2, 64), float("nan"))
    refs = [ref("x", "float32", 1, "T", 64), ref("weight", "float32", 64)]
    launch(lower(node("RMSNormalization", refs, [ref("y", "float32", 1, "T", 64)])), given | {"y": y}, {"T": 2})
    assert (y[0, 0] == 0).all() and torch.allclose(y[0, 1], torch.ones(64), rtol=1e-6)


@pytest.mark.parametrize(("width", "height", "warps"), [(64, 16, 4), (1000, 1, 4), (4096, 1, 8), (8192, 1, 16), (28672, 1, 32)])
def test_tiles(width: int, height: int, warps: int) -> None:
    x = ref("x", "bfloat16", 1, "T", width)
    (one,) = lower(node("RMSNormalization", [x, ref("w", "bfloat16", width)], [x], epsilon=EPSILON))
    constants = dict(one.kernel.constants)
    assert (constants["ROWS"], one.kernel.num_warps) == (height, warps)
    assert [size.at({"T": 33}) for size in one.grid] == [-(-33 // height), 1, 1]


def test_a_row_that_is_too_wide_is_refused() -> None:
    x = ref("x", "bfloat16", 1, "T", 40000)
    with pytest.raises(CompileError, match=r"the.RMSNormalization: RMSNormalization over 40000 columns.*up to 32768"):
        lower(node("RMSNormalization", [x, ref("w", "bfloat16", 40000)], [x]))
