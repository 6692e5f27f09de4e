"""Launches of the router, of experts, and of the gate of a shared expert. ``LOWERS`` is the list.

Tuning of the products of experts: ``experts_few``, ``experts_many``: [pairs, rows of gate and as many of up, rows of down,
columns, stages] of a tile where few or many pairs are in a step; ``experts_grid``: [warps, programs a multiprocessor].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from zoo.errors import CompileError
from zoo.plugins.kernels import Arg, CudaNode, Kernel, Launch, Lower, Scratch, Size, TensorRef, fixed
from zoo.plugins.standard.tile import row_tiles, tiles

ROUTER, KERNELS = "zoo.plugins.moe.router_kernels", "zoo.plugins.moe.kernels"
SIGMOID, TOP2 = 1, 1  # attributes score and group_score, as ``zoo.plugins.moe`` numbers them
# op type -> its inputs, by the names of the contract
INPUTS: dict[str, tuple[str, ...]] = {
    "ZooRouter": ("x", "router"),
    "ZooRouterBias": ("x", "router", "router_bias"),
    "ZooRouterSelect": ("x", "router", "select_bias"),
    "ZooRouterBiasSelect": ("x", "router", "router_bias", "select_bias"),
    "ZooExperts": ("x", "chosen", "weights", "gate_up", "down"),
    "ZooExpertsBias": ("x", "chosen", "weights", "gate_up", "down", "gate_up_bias", "down_bias"),
    "ZooSharedGate": ("x", "gate", "shared", "experts"),
}
MULTIPROCESSORS = 132  # of H100 SXM and H200
SHARED = 227 << 10  # bytes of a multiprocessor that programs share
ITEMS = {"float16": 2, "bfloat16": 2, "float32": 4}
LIMITS = {"T": "max_tokens", "B": "max_sequences", "R": "max_rows"}
CHUNK, PART, CHUNKS = 1024, 128, 32  # pairs that a program of the sort has, and places at a time; counts that it adds at a time
FEW_PAIRS = 16  # an expert, on average, up to which a step has few
LOGITS = (16, 64, 128, 3)  # tokens, experts, columns, stages of a tile of the router's product
SHARE, SHARES = 512, 8  # columns of a share of that product, at least, and how many shares at most
ROUTED = 1024  # scores that a program of the router holds

Constants = tuple[tuple[str, int | float | bool | str], ...]


@dataclass(frozen=True)
class Tile:
    """A tile of both products: pairs, rows of gate (and as many of up), rows of down, columns of each, stages."""

    pairs: int
    gate_up: int
    down: int
    columns: int
    stages: int

    def constants(self, prefix: str, rows: int) -> Constants:
        named = (("M", self.pairs), ("N", rows), ("K", self.columns), ("STAGES", self.stages))
        return tuple((f"{prefix}_{key}", value) for key, value in named)

    def shared(self, item: int) -> int:
        """Bytes of shared memory that a program takes, about."""
        return self.stages * (self.pairs + max(2 * self.gate_up, self.down)) * self.columns * item


TILES = {"experts_few": Tile(16, 64, 64, 128, 3), "experts_many": Tile(128, 64, 128, 64, 3)}
GRID = (4, 2)  # warps, programs a multiprocessor


def lower_router(node: CudaNode) -> list[Launch]:
    """Two launches: the product, in shares of its columns, and the choice."""
    given = _named(node)
    x, router, (chosen, weights) = given["x"], given["router"], node.outputs
    bias, select = given.get("router_bias"), given.get("select_bias")
    (experts, size), tokens, attrs = _sizes(router), x.rows, node.attrs
    rows, wide, columns, stages = LOGITS
    shares = min(SHARES, max(1, size // SHARE))
    parts = Scratch(f"{node.name}.parts", Size(tokens.symbol, tokens.times * shares * experts * 4))
    product = Kernel(
        f"{ROUTER}:router_logits",
        (("x", x.pointer), ("router", router.pointer), ("parts", "*fp32"), ("tokens", "i32")),
        (("E", size), ("X", experts), ("SPLITS", shares), ("BLOCK_M", rows), ("BLOCK_N", wide), ("BLOCK_K", columns)),
        num_stages=stages,
        overlaps=True,
    )
    groups, top_k = int(attrs["groups"]), int(attrs["top_k"])
    inside = _power_of_two(experts // groups)
    at_once = max(1, ROUTED // (_power_of_two(groups) * inside))
    tensors = (("bias", bias or router), ("select", select or weights), ("chosen", chosen), ("weights", weights))
    constants: dict[str, int | float | bool | str] = {
        "X": experts,
        "G": groups,
        "TOP_GROUPS": int(attrs["top_groups"]),
        "TOP2": attrs["group_score"] == TOP2,
        "TOP_K": top_k,
        "SIGMOID": attrs["score"] == SIGMOID,
        "NORMALIZE": bool(attrs["normalize"]),
        "SCALE": float(attrs["scale"]),
        "BIASED": bias is not None,
        "SELECTED": select is not None,
        "SPLITS": shares,
        "ROWS": at_once,
        "GROUPS": _power_of_two(groups),
        "INSIDE": inside,
        "CHOICES": _power_of_two(top_k),
    }
    choice = Kernel(
        f"{ROUTER}:route",
        (("parts", "*fp32"), *((name, tensor.pointer) for name, tensor in tensors), ("tokens", "i32")),
        tuple(constants.items()),
        overlaps=True,
    )
    grid = fixed(-(-experts // wide)), fixed(shares), Size(tokens.symbol, tokens.times, rows)
    return [
        Launch(product, grid, (x.name, router.name, parts, tokens)),
        Launch(choice, _rows(tokens, at_once), (parts, *(tensor.name for _, tensor in tensors), tokens)),
    ]


def lower_experts(node: CudaNode) -> list[Launch]:
    """Five launches: two sort, then gate and up, down, and the sum."""
    given = _named(node)
    x, chosen, weights, gate_up, down = (given[name] for name in ("x", "chosen", "weights", "gate_up", "down"))
    (y,), k, tokens = node.outputs, int(node.attrs["top_k"]), x.rows
    (experts, size, inner), pairs = _sizes(down), Size(tokens.symbol, tokens.times * k)
    few, many = (_tile(node, key) for key in TILES)
    limit = FEW_PAIRS * experts  # pairs of a step that are few

    def scratch(name: str, bytes_each: int, count: int = 0) -> Scratch:
        """Memory for ``count`` things, or for one a pair."""
        return Scratch(
            f"{node.name}.{name}", fixed(count * bytes_each) if count else Size(pairs.symbol, pairs.times * bytes_each)
        )

    most = pairs.times * (node.limits[LIMITS[pairs.symbol]] if pairs.symbol else 1)
    counts, starts = scratch("counts", 4, -(-most // CHUNK) * experts), scratch("starts", 4, experts + 1)
    ends, order = scratch("ends", 4, experts), scratch("order", 4)
    h, parts = scratch("h", inner * ITEMS[x.dtype]), scratch("parts", size * ITEMS[x.dtype])
    sorting: Constants = (("X", experts), ("EXPERTS", _power_of_two(experts + 1)), ("CHUNK", CHUNK))
    count = Kernel(
        f"{KERNELS}:count_experts", (("chosen", chosen.pointer), ("counts", "*i32"), ("pairs", "i32")), sorting, overlaps=True
    )
    place = Kernel(
        f"{KERNELS}:place_pairs",
        (("chosen", chosen.pointer), *((name, "*i32") for name in ("counts", "starts", "tile_ends", "order")), ("pairs", "i32")),
        (*sorting, ("PART", PART), ("ROWS", CHUNKS), ("FEW", limit), ("FEW_ROWS", few.pairs), ("MANY_ROWS", many.pairs)),
        overlaps=True,
    )
    chunks = _rows(pairs, CHUNK)
    launches = [
        Launch(count, chunks, (chosen.name, counts, pairs)),
        Launch(place, chunks, (chosen.name, counts, starts, ends, order, pairs)),
    ]
    warps, programs = _grid(node)
    products: tuple[tuple[str, Arg, TensorRef, Arg, tuple[int, int], Constants], ...] = (
        ("gate_up", x.name, gate_up, h, (few.gate_up, many.gate_up), (("TOP_K", k), ("KIND", int(node.attrs["kind"])))),
        ("down", h, down, parts, (few.down, many.down), ()),
    )
    for name, source, weight, made, rows, constants in products:
        bias = given.get(f"{name}_bias")
        kernel = Kernel(
            f"{KERNELS}:{name}",
            (
                *((one, x.pointer) for one in (("x", "w", "bias", "h") if name == "gate_up" else ("h", "w", "bias", "parts"))),
                *((one, "*i32") for one in ("order", "starts", "tile_ends")),
                ("pairs", "i32"),
            ),
            (
                *(("E", size), ("F", inner), ("X", experts), ("EXPERTS", _power_of_two(experts)), *constants),
                *(("BIASED", bias is not None), ("FEW", limit)),
                *few.constants("FEW", rows[0]),
                *many.constants("MANY", rows[1]),
            ),
            num_warps=warps,
            overlaps=True,
        )
        args = (source, weight.name, (bias or weight).name, made, order, starts, ends, pairs)
        launches.append(Launch(kernel, (fixed(programs), fixed(1), fixed(1)), args))
    return [*launches, _combine(parts, weights, y, k)]


def _combine(parts: Scratch, weights: TensorRef, y: TensorRef, k: int) -> Launch:
    cut = tiles(y)
    made = cut.launch(f"{KERNELS}:combine", [("parts", y), ("weights", weights), ("y", y)], TOP_K=k)
    return Launch(made.kernel, made.grid, (parts, *made.args[1:]))


def lower_shared_gate(node: CudaNode) -> list[Launch]:
    """One launch, one or more rows a program."""
    given = _named(node)
    tensors = [*given.items(), ("y", node.outputs[0])]
    return [row_tiles(node, given["x"]).launch(f"{ROUTER}:shared_gate", tensors)]


def _named(node: CudaNode) -> dict[str, TensorRef]:
    """A node's inputs by the names of the contract."""
    named: dict[str, TensorRef] = {}
    for name, tensor in zip(INPUTS[node.op], node.inputs, strict=True):
        assert tensor is not None, f"{node.name}: {name} is missing"
        named[name] = tensor
    return named


