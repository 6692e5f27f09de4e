"""Launches of ``ZooQuantizeFp8``. ``ZooFp8Gemm`` is a library call, made by the compiler itself."""

from __future__ import annotations

from zoo.plugins.kernels import CudaNode, Launch
from zoo.plugins.standard.tile import tiles

KERNELS = "zoo.plugins.fp8_gemm.kernels"


def lower(node: CudaNode) -> list[Launch]:
    """x, x_scale -> y."""
    assert node.op == "ZooQuantizeFp8"
    x, x_scale = node.inputs
    (y,) = node.outputs
    assert x is not None and x_scale is not None
    return [tiles(x).launch(f"{KERNELS}:quantize_fp8", [("x", x), ("x_scale", x_scale), ("y", y)])]
