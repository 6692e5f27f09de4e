"""Gated activations: bodies against float64 numpy, kernels in the interpreter for every kind and dtype."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import ort_value
from interpreted import ROUNDING, TORCH, assert_rounds_to8, column_scales, exact, from_bits8, launch, node, poisoned, ref
from onnx import helper

from zoo.graph import IR_VERSION, ONNX_TYPES, OPSET
from zoo.plugins.gated_activation import GATED_ACTIVATION, GATED_ACTIVATION_FP8
from zoo.plugins.gated_activation.cuda import lower

SCALE = 0.021
KINDS = ["silu", "gelu", "gelu_tanh", "relu"]
PLUGINS = {plugin.op: plugin for plugin in (GATED_ACTIVATION, GATED_ACTIVATION_FP8)}


def activation(x: np.ndarray, kind: str) -> np.ndarray:
    """In float64."""
    with np.errstate(over="ignore"):
        if kind == "silu":
            return x / (1 + np.exp(-x))
        if kind == "gelu":
            return x * 0.5 * np.vectorize(math.erfc)(-x / math.sqrt(2))
        if kind == "gelu_tanh":
            return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0)


def product(gate_up: np.ndarray, kind: str) -> np.ndarray:
    gate, up = np.split(gate_up, 2, axis=-1)
    return activation(gate, kind) * up


def values(rows: int, width: int, dtype: str, seed: int = 0) -> torch.Tensor:
    """Normal ones, and a few that saturate the activation on both sides."""
    x = 2 * torch.randn(1, rows, 2 * width, generator=torch.Generator().manual_seed(seed))
    x[0, 0, :6] = torch.tensor([-100.0, 100.0, -12.0, 12.0, 0.0, -0.0])
    return x.to(TORCH[dtype])


def compare(op: str, got: np.ndarray, wanted: np.ndarray, dtype: str) -> None:
    """One rounding, and float32 noise: relative, and 1e-6 of a number near 1 where 1 + erf cancels."""
    if op == "ZooGatedActivationFp8":
        assert_rounds_to8(got, wanted, SCALE, noise=3e-6, floor=1e-6)
    else:
        np.testing.assert_allclose(got, wanted, rtol=1.01 * ROUNDING[dtype] + 2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", PLUGINS)
def test_the_body_is_the_formula(op: str, kind: str) -> None:
    plugin, width = PLUGINS[op], 24
    inputs = [port.name for port in plugin.inputs]
    kinds = ["float32", "float8e4m3" if "Fp8" in op else "float32"]
    given = [helper.make_tensor_value_info("gate_up", 1, [1, "T", 2 * width]), helper.make_tensor_value_info("y_scale", 1, [])]
    made = helper.make_tensor_value_info("y", ONNX_TYPES[kinds[1]], [1, "T", width])
    one = helper.make_node(op, inputs, ["y"], domain="zoo", **plugin.attrs("n", {"kind": KINDS.index(kind)}))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("zoo", 1)]
    graph = helper.make_graph([one], "one", given[: len(inputs)], [made])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[plugin.body])
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    gate_up = values(5, width, "float32")
    feeds = {"gate_up": ort_value(gate_up.numpy()), "y_scale": ort_value(np.array(SCALE, np.float32))}
    (y,) = session.run_with_ort_values(["y"], {name: feeds[name] for name in inputs})
    got = from_bits8(y.numpy()) if "Fp8" in op else y.numpy()
    compare(op, got, product(exact(gate_up), kind), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", PLUGINS)
def test_kernels_in_the_interpreter(op: str, kind: str, dtype: str) -> None:
    """Narrow rows, several in a tile; wide ones, cut into two tiles; one that is no multiple of anything."""
    for rows, width in ((7, 40), (2, 2500), (3, 101)):
        gate_up = values(rows, width, dtype, seed=width)
        refs = [ref("gate_up", dtype, 1, "T", 2 * width), ref("y_scale", "float32")]
        y = ref("y", "float8e4m3" if "Fp8" in op else dtype, 1, "T", width)
        out = poisoned(y, {"T": rows + 1})
        launches = lower(node(op, refs[: len(PLUGINS[op].inputs)], [y], kind=KINDS.index(kind)))
        launch(launches, {"gate_up": gate_up, "y_scale": torch.tensor(SCALE), "y": out}, {"T": rows})
        assert np.isnan(exact(out)[:, rows:]).all()
        compare(op, exact(out)[:, :rows], product(exact(gate_up), kind), dtype)


@pytest.mark.parametrize("op", PLUGINS)
def test_columns_are_scaled_first(op: str) -> None:
    """What a float8 GEMM left to do: the same product of the same numbers."""
    for rows, width in ((7, 40), (2, 2500)):
        scales = column_scales(2 * width)
        gate_up = (values(rows, width, "float32") / scales).to(torch.bfloat16)
        refs = [ref("gate_up", "bfloat16", 1, "T", 2 * width), ref("y_scale", "float32")]
        y = ref("y", "float8e4m3" if "Fp8" in op else "bfloat16", 1, "T", width)
        out = poisoned(y, {"T": rows})
        one = node(op, refs[: len(PLUGINS[op].inputs)], [y], kind=0)
        one = dataclasses.replace(one, scales={0: ref("scales", "float32", 2 * width)})
        launch(lower(one), {"gate_up": gate_up, "y_scale": torch.tensor(SCALE), "scales": scales, "y": out}, {"T": rows})
        compare(op, exact(out), product(exact(gate_up) * exact(scales), "silu"), "bfloat16")


def test_the_grid_covers_the_output() -> None:
    gate_up, y = ref("gate_up", "bfloat16", 1, "T", 2 * 14336), ref("y", "bfloat16", 1, "T", 14336)
    (one,) = lower(node("ZooGatedActivation", [gate_up], [y], kind=0))
    assert [size.at({"T": 5}) for size in one.grid] == [5, 7, 1]
    assert one.args == ("gate_up", "gate_up", "y", y.rows)  # no scales: something stands in their place
