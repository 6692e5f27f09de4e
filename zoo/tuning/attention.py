"""Tiles of prefill and decode of the attention kernels, for one head size, group of heads and dtype of the pool.

T tokens, B sequences, P blocks, H heads, K key/value heads, D head size. Batches are laid out by the session's own code.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zoo.plugins.cached_attention import cuda as attention
from zoo.runtime.abi import Batch, EngineLimits
from zoo.runtime.cuda.steps import eager_step
from zoo.tuning.bench import Bench, copies, step_json
from zoo.tuning.shapes import PlanKernel, attention_node
from zoo.tuning.trial import Load, Outcome, Variant, compete
from zoo.weights.reader import NUMPY

SHARED = 227 << 10  # bytes of shared memory that a program may have
POOL = 4 << 30  # bytes of a pool, at most
WEIGHED = (1e-2, 2**-5)  # tolerance where weights of values are rounded to the pool's 16 bits, by another largest score
# (block_n, warps, stages)
DECODE = tuple(itertools.product((32, 64, 128, 256), (2, 4, 8), (2, 3, 4)))
# (block_m, block_n, warps, stages)
PREFILL = tuple(
    (block_m, block_n, warps, stages)
    for (block_m, warps), block_n, stages in itertools.product(((64, 4), (128, 8), (128, 4)), (32, 64, 128), (2, 3, 4))
)
# (new tokens, context) of each sequence
DECODE_LOADS = {"1 x 2048": [(1, 2048)], "64 x 1024": [(1, 1024)] * 64, "512 x 512": [(1, 512)] * 512}
PREFILL_LOADS = {
    "1 x 2048": [(2048, 2048)],
    "16 x 128": [(128, 128)] * 16,
    "1024 behind 7168": [(1024, 8192)],
}


class KernelShape:
    """What ``index_inputs`` and heads the session's steps ask for."""

    def __init__(self, kv_heads: int) -> None:
        self.index_inputs: tuple[str, ...] = ("token_slots", "prefill_tiles")
        self.kv_heads = kv_heads


