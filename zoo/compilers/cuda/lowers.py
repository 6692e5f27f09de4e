"""Which op is carried out by which launches: zoo ops, then standard ones. An explicit list, readable top to bottom."""

from __future__ import annotations

from collections.abc import Mapping

from zoo.plugins.cached_attention import cuda as cached_attention
from zoo.plugins.fp8_gemm import cuda as fp8_gemm
from zoo.plugins.gated_activation import cuda as gated_activation
from zoo.plugins.kernels import Lower
from zoo.plugins.moe import cuda as moe
from zoo.plugins.packed_attention import cuda as packed_attention
from zoo.plugins.rms_norm import cuda as rms_norm
from zoo.plugins.rotary_cache import cuda as rotary_cache
from zoo.plugins.standard.cuda import STANDARD

LOWERS: Mapping[str, Lower] = {
    "ZooRmsNormFp8": rms_norm.lower,
    "ZooAddRmsNorm": rms_norm.lower,
    "ZooAddRmsNormFp8": rms_norm.lower,
    "ZooGatedActivation": gated_activation.lower,
    "ZooGatedActivationFp8": gated_activation.lower,
    "ZooQuantizeFp8": fp8_gemm.lower,
    **rotary_cache.LOWERS,
    **cached_attention.LOWERS,
    **packed_attention.LOWERS,
    **moe.LOWERS,
    **STANDARD,
}