def _sizes(weight: TensorRef) -> tuple[int, ...]:
    sizes = tuple(size for size in weight.shape if isinstance(size, int))
    assert len(sizes) == len(weight.shape), f"{weight.name} has the shape {weight.shape}"
    return sizes


def _rows(rows: Size, at_once: int) -> tuple[Size, Size, Size]:
    return Size(rows.symbol, rows.times, at_once), fixed(1), fixed(1)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _tile(node: CudaNode, key: str) -> Tile:
    """The tile for few or many pairs, from the hardware profile or the default. CompileError for one that no kernel has."""
    if key not in node.tuning:
        return TILES[key]
    numbers, names = node.tuning[key], ", ".join(field.name for field in fields(Tile))
    try:
        tile = Tile(*(int(number) for number in numbers))
    except (TypeError, ValueError):
        raise CompileError(f"tuning.{key} is {numbers!r}, not [{names}]") from None
    item = ITEMS[node.inputs[0].dtype] if node.inputs[0] else 2
    powers = (tile.pairs, tile.gate_up, tile.down, tile.columns)
    low = min(powers) < 16 or min(tile.gate_up, tile.down) < 64 or tile.stages < 1
    if low or any(one & (one - 1) for one in powers) or tile.shared(item) > SHARED:
        raise CompileError(
            f"tuning.{key}: {tile} is no tile: sizes are powers of two, of 16 at least and of 64 for rows of weights, "
            f"and its stages fit in {SHARED:,} bytes"
        )
    return tile


def _grid(node: CudaNode) -> tuple[int, int]:
    """Warps of a program, and programs."""
    numbers: Any = node.tuning.get("experts_grid", GRID)
    try:
        warps, each = (int(number) for number in numbers)
    except (TypeError, ValueError):
        raise CompileError(f"tuning.experts_grid is {numbers!r}, not [warps, programs a multiprocessor]") from None
    if warps not in (4, 8) or each < 1:
        raise CompileError(f"tuning.experts_grid is {numbers!r}; warps are 4 or 8, programs a multiprocessor at least 1")
    return warps, each * MULTIPROCESSORS


LOWERS: Mapping[str, Lower] = {
    **{op: lower_router for op in INPUTS if op.startswith("ZooRouter")},
    **{op: lower_experts for op in INPUTS if op.startswith("ZooExperts")},
    "ZooSharedGate": lower_shared_gate,
}
