"""Graphs written as ONNX text, for tests of passes over linear layers."""

from __future__ import annotations

import re
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from zoo.graph import ONNX_TYPES, LayerInfo, ModelGraph
from zoo.weights.recipe import Weight, tensor, transpose

NAMES = {number: name for name, number in ONNX_TYPES.items()}


def from_text(text: str, layers: int = 1) -> ModelGraph:
    """A ModelGraph from the text of one ONNX graph. Inputs called ``w.*`` and ``b.*`` are weights: [out, in] and [out] stored.

    A node's name is the name of its first output, without ``.out``.
    """
    text = re.sub(r"(?<=[a-z0-9])\.(?=[a-z0-9])", "__", text)  # ONNX text has no dots in names
    model = onnx.parser.parse_model(f'<ir_version: 12, opset_import: ["": 24, "zoo": 1]>\n{text}')
    for value in [*model.graph.input, *model.graph.output]:
        value.name = value.name.replace("__", ".")
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("__", ".") for name in names]
        node.name = node.output[0].removesuffix(".out")
    graph = gs.import_onnx(model)
    weights = {}
    for variable in graph.inputs:
        if variable.name.startswith(("w.", "b.")):
            shape, role = tuple(variable.shape), variable.name
            recipe = (
                transpose(tensor(f"{role}.stored", shape[::-1]), (1, 0)) if len(shape) == 2 else tensor(f"{role}.stored", shape)
            )
            number = next(i.type.tensor_type.elem_type for i in model.graph.input if i.name == role)
            weights[role] = Weight(role, NAMES[number], recipe)
    return ModelGraph(graph, weights, [LayerInfo(i, 1, 1, 4, 0.5) for i in range(layers)], "float32")


def nodes_of(graph: ModelGraph) -> list[tuple[Any, ...]]:
    """Every node as (op, name, inputs, outputs), for comparing graphs."""
    return [(n.op, n.name, [t.name for t in n.inputs], [t.name for t in n.outputs]) for n in graph.graph.nodes]
