"""Mixture of experts as a plain graph: every expert computes every token, and a weight of 0 drops what was not chosen.

    x ─ router ─ scores ─ TopK ─ weights [B, S, k] ─ spread over all experts ─┐
    x ─ gate, up, down of each expert [B, X, S, E] ───────────────────────────┴─ weighted sum ─┬─ + ─▶
    x ─ shared expert, perhaps times sigmoid(x @ shared_gate) ─────────────────────────────────┘

Shazeer et al. 2017; groups, the shared expert and the bias of the choice: DeepSeek-V2 and V3 (2024). Scores are float32 in
every model, as in transformers, and so are weights until the sum over experts is rounded.

Of equal scores the lower expert's wins, as ONNX's TopK has it. (torch.topk promises no order, and often takes another.)

``zoo/passes/insert_experts.py`` knows these nodes by their names. The shared expert stands first, so that the scale of x is
named after one of its linear layers, of which each is quantized, and not after the router, which never is.

B batch, S sequence, E hidden, F intermediate of an expert, X experts, k chosen, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zoo.checkpoints.names import constant_recipe
from zoo.graph import ONNX_TYPES
from zoo.graph_templates.builder import BATCH, Builder
from zoo.graph_templates.mlp import gate_and_up
from zoo.weights.recipe import Weight

# Added to the sum that weights are divided by, as DeepSeek-V3 has it: sigmoids may all be 0. Nothing beside a larger sum.
EPSILON = 1e-20
LOWEST = float(np.finfo(np.float32).min)


def moe(b: Builder, i: int, x: gs.Variable) -> gs.Variable:
    """x [B, S, E] -> [B, S, E]: layer ``i``'s experts, weighted, and its shared expert if it has one."""
    shared = shared_expert(b, i, x) if b.model.moe.shared else None
    chosen, weights = router(b, i, x)
    y = experts(b, i, x, chosen, weights)
    return y if shared is None else b.like("Add", f"layer.{i}.moe", y, shared)


def shared_expert(b: Builder, i: int, x: gs.Variable) -> gs.Variable:
    """The MLP that every token goes through, times a gate of one number a token in Qwen2-MoE."""
    name = f"layer.{i}.shared"
    h = gate_and_up(b, name, b.linear("shared.gate", x, i), b.linear("shared.up", x, i))
    y = b.linear("shared.down", h, i)
    if not b.model.moe.shared_gate:
        return y
    gate = b.like("Sigmoid", f"{name}_gate.sigmoid", b.linear("shared_gate", x, i))
    return b.like("Mul", f"{name}.gated", y, gate)


def router(b: Builder, i: int, x: gs.Variable) -> tuple[gs.Variable, gs.Variable]:
    """x -> the experts of each token [B, S, k] int64, the best first, and their weights [B, S, k] float32."""
    m, name = b.model.moe, f"layer.{i}.router"
    logits = b.cast(f"{name}.float", b.linear("router", x, i, bias=m.router_bias), "float32")
    soft: dict[str, Any] = {"axis": -1} if m.score == "softmax" else {}
    scores = _float(b, "Softmax" if soft else "Sigmoid", f"{name}.scores", logits, **soft)
    choice = scores
    if m.select_bias:
        choice = _float(b, "Add", f"{name}.select", scores, b.weight("select_bias", i))
    if m.top_groups < m.groups:
        choice = best_groups(b, name, choice)
    _, chosen = _top(b, f"{name}.top", choice, m.top_k)
    weights = b.node("GatherElements", f"{name}.weights", [scores, chosen], chosen.shape, "float32", axis=-1)
    if m.normalize:
        total = _reduced(b, "ReduceSum", f"{name}.sum", weights, -1, keepdims=1)
        total = _float(b, "Add", f"{name}.sum.some", total, _number(b, "router.epsilon", EPSILON))
        weights = _float(b, "Div", f"{name}.share", weights, total)
    if m.scale != 1.0:
        weights = _float(b, "Mul", f"{name}.scaled", weights, _number(b, "router.scale", m.scale))
    return chosen, weights


