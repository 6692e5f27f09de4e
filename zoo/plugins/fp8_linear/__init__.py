"""``ZooFp8Linear``: a linear layer with float8e4m3 weights and activations and static scales.

    y = (round8(x / x_scale) · round8(w / weight_scale)ᵀ) * x_scale * weight_scale

Shape legend: K in, N out; ``...`` any leading axes. Rounding to float8e4m3 is to the nearest even and saturates at ±448
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning").

    x             [..., K]   the compute type T
    weight        [N, K]     float8e4m3; a row is one output channel
    weight_scale  [N]        float32, one a row
    x_scale       []         float32, one for the whole tensor, from calibration
    y             [..., N]   T

Weights are [N, K], not [K, N]: FP8 tensor cores read both operands along K, so this is the layout that cuBLASLt wants and
that TensorRT-RTX turns into a strided constant without a copy; it is also how checkpoints store them, so that quantizing
streams a file from front to back. Scales are float32 whatever T is: with half-precision scales TensorRT-RTX lets its GEMM
write unscaled sums in T, and in float16 those overflow beyond 65504. A bias stays the Add behind the node.

Scales are inputs, never constants: recalibrating changes a weight and no node.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from zoo.graph import OPSET
from zoo.plugins.contract import DOMAIN, Plugin, Port, function_attributes

VERSION = "1"


def _body() -> onnx.FunctionProto:
    """The reference body: a Q/DQ pair on x, a DQ on the weight, MatMul. Quantizing divides in float32, as the kernels do."""
    nodes = [
        helper.make_node(
            "QuantizeLinear",
            ["x", "x_scale"],
            ["x_quantized"],
            output_dtype=TensorProto.FLOAT8E4M3FN,
            saturate=1,
            name="x.quantize",
        ),
        helper.make_node("DequantizeLinear", ["x_quantized", "x_scale"], ["x_float"], name="x.dequantize"),
        helper.make_node("CastLike", ["x_float", "x"], ["x_rounded"], name="x.cast"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale"], ["weight_float"], axis=0, name="weight.dequantize"),
        helper.make_node("CastLike", ["weight_float", "x"], ["weight_rounded"], name="weight.cast"),
        helper.make_node("Transpose", ["weight_rounded"], ["weight_transposed"], perm=[1, 0], name="weight.transpose"),
        helper.make_node("MatMul", ["x_rounded", "weight_transposed"], ["y"], name="matmul"),
    ]
    return helper.make_function(
        DOMAIN,
        "ZooFp8Linear",
        ["x", "weight", "weight_scale", "x_scale"],
        ["y"],
        nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=function_attributes(()),
    )


PLUGIN = Plugin(
    op="ZooFp8Linear",
    version=VERSION,
    inputs=(
        Port("x", "T", ("...", "K")),
        Port("weight", "float8e4m3", ("N", "K")),
        Port("weight_scale", "float32", ("N",)),
        Port("x_scale", "float32", ()),
    ),
    outputs=(Port("y", "T", ("...", "N")),),
    attributes=(),
    body=_body(),
)
