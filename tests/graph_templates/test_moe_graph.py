"""The plain graph of a mixture of experts against transformers' own blocks, and what happens between equal scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from moe_blocks import CASES, checkpoint, inputs, plain_graph, reference, run, spec, weights_of

from zoo.graph import ONNX_TYPES
from zoo.graph_templates.moe import EPSILON, LOWEST


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    graph = plain_graph(spec(name))
    onnx.checker.check_model(graph.to_onnx(), full_check=True)
    with checkpoint(name, tmp_path) as tensors:
        weights = weights_of(graph, tensors)
        for batch, length in ((2, 7), (1, 1), (1, 40)):
            x = inputs(batch, length, seed=length)
            np.testing.assert_allclose(run(graph, weights, x), reference(name, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_scores_and_weights_are_float32_in_every_model(name: str, dtype: str) -> None:
    graph = plain_graph(spec(name), dtype)
    onnx.checker.check_model(graph.to_onnx(), full_check=True)
    kinds = {node.name: node.outputs[-1 if node.op == "TopK" else 0].dtype for node in graph.graph.nodes}
    float32, compute = ONNX_TYPES["float32"], ONNX_TYPES[dtype]
    ends = ("scores", "weights", "share", "scaled", "select")
    assert {kinds[f"layer.0.router.{end}"] for end in ends if f"layer.0.router.{end}" in kinds} == {float32}
    assert (kinds["layer.0.experts"], kinds["layer.0.experts.rounded"], kinds["layer.0.experts.down"]) == (
        float32,
        compute,
        compute,
    )
    assert {weight.dtype for key, weight in graph.weights.items() if key.endswith("select_bias")} <= {"float32"}


def test_of_equal_scores_the_lower_expert_wins() -> None:
    """A router of zeros: experts 0 and 1 of a Mixtral. torch.topk gives no order for equals: of eight zeros it takes 6, 5, 4."""
    rng = np.random.default_rng(0)
    graph = plain_graph(spec("mixtral"))
    weights = {
        key: rng.standard_normal(one.shape).astype(np.float32) if one.shape else np.full((), EPSILON, np.float32)
        for key, one in graph.weights.items()
    }
    weights["layer.0.router"][:] = 0
    alone = weights | {"layer.0.experts.down": weights["layer.0.experts.down"].copy()}
    alone["layer.0.experts.down"][2:] = 0
    x = inputs(1, 5)
    assert np.array_equal(run(graph, weights, x), run(graph, alone, x))
    alone["layer.0.experts.down"][1] = 0
    assert not np.allclose(run(graph, weights, x), run(graph, alone, x))


def test_sigmoids_that_are_all_zero_give_nothing() -> None:
    """DeepSeek-V3 adds 1e-20 to the sum that weights are divided by: no NaN."""
    graph, x = plain_graph(spec("deepseek_v3")), inputs(1, 3)
    values = {"router.epsilon": EPSILON, "router.scale": 2.5, "router.lowest": LOWEST}
    weights = {key: np.full(one.shape, values.get(key, 1.0), np.float32) for key, one in graph.weights.items()}
    weights["layer.0.router"] = -np.sign(x[0, 0])[:, None].repeat(8, 1).astype(np.float32) * 1e4
    weights["layer.0.shared.down"][:] = 0
    assert np.array_equal(run(graph, weights, x[:, :1]), np.zeros((1, 1, 24), np.float32))
