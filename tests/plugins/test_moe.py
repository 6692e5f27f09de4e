"""Experts: the body against torch in float64, lowerings against the body, kernels in the interpreter against torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from interpreted import ROUNDING
from moe_ops import KINDS, Array, cuda_node, experts_reference, random_experts, run_kernels
from one_op import body_session, run_body
from onnx import helper

from zoo.compilers.cuda.lowers import LOWERS
from zoo.errors import CompileError
from zoo.graph import IR_VERSION, ONNX_TYPES, OPSET
from zoo.plugins.contract import Plugin
from zoo.plugins.gated_activation import GELU, GELU_TANH, RELU, SILU
from zoo.plugins.moe import EXPERTS, PLUGINS, RELU2, SIGMOID, SWIGLU_CLAMPED, TOP2, cuda
from zoo.plugins.moe.experts import takes_turns
from zoo.weights.reader import NUMPY

# name -> tokens, experts, chosen, how choices spread
SPREADS = {
    "one-token": (1, 6, 2, "any"),
    "some": (7, 5, 3, "any"),
    "all-to-the-last": (9, 4, 2, "same"),
    "experts-without-tokens": (9, 8, 2, "two"),
    "every-expert": (3, 4, 4, "any"),
    "one-expert": (3, 1, 1, "any"),
    "more-tiles-than-a-group": (24, 12, 4, "any"),
}


def lowered(plugin: Plugin, lowering: str, given: Mapping[str, Array], **attrs: Any) -> Array:
    """A node in a target's form, in ONNX Runtime."""
    function = plugin.lowerings[lowering].function(attrs)
    onnx.checker.check_function(function)
    node = helper.make_node(function.name, list(function.input), ["y"], domain="zoo", **plugin.attrs("n", attrs))
    infos = [
        helper.make_tensor_value_info(name, ONNX_TYPES[str(given[name].dtype)], [None] * given[name].ndim)
        for name in function.input
    ]
    graph = helper.make_graph([node], "one", infos, [helper.make_tensor_value_info("y", 1, [None, None])])
    opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in ("zoo", "com.microsoft"))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[function])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(
        None, {name: woven(given, attrs)[name] if lowering == "chosen" else given[name] for name in function.input}
    )
    return y


def woven(given: Mapping[str, Array], attrs: Mapping[str, Any]) -> dict[str, Array]:
    """Rows of gate and up in turns, where the function wants them so."""
    made = dict(given)
    for name in {"gate_up", "gate_up_bias"} & set(given) if takes_turns(attrs) else ():
        first, second = np.split(given[name], 2, axis=1)
        made[name] = np.stack([first, second], axis=2).reshape(given[name].shape)
    return made


def close(found: Array, wanted: Array, tolerance: float) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize("op", PLUGINS)
def test_bodies_are_valid_functions_of_standard_ops(op: str) -> None:
    body = PLUGINS[op].body
    onnx.checker.check_function(body)
    assert PLUGINS[op].op == op and [entry.domain for entry in body.opset_import] == [""]
    assert set(body.attribute) == {attribute.name for attribute in PLUGINS[op].attributes} | {
        "plugin_namespace",
        "plugin_version",
    }


def test_launches_are_those_of_the_contract() -> None:
    assert {op: tuple(port.name for port in plugin.inputs) for op, plugin in PLUGINS.items()} == cuda.INPUTS
    assert set(cuda.LOWERS) == set(PLUGINS) <= set(LOWERS)
    assert (cuda.SIGMOID, cuda.TOP2) == (SIGMOID, TOP2)


def test_kinds_continue_those_of_gates() -> None:
    assert tuple(range(len(KINDS))) == (SILU, GELU, GELU_TANH, RELU, RELU2, SWIGLU_CLAMPED)


@pytest.mark.parametrize("bias", [False, True])
def test_the_body_is_the_formula(bias: bool) -> None:
    for kind, name in enumerate(KINDS):
        session = body_session(EXPERTS[bias], kind=kind, top_k=3)
        given = random_experts(7, 5, 3, bias=bias, seed=kind)
        given["gate_up"] *= 4  # beyond what gpt-oss cuts
        close(run_body(session, given)["y"], experts_reference(name, given), 1e-6)