def best_groups(b: Builder, name: str, choice: gs.Variable) -> gs.Variable:
    """The same scores [B, S, X], but the lowest number for experts of groups that are not among the best."""
    m = b.model.moe
    split = [*BATCH, m.groups, m.experts // m.groups]
    sizes = b.constant(f"{name}.groups.shape", [0, 0, *split[2:]])
    by_group = b.node("Reshape", f"{name}.groups", [choice, sizes], split, "float32")
    if m.group_score == "top2":
        two, _ = _top(b, f"{name}.groups.two", by_group, 2)
        best = _reduced(b, "ReduceSum", f"{name}.groups.best", two, -1)
    else:
        best = _reduced(b, "ReduceMax", f"{name}.groups.best", by_group, -1)
    _, kept = _top(b, f"{name}.groups.top", best, m.top_groups)
    mask = _reduced(b, "ReduceMax", f"{name}.groups.mask", one_hot(b, f"{name}.groups.kept", kept, m.groups), -2)
    last = b.constant(f"{name}.groups.last", [-1])
    column = b.node("Unsqueeze", f"{name}.groups.column", [mask, last], [*mask.shape, 1], "float32")
    inside = b.node("Cast", f"{name}.groups.inside", [column], column.shape, "bool", to=int(ONNX_TYPES["bool"]))
    masked = b.node("Where", f"{name}.groups.masked", [inside, by_group, _number(b, "router.lowest", LOWEST)], split, "float32")
    whole = b.constant(f"{name}.kept.shape", [0, 0, m.experts])
    return b.node("Reshape", f"{name}.kept", [masked, whole], choice.shape, "float32")


def experts(b: Builder, i: int, x: gs.Variable, chosen: gs.Variable, weights: gs.Variable) -> gs.Variable:
    """x [B, S, E] through all experts, and the sum by ``weights`` of those that are ``chosen``: in float32, rounded once."""
    m, name = b.model, f"layer.{i}.experts"
    last, axis = b.constant(f"{name}.last", [-1]), b.constant(f"{name}.axis", [1])
    share = b.node("Unsqueeze", f"{name}.share", [weights, last], [*weights.shape, 1], "float32")
    marks = one_hot(b, f"{name}.chosen", chosen, m.moe.experts)
    spread = _reduced(b, "ReduceSum", f"{name}.weights", _float(b, "Mul", f"{name}.shares", marks, share), -2)
    rows = [BATCH[0], m.moe.experts, BATCH[1]]
    by_expert = b.node("Transpose", f"{name}.by_expert", [spread], rows, "float32", perm=[0, 2, 1])
    column = b.node("Unsqueeze", f"{name}.column", [by_expert, last], [*rows, 1], "float32")

    each = b.node("Unsqueeze", f"{name}.x", [x, axis], [BATCH[0], 1, BATCH[1], m.hidden_size])
    y = linear(b, i, "experts.down", gate_and_up(b, name, linear(b, i, "experts.gate", each), linear(b, i, "experts.up", each)))
    y = _float(b, "Mul", f"{name}.weighted", b.cast(f"{name}.float", y, "float32"), column)
    total = b.node("ReduceSum", name, [y, axis], [*BATCH, m.hidden_size], "float32", keepdims=0)
    if b.dtype == "float32":
        return total
    return b.node("Cast", f"{name}.rounded", [total], total.shape, to=int(ONNX_TYPES[b.dtype]))


def linear(b: Builder, i: int, role: str, x: gs.Variable) -> gs.Variable:
    """x [B, 1 or X, S, in] -> [B, X, S, out]: each expert's matrix [in, out], and its bias [out]."""
    name, weight = f"layer.{i}.{role}", b.weight(role, i)
    count, _, wide = weight.shape
    y = b.node("MatMul", name, [x, weight], [BATCH[0], count, BATCH[1], wide])
    if not b.model.moe.expert_bias:
        return y
    bias = [b.weight(f"{role}.bias", i), b.constant(f"{name}.bias.axis", [1])]
    return b.like("Add", f"{name}.bias", y, b.node("Unsqueeze", f"{name}.bias.rows", bias, [count, 1, wide]))


def one_hot(b: Builder, name: str, ids: gs.Variable, count: int) -> gs.Variable:
    """ids [B, S, n] -> [B, S, n, count] float32: 1 where the number of the column is the id."""
    column = [ids, b.constant(f"{name}.last", [-1])]
    ids = b.node("Unsqueeze", f"{name}.column", column, [*ids.shape, 1], "int64")
    same = b.node("Equal", f"{name}.same", [ids, b.constant(f"{name}.numbers", range(count))], [*ids.shape[:-1], count], "bool")
    return b.node("Cast", f"{name}.one", [same], same.shape, "float32", to=int(ONNX_TYPES["float32"]))


def _float(b: Builder, op: str, name: str, *inputs: gs.Variable, **attrs: Any) -> gs.Variable:
    return b.node(op, name, inputs, inputs[0].shape, "float32", **attrs)


def _reduced(b: Builder, op: str, name: str, x: gs.Variable, axis: int, keepdims: int = 0) -> gs.Variable:
    """A sum or maximum over one axis, counted from the end."""
    place = len(x.shape) + axis
    shape = [*x.shape[:place], *([1] if keepdims else []), *x.shape[place + 1 :]]
    return b.node(op, name, [x, b.constant(f"{name}.axis", [axis])], shape, "float32", keepdims=keepdims)


def _top(b: Builder, name: str, x: gs.Variable, count: int) -> tuple[gs.Variable, gs.Variable]:
    """The largest ``count`` of the last axis, in order, and their places; of equals the first."""
    shape = [*x.shape[:-1], count]
    values = gs.Variable(f"{name}.values", dtype=ONNX_TYPES["float32"], shape=shape)
    places = gs.Variable(f"{name}.out", dtype=ONNX_TYPES["int64"], shape=shape)
    inputs = [x, b.constant(f"{name}.k", [count])]
    b.out.graph.nodes.append(gs.Node(op="TopK", name=name, attrs={"axis": -1}, inputs=inputs, outputs=[values, places]))
    return values, places


def _number(b: Builder, name: str, value: float) -> gs.Variable:
    """A number of the spec as a float32 weight of shape [], which all layers share."""
    if name in b.out.weights:
        return b.out.variable(name)
    return b.out.add_weight(Weight(name, "float32", constant_recipe(value)))
