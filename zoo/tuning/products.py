"""Tilings of the kernel for products of few rows, and up to how many rows it beats cuBLASLt.

M rows, N outputs, K inputs. For each shape and each bucket of rows the candidates are the plan's default, cuBLASLt, and a sweep;
they are compared and timed as the session runs them (``zoo.runtime.cuda.gemms``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from typing import Any

from zoo.plugins.kernels import Launch, TensorRef
from zoo.plugins.skinny_gemm import cuda as skinny
from zoo.tuning.bench import Bench, copies, step_json
from zoo.tuning.shapes import Product
from zoo.tuning.trial import GAIN, Load, Outcome, Timing, Variant, compete

BUCKETS = (16, 32, 64, 128)  # most rows of a kernel of its own
# bytes along K of a step and stages, rows of w, warps
SWEEP = tuple(itertools.product(((128, 3), (128, 4), (128, 6), (256, 2), (256, 3), (256, 4)), (64, 128), (4, 8)))
WAVES = (1.0, 1.4, 2.5)  # programs for each multiprocessor that K is split for, at least
LEAST_STEPS = 2  # of a program along K
FULL = 0.9  # of the shared memory of a multiprocessor that one program may take
FAST = (2e-2, 2**-4)  # tolerance of float8 products: cuBLASLt adds them in the few bits that tensor cores have
X_SCALE, W_SCALE = 0.011, 0.013


def tilings(bucket: int, product: Product, multiprocessors: int) -> list[skinny.Tiling]:
    """Candidates for a bucket of rows, the default first."""
    item = skinny.ITEMS[product.dtype]
    found = [skinny.tiling(bucket, product.n, product.k, product.dtype)]
    for ((size, stages), block_n, warps), wave in itertools.product(SWEEP, WAVES):
        steps, tiles = product.k * item // size, -(-product.n // block_n)
        able = [s for s in range(1, max(steps // LEAST_STEPS, 1) + 1) if product.k * item % (size * s) == 0]
        splits = next((s for s in able if tiles * s >= wave * multiprocessors), able[-1] if able else 1)
        one = skinny.Tiling(min(bucket, 128), block_n, size // item, splits, warps, stages)
        if one not in found and one.shared(product.dtype) <= FULL * skinny.SHARED:
            found.append(one)
    return found


def variants(product: Product, bucket: int, multiprocessors: int) -> list[Variant]:
    """The plan's default for so many rows, cuBLASLt, and the sweep."""
    default = dict(_launches(product, {})).get(bucket)
    found = [] if default is None else [_variant(product, bucket, default, {}, "default")]
    found.append(_variant(product, bucket, None, {}, "cuBLASLt"))
    first, *rest = tilings(bucket, product, multiprocessors)
    for tiles in rest if default is not None else [first, *rest]:
        numbers = {str(bucket): list(astuple(tiles))}
        launches = dict(_launches(product, {"skinny": {product.key: numbers}}))[bucket]
        found.append(_variant(product, bucket, launches, numbers, _label(tiles)))
    return found


def loads(bench: Bench, product: Product, bucket: int, rows: tuple[int, ...]) -> list[Load]:
    """Random operands; one load for each number of rows."""
    scaled = product.dtype == "float8e4m3"
    item, out = skinny.ITEMS[product.dtype], skinny.ITEMS[product.out]
    nbytes = product.n * product.k * item
    spread = 60.0 if scaled else 1.0
    weights = [bench.random(product.dtype, product.n * product.k, spread, seed) for seed in range(max(2, copies(nbytes)))]
    # rows are rounded up for cuBLASLt: buffers have them
    shared = {
        "x": bench.random(product.dtype, 2 * bucket * product.k, spread, 99),
        "y": bench.allocate(2 * bucket * product.n * out),
    }
    if scaled:
        shared |= {"x_scale": bench.constant(X_SCALE), "w_scale": bench.constant(W_SCALE, product.n)}
    sets = [shared | {"w": w} for w in weights]
    made = []
    for count in rows:
        moved = nbytes + count * (product.k * item + product.n * out)
        flops = 2 * count * product.n * product.k
        outputs = {"y": (product.out, count * product.n)}
        made.append(Load(f"M={count}", {"T": count}, sets, outputs, moved, flops, FAST if scaled else None))
    return made


