"""Which kernels ``pipelines.bench.kernels`` measures, on what. No GPU is needed to say so; scripts of tests/gpu are.

M rows, N outputs and K inputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.bench.kernel_table import FP8

POOLS = {"bfloat16": "bfloat16 cache", FP8: "FP8 cache"}
DECODE = ((64, 2048), (256, 1024), (512, 512), (1, 2048))  # sequences, context of each
# new tokens of each sequence, contexts
PREFILL = {"1 x 2,048": ([2048], [2048]), "2,048 of 16,384": ([2048], [16384]), "64 x 128": ([128] * 64, [128] * 64)}
PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
PRODUCT_ROWS = (1, 16, 64, 1024, 8192)
HEAD, HEAD_ROWS = (128256, 4096), (1, 64, 1024)
TOKENS = (8192, 64)
ELEMENTWISE = {
    "add rms_norm fp8": "add + RMS norm + quantize",
    "add rms_norm": "add + RMS norm",
    "gated silu fp8": "gated SiLU + quantize",
    "gated silu": "gated SiLU",
}
SAMPLED = (1, 64, 1024)  # rows of logits
SAMPLING = ("greedy", "top_k 50, top_p 0.9", "top_p 0.9, flat rows")

Tuning = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A row to be. Launches by name ("", "tuned"), none for what cuBLASLt does; a load, or M, N, K and dtype of a product."""

    kernel: str
    case: str
    launches: Mapping[str, Sequence[Any]]
    load: Callable[[], Any] | None = None
    product: tuple[int, int, int, str] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


def tuning_of(path: Path | None) -> dict[str, Any]:
    """The ``tuning`` section of a hardware profile; empty without one."""
    if path is None:
        return {}
    import yaml

    return dict(yaml.safe_load(path.read_text()).get("tuning") or {})


def variants(lower: Callable[[Tuning], Sequence[Any]], tuning: Tuning) -> dict[str, Sequence[Any]]:
    """The default launches, and those with tuning if they are others."""
    default, tuned = lower({}), lower(tuning)
    return {"": default} | ({"tuned": tuned} if [one.kernel for one in tuned] != [one.kernel for one in default] else {})


def few_rows(m: int, n: int, k: int, dtype: str, tuning: Tuning) -> list[Any]:
    """Launches that an engine has for a product of M rows; none where it calls cuBLASLt. Columns are scaled by y's reader."""
    import skinny_bench

    from zoo.plugins.skinny_gemm.cuda import alternatives

    x, w, y, *scales = skinny_bench.refs(n, k, dtype)
    found = alternatives(x, w, y, scales[1] if scales else None, None, tuning)
    return next((few.launches for few in found if m <= few.most), [])


def cases(tuning: Tuning) -> Iterator[Case]:
    """All of them; no GPU is needed for that."""
    import attention_bench
    import elementwise_bench
    import sampling_bench

    layers = {pool: attention_bench.Layer(pool=pool) for pool in POOLS}
    for pool, layer in layers.items():
        launches = variants(lambda given, layer=layer: layer.attention(**given)[1:], tuning)
        for sequences, context in DECODE:
            load = partial(attention_bench.decode_load, layer, sequences, context)
            yield Case(f"decode attention, {POOLS[pool]}", f"{sequences} x {context:,}", launches, load)
    for pool, layer in layers.items():
        launches = variants(lambda given, layer=layer: layer.attention(**given)[:1], tuning)
        for name, (counts, lengths) in PREFILL.items():
            load = partial(attention_bench.prefill_load, layer, counts, lengths)
            yield Case(f"prefill attention, {POOLS[pool]}", name, launches, load)
    products = [(f"FP8 {name}, {n} x {k}", (m, n, k, FP8)) for name, (n, k) in PRODUCTS.items() for m in PRODUCT_ROWS]
    products += [(f"bfloat16 head, {HEAD[0]} x {HEAD[1]}", (m, *HEAD, "bfloat16")) for m in HEAD_ROWS]
    for name, product in products:
        yield Case(name, row_count(product[0]), variants(partial(few_rows, *product), tuning), None, product)
    ops = {op.label: op for op in elementwise_bench.ops(elementwise_bench.HIDDEN, elementwise_bench.INNER, "bfloat16")}
    for label, name in ELEMENTWISE.items():
        width = elementwise_bench.INNER if label.startswith("gated") else elementwise_bench.HIDDEN
        for rows in TOKENS:
            load, launches = partial(ops[label].load, rows), variants(ops[label].launches, tuning)
            yield Case(name, f"{rows:,} x {width:,}", launches, load, None, {"writes": True})
    for pool, layer in layers.items():
        launches = variants(lambda given, layer=layer: layer.rotary_cache("ZooRotaryCache", **given), tuning)
        for tokens in TOKENS:
            load = partial(attention_bench.rotary_load, layer, tokens)
            yield Case(f"rotary + cache write, {POOLS[pool]}", f"{tokens:,} tokens", launches, load, None, {"writes": True})
    for name, kind, params, spread in sampling_bench.CASES:
        for rows in SAMPLED if name in SAMPLING else ():
            load = partial(sampling_bench.load, rows, params, spread)
            launches = {"": sampling_bench.cuda.launches(sampling_bench.VOCAB)[kind]}
            yield Case(f"sampling, {name}", row_count(rows), launches, load)


def row_count(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows > 1)}"
