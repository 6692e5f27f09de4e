"""Zoo ops, one folder each. ``PLUGINS`` is the list, by op type."""

from __future__ import annotations

from zoo.plugins import (
    cached_attention,
    fp8_gemm,
    fp8_linear,
    gated_activation,
    moe,
    packed_attention,
    paged_attention,
    rms_norm,
    rotary_cache,
)
from zoo.plugins.contract import Plugin

PLUGINS: dict[str, Plugin] = {
    **paged_attention.PLUGINS,
    **moe.PLUGINS,
    "ZooPackedAttention": packed_attention.PLUGIN,
    "ZooFp8Linear": fp8_linear.PLUGIN,
    # what kernels of our own are made for: the passes of the cuda target put them in place of the two above
    "ZooQuantizeFp8": fp8_gemm.QUANTIZE_FP8,
    "ZooFp8Gemm": fp8_gemm.FP8_GEMM,
    "ZooRmsNormFp8": rms_norm.RMS_NORM_FP8,
    "ZooAddRmsNorm": rms_norm.ADD_RMS_NORM,
    "ZooAddRmsNormFp8": rms_norm.ADD_RMS_NORM_FP8,
    "ZooGatedActivation": gated_activation.GATED_ACTIVATION,
    "ZooGatedActivationFp8": gated_activation.GATED_ACTIVATION_FP8,
    **rotary_cache.PLUGINS,
    **cached_attention.PLUGINS,
}
