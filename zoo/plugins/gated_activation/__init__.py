"""The gate of a gated MLP (Shazeer 2020) over the output of one fused linear layer.

    gate, up = halves of gate_up
    ZooGatedActivation      y = act(gate) * up
    ZooGatedActivationFp8   y = round8(act(gate) * up / y_scale)

Shape legend: F intermediate; ``...`` any leading axes.

    gate_up  [..., 2*F]  the compute type T: the gate's channels, then the other's
    y_scale  []          float32
    y        [..., F]    T, or float8e4m3

``kind`` says which activation: 0 SiLU, 1 GELU by erf, 2 GELU by tanh (Hendrycks and Gimpel 2016), 3 ReLU. All of it is in
float32, with one rounding at the end, to T or straight to float8e4m3.
"""

from __future__ import annotations

from zoo.plugins.contract import Attribute, Port
from zoo.plugins.fp8_gemm import FLOAT, quantized, zoo_op

SILU, GELU, GELU_TANH, RELU = range(4)
GATE_UP, Y_SCALE = Port("gate_up", "T", ("...", "2*F")), Port("y_scale", "float32", ())
KIND = (Attribute("kind", int),)

# Small and only a judge: all four, and then the one that is meant.
_PRODUCT = f"""
    float = Cast <to = {FLOAT}> (gate_up)
    gate, up = Split <axis = -1, num_outputs = 2> (float)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    gelu = Gelu <approximate = "none"> (gate)
    gelu_tanh = Gelu <approximate = "tanh"> (gate)
    relu = Relu (gate)
    kind = Constant <value_int: int = @kind> ()
    one = Constant <value_int = {GELU}> ()
    two = Constant <value_int = {GELU_TANH}> ()
    three = Constant <value_int = {RELU}> ()
    is_one = Equal (kind, one)
    is_two = Equal (kind, two)
    is_three = Equal (kind, three)
    act_one = Where (is_one, gelu, silu)
    act_two = Where (is_two, gelu_tanh, act_one)
    act = Where (is_three, relu, act_two)
    product = Mul (act, up)
    """

GATED_ACTIVATION = zoo_op(
    "ZooGatedActivation", (GATE_UP,), (Port("y", "T", ("...", "F")),), KIND, _PRODUCT + "y = CastLike (product, gate_up)"
)
GATED_ACTIVATION_FP8 = zoo_op(
    "ZooGatedActivationFp8",
    (GATE_UP, Y_SCALE),
    (Port("y", "float8e4m3", ("...", "F")),),
    KIND,
    _PRODUCT + f"y = {quantized('product', 'y_scale')}",
)
