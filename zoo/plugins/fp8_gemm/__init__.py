"""``ZooQuantizeFp8`` and ``ZooFp8Gemm``: a ``ZooFp8Linear`` in the two steps that a GPU takes.

    x8 = round8(x / x_scale)                                    ZooQuantizeFp8
    y  = (x8 · weightᵀ) * x_scale * weight_scale                ZooFp8Gemm

Apart, the first step is shared by linear layers that read the same activation, and melts into the kernel that makes the
activation (``ZooRmsNormFp8``, ``ZooGatedActivationFp8``); the second is one cuBLASLt call. Together they are what
``ZooFp8Linear`` is, rounding for rounding.

Shape legend: K in, N out; ``...`` any leading axes. Rounding to float8e4m3 is to the nearest even and saturates at ±448
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning"); the division before it is in float32.

    x             [..., K]   the compute type T of ZooQuantizeFp8, float8e4m3 of ZooFp8Gemm
    weight        [N, K]     float8e4m3; a row is one output channel
    weight_scale  [N]        float32, one a row
    x_scale       []         float32, one for the whole tensor, from calibration
    y             [..., N]   float8e4m3 of ZooQuantizeFp8, T of ZooFp8Gemm

No input of ZooFp8Gemm has the compute type, so that its attribute ``to`` names it: a code of ONNX's TensorProto, as Cast's.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, parser

from zoo.graph import OPSET
from zoo.plugins.contract import Attribute, Plugin, Port, function_attributes

FLOAT, FLOAT8 = int(TensorProto.FLOAT), int(TensorProto.FLOAT8E4M3FN)

# x, x_scale -> y in float8e4m3, for every function that ends in a quantized output.
ROUND8 = "QuantizeLinear <output_dtype = {to}, saturate = 1> ({x}, {scale})"


def quantized(x: str, scale: str) -> str:
    """The call, in ONNX text, that rounds ``x`` / ``scale`` to float8e4m3."""
    return ROUND8.format(to=FLOAT8, x=x, scale=scale)


def zoo_op(op: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...], attributes: tuple[Attribute, ...], text: str) -> Plugin:
    """A zoo op whose body is the text of an ONNX function's nodes."""
    declared = ", ".join(function_attributes(attributes))
    given, made = (", ".join(port.name for port in ports) for ports in (inputs, outputs))
    head = f'<domain: "zoo", opset_import: ["" : {OPSET}]>\n{op} <{declared}> ({given}) => ({made})'
    body: onnx.FunctionProto = parser.parse_function(f"{head} {{{text}}}")
    return Plugin(op=op, version="1", inputs=inputs, outputs=outputs, attributes=attributes, body=body)


X_SCALE = Port("x_scale", "float32", ())

QUANTIZE_FP8 = zoo_op(
    "ZooQuantizeFp8",
    (Port("x", "T", ("...", "K")), X_SCALE),
    (Port("y", "float8e4m3", ("...", "K")),),
    (),
    f"y = {quantized('x', 'x_scale')}",
)

FP8_GEMM = zoo_op(
    "ZooFp8Gemm",
    (
        Port("x", "float8e4m3", ("...", "K")),
        Port("weight", "float8e4m3", ("N", "K")),
        Port("weight_scale", "float32", ("N",)),
        X_SCALE,
    ),
    (Port("y", "T", ("...", "N")),),
    (Attribute("to", int),),
    """
    x_float = DequantizeLinear (x, x_scale)
    x_rounded = Cast <to: int = @to> (x_float)
    weight_float = DequantizeLinear <axis = 0> (weight, weight_scale)
    weight_rounded = Cast <to: int = @to> (weight_float)
    weight_transposed = Transpose <perm = [1, 0]> (weight_rounded)
    y = MatMul (x_rounded, weight_transposed)
    """,
)