def tune_product(bench: Bench, product: Product, most: int, deadline: float) -> Iterator[tuple[int, Outcome]]:
    """(bucket, outcome), bucket by bucket, up to the first in which cuBLASLt wins. ``most``: rows that a step may have.

    None for a shape that the kernel cannot do.
    """
    for bucket in BUCKETS if _launches(product, {}) else ():
        if bucket > most and bucket != BUCKETS[0]:
            return
        with bench.memory():
            rows = (1, min(bucket, most)) if bucket == BUCKETS[0] and most > 1 else (min(bucket, most),)
            candidates = variants(product, bucket, bench.device.multiprocessors)
            outcome = compete(bench, f"{product.key} M<={bucket}", candidates, loads(bench, product, bucket, rows), deadline)
        if outcome is None:
            return
        yield bucket, outcome
        if not outcome.complete or winner(outcome).variant.label == "cuBLASLt":
            return


def winner(outcome: Outcome) -> Timing:
    """The best tiling if it beats cuBLASLt by enough to be worth kernels of its own, else cuBLASLt."""
    library = cublas(outcome)
    return outcome.best if library is None or outcome.best.ratio(library) < GAIN else library


def cublas(outcome: Outcome) -> Timing | None:
    """cuBLASLt's time, where it has one."""
    return next((one for one in outcome.timings if one.variant.label == "cuBLASLt" and one.seconds), None)


def entry(product: Product, outcomes: Mapping[int, Outcome]) -> dict[str, list[int]] | None:
    """What ``tuning.skinny`` says of a shape: {most rows: tiling}; None where that is what stands there without it."""
    unchanged = {str(most): list(astuple(default(product, most))) for most in skinny.BUCKETS}
    found: dict[str, list[int]] = {}
    for bucket in sorted({*outcomes, *skinny.BUCKETS}):
        best = winner(outcomes[bucket]).variant if bucket in outcomes else None
        if best is not None and best.label == "cuBLASLt":
            break
        found[str(bucket)] = list(best.tuning[str(bucket)]) if best is not None and best.tuning else unchanged[str(bucket)]
    return None if found == unchanged else found


def default(product: Product, bucket: int) -> skinny.Tiling:
    return skinny.tiling(bucket, product.n, product.k, product.dtype)


def _launches(product: Product, tuning: Mapping[str, Any]) -> list[tuple[int, list[Launch]]]:
    """What the compiler makes of a product with this tuning: (most rows, launches)."""
    x = TensorRef("x", product.dtype, (1, "T", product.k))
    w, y = TensorRef("w", product.dtype, (product.n, product.k)), TensorRef("y", product.out, (1, "T", product.n))
    scaled = product.dtype == "float8e4m3"
    x_scale = TensorRef("x_scale", "float32", ()) if scaled else None
    w_scale = TensorRef("w_scale", "float32", (product.n,)) if scaled and not product.deferred else None
    return [(few.most, few.launches) for few in skinny.alternatives(x, w, y, x_scale, w_scale, tuning)]


def _variant(product: Product, bucket: int, launches: list[Launch] | None, tuning: Mapping[str, Any], label: str) -> Variant:
    scaled = product.dtype == "float8e4m3"
    counters = -(-product.n // 64) * -(-bucket // 16)  # tiles of the result, at most
    small = [{"most": bucket, "launches": [step_json(one) for one in launches]}] if launches is not None else []
    step = {
        "op": "gemm",
        "rows": ["T", 1, 1],
        "n": product.n,
        "k": product.k,
        "dtype": product.dtype,
        "out": product.out,
        "stored": "out_in",
        "deferred": product.deferred,
        **{name: {"tensor": name} for name in ("x", "w", "y")},
        **{name: {"tensor": name} if scaled else None for name in ("w_scale", "x_scale")},
        "small": small,
        "counters": counters,
    }
    return Variant(tuning, [step], launches or [], label)


def _label(tiles: skinny.Tiling) -> str:
    return "{}x{}x{}/{} w{} s{}".format(*astuple(tiles))
