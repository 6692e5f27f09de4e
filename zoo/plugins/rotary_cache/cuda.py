"""Launches of ``ZooRotaryCache`` and its variants: one for each node."""

from __future__ import annotations

from math import gcd

from zoo.plugins.kernels import CudaNode, Kernel, Launch, Lower, Size, TensorRef, fixed

KERNEL = "zoo.plugins.rotary_cache.kernels:rotary_cache"
KINDS = ("ZooRotaryCache", "ZooRotaryCacheNorm", "ZooCacheWrite")
# parameter of the kernel -> place among the node's inputs, by kind; a float8 pool has kv_scale behind them
INPUTS: dict[str, tuple[str, ...]] = {
    "ZooRotaryCache": ("qkv", "cos", "sin", "positions", "kv", "token_slots"),
    "ZooRotaryCacheNorm": ("qkv", "cos", "sin", "positions", "q_norm", "k_norm", "kv", "token_slots"),
    "ZooCacheWrite": ("qkv", "kv", "token_slots"),
}
SCALED = {kind + suffix: (0,) for kind in KINDS for suffix in ("", "Fp8")}  # columns that are scaled first (``CudaNode.scales``)
ELEMENTS = 4096  # of a tile: 32 for each thread of 4 warps
HEADS = 8  # of a tile, at most


def lower(node: CudaNode) -> list[Launch]:
    """One launch. Tuning: ``rotary_elements`` of a tile, ``rotary_heads`` of it at most, ``rotary_warps``."""
    kind = node.op.removesuffix("Fp8")
    names = (*INPUTS[kind], *(("kv_scale",) if node.op.endswith("Fp8") else ()))
    given: dict[str, TensorRef] = {}
    for name, tensor in zip(names, node.inputs, strict=True):
        assert tensor is not None, f"{node.name}: {name} is missing"
        given[name] = tensor
    given["q"], given["kv"] = node.outputs
    heads, kv_heads, size = (int(node.attrs[name]) for name in ("num_heads", "kv_heads", "head_dim"))
    rotary = 0 if kind == "ZooCacheWrite" else int(node.attrs["rotary_dim"])
    group = gcd(heads, kv_heads)
    group = min(group & -group, int(node.tuning.get("rotary_heads", HEADS)))
    width = _power_of_two(size)
    tokens = max(1, int(node.tuning.get("rotary_elements", ELEMENTS)) // (group * width))
    constants: dict[str, int | float | bool | str] = {
        "H": heads,
        "K": kv_heads,
        "D": size,
        "BLOCK_SIZE": int(node.attrs["block_size"]),
        "R": rotary,
        "LACED": bool(node.attrs.get("interleaved", 0)),
        "NORM": kind == "ZooRotaryCacheNorm",
        "EPSILON": float(node.attrs.get("epsilon", 0.0)),
        "SCALED": bool(node.scales),
        "TOKENS": tokens,
        "HEADS": group,
        "PAIRS": _power_of_two(rotary // 2),
        "REST": _power_of_two(size - rotary) if 0 < rotary < size else 0,
        "WIDTH": width,
    }
    if node.scales:
        given["qkv_scale"] = node.scales[0]
    order = ("qkv", "qkv_scale", "cos", "sin", "positions", "q_norm", "k_norm", "token_slots", "kv_scale", "q", "kv")
    spare = given["token_slots"]  # stands for what the variant does not read
    tensors = [(name, given.get(name, spare)) for name in order]
    kernel = Kernel(
        KERNEL,
        (*((name, tensor.pointer) for name, tensor in tensors), ("tokens", "i32")),
        tuple(constants.items()),
        num_warps=int(node.tuning.get("rotary_warps", 4)),
        overlaps=True,
    )
    grid = (Size("T", 1, tokens), fixed((heads + 2 * kv_heads) // group), fixed(1))
    return [Launch(kernel, grid, (*(tensor.name for _, tensor in tensors), Size("T")))]


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


LOWERS: dict[str, Lower] = {kind + suffix: lower for kind in KINDS for suffix in ("", "Fp8")}
