"""``Builder``: the few verbs that templates are written in. Every node and tensor gets a stable, readable name.

A node named ``layer.3.q`` writes the tensor ``layer.3.q.out``; its weight is the graph input ``layer.3.q``.

Shape legend: B batch, S sequence (both symbolic), H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zoo.checkpoints.names import recipe_for, rope_recipe
from zoo.graph import ONNX_TYPES, LayerInfo, ModelGraph, new_graph
from zoo.spec import ModelSpec
from zoo.weights.recipe import Weight, slice_

FLOAT32_STASH = 1  # TensorProto.FLOAT: norms compute in float32 whatever the model's dtype
BATCH = ("batch", "sequence")


class Builder:
    """Grows one plain graph. ``dtype`` is the compute type of everything but the logits.

    ``max_context`` bounds the position tables (rotary and learned); 0 means the model's own limit.
    """

    def __init__(self, model: ModelSpec, dtype: str, max_context: int = 0) -> None:
        self.model, self.dtype = model, dtype
        self.positions = min(max_context, model.max_positions) or model.max_positions
        layers = [
            LayerInfo(i, model.num_heads, model.num_kv_heads, model.head_dim, model.scale, model.window_of(i), model.softcap)
            for i in range(model.num_layers)
        ]
        self.out = ModelGraph(new_graph(model.name), {}, layers, dtype)

    def input(self, name: str, dtype: str, shape: Sequence[int | str] = BATCH) -> gs.Variable:
        """A data input of the graph."""
        variable = gs.Variable(name, dtype=ONNX_TYPES[dtype], shape=list(shape))
        self.out.graph.inputs.append(variable)
        return variable

    def output(self, variable: gs.Variable, name: str) -> None:
        """Declare an output of the graph under its public name."""
        variable.name = name
        self.out.graph.outputs.append(variable)

    def weight(self, role: str, layer: int | None = None) -> gs.Variable:
        """The graph input of a weight by its role; see ``zoo.graph`` for the roles."""
        name = role if layer is None else f"layer.{layer}.{role}"
        if role in ("rope.cos", "rope.sin"):
            recipe = rope_recipe(self.model, role.removeprefix("rope."), self.positions)
        else:
            recipe = recipe_for(self.model, role, layer)
        if role == "pos_embed" and self.positions < recipe.shape[0]:
            recipe = slice_(recipe, 0, 0, self.positions)
        return self.out.add_weight(Weight(name, self.dtype, recipe))

    def constant(self, name: str, values: Any) -> gs.Constant:
        """A small int64 constant: shapes and axes only, never anything that a checkpoint or a calibration decides."""
        return gs.Constant(name, np.asarray(values, dtype=np.int64))

    def node(self, op: str, name: str, inputs: Sequence[Any], shape: Sequence[Any], dtype: str = "", **attrs: Any) -> gs.Variable:
        """Append a node with one output; ``shape`` and ``dtype`` describe it (default: the compute type)."""
        output = gs.Variable(f"{name}.out", dtype=ONNX_TYPES[dtype or self.dtype], shape=list(shape))
        self.out.graph.nodes.append(gs.Node(op=op, name=name, attrs=attrs, inputs=list(inputs), outputs=[output]))
        return output

    def like(self, op: str, name: str, *inputs: gs.Variable, **attrs: Any) -> gs.Variable:
        """A node whose output has the shape and dtype of its first input."""
        return self.node(op, name, inputs, inputs[0].shape, **attrs)

    def linear(self, role: str, x: gs.Variable, layer: int | None = None, bias: bool = False) -> gs.Variable:
        """x [B, S, in] -> [B, S, out]: MatMul by the weight ``role`` [in, out], then Add of its bias [out]."""
        name = role if layer is None else f"layer.{layer}.{role}"
        weight = self.weight(role, layer)
        y = self.node("MatMul", name, [x, weight], [*BATCH, weight.shape[1]])
        return self.like("Add", f"{name}.bias", y, self.weight(f"{role}.bias", layer)) if bias else y

    def norm(self, role: str, x: gs.Variable, layer: int | None = None, name: str = "", kind: str = "") -> gs.Variable:
        """RMS norm (Zhang and Sennrich 2019) or layer norm over the last axis, computed in float32."""
        name = name or (role if layer is None else f"layer.{layer}.{role}")
        attrs = {"axis": -1, "epsilon": self.model.norm_eps, "stash_type": FLOAT32_STASH}
        scale = self.weight(role, layer)
        if (kind or self.model.norm) == "rms":
            return self.like("RMSNormalization", name, x, scale, **attrs)
        return self.like("LayerNormalization", name, x, scale, self.weight(f"{role}.bias", layer), **attrs)

    def cast(self, name: str, x: gs.Variable, dtype: str) -> gs.Variable:
        """``x`` in another dtype; the same variable when it has it already."""
        return x if self.dtype == dtype else self.node("Cast", name, [x], x.shape, dtype, to=int(ONNX_TYPES[dtype]))
