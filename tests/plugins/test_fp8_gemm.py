"""ZooQuantizeFp8 and ZooFp8Gemm: together bit for bit what ZooFp8Linear is; the kernel bit for bit against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from interpreted import TORCH, exact, launch, node, poisoned, ref, round8
from onnx import helper
from onnx.reference import ReferenceEvaluator

from zoo.graph import IR_VERSION, ONNX_TYPES, OPSET
from zoo.plugins import fp8_linear
from zoo.plugins.fp8_gemm import FP8_GEMM, QUANTIZE_FP8
from zoo.plugins.fp8_gemm.cuda import lower

FLOAT8 = ml_dtypes.float8_e4m3fn
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def model_of(dtype: str, weight: np.ndarray, scales: np.ndarray, x_scale: float, whole: bool) -> onnx.ModelProto:
    """x [1, T, K] -> y as one ZooFp8Linear, or in two steps."""
    n, k = weight.shape
    given = [
        helper.make_tensor("w", ONNX_TYPES["float8e4m3"], weight.shape, weight.tobytes(), raw=True),
        helper.make_tensor("ws", ONNX_TYPES["float32"], scales.shape, scales),
        helper.make_tensor("xs", ONNX_TYPES["float32"], (), [x_scale]),
    ]
    plugins = [fp8_linear.PLUGIN] if whole else [QUANTIZE_FP8, FP8_GEMM]
    wires = [(["x", "w", "ws", "xs"], ["y"])] if whole else [(["x", "xs"], ["x8"]), (["x8", "w", "ws", "xs"], ["y"])]
    nodes = [
        helper.make_node(
            plugin.op,
            *wire,
            domain="zoo",
            **plugin.attrs("n", {"to": int(ONNX_TYPES[dtype])} if plugin is FP8_GEMM else {}),
        )
        for plugin, wire in zip(plugins, wires, strict=True)
    ]
    io = [helper.make_tensor_value_info(name, ONNX_TYPES[dtype], [1, "T", size]) for name, size in (("x", k), ("y", n))]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("zoo", 1)]
    graph = helper.make_graph(nodes, "one", io[:1], io[1:], given)
    bodies = [plugin.body for plugin in plugins]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=bodies)
    onnx.checker.check_model(model, full_check=True)
    return model


def operands(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((24, 40)) * 100).astype(FLOAT8)
    return rng.standard_normal((1, 7, 40)).astype(NUMPY[dtype]), weight, rng.uniform(0.001, 0.01, 24).astype(np.float32)


def test_two_steps_are_the_whole_bit_for_bit() -> None:
    x, weight, scales = operands("float32")
    whole, steps = (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for model in (model_of("float32", weight, scales, 0.01, one) for one in (True, False))
    )
    assert np.abs(whole).max() > 1
    np.testing.assert_array_equal(steps, whole)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_steps_are_the_whole_in_half_precision(dtype: str) -> None:
    x, weight, scales = operands(dtype)
    whole, steps = (
        ReferenceEvaluator(model_of(dtype, weight, scales, 0.01, one)).run(None, {"x": x})[0] for one in (True, False)
    )
    assert steps.dtype == NUMPY[dtype]
    np.testing.assert_array_equal(steps.astype(np.float32), whole.astype(np.float32))


def quantize(x: torch.Tensor, scale: float, dtype: str) -> np.ndarray:
    """The kernel's bits for x [1, T, K]."""
    rows, width = x.shape[1:]
    y = ref("y", "float8e4m3", 1, "T", width)
    out = poisoned(y, {"T": rows + 1})
    launches = lower(node("ZooQuantizeFp8", [ref("x", dtype, 1, "T", width), ref("x_scale", "float32")], [y]))
    launch(launches, {"x": x, "x_scale": torch.tensor(scale), "y": out}, {"T": rows})
    assert np.isnan(exact(out)[:, rows:]).all()
    return exact(out)[:, :rows]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 0.037, 3e-4, 700.0, 2.0**-9, 2 - 2.0**-22])
def test_the_kernel_rounds_bit_for_bit(scale: float, dtype: str) -> None:
    """Every float8 value, every middle between two, neighbours of those, subnormals, what saturates, NaN."""
    every = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    middles = (every[1:] + every[:-1]) / 2
    targets = np.concatenate([every, middles]) * np.float32(scale)
    near = [targets, np.nextafter(targets, np.float32(np.inf)), np.nextafter(targets, np.float32(-np.inf))]
    rng = np.random.default_rng(0)
    wild = np.array([1e4, -1e4, 464.0, 465.0, 0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30]) * scale
    values = np.concatenate([*near, rng.standard_normal(4096) * 100 * scale, wild])
    x = torch.from_numpy(np.resize(values.astype(np.float32), (1, 61, 100))).to(TORCH[dtype])
    found, wanted = quantize(x, scale, dtype), round8(exact(x), scale)
    np.testing.assert_array_equal(found, wanted)


def test_the_kernel_divides_as_ieee_does() -> None:
    """A million quotients by a thousand scales, in tiles of several rows."""
    rng = np.random.default_rng(1)
    for scale in np.exp(rng.uniform(-12, 6, 30)).astype(np.float32):
        x = torch.from_numpy((rng.standard_normal((1, 33, 1030)) * 150 * scale).astype(np.float32))
        np.testing.assert_array_equal(quantize(x, float(scale), "float32"), round8(exact(x), float(scale)))


def test_the_contract() -> None:
    assert [port.dtype for port in FP8_GEMM.inputs] == ["float8e4m3", "float8e4m3", "float32", "float32"]
    assert [attribute.name for attribute in FP8_GEMM.attributes] == ["to"] and not QUANTIZE_FP8.attributes
