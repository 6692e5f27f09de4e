"""The least time that the steps of a run could have taken on their hardware (Williams et al. 2009, "Roofline").

A step must read every weight of the linear layers once (the head's only if it gives logits), read the keys and values that its
sequences have, write those of its new tokens, and do the multiplications. It takes at least as long as the slower of both:

    floor = max(bytes / bandwidth, sum over dtypes of FLOPs / FLOP/s)

with the figures of the hardware profile, which are the vendor's. Left out, so that it stays a floor: activations, norms, the
embedding's rows, sampling, launches, padding to captured sizes, and everything that the host does. Steps are those that ran: how
many there were, and how full, is the scheduler's doing and no part of the floor.

T tokens, R rows of logits; n new tokens of a sequence whose context is then L; w an attention window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zoo.benchmark.loop import StepNote
from zoo.runtime.abi import Int32

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8e4m3": 1}
FP8 = "float8e4m3"
GROUPS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # roles that ``quant.skip`` may name together


@dataclass(frozen=True)
class Demand:
    """What one model asks of its hardware.

    linears     dtype -> numbers in the weights of all linear layers but the head
    head        numbers in the head's weight, and ``head_dtype``
    windows     window (0: none) -> how many layers have it
    kv_numbers  numbers of keys and values that one token adds to one layer, kept as ``kv_dtype``
    pair_flops  of one query and one key in one layer, all heads: scores and the sum of values
    """

    linears: Mapping[str, int]
    head: int
    head_dtype: str
    windows: Mapping[int, int]
    kv_numbers: int
    kv_dtype: str
    pair_flops: int
    dtype: str


@dataclass
class Work:
    """Bytes and FLOPs of steps, [steps] each."""

    weight_bytes: np.ndarray[Any, Any]
    kv_bytes: np.ndarray[Any, Any]
    flops: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)


def demand_of(spec: Mapping[str, Any]) -> Demand:
    """From the ``spec`` of an engine's manifest. KeyError or TypeError when it lacks a number."""
    model, quant, dtype = spec["model"], spec["quant"], str(spec["dtype"])
    hidden, inner, size = (int(model[key]) for key in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads, layers = (int(model[key]) for key in ("num_heads", "num_kv_heads", "num_layers"))
    roles = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size, "o": heads * size, "up": inner, "down": inner}
    if model["mlp"] == "gated":
        roles["gate"] = inner
    skipped = set(quant["skip"]) if quant["method"] == "fp8" else {*roles, "lm_head"}
    skipped |= {role for group, members in GROUPS.items() if group in skipped for role in members}
    linears: dict[str, int] = {}
    for role, width in roles.items():
        kind = dtype if role in skipped else FP8
        linears[kind] = linears.get(kind, 0) + layers * hidden * width
    windows: dict[int, int] = {}
    for layer in range(layers):
        window = int(model["window"]) if not model["window_layers"] or layer in model["window_layers"] else 0
        windows[window] = windows.get(window, 0) + 1
    return Demand(
        linears,
        int(model["vocab_size"]) * hidden,
        dtype if "lm_head" in skipped else FP8,
        windows,
        2 * kv_heads * size,
        FP8 if quant.get("kv_cache") == "fp8" else dtype,
        4 * heads * size,
        dtype,
    )


def work_of(demand: Demand, steps: Sequence[StepNote]) -> Work:
    """What each step must move and compute."""
    tokens = np.array([int(one.query_starts[-1]) for one in steps], np.float64)
    rows = np.array([one.rows for one in steps], np.float64)
    sums = np.array([_moved_and_pairs(one.query_starts, one.kv_lengths, demand.windows) for one in steps], np.float64)
    moved, pairs = sums.reshape(-1, 2).T
    weights = sum(count * ITEM_SIZES[kind] for kind, count in demand.linears.items())
    made = Work(
        weights + demand.head * ITEM_SIZES[demand.head_dtype] * (rows > 0),
        moved * demand.kv_numbers * ITEM_SIZES[demand.kv_dtype],
    )
    parts = [(kind, 2 * count * tokens) for kind, count in demand.linears.items()]
    parts += [(demand.head_dtype, 2 * demand.head * rows), (demand.kv_dtype, demand.pair_flops * pairs)]
    for kind, flops in parts:
        made.flops[kind] = made.flops.get(kind, 0) + flops
    return made


def _moved_and_pairs(query_starts: Int32, kv_lengths: Int32, windows: Mapping[int, int]) -> tuple[int, int]:
    """Over all layers: tokens whose keys and values are read or written, and pairs of a query and a key that it sees."""
    lengths = kv_lengths.astype(np.int64)
    new = np.diff(query_starts).astype(np.int64)
    moved = pairs = 0
    for window, layers in windows.items():
        if window:
            read = np.minimum(lengths - new, window - 1)
            moved += layers * int((read + new).sum())
            pairs += layers * int((_seen(lengths, window) - _seen(lengths - new, window)).sum())
        else:
            moved += layers * int(lengths.sum())
            pairs += layers * int((new * lengths - new * (new - 1) // 2).sum())
    return moved, pairs


def _seen(positions: np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """Keys that the first so many queries of a sequence see, together: the sum of min(i, window) for i from 1."""
    short: np.ndarray[Any, Any] = np.minimum(positions, window)
    total: np.ndarray[Any, Any] = short * (short + 1) // 2 + (positions - short) * window
    return total


def roofline(spec: Mapping[str, Any], steps: Sequence[StepNote], seconds: float, tokens: int) -> dict[str, Any]:
    """The floor of a run that took ``seconds`` for so many output tokens; ``fraction`` is the floor's part of them.

    Where the profile states no rates, ``fraction`` is None and ``reason`` says so.
    """
    hardware = spec.get("hardware", {})
    try:
        demand = demand_of(spec)
        bandwidth = float(hardware["bandwidth"])
        stated = {str(kind): float(rate) for kind, rate in hardware["flops"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return _nothing(f"the engine's manifest does not describe its model and hardware ({error!r})")
    if not bandwidth or not stated.get(demand.dtype):
        return _nothing(f"the hardware profile {hardware.get('name')} states no bandwidth or no FLOP/s for {demand.dtype}")
    work = work_of(demand, steps)
    rates = {kind: stated.get(kind) or stated[demand.dtype] for kind in work.flops}
    moving = (work.weight_bytes + work.kv_bytes) / bandwidth
    computing = sum((flops / rates[kind] for kind, flops in work.flops.items()), np.zeros(len(steps)))
    floor = float(np.maximum(moving, computing).sum())
    return {
        "fraction": round(floor / seconds, 4),
        "floor_s": round(floor, 4),
        "output_tokens_per_s": round(tokens / floor, 1),
        "memory_bound_steps": int((moving >= computing).sum()),
        "weight_bytes": int(work.weight_bytes.sum()),
        "kv_bytes": int(work.kv_bytes.sum()),
        "flops": {kind: float(flops.sum()) for kind, flops in work.flops.items()},
        "bandwidth": bandwidth,
        "flops_per_s": rates,
        "reason": None,
    }


def _nothing(reason: str) -> dict[str, Any]:
    return {"fraction": None, "floor_s": None, "output_tokens_per_s": None, "reason": reason}
