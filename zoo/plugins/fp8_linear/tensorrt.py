"""``ZooFp8Linear`` as a TensorRT plugin. NOT YET RUN: see ``zoo.plugins.tensorrt``.

It is not used unless it is asked for: without it the op reaches TensorRT as the quantizers and the product that its body is,
which the builder makes an FP8 product of its own from. FP8 tensor cores begin with SM 8.9.

Shape legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.plugins.fp8_linear import PLUGIN
from zoo.plugins.kernels import Kernel
from zoo.plugins.tensorrt_kernels import Binding, Launched

KERNEL = "zoo.plugins.fp8_linear.kernels:fp8_linear"
BLOCK_M, BLOCK_N, BLOCK_K = 64, 128, 64


def launch(attributes: Mapping[str, Any], dtypes: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> Launched:
    """One program for each tile of the result."""
    n, k = shapes["weight"]
    assert n > 0 and k > 0, f"a weight of {n} by {k}"
    constants = {"N": int(n), "K": int(k), "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "PROMOTE": BLOCK_K}
    kernel = Kernel(KERNEL, BINDING.kernel_args(dtypes), tuple(constants.items()), num_warps=4, num_stages=3)
    columns = -(-int(n) // BLOCK_N)
    return Launched(kernel, lambda sizes: (columns, (sizes["rows"] + (BLOCK_M - 1)) // BLOCK_M, 1))


BINDING = Binding(PLUGIN, {"rows": ("x", None)}, launch)
