"""The MLP of one layer, [B, S, E] -> [B, S, E], and the activations that experts share with it.

B batch, S sequence, E hidden, F intermediate.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zoo.graph_templates.builder import Builder

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # of gpt-oss


def mlp(b: Builder, i: int, x: gs.Variable) -> gs.Variable:
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020), or ``down(act(up(x)))`` without a gate."""
    m, name = b.model, f"layer.{i}"
    if m.mlp == "gated":
        y = gate_and_up(b, name, b.linear("gate", x, i, bias=m.mlp_bias), b.linear("up", x, i, bias=m.mlp_bias))
    else:
        y = activation(b, f"{name}.act", b.linear("up", x, i, bias=m.mlp_bias))
    return b.linear("down", y, i, bias=m.mlp_bias)


def gate_and_up(b: Builder, name: str, gate: gs.Variable, up: gs.Variable) -> gs.Variable:
    """act(gate) * up, of any equal shapes, as nodes ``{name}.act`` and ``{name}.mlp``.

    swiglu_clamped (gpt-oss): gate is cut at 7 and up at +- 7, then gate * sigmoid(1.702 * gate) * (up + 1).
    """
    if b.model.activation != "swiglu_clamped":
        return b.like("Mul", f"{name}.mlp", activation(b, f"{name}.act", gate), up)
    least, most = b.number("swiglu.least", -SWIGLU_LIMIT), b.number("swiglu.most", SWIGLU_LIMIT)
    gate = b.like("Min", f"{name}.gate.cut", gate, most)
    up = b.like("Clip", f"{name}.up.cut", up, least, most)
    steep = b.like("Mul", f"{name}.act.steep", gate, b.number("swiglu.alpha", SWIGLU_ALPHA))
    act = b.like("Mul", f"{name}.act", gate, b.like("Sigmoid", f"{name}.act.sigmoid", steep))
    return b.like("Mul", f"{name}.mlp", act, b.like("Add", f"{name}.up.one", up, b.number("one", 1.0)))


def activation(b: Builder, name: str, x: gs.Variable) -> gs.Variable:
    """Elementwise; SiLU is spelled x * sigmoid(x), the squared ReLU (So et al. 2021) as what it is."""
    kind = b.model.activation
    if kind == "silu":
        return b.like("Mul", name, x, b.like("Sigmoid", f"{name}.sigmoid", x))
    if kind == "relu":
        return b.like("Relu", name, x)
    if kind == "relu2":
        half = b.like("Relu", f"{name}.relu", x)
        return b.like("Mul", name, half, half)
    return b.like("Gelu", name, x, approximate="tanh" if kind == "gelu_tanh" else "none")
