"""Tiles of the rotary kernel, and warps of the kernels that norm whole rows.

T tokens, H heads, K key/value heads, D head size, R rotary size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from zoo.plugins.kernels import Launch, Size
from zoo.plugins.rotary_cache import cuda as rotary
from zoo.runtime.abi import EngineLimits
from zoo.tuning.bench import Bench, copies, step_json
from zoo.tuning.shapes import PlanKernel, rotary_node
from zoo.tuning.trial import Load, Outcome, Variant, compete
from zoo.weights.reader import NUMPY

ROTARY = tuple(itertools.product((1024, 2048, 4096, 8192), (4, 8), (4, 8)))  # elements, heads, warps
WARPS = (2, 4, 8, 16, 32)
TOKENS = (64, 4096)  # of a decode step, and of a step of prompts
POSITIONS = 4096
WRITTEN = ("y", "sum")  # by norm kernels


def token_counts(limits: EngineLimits) -> list[int]:
    """``TOKENS`` as far as the engine takes them, in whole blocks."""
    size = limits.block_size
    return sorted({max(min(tokens, limits.max_tokens) // size, 1) * size for tokens in TOKENS})


def rotary_variants(kernel: PlanKernel, limits: Mapping[str, int], sm: int) -> list[Variant]:
    """The default and the candidates, as the compiler lowers them."""
    found: list[Variant] = []
    for numbers in [None, *ROTARY]:
        tuning = dict(zip(("rotary_elements", "rotary_heads", "rotary_warps"), numbers, strict=True)) if numbers else {}
        launches = rotary.lower(rotary_node(kernel, limits, sm, tuning))
        if not any([one.kernel for one in launches] == other.kernels for other in found):
            label = "/".join(map(str, tuning.values())) or "default"
            found.append(Variant(tuning, [step_json(one) for one in launches], launches, label))
    return found


def rotary_loads(bench: Bench, kernel: PlanKernel, counts: list[int]) -> list[Load]:
    """Every place of the pool is written, in a random order."""
    constants = kernel.constants
    heads, kv_heads, size, rotated = (int(constants[one]) for one in ("H", "K", "D", "R"))
    dtype, pool, width = kernel.dtype("qkv"), kernel.dtype("kv"), (heads + 2 * kv_heads) * size
    table = POSITIONS * max(rotated // 2, 1)
    fixed = {
        "cos": bench.random(kernel.dtype("cos"), table, 1.0, 3),
        "sin": bench.random(kernel.dtype("sin"), table, 1.0, 4),
        "q_norm": bench.random(kernel.dtype("q_norm"), size, 1.0, 5),
        "k_norm": bench.random(kernel.dtype("k_norm"), size, 1.0, 6),
        "qkv_scale": bench.constant(0.5, width),
        "kv_scale": bench.constant(0.016, 2),
    }
    made = []
    for tokens in counts:
        rng = np.random.default_rng(tokens)
        kept = 2 * tokens * kv_heads * size
        moved = tokens * (width + heads * size) * NUMPY[dtype].itemsize + kept * NUMPY[pool].itemsize
        sets = [
            fixed
            | {
                "qkv": bench.random(dtype, tokens * width, 1.0, turn),
                "q": bench.allocate(tokens * heads * size * NUMPY[kernel.dtype("q")].itemsize),
                "kv": bench.allocate(kept * NUMPY[pool].itemsize),
                "positions": bench.send(rng.integers(0, POSITIONS, tokens, dtype=np.int32)),
                "token_slots": bench.send(rng.permutation(tokens).astype(np.int32)),
            }
            for turn in range(copies(moved))
        ]
        outputs = {"q": (kernel.dtype("q"), tokens * heads * size), "kv": (pool, kept)}
        made.append(Load(f"T={tokens}", {"T": tokens}, sets, outputs, moved))
    return made


def tune_rotary(bench: Bench, kernel: PlanKernel, limits: Mapping[str, int], deadline: float) -> Outcome | None:
    """``rotary_elements`` of a tile, ``rotary_heads`` of it, ``rotary_warps``."""
    with bench.memory():
        competing = rotary_variants(kernel, limits, bench.device.sm)
        return compete(bench, "rotary", competing, rotary_loads(bench, kernel, token_counts(bench.limits)), deadline)


def norm_variants(kernel: PlanKernel) -> list[Variant]:
    """The plan's own kernel, with other numbers of warps."""
    from zoo.compilers.cuda.aot import from_json

    own = from_json(dict(kernel.data))
    constants = kernel.constants
    args: list[Any] = [name if kind.startswith("*") else Size("T") if kind == "i32" else 1e-5 for name, kind in own.args]
    grid = (Size("T", 1, constants["ROWS"]), Size("", -(-constants["WIDTH"] // constants["BLOCK"])), Size("", 1))
    found = []
    for warps in [own.num_warps, *(one for one in WARPS if one != own.num_warps)]:
        launch = Launch(dataclasses.replace(own, num_warps=warps), grid, tuple(args))
        tuning = {} if warps == own.num_warps else {"row_warps": warps}
        found.append(Variant(tuning, [step_json(launch)], [launch], "default" if not tuning else f"{warps} warps"))
    return found


def norm_loads(bench: Bench, kernel: PlanKernel, counts: list[int]) -> list[Load]:
    """Every pointer gets a tensor of rows, which is more than a weight needs, and a scale gets a number."""
    width = int(kernel.constants["WIDTH"])
    pointers = [name for name, kind in kernel.data["args"] if kind.startswith("*")]
    made = []
    for tokens in counts:
        nbytes = {name: tokens * width * NUMPY[kernel.dtype(name)].itemsize for name in pointers if not name.endswith("scale")}
        moved = sum(size for name, size in nbytes.items() if name not in ("weight", "bias"))
        sets = [
            {
                name: bench.constant(0.05, width)
                if name.endswith("scale")
                else bench.allocate(nbytes[name])
                if name in WRITTEN
                else bench.random(kernel.dtype(name), tokens * width, 1.0, turn)
                for name in pointers
            }
            for turn in range(copies(moved))
        ]
        outputs = {name: (kernel.dtype(name), tokens * width) for name in pointers if name in WRITTEN}
        made.append(Load(f"T={tokens}", {"T": tokens}, sets, outputs, moved))
    return made


def tune_norm(bench: Bench, kernel: PlanKernel, deadline: float) -> Outcome | None:
    """``row_warps`` of the norm that a step launches most often."""
    with bench.memory():
        loads = norm_loads(bench, kernel, token_counts(bench.limits))
        return compete(bench, f"rows of {kernel.constants['WIDTH']}", norm_variants(kernel), loads, deadline)
