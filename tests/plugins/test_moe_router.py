"""Routers and the gate of a shared expert: bodies against torch, lowerings and kernels against the same; equal scores; NaN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from interpreted import ROUNDING
from moe_ops import Array, cuda_node, run_kernels
from one_op import body_session, run_body
from onnx import helper

from zoo.graph import IR_VERSION, ONNX_TYPES, OPSET
from zoo.plugins.contract import Plugin
from zoo.plugins.moe import MAX, ROUTERS, SHARED_GATE, SIGMOID, SOFTMAX, TOP2, cuda
from zoo.weights.reader import NUMPY

SIZE = 40
# attributes; the rest are defaults
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"top_k": 2, "score": SOFTMAX, "normalize": 1},
    "olmoe": {"top_k": 3, "score": SOFTMAX, "normalize": 0},
    "all-of-them": {"top_k": 8, "score": SOFTMAX, "normalize": 1},
    "deepseek-v2": {"top_k": 3, "score": SOFTMAX, "normalize": 0, "groups": 4, "top_groups": 2, "scale": 16.0},
    "deepseek-v3": {
        "top_k": 3, "score": SIGMOID, "normalize": 1, "groups": 4, "top_groups": 2, "group_score": TOP2, "scale": 2.5,
    },
    "groups-that-all-count": {"top_k": 2, "score": SIGMOID, "normalize": 1, "groups": 2, "top_groups": 2},
    "one-group-of-eight": {"top_k": 1, "score": SIGMOID, "normalize": 0, "groups": 8, "top_groups": 1},
}  # fmt: skip


def reference(given: Mapping[str, Array], attrs: Mapping[str, Any]) -> tuple[Array, Array]:
    """chosen and weights in float64; sorts are stable, so the lower number comes first."""
    values = {name: torch.from_numpy(array.astype(np.float64)) for name, array in given.items()}
    logits = values["x"] @ values["router"].T + values.get("router_bias", torch.zeros(1))
    scores = logits.sigmoid() if attrs["score"] == SIGMOID else logits.softmax(-1)
    choice = scores + values.get("select_bias", torch.zeros(1))
    groups = attrs.get("groups", 1)
    by_group = choice.reshape(len(choice), groups, -1)
    best = by_group.amax(-1)
    if attrs.get("group_score", MAX) == TOP2:
        best = by_group.sort(dim=-1, descending=True)[0][..., :2].sum(-1)
    kept = best.sort(dim=-1, descending=True, stable=True)[1][:, : attrs.get("top_groups", 1)]
    mask = torch.zeros_like(best).scatter_(1, kept, 1)[..., None].expand_as(by_group).reshape(choice.shape)
    choice = choice.masked_fill(mask == 0, float("-inf"))
    chosen = choice.sort(dim=-1, descending=True, stable=True)[1][:, : attrs["top_k"]]
    weights = scores.gather(1, chosen)
    if attrs["normalize"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen.numpy(), (weights * attrs.get("scale", 1.0)).numpy()


def random_router(tokens: int, experts: int, bias: bool, select: bool, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    given = {
        "x": rng.standard_normal((tokens, SIZE)).astype(np.float32),
        "router": (rng.standard_normal((experts, SIZE)) * SIZE**-0.5).astype(np.float32),
    }
    if bias:
        given["router_bias"] = rng.standard_normal(experts).astype(np.float32)
    if select:
        given["select_bias"] = (0.3 * rng.standard_normal(experts)).astype(np.float32)
    return given


def _round(array: Array, dtype: str) -> Array:
    return array.astype(NUMPY[dtype]).astype(np.float32)


def lowered(plugin: Plugin, lowering: str, given: Mapping[str, Array], attrs: Mapping[str, Any]) -> tuple[Array, Array]:
    whole = plugin.attrs("n", attrs)
    function = plugin.lowerings[lowering].function(whole)
    onnx.checker.check_function(function)
    outputs = ["chosen", "weights"]
    node = helper.make_node(function.name, list(function.input), outputs, domain="zoo", **whole)
    infos = [helper.make_tensor_value_info(name, 1, [None] * given[name].ndim) for name in function.input]
    made = [
        helper.make_tensor_value_info(name, ONNX_TYPES[kind], [None, None])
        for name, kind in zip(outputs, ("int32", "float32"), strict=True)
    ]
    graph = helper.make_graph([node], "one", infos, made)
    opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in ("zoo", "com.microsoft"))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[function])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    chosen, weights = session.run(outputs, {name: given[name] for name in function.input})
    return chosen, weights


def found_by(
    form: str, bias: bool, select: bool, given: Mapping[str, Array], attrs: dict[str, Any], dtype: str
) -> tuple[Array, Array]:
    plugin = ROUTERS[bias, select]
    if form == "kernels":
        shape = (len(given["x"]), attrs["top_k"])
        outputs = {"chosen": shape, "weights": shape}
        made = run_kernels(cuda_node(plugin, given, dtype, outputs, **attrs), given, outputs)
        return made["chosen"], made["weights"]
    if form == "body":
        made = run_body(body_session(plugin, **attrs), given)
        return made["chosen"], made["weights"]
    return lowered(plugin, form, given, attrs)


@pytest.mark.parametrize("form", ["body", "dense", "chosen", "kernels"])
@pytest.mark.parametrize("name", CASES)
def test_every_form_is_the_formula(name: str, form: str) -> None:
    attrs = CASES[name]
    for number, (bias, select) in enumerate(ROUTERS):
        given = random_router(1 if number == 3 else 21, 8, bias, select, seed=number)
        chosen, weights = reference(given, attrs)
        found, shares = found_by(form, bias, select, given, attrs, "float32")
        assert found.dtype == np.int32 and np.array_equal(found, chosen)
        np.testing.assert_allclose(shares, weights, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("experts", "groups"), [(60, 1), (20, 4), (160, 8), (1, 1)])
def test_kernels_with_sizes_that_are_no_powers_of_two(
    experts: int, groups: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of rounded numbers are summed in float32: scores are those of float64 but for that."""
    monkeypatch.setattr(cuda, "SHARE", 16)
    given = random_router(9, experts, False, False, seed=experts)
    attrs = {"top_k": min(4, experts), "score": SOFTMAX, "normalize": 1, "groups": groups, "top_groups": (groups + 1) // 2}
    given = {key: _round(array, dtype) for key, array in given.items()}
    chosen, weights = reference(given, attrs)
    found, shares = found_by("kernels", False, False, given, attrs, dtype)
    assert np.array_equal(found, chosen)
    np.testing.assert_allclose(shares, weights, rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["body", "dense", "chosen", "kernels"])
@pytest.mark.parametrize("score", [SOFTMAX, SIGMOID])
def test_of_equal_scores_the_lower_expert_wins(form: str, score: int) -> None:
    """All equal; equal in pairs; groups that are equal. torch.topk would give other experts: [6, 5, 4] for eight zeros."""
    x, router = np.ones((2, SIZE), np.float32), np.zeros((8, SIZE), np.float32)
    plain, grouped = {"top_k": 3, "score": score, "normalize": 1}, {"groups": 4, "top_groups": 2}
    for extra in ({}, grouped, grouped | {"group_score": TOP2}):
        found, weights = found_by(form, False, False, {"x": x, "router": router}, plain | extra, "float32")
        assert found.tolist() == [[0, 1, 2]] * 2
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
    router[[1, 4, 6], 0], router[[3, 5], 0] = 1.0, 2.0
    found, _ = found_by(form, False, False, {"x": x, "router": router}, plain | {"top_k": 5}, "float32")
    assert found.tolist() == [[3, 5, 1, 4, 6]] * 2
    found, _ = found_by(form, False, False, {"x": x, "router": router}, plain | grouped, "float32")
    assert found.tolist() == [[3, 5, 4]] * 2  # the groups of 2, 3 and of 4, 5 are the best


@pytest.mark.parametrize("form", ["body", "dense", "chosen", "kernels"])
def test_a_token_of_nan_harms_nobody(form: str) -> None:
    """Its experts exist and are different; its weights are NaN; all other tokens are as they were."""
    for attrs in (CASES["mixtral"], CASES["deepseek-v3"]):
        given = random_router(5, 8, False, False)
        chosen, weights = reference(given, attrs)
        given["x"][2] = np.nan
        found, shares = found_by(form, False, False, given, attrs, "float32")
        others = np.arange(5) != 2
        assert np.array_equal(found[others], chosen[others]) and ((found >= 0) & (found < 8)).all()
        assert len(set(found[2].tolist())) == attrs["top_k"] and np.isnan(shares[2]).all()
        np.testing.assert_allclose(shares[others], weights[others], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_gate_of_a_shared_expert(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for tokens, size in ((1, 40), (7, 64), (5, 101)):
        given = {
            name: _round(rng.standard_normal((tokens, size)).astype(np.float32), dtype) for name in ("x", "shared", "experts")
        }
        given["gate"] = _round((rng.standard_normal((1, size)) * size**-0.5).astype(np.float32), dtype)
        exact = {name: array.astype(np.float64) for name, array in given.items()}
        wanted = exact["experts"] + exact["shared"] / (1 + np.exp(-exact["x"] @ exact["gate"].T))
        outputs = {"y": (tokens, size)}
        found = run_kernels(cuda_node(SHARED_GATE, given, dtype, outputs), given, outputs)["y"].astype(np.float64)
        np.testing.assert_allclose(found, wanted, rtol=1.01 * ROUNDING[dtype], atol=3e-6)
        if dtype == "float32":
            np.testing.assert_allclose(run_body(body_session(SHARED_GATE), given)["y"], wanted, rtol=1e-6, atol=1e-6)
