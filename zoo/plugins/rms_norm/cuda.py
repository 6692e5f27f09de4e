"""Launches of the RMS norm zoo ops, and of ONNX's RMSNormalization, which has the same kernels.

``SCALED`` lists the inputs whose columns a kernel can scale first (``CudaNode.scales``).
"""

from __future__ import annotations

from zoo.plugins.kernels import CudaNode, Launch
from zoo.plugins.standard.tile import row_tiles

KERNELS = "zoo.plugins.rms_norm.kernels"
# op type -> the kernel, whose parameters are its inputs, then its outputs
FUNCTIONS = {
    "RMSNormalization": ("rms_norm", ("x", "weight"), ("y",)),
    "ZooRmsNormFp8": ("rms_norm_fp8", ("x", "weight", "y_scale"), ("y",)),
    "ZooAddRmsNorm": ("add_rms_norm", ("x", "residual", "weight"), ("sum", "y")),
    "ZooAddRmsNormFp8": ("add_rms_norm_fp8", ("x", "residual", "weight", "y_scale"), ("sum", "y")),
}
SCALED = {"ZooAddRmsNorm": (0, 1), "ZooAddRmsNormFp8": (0, 1)}


def lower(node: CudaNode) -> list[Launch]:
    """One launch, one or more rows a program."""
    function, inputs, outputs = FUNCTIONS[node.op]
    given = [tensor for tensor in node.inputs if tensor is not None]
    tensors = list(zip(inputs, given, strict=True))
    constants = {}
    if node.op in SCALED:
        scale = given[2]  # stands for none
        if node.scales:
            ((place, scale),) = node.scales.items()
            if place == 1:  # a sum is the same from either side
                tensors[:2] = ("x", given[1]), ("residual", given[0])
        tensors.append(("x_scale", scale))
        constants["SCALED"] = bool(node.scales)
    tensors += zip(outputs, node.outputs, strict=True)
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    return [row_tiles(node, given[0]).launch(f"{KERNELS}:{function}", tensors, [("epsilon", "fp32", epsilon)], **constants)]