@pytest.mark.parametrize("lowering", ["dense", "chosen"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_lowerings_are_the_body(kind: int, bias: bool, lowering: str) -> None:
    for tokens, experts, top_k, spread in SPREADS.values():
        given = random_experts(tokens, experts, top_k, bias=bias, seed=tokens, spread=spread)
        body = run_body(body_session(EXPERTS[bias], kind=kind, top_k=top_k), given)["y"]
        close(lowered(EXPERTS[bias], lowering, given, kind=kind, top_k=top_k), body, 2e-6)


@pytest.mark.parametrize("lowering", ["body", "dense", "chosen", "kernels"])
@pytest.mark.parametrize("kind", [SILU, GELU])
def test_what_nobody_chose_does_not_count(lowering: str, kind: int) -> None:
    """Experts that nobody chose are full of NaN; one token is, too, and what it gives is its own."""
    tokens, experts, top_k = 5, 6, 2
    given = random_experts(tokens, experts, top_k, spread="two")
    given["chosen"][:] = [0, 3]
    unused = [1, 2, 4, 5]
    given["gate_up"][unused] = given["down"][unused] = np.nan
    wanted = experts_reference(KINDS[kind], given)
    given["x"][2] = given["weights"][2] = np.nan
    if lowering == "body":
        found = run_body(body_session(EXPERTS[False], kind=kind, top_k=top_k), given)["y"]
    elif lowering == "kernels":
        node = cuda_node(EXPERTS[False], given, "float32", {"y": given["x"].shape}, kind=kind, top_k=top_k)
        found = run_kernels(node, given, {"y": given["x"].shape})["y"]
    else:
        found = lowered(EXPERTS[False], lowering, given, kind=kind, top_k=top_k)
    others = np.arange(tokens) != 2
    assert np.isnan(found[2]).all()
    close(found[others], wanted[others], 2e-6)


def rounded(given: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """Numbers that the dtype has, as float32."""
    kept = ("chosen", "weights")
    return {name: array if name in kept else array.astype(NUMPY[dtype]).astype(np.float32) for name, array in given.items()}


def kernels(given: Mapping[str, Array], dtype: str, kind: int, fill: int = 0xFF, **tuning: Any) -> Array:
    plugin, shape = EXPERTS["down_bias" in given], {"y": given["x"].shape}
    node = cuda_node(plugin, given, dtype, shape, kind=kind, top_k=given["chosen"].shape[1])
    return run_kernels(dataclasses.replace(node, tuning=tuning), given, shape, fill)["y"].astype(np.float64)


def assert_right(found: Array, given: Mapping[str, Array], dtype: str, kind: int) -> None:
    """One rounding each of h, of what an expert gives and of y, and the noise of float32 sums."""
    bound = (3 * ROUNDING[dtype] + 1e-6) * experts_reference(KINDS[kind], given, sizes=True)
    error = np.abs(found - experts_reference(KINDS[kind], given))
    assert (error <= bound).all(), f"{(error / bound).max()} of the bound"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program has several tiles, the sort several chunks, a chunk several parts."""
    monkeypatch.setattr(cuda, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(cuda, "CHUNK", 16)
    monkeypatch.setattr(cuda, "PART", 4)
    monkeypatch.setattr(cuda, "CHUNKS", 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("spread", SPREADS)
def test_kernels_in_the_interpreter(spread: str, dtype: str) -> None:
    """Sizes that no block divides; with biases and gpt-oss's gate, and without."""
    tokens, experts, top_k, choice = SPREADS[spread]
    for bias, kind in ((False, SILU), (True, SWIGLU_CLAMPED)):
        given = rounded(random_experts(tokens, experts, top_k, 72, 40, bias, seed=tokens, spread=choice), dtype)
        assert_right(kernels(given, dtype, kind), given, dtype, kind)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_every_gate_in_the_interpreter(kind: int) -> None:
    given = random_experts(6, 4, 2, seed=kind)
    given["gate_up"] *= 4
    assert_right(kernels(given, "float32", kind), given, "float32", kind)


def test_many_pairs_have_tiles_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past FEW_PAIRS an expert: full tiles, one that is not, and an expert without any; whole and broken columns."""
    monkeypatch.setattr(cuda, "CHUNK", 64)
    monkeypatch.setattr(cuda, "PART", 32)
    small = {"experts_many": [32, 64, 128, 64, 2]}
    for size, inner, tuning in ((64, 64, {}), (72, 130, small)):
        given = rounded(random_experts(50, 3, 2, size, inner, seed=inner), "bfloat16")
        given["chosen"][:40] = [0, 2]
        assert given["chosen"].size > cuda.FEW_PAIRS * 3
        assert_right(kernels(given, "bfloat16", SILU, **tuning), given, "bfloat16", SILU)


def test_the_same_step_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fresh memory holds, and however many programs share the work."""
    given = rounded(random_experts(9, 5, 3, 72, 40), "bfloat16")
    first = kernels(given, "bfloat16", SILU)
    assert np.array_equal(first, kernels(given, "bfloat16", SILU, fill=0x7F))
    monkeypatch.setattr(cuda, "MULTIPROCESSORS", 7)
    assert np.array_equal(first, kernels(given, "bfloat16", SILU, experts_grid=[8, 3]))


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    given = rounded(random_experts(6, 5, 2, 72, 40), "bfloat16")
    alone = {name: array[3:4] if name in ("x", "chosen", "weights") else array for name, array in given.items()}
    assert np.array_equal(kernels(given, "bfloat16", SILU)[3:4], kernels(alone, "bfloat16", SILU))


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({"experts_few": [16, 64]}, "tuning.experts_few is .16, 64., not .pairs, gate_up, down, columns, stages"),
        ({"experts_many": [128, 48, 64, 64, 3]}, "is no tile: sizes are powers of two"),
        ({"experts_many": [8, 64, 64, 64, 3]}, "is no tile"),
        ({"experts_many": [128, 128, 128, 128, 4]}, "its stages fit in 232,448 bytes"),
        ({"experts_grid": [2, 2]}, "warps are 4 or 8"),
        ({"experts_grid": 4}, "not .warps, programs a multiprocessor."),
    ],
)
def test_tuning_that_no_kernel_has_is_refused(tuning: dict[str, Any], said: str) -> None:
    with pytest.raises(CompileError, match=said):
        kernels(random_experts(1, 4, 2), "bfloat16", SILU, **tuning)


def test_default_tiles_fit_a_multiprocessor_twice() -> None:
    assert all(2 * tile.shared(2) <= cuda.SHARED for tile in cuda.TILES.values())
