"""What each compilation target can do, as data that passes and checks read.

A target's abilities are never an ``if`` on its name: a pass asks for the ability. Facts come from running the target;
docs/architecture.md says where each was seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Abilities of one compiler's runtime.

    name            the compiler's name
    zoo_ops         how zoo ops reach it: "function" (an ONNX function of standard ops), "inline" (the same, inlined
                    before its parser sees it), "plugin" (its own plugin interface), "kernel" (our kernels)
    attention       the lowering of ZooPagedAttention: "loop" (one Loop iteration a sequence), "padded" (queries padded
                    to [B, L] by index inputs, contexts gathered once a sequence), "plugin"
    experts         the lowering of ZooExperts and ZooRouter: "chosen" (only experts that somebody chose are computed),
                    "dense" (every expert for every token: what a decode step of one token reads is all of them), "plugin"
    dtypes          compute types it can run
    fused_matmul    it has com.microsoft FusedMatMul, so weights may stay [out, in] as checkpoints store them
    narrow_lookups  it looks rows up in a half-precision table where it computes in float32
    kernels         zoo ops reach it as kernels of their own: norms, activations and the cache are fused for them
    float8_pool     a KV pool of float8 values is possible
    sms             SM versions it builds for; empty: not a GPU target
    """

    name: str
    zoo_ops: str
    attention: str
    dtypes: tuple[str, ...]
    fused_matmul: bool = False
    narrow_lookups: bool = False
    kernels: bool = False
    float8_pool: bool = False
    sms: tuple[int, ...] = ()
    experts: str = "plugin"


TARGETS: dict[str, Target] = {
    "onnxruntime": Target(
        "onnxruntime", "function", "loop", ("float32",), fused_matmul=True, narrow_lookups=True, experts="chosen"
    ),
    "tensorrt_rtx": Target(
        "tensorrt_rtx", "inline", "padded", ("float16", "bfloat16"), sms=(75, 80, 86, 89, 120, 121), experts="dense"
    ),
    # Until plugins for it exist, datacenter TensorRT takes what TensorRT-RTX takes, which builds and is compared here.
    "tensorrt": Target(
        "tensorrt", "plugin", "padded", ("float16", "bfloat16"), sms=(75, 80, 86, 89, 90, 100, 120), experts="dense"
    ),
    # Kernels compile for other SMs, too; only Hopper has been run.
    "cuda": Target(
        "cuda", "kernel", "plugin", ("bfloat16", "float16"), fused_matmul=True, kernels=True, float8_pool=True, sms=(90,)
    ),
}
