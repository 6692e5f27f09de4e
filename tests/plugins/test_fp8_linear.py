"""The reference body of ZooFp8Linear: bit for bit against numpy and ml_dtypes, in half precision, and seen by TensorRT-RTX."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from zoo.graph import IR_VERSION, ONNX_TYPES, OPSET
from zoo.plugins.contract import NAMESPACE
from zoo.plugins.fp8_linear import PLUGIN

FLOAT8 = ml_dtypes.float8_e4m3fn
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def model_of(dtype: str, weight: np.ndarray, scales: np.ndarray, x_scale: float) -> onnx.ModelProto:
    """One node, its weights as initializers, its body as a function; x is [1, T, K]."""
    n, k = weight.shape
    given = [
        helper.make_tensor("w", ONNX_TYPES["float8e4m3"], weight.shape, weight.tobytes(), raw=True),
        helper.make_tensor("ws", ONNX_TYPES["float32"], scales.shape, scales.astype(np.float32)),
        helper.make_tensor("xs", ONNX_TYPES["float32"], (), [x_scale]),
    ]
    node = helper.make_node(
        PLUGIN.op, ["x", "w", "ws", "xs"], ["y"], domain="zoo", plugin_namespace=NAMESPACE, plugin_version=PLUGIN.version
    )
    io = [helper.make_tensor_value_info(name, ONNX_TYPES[dtype], [1, "T", size]) for name, size in (("x", k), ("y", n))]
    graph = helper.make_graph([node], "one", io[:1], io[1:], given)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("zoo", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[PLUGIN.body])
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def round8(x: np.ndarray, scale: float) -> np.ndarray:
    """float8 values as float32: divide in float32, clamp, round to nearest even."""
    return np.clip(x.astype(np.float32) / np.float32(scale), -448, 448).astype(FLOAT8).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 0.037, 3e-4, 700.0])
def test_activations_round_bit_for_bit(scale: float) -> None:
    """An identity weight shows the dequantized activation itself: ties, subnormals, signed zeros, values beyond the range."""
    every = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    middles = (every[1:] + every[:-1]) / 2  # exact ties
    rng = np.random.default_rng(0)
    values = np.concatenate([every, middles, rng.standard_normal(512) * 100, [1e4, -1e4, 464.0, 465.0, 0.0, -0.0]])
    x = np.resize((values * scale).astype(np.float32), (1, 70, 16))
    model = model_of("float32", np.eye(16, dtype=np.float32).astype(FLOAT8), np.ones(16), scale)
    np.testing.assert_array_equal(run(model, x), round8(x, scale) * np.float32(scale))


def test_rows_have_their_own_scales() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((24, 40)).astype(np.float32) * np.exp(rng.standard_normal((24, 1)) * 2).astype(np.float32)
    scales = np.abs(weight).max(axis=1) / np.float32(448)
    stored = np.clip(weight / scales[:, None], -448, 448).astype(FLOAT8)
    x = rng.standard_normal((1, 7, 40)).astype(np.float32)
    got = run(model_of("float32", stored, scales, 0.01), x)
    x8, w8 = round8(x, 0.01).astype(np.float64), stored.astype(np.float64)
    wanted = (x8 @ w8.T) * np.float64(np.float32(0.01)) * scales.astype(np.float64)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.05  # the rounding of two operands to 4 significant bits, averaged over 40 products


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-9), ("bfloat16", 2**-6)])
def test_lower_precision_is_the_same_arithmetic(dtype: str, tolerance: float) -> None:
    """ONNX's own evaluator runs the body in half precision; it may differ by a few roundings of the dtype."""
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((8, 32)) * 100).astype(FLOAT8)
    scales, x_scale = rng.uniform(0.001, 0.01, 8).astype(np.float32), 0.02
    x = rng.standard_normal((1, 5, 32)).astype(TYPES[dtype])
    got = ReferenceEvaluator(model_of(dtype, weight, scales, x_scale)).run(None, {"x": x})[0]
    assert got.dtype == TYPES[dtype]
    wanted = run(model_of("float32", weight, scales, x_scale), x.astype(np.float32))
    np.testing.assert_allclose(got.astype(np.float32), wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)


def test_the_contract_and_the_body_agree() -> None:
    assert [port.name for port in PLUGIN.inputs] == list(PLUGIN.body.input) == ["x", "weight", "weight_scale", "x_scale"]
    assert [port.dtype for port in PLUGIN.inputs] == ["T", "float8e4m3", "float32", "float32"]
    assert not [node for node in PLUGIN.body.node if node.op_type == "Constant"]  # scales are inputs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensorrt_rtx_makes_one_fp8_gemm_of_it(dtype: str) -> None:
    """Built for SM 8.9 without a GPU: the layer list of the plan says which operands the GEMM reads."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is an extra (rtx) of the package")
    k, n = 256, 512
    weight = np.random.default_rng(3).standard_normal((n, k)).astype(FLOAT8)
    model = onnx.inliner.inline_local_functions(model_of(dtype, weight, np.full(n, 0.01), 0.02))
    messages: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: object, message: str) -> None:
            messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, k), (1, 16, k), (1, 64, k))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    (layers,) = [message for message in messages if message.startswith("Layers:")]
    (gemm,) = [line for line in layers.splitlines() if "LayerType: gemm" in line]
    operands, results = gemm.split("Outputs:")
    assert operands.count("Datatype: FP8") == 2
    assert "Datatype: Float" in results  # unscaled sums stay in float32: in float16 they would overflow
