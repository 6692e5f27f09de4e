"""GPU kernels that carry out weight recipes when an engine is loaded: which ones an engine may need, as data.

``zoo.runtime.cuda.weights`` launches them by these names; it cannot import this room, so a test compares the two.
"""

from __future__ import annotations

from zoo.plugins.kernels import TRITON_TYPES, Kernel

SOURCES = ("bfloat16", "float16", "float32")  # dtypes of checkpoints that are quantized on the GPU
BLOCK = 2048


def weight_kernels() -> dict[tuple[str, str], Kernel]:
    """(kernel, dtype of the source) -> what to compile. Arguments are those of ``kernels.py``, in order; one row a program."""
    made: dict[tuple[str, str], Kernel] = {}
    for dtype in SOURCES:
        x = ("x", "*" + TRITON_TYPES[dtype])
        scales = (x, ("scale", "*fp32"), ("bad", "*i32"), ("columns", "i32"), ("limit", "fp32"))
        rounds = (x, ("scale", "*fp32"), ("y", "*fp8e4nv"), ("columns", "i32"))
        for name, args in (("channel_scale", scales), ("quantize", rounds)):
            source = f"zoo.plugins.weight_kernels.kernels:{name}"
            made[name, dtype] = Kernel(source, args, (("BLOCK", BLOCK),), num_warps=4, num_stages=2)
    return made
