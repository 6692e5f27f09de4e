"""The launch of ``ZooPackedAttention``: tiles of a step's rows, for each head; and of ONNX's RotaryEmbedding before it, which
where there is a cache is part of writing to it.

Shape legend: T tokens, B texts, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import CompileError
from zoo.plugins.kernels import CudaNode, Kernel, Launch, Lower, Size, TensorRef, fixed

KERNELS = "zoo.plugins.packed_attention.kernels"
OP = "ZooPackedAttention"
ROTATED = 1024  # pairs that a program rotates
STARTS = 128  # entries of query_starts that a program compares at a time


def lower(node: CudaNode) -> list[Launch]:
    """One launch. Tuning: ``packed_block_m``, ``packed_block_n``, ``packed_warps``, ``packed_stages``."""
    tensors = [tensor for tensor in (*node.inputs, *node.outputs) if tensor is not None]
    assert len(tensors) == 5, f"{node.name}: {len(tensors)} tensors"
    assert node.attrs["scale"] > 0, f"{node.name}: the kernel looks for the largest score behind the scale"
    heads, kv_heads, size = (int(node.attrs[name]) for name in ("num_heads", "kv_heads", "head_dim"))
    choices = _choices(size, node.tuning)
    block_m = choices["packed_block_m"]
    args: list[tuple[str, TensorRef | Size]] = [
        *zip(("q", "k", "v", "query_starts", "out"), tensors, strict=True),
        ("tokens", Size("T")),
        ("sequences", Size("B")),
    ]
    constants: dict[str, int | float | bool | str] = {
        "H": heads,
        "K": kv_heads,
        "D": size,
        "SCALE": float(node.attrs["scale"]),
        "WINDOW": int(node.attrs["window"]),
        "SOFTCAP": float(node.attrs["softcap"]),
        "BLOCK_M": block_m,
        "BLOCK_N": choices["packed_block_n"],
        "BLOCK_D": max(16, 1 << (size - 1).bit_length()),
        "BLOCK_B": STARTS,
    }
    types = tuple((name, arg.pointer if isinstance(arg, TensorRef) else "i32") for name, arg in args)
    kernel = Kernel(
        f"{KERNELS}:packed", types, tuple(constants.items()), choices["packed_warps"], choices["packed_stages"], overlaps=True
    )
    values = tuple(arg.name if isinstance(arg, TensorRef) else arg for _, arg in args)
    return [Launch(kernel, (fixed(heads), Size("T", 1, block_m), fixed(1)), values)]


def rotate(node: CudaNode) -> list[Launch]:
    """Queries or keys [1, T, heads * D] by tables [positions, rotated / 2]."""
    if len(node.inputs) != 4 or any(tensor is None for tensor in node.inputs):
        raise CompileError(f"{node.name}: the cuda target rotates by positions, and this RotaryEmbedding has none")
    x, cos, sin, positions = (tensor for tensor in node.inputs if tensor is not None)
    heads, half, width = int(node.attrs.get("num_heads", 0)), cos.shape[-1], x.shape[-1]
    if len(x.shape) != 3 or not heads or not isinstance(width, int) or not isinstance(half, int):
        raise CompileError(f"{node.name}: the cuda target rotates [1, T, heads * D], not {list(x.shape)} of {heads} heads")
    size = width // heads
    block = 1 << (max(half, size - 2 * half) - 1).bit_length()
    rows = max(1, ROTATED // block)
    constants = {"HEADS": heads, "D": size, "HALF": half, "INTERLEAVED": bool(node.attrs.get("interleaved", 0))}
    tensors = (x, cos, sin, positions, node.outputs[0])
    types = [(name, tensor.pointer) for name, tensor in zip(("x", "cos", "sin", "positions", "y"), tensors, strict=True)]
    kernel = Kernel(
        f"{KERNELS}:rotate", (*types, ("rows", "i32")), (*constants.items(), ("ROWS", rows), ("BLOCK", block)), overlaps=True
    )
    grid = (Size(x.rows.symbol, x.rows.times, rows), fixed(heads), fixed(1))
    return [Launch(kernel, grid, (*(tensor.name for tensor in tensors), x.rows))]


def _choices(size: int, tuning: Mapping[str, Any]) -> dict[str, int]:
    """Tile sizes, warps and stages, by head size; ``tuning`` has the last word. No variant has been timed on a GPU yet."""
    wide = size > 128
    defaults = {
        "packed_block_m": 64,
        "packed_block_n": 32 if wide else 64,
        "packed_warps": 8 if wide else 4,
        "packed_stages": 2 if wide else 3,
    }
    return {key: int(tuning.get(key, value)) for key, value in defaults.items()}


LOWERS: dict[str, Lower] = {OP: lower, "RotaryEmbedding": rotate}
