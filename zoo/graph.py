"""``ModelGraph``: an onnx-graphsurgeon graph, its weight table, and what passes need to know beside it.

The graph carries no weights. A weight is a graph input whose name stands in the table with its recipe; nothing is read
until a compiler binds it. Facts that a node cannot say (window, soft cap, cache kind) stand in a table per layer: passes
read that table, check the nodes against it, and infer nothing from masks.

Weight roles of the decoder template (graph inputs):
    embed, pos_embed, final_norm[.bias], lm_head, rope.cos, rope.sin
    layer.{i}.{norm1,norm2}[.bias]  layer.{i}.{q,k,v,o,gate,up,down}[.bias]  layer.{i}.{q_norm,k_norm}
Linear weights are [in, out], as MatMul wants them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zoo.errors import GraphError
from zoo.weights.recipe import Weight

OPSET = 24
IR_VERSION = 12
ONNX_TYPES: dict[str, int] = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8e4m3": onnx.TensorProto.FLOAT8E4M3FN,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}


@dataclass(frozen=True)
class LayerInfo:
    """What one layer's attention is, beside the graph. ``group`` names the block table that its cache follows."""

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    group: str = "full"
    sinks: bool = False  # one more score a head, the weight layer.{i}.sinks, that gives nothing
    alibi: bool = False  # scores fall with distance, by the weight alibi.slopes


@dataclass(frozen=True)
class IndexInput:
    """An input that a session derives from the batch for one lowering; ``zoo.runtime.indices`` knows how, by ``name``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass
class Miss:
    """A place that a pass looked at and left alone, and why."""

    where: str
    reason: str


@dataclass
class PassReport:
    """What one pass did: rewrites counted by kind, and near misses."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return any(self.counts.values())


@dataclass
class ModelGraph:
    """A graph on its way from template to compiler. Passes change it in place; ``copy()`` first to compare.

    ``ragged`` is False for the plain graph ([batch, sequence] inputs, no cache) and True once paged attention is in.
    ``functions`` maps (op type) to the ONNX function that gives a ``zoo`` node its meaning for the target.
    """

    graph: gs.Graph
    weights: dict[str, Weight]
    layers: list[LayerInfo]
    dtype: str
    ragged: bool = False
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)
    index_inputs: list[IndexInput] = field(default_factory=list)
    reports: list[PassReport] = field(default_factory=list)
    phase: str = "template"

    def copy(self) -> ModelGraph:
        """An independent graph over the same weight recipes."""
        other = copy.copy(self)
        other.graph = gs.import_onnx(self.to_onnx())
        other.weights, other.layers = dict(self.weights), list(self.layers)
        other.functions, other.index_inputs = dict(self.functions), list(self.index_inputs)
        other.reports = list(self.reports)
        return other

    def add_weight(self, weight: Weight) -> gs.Variable:
        """Enter a weight into the table and give the graph input that stands for it; the same name twice is an error."""
        if weight.name in self.weights:
            raise GraphError(f"weight {weight.name!r} is defined twice")
        self.weights[weight.name] = weight
        variable = gs.Variable(weight.name, dtype=ONNX_TYPES[weight.dtype], shape=list(weight.shape))
        self.graph.inputs.append(variable)
        return variable

    def replace_weight(self, variable: gs.Variable, weight: Weight) -> None:
        """Give an existing weight input another recipe, shape or dtype; its name stays."""
        assert variable.name == weight.name and weight.name in self.weights
        self.weights[weight.name] = weight
        variable.dtype, variable.shape = ONNX_TYPES[weight.dtype], list(weight.shape)

    def drop_unused_weights(self) -> int:
        """Take weights that no node reads out of the inputs and the table; says how many."""
        unused = [v for v in self.graph.inputs if v.name in self.weights and not v.outputs]
        gone = {v.name for v in unused}
        self.graph.inputs = [v for v in self.graph.inputs if v.name not in gone]
        for name in gone:
            del self.weights[name]
        return len(gone)

    @property
    def data_inputs(self) -> list[gs.Variable]:
        """The graph inputs that are not weights, in order."""
        return [v for v in self.graph.inputs if v.name not in self.weights]

    def variable(self, name: str) -> gs.Variable:
        """A graph input by name."""
        for candidate in self.graph.inputs:
            if candidate.name == name:
                return candidate
        raise GraphError(f"the graph has no input {name!r}; it has {', '.join(v.name for v in self.data_inputs)}")

    def to_onnx(self) -> onnx.ModelProto:
        """The graph as an ONNX model without weight data (weights are inputs), functions of its zoo nodes included."""
        model = gs.export_onnx(self.graph)
        model.ir_version = IR_VERSION
        model.producer_name = "engine-zoo"
        del model.functions[:]
        used = {node.op for node in self.graph.nodes}
        for op, function in self.functions.items():
            if op in used:
                model.functions.append(function)
        domains = {entry.domain for entry in model.opset_import}
        if any(node.domain == "zoo" for node in self.graph.nodes) and "zoo" not in domains:
            model.opset_import.append(onnx.helper.make_opsetid("zoo", 1))
        return model

    def save(self, path: Path) -> None:
        """Write the weightless ONNX file, for Netron: aside, then renamed. OSError when the folder cannot be written."""
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_bytes(self.to_onnx().SerializeToString())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def new_graph(name: str) -> gs.Graph:
    """An empty graph at the project's opset."""
    return gs.Graph(name=name, opset=OPSET, import_domains=[onnx.helper.make_opsetid("", OPSET)])


WeightLoader = Callable[[Weight], np.ndarray[Any, Any]]
