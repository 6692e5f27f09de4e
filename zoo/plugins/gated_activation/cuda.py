"""Launches of the gated activations."""

from __future__ import annotations

from zoo.plugins.kernels import CudaNode, Launch
from zoo.plugins.standard.tile import tiles

KERNELS = "zoo.plugins.gated_activation.kernels"
FUNCTIONS = {
    "ZooGatedActivation": ("gated_activation", ("gate_up",)),
    "ZooGatedActivationFp8": ("gated_activation_fp8", ("gate_up", "y_scale")),
}
SCALED = dict.fromkeys(FUNCTIONS, (0,))  # inputs whose columns the kernels can scale first (``CudaNode.scales``)


def lower(node: CudaNode) -> list[Launch]:
    """One launch over tiles of the output."""
    function, inputs = FUNCTIONS[node.op]
    given = [tensor for tensor in node.inputs if tensor is not None]
    (y,) = node.outputs
    tensors = [*zip(inputs, given, strict=True), ("x_scale", node.scales.get(0, given[0])), ("y", y)]
    return [tiles(y).launch(f"{KERNELS}:{function}", tensors, KIND=int(node.attrs["kind"]), SCALED=bool(node.scales))]
