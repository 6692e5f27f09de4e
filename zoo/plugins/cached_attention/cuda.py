"""Launches of ``ZooCachedAttention`` and its variants: tiles of prefill, then decode, then the merge of decode's parts.

Shape legend: T tokens, B sequences, W prefill tiles, S splits, H heads, K key/value heads, G = H / K, D head size.

W and S come from ``zoo.runtime.cuda_indices``. Any S gives the same result: scratch has a size that no step changes, and
kernels make no more parts of contexts than it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.plugins.kernels import CudaNode, Kernel, Launch, Lower, Scratch, Size, TensorRef, fixed

KERNELS = "zoo.plugins.cached_attention.kernels"
VARIANTS = {"": "", "Sinks": "sinks", "Slopes": "slopes"}  # part of an op's name -> its input [H] and the kernels' EXTRA
OPS = tuple("ZooCachedAttention" + variant + fp8 + out8 for variant in VARIANTS for fp8 in ("", "Fp8") for out8 in ("", "Out8"))
GIVEN = ("q", "kv", "block_table", "query_starts", "kv_lengths", "prefill_tiles")
TILE = 128  # queries of a prefill tile, at most; ``zoo.runtime.cuda_indices`` cuts by the same number
PROGRAMS = 2048  # parts of contexts, over all key/value heads, that scratch has room for

Constants = dict[str, int | float | bool | str]
Args = dict[str, TensorRef | Scratch | Size]


def lower(node: CudaNode) -> list[Launch]:
    """Three launches. A step without tiles has no first one, a step that splits no context no last one; sequences that one of
    them is not for cost it one load.

    Tuning: ``prefill_block_m``, ``prefill_block_n``, ``prefill_warps``, ``prefill_stages``, ``decode_block_n``,
    ``decode_warps``, ``decode_stages``, ``decode_least`` (positions of a context's part, at least). For all shapes, or for those
    of one key under ``attention`` (``key_of``), which go before.
    """
    extra = next((name for variant, name in VARIANTS.items() if variant and variant in node.op), "")
    optional = [extra] * bool(extra) + ["kv_scale"] * ("Fp8" in node.op) + ["out_scale"] * node.op.endswith("Out8")
    given: dict[str, TensorRef] = {}
    for name, tensor in zip((*GIVEN, *optional), node.inputs, strict=True):
        assert tensor is not None, f"{node.name}: {name} is missing"
        given[name] = tensor
    (given["out"],) = node.outputs
    for name in ("kv_scale", "out_scale"):
        given.setdefault(name, given["kv_lengths"])  # what is not read still wants an argument
    assert node.attrs["scale"] > 0, f"{node.name}: kernels look for the largest score before they scale it"
    heads, kv_heads, size = (int(node.attrs[name]) for name in ("num_heads", "kv_heads", "head_dim"))
    choices = _choices(size, heads // kv_heads, given["kv"].dtype == "float8e4m3", node.tuning)
    block_d = max(32, _power_of_two(size))
    width = {"table_width": _width(given["block_table"], node)}
    shape: Constants = {"H": heads, "K": kv_heads, "D": size, "BLOCK_SIZE": int(node.attrs["block_size"])}
    window = int(node.attrs["window"])
    bend: Constants = {"SCALE": float(node.attrs["scale"]), "WINDOW": window, "SOFTCAP": float(node.attrs["softcap"])}
    bend["EXTRA"] = extra
    per_head = given[extra] if extra else None

    block_m, block_n = choices["prefill_block_m"], choices["prefill_block_n"]
    parts = -(-TILE * (heads // kv_heads) // block_m)
    prefill = _launch(
        "prefill",
        (fixed(kv_heads * parts), Size("W"), fixed(1)),
        _pick(given, "q", "kv", "block_table", "prefill_tiles", "kv_scale", "out_scale", "out") | width,
        per_head,
        shape | bend | {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "PARTS": parts},
        choices["prefill_warps"],
        choices["prefill_stages"],
    )

    slots = slots_of(kv_heads)
    scratch: Args = {
        "partials": Scratch(f"{node.name}.partials", fixed(4 * slots * heads * size)),
        "stats": Scratch(f"{node.name}.stats", fixed(4 * slots * heads)),
    }
    splits: Args = {"splits": Size("S")}
    block_n = choices["decode_block_n"]
    split: Constants = {"LEAST": max(block_n, choices["decode_least"] // block_n * block_n), "SLOTS": slots}
    decode = _launch(
        "decode",
        (fixed(kv_heads), Size("S"), Size("B")),
        _pick(given, "q", "kv", "block_table", "query_starts", "kv_lengths", "kv_scale", "out_scale", "out")
        | scratch
        | width
        | splits,
        per_head,
        shape | bend | {"COLS": max(8, _power_of_two(heads // kv_heads)), "BLOCK_N": block_n, "BLOCK_D": block_d} | split,
        choices["decode_warps"],
        choices["decode_stages"],
    )
    whole: Constants = {"H": heads, "D": size, "WINDOW": window, "EXTRA": extra if extra == "sinks" else ""}
    merge = _launch(
        "merge",
        (fixed(heads), Size("B"), Size("J")),
        scratch | _pick(given, "query_starts", "kv_lengths", "out_scale", "out") | splits,
        per_head if extra == "sinks" else None,
        whole | {"BLOCK_N": block_n, "BLOCK_D": block_d} | split | {"BLOCK_S": 16},
        1,
        1,
    )
    return [prefill, decode, merge]


def slots_of(kv_heads: int) -> int:
    """Parts of contexts that scratch holds for each key/value head, with all its heads. Kernels never make more."""
    return max(PROGRAMS // kv_heads, 1)


def _choices(size: int, group: int, fp8: bool, tuning: Mapping[str, Any]) -> dict[str, int]:
    """Tile sizes, warps and stages, by head size, heads of a group and pool; ``tuning`` has the last word.

    Prefill of heads of 128 on an H100, against tiles of 128 x 128 with 8 warps: 3 to 12 percent faster at 1,000 to 2,000
    tokens a sequence, a third at 128.
    """
    wide = size > 128
    defaults = {
        "prefill_block_m": 128 if wide else 64,
        "prefill_block_n": (32 if fp8 else 64) if wide else (128 if fp8 else 64),
        "prefill_warps": 8 if wide else 4,
        "prefill_stages": 3,
        "decode_block_n": 64 if wide or group > 8 else 128,
        "decode_warps": 4,
        "decode_stages": 3,
        "decode_least": 128,
    }
    own = tuning.get("attention", {}).get(key_of(size, group, fp8), {})
    return {key: int(own.get(key, tuning.get(key, value))) for key, value in defaults.items()}


def key_of(size: int, group: int, fp8: bool) -> str:
    """What kernels of these shapes are called in ``tuning.attention``: 128x4, or 128x4.float8e4m3 with a pool of that type."""
    return f"{size}x{group}.float8e4m3" if fp8 else f"{size}x{group}"


def _width(block_table: TensorRef, node: CudaNode) -> Size:
    """Blocks in a row of the table: of this step, or fixed."""
    columns = block_table.shape[-1]
    assert columns == "P" or isinstance(columns, int), f"{node.name}: a block table of {block_table.shape}"
    return Size("P") if columns == "P" else fixed(int(columns))


def _pick(given: Mapping[str, TensorRef], *names: str) -> Args:
    return {name: given[name] for name in names}


def _launch(
    function: str,
    grid: tuple[Size, Size, Size],
    args: Args,
    per_head: TensorRef | None,
    constants: Constants,
    warps: int,
    stages: int,
) -> Launch:
    """``per_head`` is the kernel's last argument, ``extra``; a constant, where there is none."""
    args = args | ({} if per_head is None else {"extra": per_head})
    constants = ({"extra": 0} if per_head is None else {}) | constants
    types, values = [], []
    for name, arg in args.items():
        types.append((name, arg.pointer if isinstance(arg, TensorRef) else "*fp32" if isinstance(arg, Scratch) else "i32"))
        values.append(arg.name if isinstance(arg, TensorRef) else arg)
    kernel = Kernel(f"{KERNELS}:{function}", tuple(types), tuple(constants.items()), warps, stages, overlaps=True)
    return Launch(kernel, grid, tuple(values))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


LOWERS: dict[str, Lower] = dict.fromkeys(OPS, lower)
