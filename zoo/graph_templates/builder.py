"""``Builder``: the few verbs that templates are written in. Every node and tensor gets a stable, readable name.

A node named ``layer.3.q`` writes the tensor ``layer.3.q.out``; its weight is the graph input ``layer.3.q``.

Shape legend: B batch, S sequence (both symbolic), H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zoo.checkpoints.names import constant_recipe, recipe_for, rope_recipe
from zoo.graph import ONNX_TYPES, LayerInfo, ModelGraph, new_graph
from zoo.modelspec import ModelSpec
from zoo.weights.recipe import Recipe, Weight, computed, slice_

FLOAT32 = ("alibi.slopes", "select_bias")  # weights that are float32 in every model
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
            LayerInfo(
                i,
                model.num_heads,
                model.cache_heads,
                model.cache_dim,
                model.scale,
                model.window_of(i),
                model.softcap,
                sinks=model.sinks,
                alibi=model.position == "alibi",
            )
            for i in range(model.num_layers)
        ]
        self._numbers: dict[str, gs.Variable] = {}
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
        """The graph input of a weight by its role; see ``zoo.checkpoints.roles`` for the roles."""
        name = role if layer is None else f"layer.{layer}.{role}"
        dtype = "float32" if role in FLOAT32 else self.dtype
        return self.out.add_weight(Weight(name, dtype, self._recipe(role, layer)))

    def _recipe(self, role: str, layer: int | None) -> Recipe:
        m = self.model
        table, _, part = role.partition(".")
        if table in ("rope", "rope_local"):
            return rope_recipe(m, part, self.positions, local=table == "rope_local")
        if role == "alibi.slopes":
            factor = m.scale if m.alibi.scaled else 1.0
            return computed(
                "alibi_slopes", (m.num_heads,), heads=m.num_heads, rule=m.alibi.rule, bias_max=m.alibi.bias_max, factor=factor
            )
        if part == "unit":
            return computed("constant", (m.head_dim,), value=1.0)
        recipe = recipe_for(m, role, layer)
        return slice_(recipe, 0, 0, self.positions) if role == "pos_embed" and self.positions < recipe.shape[0] else recipe

    def number(self, name: str, value: float, dtype: str = "") -> gs.Variable:
        """A number of the spec, a weight of shape [] (default: in the compute type); the same name is the same number."""
        if name not in self._numbers:
            self._numbers[name] = self.out.add_weight(Weight(name, dtype or self.dtype, constant_recipe(value)))
        return self._numbers[name]

    def scaled(self, name: str, x: gs.Variable, factor: float, dtype: str = "") -> gs.Variable:
        """``x`` times a number of the spec; ``x`` itself for 1. ``dtype`` is that of ``x``, if it is not the compute type."""
        return x if factor == 1.0 else self.like("Mul", name, x, self.number(f"{name}.factor", factor, dtype), dtype=dtype)

    def reshape(self, name: str, x: gs.Variable, sizes: Sequence[int], shape: Sequence[Any]) -> gs.Variable:
        """``x`` in another shape; 0 in ``sizes`` keeps a size, ``shape`` describes the result."""
        return self.node("Reshape", name, [x, self.constant(f"{name}.shape", sizes)], shape)

    def split(self, name: str, x: gs.Variable, sizes: Sequence[int], axis: int) -> list[gs.Variable]:
        """Parts of ``x`` along an axis."""
        parts = []
        for number, size in enumerate(sizes):
            shape = [size if place == axis else other for place, other in enumerate(x.shape)]
            parts.append(gs.Variable(f"{name}.{number}.out", dtype=ONNX_TYPES[self.dtype], shape=shape))
        inputs = [x, self.constant(f"{name}.sizes", sizes)]
        self.out.graph.nodes.append(gs.Node(op="Split", name=name, attrs={"axis": axis}, inputs=inputs, outputs=parts))
        return parts

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

    def norm(
        self, role: str, x: gs.Variable, layer: int | None = None, name: str = "", bias: bool = True, eps: float = 0.0
    ) -> gs.Variable:
        """RMS norm (Zhang and Sennrich 2019) or layer norm over the last axis, computed in float32.

        ``bias`` False: without one, also where the model's layer norms have them. ``eps`` 0: the model's.
        """
        name = name or (role if layer is None else f"layer.{layer}.{role}")
        attrs = {"axis": -1, "epsilon": eps or self.model.norm_eps, "stash_type": FLOAT32_STASH}
        scale = self.weight(role, layer)
        if self.model.norm == "rms":
            return self.like("RMSNormalization", name, x, scale, **attrs)
        biases = [self.weight(f"{role}.bias", layer)] if bias and self.model.norm_bias else []
        return self.like("LayerNormalization", name, x, scale, *biases, **attrs)

    def cast(self, name: str, x: gs.Variable, dtype: str) -> gs.Variable:
        """``x`` in another dtype; the same variable when it has it already."""
        return x if self.dtype == dtype else self.node("Cast", name, [x], x.shape, dtype, to=int(ONNX_TYPES[dtype]))
