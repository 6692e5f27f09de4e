"""What ``attention_bench.py`` and its neighbours stand on: kernels compiled as the ``cuda`` compiler does it, launches, timing;
and for attention batches and a reference.

Needs torch and triton on the GPU's machine, nothing else: packages of ``zoo`` are entered without their ``__init__.py``.

Shape legend: T tokens, B sequences, P blocks, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_tools import Compiled, compile_all, triton_kernel

attention = importlib.import_module("zoo.plugins.cached_attention.cuda")
rotary = importlib.import_module("zoo.plugins.rotary_cache.cuda")
seam = importlib.import_module("zoo.plugins.kernels")
indices = importlib.import_module("zoo.runtime.cuda_indices")
abi = importlib.import_module("zoo.runtime.abi")

DEVICE = "cuda"
TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8e4m3": torch.float8_e4m3fn,
    "int32": torch.int32,
}
SCALES = (0.021, 0.013)
OUT_SCALE = 0.011
Tensors = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------------- compiling, launching


KERNELS: dict[str, Any] = {}  # by name, as Triton launches them
COMPILED: dict[Any, Compiled] = {}  # the same, as the driver takes them


def prepare(launches: Iterable[Any]) -> None:
    """Compile what is not there yet, on all cores."""
    missing = {one.kernel.name: one.kernel for one in launches if one.kernel.name not in KERNELS}
    if missing:
        made = compile_all(list(missing.values()))
        KERNELS.update({name: triton_kernel(kernel) for name, kernel in missing.items()})  # from Triton's cache
        COMPILED.update(made)


def carry_out(launches: Iterable[Any], tensors: Tensors, sizes: dict[str, int]) -> None:
    """Run launches. Scratch is made, full of NaN, when it is first seen."""
    for one in launches:
        grid = tuple(side.at(sizes) for side in one.grid)
        if not all(grid):
            continue
        args = []
        for arg in one.args:
            if isinstance(arg, seam.Scratch):
                if arg.name not in tensors:
                    tensors[arg.name] = torch.full((arg.size.at(sizes) // 4,), float("nan"), device=DEVICE)
                arg = arg.name
            args.append(tensors[arg] if isinstance(arg, str) else arg.at(sizes) if isinstance(arg, seam.Size) else arg)
        KERNELS[one.kernel.name][grid](*args, *dict(one.kernel.constants).values())


def microseconds(calls: Sequence[Callable[[], None]], least: int = 20) -> float:
    """Median time of one call: all of them in a graph, several times over, replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        repeats = -(-least // len(calls))
        with torch.cuda.graph(graph, stream=side):
            for call in [*calls] * repeats:
                call()
        times = []
        for _ in range(9):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(side)
            graph.replay()
            stop.record(side)
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return statistics.median(times[2:]) * 1e3 / (repeats * len(calls))


@dataclass(frozen=True)
class Load:
    """What a kernel is timed on: operands of one call after the other, the sizes of the step, the bytes that must be moved at
    least, and the work. Scratch belongs to the first set, and all share it."""

    sets: list[Tensors]
    sizes: dict[str, int]
    moved: int
    flops: int = 0

    def calls(self, launches: Iterable[Any], **sizes: int) -> list[Callable[[], None]]:
        """The launches on each set, with other sizes where they are given."""
        carry_out(launches, self.sets[0], self.sizes | sizes)  # makes the scratch
        return [partial(carry_out, launches, self.sets[0] | one, self.sizes | sizes) for one in self.sets]


# ---------------------------------------------------------------------------------------------------- nodes and batches


@dataclass(frozen=True)
class Layer:
    """One layer's attention. ``pool`` and ``out`` are dtypes."""

    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    dtype: str = "bfloat16"
    pool: str = "bfloat16"
    out: str = "bfloat16"
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0

    def attention(self, **tuning: Any) -> list[Any]:
        op = "ZooCachedAttention" + "Fp8" * (self.pool == "float8e4m3") + "Out8" * (self.out == "float8e4m3")
        width = self.heads * self.size
        inputs = [
            ("q", self.dtype, (1, "T", width)),
            ("kv", self.pool, ("blocks", 2, self.block_size, self.kv_heads, self.size)),
            ("block_table", "int32", ("B", "P")),
            ("query_starts", "int32", ("B+1",)),
            ("kv_lengths", "int32", ("B",)),
            ("prefill_tiles", "int32", ("W", 4)),
            *([("kv_scale", "float32", (2,))] if "Fp8" in op else []),
            *([("out_scale", "float32", ())] if op.endswith("Out8") else []),
        ]
        attrs = self._attrs() | {"scale": self.size**-0.5, "window": self.window, "softcap": self.softcap}
        return list(attention.lower(_node(op, attrs, inputs, [("out", self.out, (1, "T", width))], tuning)))

    def rotary_cache(self, kind: str, **tuning: Any) -> list[Any]:
        op = kind + "Fp8" * (self.pool == "float8e4m3")
        table = (4096, self.size // 2)
        shapes = {
            "qkv": (self.dtype, (1, "T", (self.heads + 2 * self.kv_heads) * self.size)),
            "cos": (self.dtype, table),
            "sin": (self.dtype, table),
            "positions": ("int32", ("T",)),
            "q_norm": (self.dtype, (self.size,)),
            "k_norm": (self.dtype, (self.size,)),
            "kv": (self.pool, ("blocks", 2, self.block_size, self.kv_heads, self.size)),
            "token_slots": ("int32", ("T",)),
            "kv_scale": ("float32", (2,)),
        }
        names = [*rotary.INPUTS[kind], *(["kv_scale"] if op.endswith("Fp8") else [])]
        outputs = [("q", self.dtype, (1, "T", self.heads * self.size)), ("kv", *shapes["kv"])]
        attrs = self._attrs() | {"rotary_dim": self.size, "interleaved": 0, "epsilon": 1e-6}
        return list(rotary.lower(_node(op, attrs, [(name, *shapes[name]) for name in names], outputs, tuning)))

    def _attrs(self) -> dict[str, Any]:
        return {
            "num_heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.size,
            "block_size": self.block_size,
        }


def _node(op: str, attrs: dict[str, Any], inputs: list[Any], outputs: list[Any], tuning: dict[str, Any]) -> Any:
    refs = [tuple(seam.TensorRef(*one) for one in ports) for ports in (inputs, outputs)]
    return seam.CudaNode(op, op, attrs, *refs, 90, {}, tuning)


@dataclass
class Step:
    """A ragged batch on the GPU, and the pool that it reads. Block tables ``others`` are for timing: the same, elsewhere."""

    layer: Layer
    counts: list[int]
    lengths: list[int]
    tensors: Tensors
    sizes: dict[str, int]
    others: list[torch.Tensor] = field(default_factory=list)


def step_of(layer: Layer, counts: list[int], lengths: list[int], rotations: int = 1, seed: int = 0) -> Step:
    """Random queries and a random pool, NaN where no token is (only with one rotation)."""
    rng = np.random.default_rng(seed)
    used = [-(-n // layer.block_size) for n in lengths]
    blocks = rotations * sum(used) + 1
    owned = np.split(rng.permutation(np.arange(1, blocks)), np.cumsum(used * rotations)[:-1])
    tables = np.zeros((rotations, len(counts), max(used)), np.int32)
    for place, block in enumerate(owned):
        tables[place // len(counts), place % len(counts), : len(block)] = block
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    starts = np.concatenate([[0], np.cumsum(counts)])
    arrays = [np.ascontiguousarray(one, np.int32) for one in (positions * 0, positions, starts, lengths)]
    batch = abi.Batch(*arrays, {"full": tables[0]}, np.zeros(1, np.int32))
    limits = abi.EngineLimits(len(positions), len(counts), 1, max(used) * layer.block_size, blocks, layer.block_size)
    torch.manual_seed(seed)
    shape = (blocks, 2, layer.block_size, layer.kv_heads, layer.size)
    if layer.pool == "float8e4m3":
        pool = torch.randn(shape, device=DEVICE, dtype=torch.float16).mul_(60).to(TYPES[layer.pool])
    else:
        pool = torch.randn(shape, device=DEVICE, dtype=TYPES[layer.pool])
    if rotations == 1:
        dead = torch.ones((blocks, layer.block_size), dtype=torch.bool)
        for row, n in zip(tables[0], lengths, strict=True):
            place = np.arange(n)
            dead[row[place // layer.block_size], place % layer.block_size] = False
        raw = pool.view(torch.uint8) if layer.pool == "float8e4m3" else pool
        raw.transpose(1, 2)[dead.to(DEVICE)] = 127 if layer.pool == "float8e4m3" else float("nan")
    tiles = indices.prefill_tiles(batch, limits)
    singles = [n for n, c in zip(lengths, counts, strict=True) if c == 1]
    tensors = {
        "q": torch.randn((1, len(positions), layer.heads * layer.size), device=DEVICE).mul_(2).to(TYPES[layer.dtype]),
        "kv": pool,
        "block_table": torch.from_numpy(tables[0]).to(DEVICE),
        "query_starts": torch.from_numpy(arrays[2]).to(DEVICE),
        "kv_lengths": torch.from_numpy(arrays[3]).to(DEVICE),
        "prefill_tiles": torch.from_numpy(tiles.copy()).to(DEVICE),
        "kv_scale": torch.tensor(SCALES, device=DEVICE),
        "out_scale": torch.tensor(OUT_SCALE, device=DEVICE),
        "out": torch.full((1, len(positions), layer.heads * layer.size), float("nan"), device=DEVICE).to(TYPES[layer.out]),
    }
    splits = indices.decode_splits(max(len(singles), 1), layer.kv_heads, max(singles, default=1), limits)
    sizes = {"T": len(positions), "B": len(counts), "P": max(used), "W": len(tiles), "S": splits, "J": int(splits > 1)}
    return Step(layer, counts, lengths, tensors, sizes, [torch.from_numpy(table).to(DEVICE) for table in tables])


def reference(step: Step) -> torch.Tensor:
    """[T, H * D] float64, sequence by sequence."""
    layer, tensors = step.layer, step.tensors
    group = layer.heads // layer.kv_heads
    rows = []
    first = 0
    for row, count, length in zip(tensors["block_table"].tolist(), step.counts, step.lengths, strict=True):
        blocks = torch.tensor(row[: -(-length // layer.block_size)], device=DEVICE)
        pool = tensors["kv"]
        pool = pool.view(torch.uint8)[blocks].view(pool.dtype)  # torch gathers no float8
        keys, values = (pool[:, half].to(torch.float64).flatten(0, 1)[:length].transpose(0, 1) for half in range(2))
        if layer.pool == "float8e4m3":
            keys, values = keys * SCALES[0], values * SCALES[1]
        queries = tensors["q"][0, first : first + count].to(torch.float64).view(count, layer.kv_heads, group, -1)
        scores = torch.einsum("nkgd,kld->kgnl", queries, keys) * layer.size**-0.5
        if layer.softcap:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        position = torch.arange(length - count, length, device=DEVICE)[:, None]
        place = torch.arange(length, device=DEVICE)[None, :]
        seen = place <= position
        if layer.window:
            seen = seen & (place > position - layer.window)
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
        rows.append(torch.einsum("kgnl,kld->nkgd", weights, values).reshape(count, -1))
        first += count
    return torch.cat(rows)
