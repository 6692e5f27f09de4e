"""Attention and rotary kernels on a GPU: first right, against float64, then how fast. Needs torch and triton, nothing else.

    python tests/gpu/attention_bench.py [--check | --time]

Kernels run in CUDA graphs. Pools are larger than the L2 cache, and every call of a graph follows another block table. The
results stand at the end: for each case the configuration that ``lower`` chooses by itself, and the fastest of those tried.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
from attention_on_gpu import (
    DEVICE,
    OUT_SCALE,
    SCALES,
    TYPES,
    Layer,
    Load,
    carry_out,
    microseconds,
    prepare,
    reference,
    step_of,
)

FP8 = "float8e4m3"
BANDWIDTH = 4.35  # TB/s that an H200 reads
L2 = 60 << 20  # bytes

LAYERS = {
    "bf16": Layer(),
    "fp8": Layer(pool=FP8),
    "fp8 out8": Layer(pool=FP8, out=FP8),
    "bf16 out8": Layer(out=FP8),
    "fp16 12/12/64": Layer(12, 12, 64, dtype="float16", pool="float16", out="float16"),
    "bf16 28/4 window": Layer(28, 4, window=100, block_size=32),
    "fp8 28/4 window softcap": Layer(28, 4, pool=FP8, window=333, softcap=30.0, block_size=8),
    "bf16 16/8/256 softcap": Layer(16, 8, 256, softcap=20.0),
    "fp8 16/8/256": Layer(16, 8, 256, pool=FP8, block_size=64),
    "bf16 32/32/80": Layer(32, 32, 80),
    "fp8 32/32/80": Layer(32, 32, 80, pool=FP8, block_size=128),
    "bf16 32/8/96": Layer(32, 8, 96),
    "fp8 24/8/64": Layer(24, 8, 64, pool=FP8),
    "fp8 64/4": Layer(64, 4, pool=FP8),
    "bf16 32/1": Layer(32, 1),
    "fp8 32/1": Layer(32, 1, pool=FP8),
}
# relative to the largest output: the roundings of queries, weights and output in the types that are multiplied
TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, FP8: 5e-3}
COUNTS = [1, 300, 1, 129, 1, 2, 1, 17, 1, 64, 1]
LENGTHS = [1, 300, 700, 400, 129, 2, 64, 1000, 1333, 64, 128]

DECODE = [(1, 2048), (8, 2048), (64, 2048), (256, 1024), (512, 512)]
DECODE_TUNING = [(128, 4, 3), (64, 4, 3), (64, 4, 5), (128, 4, 5), (128, 8, 3), (64, 2, 3), (32, 1, 3), (256, 8, 3)]
PREFILL = {
    "1x2048": ([2048], [2048]),
    "4x2048": ([2048] * 4, [2048] * 4),
    "16x1000": ([1000] * 16, [1000] * 16),
    "64x128": ([128] * 64, [128] * 64),
    "2048 of 16384": ([2048], [16384]),
}
PREFILL_TUNING = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (64, 128, 4, 3)]
ROTARY_KINDS = ("ZooRotaryCache", "ZooRotaryCacheNorm", "ZooCacheWrite")
ROTARY_TUNING = [(4096, 8, 4), (2048, 8, 4), (2048, 4, 4), (4096, 8, 8), (8192, 8, 8), (1024, 8, 4)]


def decode_tuning(block_n: int, warps: int, stages: int) -> dict[str, int]:
    return {"decode_block_n": block_n, "decode_warps": warps, "decode_stages": stages, "decode_least": min(block_n, 128)}


def prefill_tuning(block_m: int, block_n: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "prefill_block_m": block_m,
        "prefill_block_n": block_n,
        "prefill_warps": warps,
        "prefill_stages": stages,
    }


def rotary_tuning(elements: int, heads: int, warps: int) -> dict[str, int]:
    return {"rotary_elements": elements, "rotary_heads": heads, "rotary_warps": warps}


# ---------------------------------------------------------------------------------------------------- right?


def check_attention(layers: Mapping[str, Layer] = LAYERS, **tuning: Any) -> int:
    """Every layer on a mixture of prefill, chunks and decode, with few and many splits. Says how many failed."""
    failed = 0
    for name, layer in layers.items():
        launches = layer.attention(**tuning)
        step = step_of(layer, COUNTS, LENGTHS)
        want = reference(step)
        largest = want.abs().max().item()
        for splits in (1, 5, 64):
            out = step.tensors["out"]
            out.copy_(torch.full(out.shape, float("nan"), device=DEVICE))
            carry_out(launches, step.tensors, step.sizes | {"S": splits})
            got = out[0].to(torch.float64)
            allowed = TOLERANCES[layer.pool if layer.pool == FP8 else layer.dtype] * largest
            if layer.out == FP8:
                got = got * OUT_SCALE
                error = ((got - want).abs() - want.abs() / 16).max().item()  # beyond half a step of float8
                allowed += OUT_SCALE / 512
            else:
                error = (got - want).abs().max().item()
            right = error <= allowed  # also False for NaN
            failed += not right
            print(f"{'ok  ' if right else 'FAIL'} {name:26} S={splits:<3} error {error / largest:.2e} of the largest")
    return failed


def rotary_inputs(layer: Layer, tokens: int, blocks: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kind = TYPES[layer.dtype]
    angles = torch.rand((4096, layer.size // 2), device=DEVICE) * 7
    width = (layer.heads + 2 * layer.kv_heads) * layer.size
    pool = torch.full((blocks, 2, layer.block_size, layer.kv_heads, layer.size), 7.0, device=DEVICE).to(TYPES[layer.pool])
    return {
        "qkv": torch.randn((1, tokens, width), device=DEVICE).to(kind),
        "cos": angles.cos().to(kind),
        "sin": angles.sin().to(kind),
        "positions": torch.randint(0, 4096, (tokens,), device=DEVICE, dtype=torch.int32),
        "q_norm": (torch.rand(layer.size, device=DEVICE) + 0.5).to(kind),
        "k_norm": (torch.rand(layer.size, device=DEVICE) + 0.5).to(kind),
        "token_slots": torch.randperm((blocks - 1) * layer.block_size, device=DEVICE)[:tokens].to(torch.int32) + layer.block_size,
        "kv_scale": torch.tensor(SCALES, device=DEVICE),
        "q": torch.full((1, tokens, layer.heads * layer.size), float("nan"), device=DEVICE, dtype=kind),
        "kv": pool,
    }


def check_rotary(kinds: tuple[str, ...] = ROTARY_KINDS, **tuning: Any) -> int:
    """Variants of one layer against float64."""
    failed = 0
    for kind, pool in itertools.product(kinds, ("bfloat16", FP8)):
        layer = Layer(pool=pool)
        given = rotary_inputs(layer, 333, 64)
        carry_out(layer.rotary_cache(kind, **tuning), given, {"T": 333})
        x = given["qkv"][0].to(torch.float64).view(333, -1, layer.size)
        q, k, v = x.split([layer.heads, layer.kv_heads, layer.kv_heads], 1)
        if kind == "ZooRotaryCacheNorm":
            q, k = (
                part * torch.rsqrt((part * part).mean(-1, keepdim=True) + 1e-6) * given[name].to(torch.float64)
                for part, name in ((q, "q_norm"), (k, "k_norm"))
            )
        if kind != "ZooCacheWrite":
            cos, sin = (given[name].to(torch.float64)[given["positions"].long()][:, None] for name in ("cos", "sin"))
            q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (part.chunk(2, -1) for part in (q, k)))
        rows = given["kv"].transpose(1, 2).flatten(0, 1).to(torch.float64)
        slots = given["token_slots"].long()
        errors = [(given["q"][0].to(torch.float64).view_as(q) - q).abs().max() / q.abs().max() * 256]
        for half, want in enumerate((k, v)):
            got = rows[slots, half]
            if pool == FP8:
                exact = want / torch.tensor(SCALES[half], dtype=torch.float64, device=DEVICE)
                exact = exact.clamp(-448, 448)
                errors.append(((got - exact).abs() / (exact.abs() / 16 + 2**-10)).max() / 1.001)
            else:
                errors.append((got - want).abs().max() / want.abs().max() * 256)
        untouched = torch.ones(len(rows), dtype=torch.bool, device=DEVICE)
        untouched[slots] = False
        right = all(error.item() <= 1 for error in errors) and bool((rows[untouched] == 7).all())
        failed += not right
        shown = " ".join(f"{error.item():.3f}" for error in errors)
        print(f"{'ok  ' if right else 'FAIL'} {kind:20} {pool:10} errors of q, k, v in roundings: {shown}")
    return failed


# ---------------------------------------------------------------------------------------------------- fast?


def decode_load(layer: Layer, sequences: int, context: int) -> Load:
    """Block tables through more of a pool than the L2 cache holds. Moved are keys and values."""
    size = sequences * context * 2 * layer.kv_heads * layer.size * torch.finfo(TYPES[layer.pool]).bits // 8
    step = step_of(layer, [1] * sequences, [context] * sequences, max(1, -(-2 * L2 // size)))
    return Load([step.tensors | {"block_table": table} for table in step.others], step.sizes, size)


def prefill_load(layer: Layer, counts: list[int], lengths: list[int]) -> Load:
    """Moved are queries, outputs, and keys and values once; the work is that of the pairs that the causal mask leaves."""
    step = step_of(layer, counts, lengths)
    pairs = sum(n * (length - n) + n * (n + 1) // 2 for n, length in zip(counts, lengths, strict=True))
    kept = 2 * sum(lengths) * layer.kv_heads * torch.finfo(TYPES[layer.pool]).bits // 8
    rows = sum(counts) * layer.heads * (TYPES[layer.dtype].itemsize + TYPES[layer.out].itemsize)
    return Load([step.tensors], step.sizes, (kept + rows) * layer.size, 4 * layer.heads * layer.size * pairs)


def rotary_load(layer: Layer, tokens: int) -> Load:
    given = [rotary_inputs(layer, tokens, 1024) for _ in range(4 if tokens > 64 else 1)]
    stored = 2 * layer.kv_heads * torch.finfo(TYPES[layer.pool]).bits // 8
    width = layer.heads + 2 * layer.kv_heads
    return Load(given, {"T": tokens}, tokens * layer.size * (2 * width + 2 * layer.heads + stored))


def time_decode(rows: list[str]) -> None:
    for pool, (sequences, context) in itertools.product(("bfloat16", FP8), DECODE):
        layer = Layer(pool=pool)
        load = decode_load(layer, sequences, context)
        size, chosen = load.moved, load.sizes["S"]
        found: list[tuple[float, str]] = []
        default = 0.0
        for tuning in [None, *DECODE_TUNING]:
            launches = layer.attention(**(decode_tuning(*tuning) if tuning else {}))[1:]
            for splits in sorted({1, max(chosen // 2, 1), chosen, chosen * 2}) if tuning else [chosen]:
                spent = microseconds(load.calls(launches, S=splits))
                default = default or spent
                if tuning:
                    found.append((spent, f"{tuning} S={splits}"))
        found.sort()
        best, how = found[0]
        speed = [size / spent * 1e-6 for spent in (default, best)]
        for spent, text in found[:6]:
            print(f"  decode {pool} {sequences}x{context} {spent:8.1f} us {size / spent * 1e-6:5.2f} TB/s  {text}")
        rows.append(
            f"decode  {pool:10} {sequences:>4}x{context:<5} default S={chosen:<3} {default:7.1f} us {speed[0]:5.2f} TB/s "
            f"{speed[0] / BANDWIDTH:4.0%}   best {best:7.1f} us {speed[1]:5.2f} TB/s {speed[1] / BANDWIDTH:4.0%}  {how}"
        )


def time_prefill(rows: list[str]) -> None:
    for pool, (name, (counts, lengths)) in itertools.product(("bfloat16", FP8), PREFILL.items()):
        layer = Layer(pool=pool)
        load = prefill_load(layer, counts, lengths)
        work = load.flops
        found: list[tuple[float, str]] = []
        for tuning in [None, *PREFILL_TUNING]:
            launches = layer.attention(**(prefill_tuning(*tuning) if tuning else {}))[:1]
            found.append((microseconds(load.calls(launches), 10), str(tuning)))
        default = found.pop(0)[0]
        found.sort()
        for spent, text in found:
            print(f"  prefill {pool} {name} {spent:8.1f} us {work / spent * 1e-6:6.0f} TFLOP/s  {text}")
        best, how = found[0]
        rows.append(
            f"prefill {pool:10} {name:14} default {default:8.1f} us {work / default * 1e-6:4.0f} TFLOP/s   "
            f"best {best:8.1f} us {work / best * 1e-6:4.0f} TFLOP/s  {how}"
        )


def time_rotary(rows: list[str]) -> None:
    cases = [("ZooRotaryCache", "bfloat16"), ("ZooRotaryCache", FP8), ("ZooRotaryCacheNorm", FP8), ("ZooCacheWrite", "bfloat16")]
    for (kind, pool), tokens in itertools.product(cases, (1, 64, 8192)):
        layer = Layer(pool=pool)
        load = rotary_load(layer, tokens)
        size = load.moved
        found = []
        for tuning in [None, *ROTARY_TUNING]:
            launches = layer.rotary_cache(kind, **(rotary_tuning(*tuning) if tuning else {}))
            found.append((microseconds(load.calls(launches)), str(tuning)))
        default = found.pop(0)[0]
        best, how = min(found)
        rows.append(
            f"{kind:18} {pool:10} T={tokens:<5} default {default:6.1f} us {size / default * 1e-3:5.0f} GB/s   "
            f"best {best:6.1f} us {size / best * 1e-3:5.0f} GB/s  {how}"
        )


def kernels_to_check() -> list[object]:
    found = [one for layer in LAYERS.values() for one in layer.attention()]
    for kind, pool in itertools.product(ROTARY_KINDS, ("bfloat16", FP8)):
        found += Layer(pool=pool).rotary_cache(kind)
    return found


def kernels_to_time() -> list[object]:
    found = []
    for pool in ("bfloat16", FP8):
        layer = Layer(pool=pool)
        for choice in DECODE_TUNING:
            found += layer.attention(**decode_tuning(*choice))[1:]
        for choice in PREFILL_TUNING:
            found += layer.attention(**prefill_tuning(*choice))[:1]
        for choice in ROTARY_TUNING:
            for kind in ROTARY_KINDS:
                found += layer.rotary_cache(kind, **rotary_tuning(*choice))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only whether they are right")
    parser.add_argument("--time", action="store_true", help="only how fast they are")
    options = parser.parse_args()
    begin = time.perf_counter()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    checks = [] if options.time else kernels_to_check()
    times = [] if options.check else kernels_to_time()
    prepare([*checks, *times, *(one for pool in ("bfloat16", FP8) for one in Layer(pool=pool).attention())])
    print(f"compiled after {time.perf_counter() - begin:.0f} s")
    failed = 0 if options.time else check_attention() + check_rotary()
    print(f"{failed} wrong, after {time.perf_counter() - begin:.0f} s", flush=True)
    rows: list[str] = []
    for timed in () if options.check else (time_decode, time_prefill, time_rotary):
        timed(rows)
        print(f"{timed.__name__} over after {time.perf_counter() - begin:.0f} s", flush=True)
    print("\n".join(rows))
    print(f"{failed} wrong; {time.perf_counter() - begin:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
