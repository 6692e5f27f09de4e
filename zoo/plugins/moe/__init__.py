"""Mixture of experts (Shazeer et al. 2017) as three zoo ops: the choice, the experts, and the gate of the shared expert.

    ZooRouter      chosen, weights = the best top_k experts of each token, the best first
    ZooExperts     y = the sum over a token's chosen experts of weight * (act(x · gateᵀ) * (x · upᵀ)) · downᵀ
    ZooSharedGate  y = experts + sigmoid(x · gateᵀ) * shared                                       (Qwen2-MoE)

``ZooRouterBias`` has a bias on its logits, ``ZooRouterSelect`` a bias of the choice, ``ZooRouterBiasSelect`` both;
``ZooExpertsBias`` has one on each expert's products.

Shape legend: X experts, k chosen, E hidden, F intermediate of an expert; ``...`` any leading axes, T the compute type.

    x             [..., E]    T
    router        [X, E]      T        a row is one expert
    router_bias   [X]         T
    select_bias   [X]         float32  added to scores where experts are chosen, not where they are weighed (DeepSeek-V3)
    chosen        [..., k]    int32    experts of each token, all different
    weights       [..., k]    float32
    gate_up       [X, 2*F, E] T        each expert's gate [F, E], then its up: as checkpoints store linear layers
    down          [X, E, F]   T
    gate_up_bias  [X, 2*F]    T
    down_bias     [X, E]      T
    gate          [1, E]      T
    shared, experts, y  [..., E]  T

Routing is in float32: score 0 is the softmax over all experts, 1 the sigmoid of each. With ``groups`` G > 1 the experts are G
groups of neighbours, and only those of the ``top_groups`` best can be chosen; a group's score is its largest (group_score 0) or
the sum of its two largest (1), of scores with select_bias. Of equal scores, and groups, the lower number wins. weights are the
chosen scores without select_bias, divided by their sum + 1e-20 if ``normalize``, times ``scale``.

``kind`` of ZooExperts: 0 SiLU, 1 GELU by erf, 2 GELU by tanh, 3 ReLU, 4 ReLU squared (So et al. 2021): act(gate) * up;
5 gpt-oss: gate cut at 7, up at ±7, then gate * sigmoid(1.702 * gate) * (up + 1).
"""

from __future__ import annotations

from functools import partial

from zoo.plugins.contract import Lowering, Plugin, Port
from zoo.plugins.fp8_gemm import zoo_op
from zoo.plugins.moe import experts as expert_text
from zoo.plugins.moe import router as router_text
from zoo.plugins.moe.experts import RELU2, SWIGLU_CLAMPED
from zoo.plugins.moe.router import MAX, MICROSOFT, SIGMOID, SOFTMAX, TOP2

__all__ = [
    "EXPERTS",
    "MAX",
    "PLUGINS",
    "RELU2",
    "ROUTERS",
    "SHARED_GATE",
    "SIGMOID",
    "SOFTMAX",
    "SWIGLU_CLAMPED",
    "TOP2",
]

ROW, CHOICE = ("...", "E"), ("...", "k")
X, Y = Port("x", "T", ROW), Port("y", "T", ROW)
CHOSEN, WEIGHTS = Port("chosen", "int32", CHOICE), Port("weights", "float32", CHOICE)
PORTS = {
    "x": X,
    "router": Port("router", "T", ("X", "E")),
    "router_bias": Port("router_bias", "T", ("X",)),
    "select_bias": Port("select_bias", "float32", ("X",)),
    "chosen": CHOSEN,
    "weights": WEIGHTS,
    "gate_up": Port("gate_up", "T", ("X", "2*F", "E")),
    "down": Port("down", "T", ("X", "E", "F")),
    "gate_up_bias": Port("gate_up_bias", "T", ("X", "2*F")),
    "down_bias": Port("down_bias", "T", ("X", "E")),
}


def _router(bias: bool, select: bool) -> Plugin:
    names = router_text.inputs_of(bias, select)
    op = "ZooRouter" + "Bias" * bias + "Select" * select
    return Plugin(
        op=op,
        version="1",
        inputs=tuple(PORTS[name] for name in names),
        outputs=(CHOSEN, WEIGHTS),
        attributes=router_text.ATTRIBUTES,
        body=router_text.body(op, bias, select),
        lowerings={
            "dense": Lowering("dense", names, partial(router_text.lowered, bias, select, False)),
            "chosen": Lowering("chosen", names, partial(router_text.lowered, bias, select, True), domains=(MICROSOFT,)),
        },
    )


def _experts(bias: bool) -> Plugin:
    names = expert_text.inputs_of(bias)
    op = "ZooExperts" + "Bias" * bias
    return Plugin(
        op=op,
        version="1",
        inputs=tuple(PORTS[name] for name in names),
        outputs=(Y,),
        attributes=expert_text.ATTRIBUTES,
        body=expert_text.body(op, bias),
        lowerings={
            "dense": Lowering("dense", names, partial(expert_text.dense, bias)),
            "chosen": Lowering("chosen", names, partial(expert_text.chosen_only, bias), domains=(MICROSOFT,)),
        },
    )


ROUTERS: dict[tuple[bool, bool], Plugin] = {
    (bias, select): _router(bias, select) for bias in (False, True) for select in (False, True)
}
EXPERTS: dict[bool, Plugin] = {bias: _experts(bias) for bias in (False, True)}
SHARED_GATE = zoo_op(
    "ZooSharedGate",
    (X, Port("gate", "T", (1, "E")), Port("shared", "T", ROW), Port("experts", "T", ROW)),
    (Y,),
    (),
    """
    column = Transpose <perm = [1, 0]> (gate)
    logit = MatMul (x, column)
    part = Sigmoid (logit)
    scaled = Mul (part, shared)
    y = Add (experts, scaled)
    """,
)
PLUGINS: dict[str, Plugin] = {plugin.op: plugin for plugin in (*ROUTERS.values(), *EXPERTS.values(), SHARED_GATE)}
