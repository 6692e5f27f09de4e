"""Every kernel of the ``cuda`` target on the GPU at hand, beside what this very GPU can do, as one Markdown table.

    python -m pipelines.bench.kernels [--tuning conf/hardware/h200-sxm.yaml] [--json FILE] [--list]

Needs torch, triton and cuda-bindings, and the scripts of tests/gpu. First the ceilings are measured: copying and reading memory,
and large products by cuBLASLt. Then kernels are checked, and timed in CUDA graphs over operands that no cache holds. A kernel
cannot be faster than its bytes at the memory's speed, nor than its work at that of large products; "of the ceiling" is the longer
of the two times as a part of what was measured, and "reached" is in the unit of that one.

Shapes are those of Llama-3.1-8B, tilings the default ones; rows that say "tuned" have those of a hardware profile, where it has
others. Products are launched as an engine does it, overlapping (``zoo.plugins.overlap``); other kernels wait for each other.

M rows, N outputs and K inputs of a product.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.bench.kernel_cases import ELEMENTWISE, Case, Tuning, cases, tuning_of
from pipelines.bench.kernel_table import FP8, Ceilings, Row, as_json, micro, table

ROOT = Path(__file__).resolve().parents[2]
LARGE = ((8192, 8192, 8192), (8192, 28672, 4096), (8192, 4096, 14336))  # M, N, K of the products whose best is the ceiling


class Machine:
    """The GPU, through the driver and through torch; kernels are compiled, all at once, when it is made."""

    def __init__(self, found: Sequence[Case], tuning: Tuning) -> None:
        import attention_on_gpu
        import bandwidth
        import sampling_bench
        import skinny_bench
        import torch

        from zoo.runtime.cuda.cublaslt import CublasLt
        from zoo.runtime.cuda.driver import Device

        drawn = sampling_bench.cuda.launches(sampling_bench.DRAWN)["sample"]
        launches = [one for case in found for some in case.launches.values() for one in some]
        launches += [*bandwidth.launches(), *drawn, *(one for given in ({}, tuning) for one in attention(given))]
        attention_on_gpu.prepare(launches)
        torch.zeros(1, device="cuda")
        self.device = Device(90)
        self.stream, self.blas = self.device.stream(), CublasLt(self.device)
        skinny = {one.kernel for case in found if case.product for some in case.launches.values() for one in some}
        self.functions = skinny_bench.loaded(self.device, {kernel: attention_on_gpu.COMPILED[kernel] for kernel in skinny})
        self._weights: tuple[Any, list[Any]] = (None, [])

    def ceilings(self) -> Ceilings:
        import bandwidth
        from gemm_bench import Gemm, timed

        best = {}
        for dtype, scaling in (("bfloat16", "none"), (FP8, "tensor")):
            gemms = [Gemm(*shape, dtype, "bfloat16", scaling, fast=dtype == FP8) for shape in LARGE]
            best[dtype] = max(2 * one.m * one.n * one.k / timed(self.device, self.blas, self.stream, one) for one in gemms)
        return Ceilings(bandwidth.copied(), bandwidth.read(), **best)

    def check(self, tuning: Tuning) -> None:
        """Kernels against float64, or their like in numpy, as the scripts of tests/gpu do it; skinny products when timed."""
        import attention_bench
        import elementwise_bench
        import gemm_bench
        import sampling_bench

        failed = 0
        for given in ({}, tuning) if tuning else ({},):
            failed += attention_bench.check_attention({name: attention_bench.LAYERS[name] for name in ("bf16", "fp8")}, **given)
            failed += attention_bench.check_rotary(("ZooRotaryCache",), **given)
            for op in elementwise_bench.ops(elementwise_bench.HIDDEN, elementwise_bench.INNER, "bfloat16"):
                for reason in [elementwise_bench.check(op, rows, given) for rows in (1, 37) if op.label in ELEMENTWISE]:
                    failed += bool(reason)
                    print(f"{'FAIL' if reason else 'ok  '} {op.label} {reason}")
        gemm_bench.check(self.device, self.blas, self.stream)
        sampling_bench.check_greedy(((1, sampling_bench.VOCAB), (64, sampling_bench.VOCAB)))
        sampling_bench.check_candidates(rows=6)
        sampling_bench.check_distribution()
        if failed:
            raise SystemExit(f"{failed} wrong; what is wrong is not timed")

    def close(self) -> None:
        self.blas.close()
        self.device.close()

    def measure(self, case: Case) -> Iterator[Row]:
        """A row for each variant of the case."""
        import attention_on_gpu

        if case.product:
            yield from self._product(case, *case.product)
            return
        load = case.load() if case.load else None
        for name, launches in case.launches.items():
            spent = attention_on_gpu.microseconds(load.calls(launches), 10 if load.flops else 20) / 1e6
            yield Row(case.kernel, label(case.case, name), spent, load.moved, load.flops, **case.row)

    def _product(self, case: Case, m: int, n: int, k: int, dtype: str) -> Iterator[Row]:
        import gemm_bench
        import skinny_bench

        from zoo.runtime.cuda.cublaslt import m_bucket

        fp8 = dtype == FP8
        gemm = gemm_bench.Gemm(m_bucket(m), n, k, dtype, "bfloat16" if fp8 else "float32", "tensor" if fp8 else "none", fast=fp8)
        library = gemm_bench.timed(self.device, self.blas, self.stream, gemm)
        moved = (n * k + m * k) * (1 if fp8 else 2) + m * n * (2 if fp8 else 4)
        for name, launches in case.launches.items():
            spent, beside = library, "by cuBLASLt"
            if launches:
                if self._weights[0] != (n, k, dtype):
                    self._weights = (None, [])  # first let go of the others
                    self._weights = (n, k, dtype), skinny_bench.random_weights(n, k, dtype)
                given = skinny_bench.product(m, self._weights[1], dtype, deferred=True)
                _, spent, _ = skinny_bench.measured(self.device, self.stream, launches, self.functions, given, -(-n // 64) * 8)
                beside = f"cuBLASLt {micro(library)}"
            yield Row(case.kernel, label(case.case, name), spent, moved, 2 * m * n * k, math=dtype, beside=beside)


def attention(tuning: Tuning) -> list[Any]:
    """All launches that ``Machine.check`` runs besides those that are timed."""
    import attention_bench

    return [one for name in ("bf16", "fp8") for one in attention_bench.LAYERS[name].attention(**tuning)]


def label(case: str, variant: str) -> str:
    return f"{case}, {variant}" if variant else case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", type=Path, help="a hardware profile, to measure its tilings, too")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--list", action="store_true", help="only say what would be measured; needs no GPU")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests" / "gpu")]
    importlib.import_module("gpu_tools")  # before any other room of zoo: those whose packages need onnx are bare
    tuning = tuning_of(arguments.tuning)
    found = list(cases(tuning))
    if arguments.list:
        for case in found:
            print(case.kernel, "|", case.case, "|", *(one.kernel.name for some in case.launches.values() for one in some))
        return 0
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        machine = Machine(found, tuning)
        print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
        ceilings = machine.ceilings()
        print(f"{ceilings} after {time.perf_counter() - started:.0f} s", flush=True)
        machine.check(tuning)
        print(f"checked after {time.perf_counter() - started:.0f} s", flush=True)
        rows = [row for case in found for row in machine.measure(case)]
    taken = time.perf_counter() - started
    print(f"{machine.device.name}, cuBLASLt {machine.blas.version}, {datetime.now(UTC):%Y-%m-%d}, {taken:.0f} s\n")
    print("\n".join(table(rows, ceilings)))
    if arguments.json:
        arguments.json.write_text(json.dumps({"gpu": machine.device.name} | as_json(rows, ceilings), indent=1))
    machine.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
