"""``ZooPagedAttention`` as a TensorRT plugin. NOT YET RUN: see ``zoo.plugins.tensorrt``.

The pool is an input and an output that share memory, which TensorRT calls aliased I/O and allows when the builder's
configuration has the preview feature ``ALIASED_PLUGIN_IO_10_03``. NVIDIA's samples show it with "jit" plugins; with "aot" ones
it is unproven. A "jit" plugin notices when the two are apart, and copies the pool first; an embedded kernel cannot. So whoever
runs an engine gives ``kv.<layer>`` and ``kv_out.<layer>`` one address: then it does not matter what TensorRT makes of the alias.

There is none for the variants with sinks or slopes: a hardware profile that asks for one is refused, and the target's lowering
carries them out.

T tokens, B sequences, P blocks a sequence, H heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.plugins.kernels import Kernel
from zoo.plugins.paged_attention import PLUGIN
from zoo.plugins.tensorrt_kernels import Binding, Launched, float32

KERNEL = "zoo.plugins.paged_attention.kernels:paged_attention"


def launch(attributes: Mapping[str, Any], dtypes: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> Launched:
    """One program for each key/value head and tile of queries. Tiles are as large as 48 KiB of shared memory allow."""
    heads, kv_heads, size = (int(attributes[name]) for name in ("num_heads", "kv_heads", "head_dim"))
    wide = size > 128
    rows = 32 if wide else 64
    group = heads // kv_heads
    tile = max(1, rows // group)
    constants = {
        "H": heads,
        "K": kv_heads,
        "D": size,
        "BLOCK_SIZE": int(attributes["block_size"]),
        "SCALE": float32(attributes["scale"]),
        "WINDOW": int(attributes["window"]),
        "SOFTCAP": float32(attributes["softcap"]),
        "TILE": tile,
        "BLOCK_T": _power_of_two(tile),
        "BLOCK_M": max(16, _power_of_two(tile * group)),
        "BLOCK_N": 16 if wide else 32,
        "BLOCK_D": max(16, _power_of_two(size)),
    }
    kernel = Kernel(KERNEL, BINDING.kernel_args(dtypes), tuple(constants.items()), num_warps=4, num_stages=2)
    return Launched(kernel, lambda sizes: (kv_heads, sizes["tokens"] // tile + sizes["sequences"], 1))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


BINDING = Binding(
    PLUGIN,
    {"tokens": ("q", 1), "sequences": ("kv_lengths", 0), "table_width": ("block_table", 1), "blocks": ("kv", 0)},
    launch,
)
