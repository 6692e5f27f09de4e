"""Behind the head logits are float32 before they are scaled or bent: close ones must not become equal in the compute type."""

from __future__ import annotations

import dataclasses

import families
import pytest

from zoo.graph import ONNX_TYPES
from zoo.graph_templates import expand
from zoo.spec import ModelSpec

TINY = ModelSpec("tiny", "llama", 40, 16, 1, 2, 1, 8, 24, 64, tensors=families.LLAMA_NAMES)
BEHIND = {"scaled": ["Mul"], "bent": ["Div", "Tanh", "Mul"], "both": ["Mul", "Div", "Tanh", "Mul"], "plain": []}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", BEHIND)
def test_what_stands_behind_the_head(case: str, dtype: str) -> None:
    scale, cap = (0.25 if case in ("scaled", "both") else 1.0), (30.0 if case in ("bent", "both") else 0.0)
    graph = expand(dataclasses.replace(TINY, logit_scale=scale, logit_softcap=cap), dtype)
    nodes = list(graph.graph.nodes)
    place = next(at for at, node in enumerate(nodes) if node.name == "lm_head")
    behind = nodes[place + 1 :]
    assert [node.op for node in behind] == ["Cast"] * (dtype != "float32") + BEHIND[case]
    assert all(node.outputs[0].dtype == ONNX_TYPES["float32"] for node in behind)
    numbers = [graph.weights[tensor.name] for node in behind for tensor in node.inputs if tensor.name in graph.weights]
    assert all(number.dtype == "float32" and number.shape == () for number in numbers)
    assert graph.graph.outputs[0].name == "logits" and graph.graph.outputs[0].dtype == ONNX_TYPES["float32"]
