"""RMS norm (Zhang and Sennrich 2019) with what stands before it and behind it: a residual sum, a rounding to float8e4m3.

    ZooRmsNormFp8      y = round8(norm(x) / y_scale)
    ZooAddRmsNorm      sum = x + residual,  y = norm(sum)
    ZooAddRmsNormFp8   sum = x + residual,  y = round8(norm(sum) / y_scale)

    norm(x) = x / sqrt(mean(x²) + epsilon) * weight

Shape legend: E the normed axis; ``...`` any leading axes.

    x, residual, sum  [..., E]   the compute type T
    weight            [E]        T
    y_scale           []         float32
    y                 [..., E]   T, or float8e4m3

``sum`` is rounded to T before it is normed, as an Add node before the norm would: the next residual sum starts from the same
numbers. The norm is in float32 from there to its one rounding, to T or straight to float8e4m3.

The plain norm needs no zoo op: it is ONNX's RMSNormalization, whose kernel stands beside these (``zoo/plugins/standard``).
"""

from __future__ import annotations

from zoo.plugins.contract import Attribute, Port
from zoo.plugins.fp8_gemm import FLOAT, quantized, zoo_op

ROW = ("...", "E")
X, RESIDUAL, SUM = (Port(name, "T", ROW) for name in ("x", "residual", "sum"))
WEIGHT, Y_SCALE = Port("weight", "T", ("E",)), Port("y_scale", "float32", ())
Y, Y8 = Port("y", "T", ROW), Port("y", "float8e4m3", ROW)
EPSILON = (Attribute("epsilon", float),)


def _norm(x: str) -> str:
    return f"""
    x_float = Cast <to = {FLOAT}> ({x})
    weight_float = Cast <to = {FLOAT}> (weight)
    normed = RMSNormalization <axis = -1, epsilon: float = @epsilon, stash_type = {FLOAT}> (x_float, weight_float)
    """


_SUM = "sum = Add (x, residual)"
_ROUND8 = f"y = {quantized('normed', 'y_scale')}"

RMS_NORM_FP8 = zoo_op("ZooRmsNormFp8", (X, WEIGHT, Y_SCALE), (Y8,), EPSILON, _norm("x") + _ROUND8)
ADD_RMS_NORM = zoo_op("ZooAddRmsNorm", (X, RESIDUAL, WEIGHT), (SUM, Y), EPSILON, _SUM + _norm("sum") + "y = CastLike (normed, x)")
ADD_RMS_NORM_FP8 = zoo_op("ZooAddRmsNormFp8", (X, RESIDUAL, WEIGHT, Y_SCALE), (SUM, Y8), EPSILON, _SUM + _norm("sum") + _ROUND8)