def key_of(kernel: PlanKernel) -> str:
    """Its name in ``tuning.attention``."""
    constants = kernel.constants
    return attention.key_of(constants["D"], constants["H"] // constants["K"], kernel.dtype("kv") == "float8e4m3")


def candidates(kernel: PlanKernel, decode: bool) -> list[dict[str, int]]:
    """Tuning to try; none of it needs more shared memory than there is. The default is no tuning at all."""
    constants = kernel.constants
    wide, item = constants["BLOCK_D"], NUMPY[kernel.dtype("kv")].itemsize
    queries = NUMPY[kernel.dtype("q")].itemsize
    found = []
    if decode:
        for block_n, warps, stages in DECODE:
            values = block_n * wide / (32 * warps)  # of keys, for each thread
            if stages * 2 * block_n * wide * item <= SHARED and 16 <= values <= 256:
                found.append({"decode_block_n": block_n, "decode_warps": warps, "decode_stages": stages})
        return found
    for block_m, block_n, warps, stages in PREFILL:
        if (stages * 2 * block_n * item + block_m * queries) * wide <= SHARED:
            names = ("prefill_block_m", "prefill_block_n", "prefill_warps", "prefill_stages")
            found.append(dict(zip(names, (block_m, block_n, warps, stages), strict=True)))
    return found


def variants(kernel: PlanKernel, limits: Mapping[str, int], sm: int, decode: bool) -> list[Variant]:
    """The default and the candidates, as the compiler lowers them; doubles of the default are left out."""
    found: list[Variant] = []
    for tuning in [{}, *candidates(kernel, decode)]:
        launches = attention.lower(attention_node(kernel, limits, sm, {"attention": {key_of(kernel): tuning}}))
        first = [one for one in launches if one.kernel.source.endswith(":prefill")]
        chosen = [one for one in launches if one not in first] if decode else first
        if any([one.kernel for one in chosen] == other.kernels for other in found):
            continue
        label = "/".join(map(str, tuning.values())) or "default"
        found.append(Variant(tuning, [step_json(one) for one in chosen], chosen, label))
    return found


def fitting(wanted: Mapping[str, Sequence[tuple[int, int]]], limits: EngineLimits) -> dict[str, list[tuple[int, int]]]:
    """Loads that the engine's limits allow; the first is cut to them if it must be."""
    found = {}
    for name, sequences in wanted.items():
        tokens, longest = sum(new for new, _ in sequences), max(context for _, context in sequences)
        if len(sequences) <= limits.max_sequences and longest <= limits.max_context and tokens <= limits.max_tokens:
            found[name] = list(sequences)
    if not found:
        new, context = next(iter(wanted.values()))[0]
        context = min(context, limits.max_context)
        new = min(new, context, limits.max_tokens)
        found[f"{new} of {context}"] = [(new, context)]
    return found


def loads(bench: Bench, kernel: PlanKernel, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> list[Load]:
    """A pool for each, and block tables that rotate through it."""
    return [_load(bench, kernel, name, sequences) for name, sequences in wanted.items()]


def _load(bench: Bench, kernel: PlanKernel, name: str, sequences: Sequence[tuple[int, int]]) -> Load:
    constants = kernel.constants
    heads, kv_heads, size, block = (int(constants[one]) for one in ("H", "K", "D", "BLOCK_SIZE"))
    pool, out = kernel.dtype("kv"), kernel.dtype("out")
    counts, lengths = (np.array(column, np.int32) for column in zip(*sequences, strict=True))
    used = -(-lengths // block)
    nbytes = 2 * block * kv_heads * size * NUMPY[pool].itemsize
    window = int(constants["WINDOW"])
    seen = np.minimum(lengths, counts + window) if window else lengths
    moved = int(seen.sum()) * nbytes // block
    turns = max(1, min(copies(moved), POOL // nbytes // int(used.sum())))
    tables = _tables(used, turns)
    tokens = int(counts.sum())
    spread = 60.0 if pool == "float8e4m3" else 1.0
    shared = {
        "q": bench.random(kernel.dtype("q"), tokens * heads * size, 2.0, 1),
        "kv": bench.random(pool, int(1 + turns * used.sum()) * nbytes // NUMPY[pool].itemsize, spread, 2),
        "kv_scale": bench.constant(0.016, 2),
        "out_scale": bench.constant(0.011),
        "out": bench.allocate(tokens * heads * size * NUMPY[out].itemsize),
    }
    if extra := str(constants.get("EXTRA", "")):
        shared[extra] = bench.random(kernel.dtype("extra"), heads, 0.1, 3)
    limits = EngineLimits(tokens, len(sequences), len(sequences), int(used.max()) * block, int(1 + turns * used.sum()), block)
    sets, sizes = [], {}
    for table in tables:
        step = eager_step(_batch(counts, lengths, table), None, limits, KernelShape(kv_heads))
        sizes = step.sizes
        sets.append(shared | {tensor: bench.send(array) for tensor, array in step.arrays.items()})
    pairs = 0 if window else int((counts.astype(np.int64) * (2 * lengths - counts + 1) // 2).sum())
    outputs = {"out": (out, tokens * heads * size)}
    tolerance = None if out == "float8e4m3" else WEIGHED
    return Load(name, sizes, sets, outputs, moved, 4 * heads * size * pairs, tolerance)


def _tables(used: np.ndarray[Any, Any], turns: int) -> list[np.ndarray[Any, Any]]:
    """Block tables [B, P], each over other blocks in a random order."""
    total = int(used.sum())
    order = np.random.default_rng(0).permutation(np.arange(1, 1 + turns * total, dtype=np.int32)).reshape(turns, total)
    tables = []
    for blocks in order:
        table = np.zeros((len(used), int(used.max())), np.int32)
        for row, own in zip(table, np.split(blocks, np.cumsum(used)[:-1]), strict=True):
            row[: len(own)] = own
        tables.append(table)
    return tables


def _batch(counts: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], table: np.ndarray[Any, Any]) -> Batch:
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    parts = [np.arange(length - count, length, dtype=np.int32) for count, length in zip(counts, lengths, strict=True)]
    positions = np.concatenate(parts)
    return Batch(np.zeros_like(positions), positions, starts, lengths, {"full": table}, starts[1:] - np.int32(1))


def tune_attention(bench: Bench, kernel: PlanKernel, limits: Mapping[str, int], deadline: float) -> Outcome | None:
    """Prefill or decode, by what the kernel is."""
    decode = kernel.data["source"].endswith(":decode")
    wanted = fitting(DECODE_LOADS if decode else PREFILL_LOADS, bench.limits)
    with bench.memory():
        competing = variants(kernel, limits, bench.device.sm, decode)
        name = f"{'decode' if decode else 'prefill'} {key_of(kernel)}"
        return compete(bench, name, competing, loads(bench, kernel, wanted), deadline)
