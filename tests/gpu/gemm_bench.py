"""GEMMs of a Llama-8B on this GPU: cuBLASLt and the skinny kernel; correct first, then how fast. And how fast weights load.

    python3 tests/gpu/gemm_bench.py [check] [cublas] [skinny] [load]        all of them without an argument; under two minutes

Weights are fresh random numbers and outputs are poisoned with NaN before each check. Every timed graph goes round over several
copies of the weights, more than any cache holds, as the layers of a model do. M rows, N outputs, K inputs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import skinny_bench
import torch
from gpu_tools import peak, seconds, table
from load_bench import load

from zoo.errors import IncompatibleError
from zoo.runtime.cuda.cublaslt import CublasLt, Gemm, Pointers
from zoo.runtime.cuda.driver import Device

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
HEAD = (128256, 4096)
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
COLD = 256 << 20  # bytes of weights that a graph goes round over
# kind -> (dtype of operands, dtype of y, scaling, fast)
KINDS = {
    "fp8 outer": ("float8e4m3", "bfloat16", "outer", False),
    "fp8 outer fast": ("float8e4m3", "bfloat16", "outer", True),
    "fp8 alpha fast": ("float8e4m3", "bfloat16", "alpha", True),
    "fp8 tensor fast": ("float8e4m3", "bfloat16", "tensor", True),
    "bf16": ("bfloat16", "bfloat16", "none", False),
}
TORCH = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8e4m3": getattr(torch, "float8_e4m3fn"),  # noqa: B009
}
CUDA = "cuda"


@dataclass
class Operands:
    """Tensors of one product, and their addresses. The reference is float32 on the GPU, without TF32."""

    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    x_scale: torch.Tensor
    w_scale: torch.Tensor
    bias: torch.Tensor
    lies: torch.Tensor

    @property
    def pointers(self) -> Pointers:
        return Pointers(*[one.data_ptr() for one in (self.x, self.lies, self.y, self.x_scale, self.w_scale, self.bias)])


def operands(gemm: Gemm, seed: int) -> Operands:
    generator = torch.Generator(CUDA).manual_seed(seed)
    x, w = (torch.randn(rows, gemm.k, device=CUDA, generator=generator).to(TORCH[gemm.x]) for rows in (gemm.m, gemm.n))
    xs, ws = (torch.rand(count, device=CUDA, generator=generator) + 0.5 for count in
              ((gemm.m if gemm.scaling == "outer" else 1), (gemm.n if gemm.scaling in ("outer", "alpha") else 1)))  # fmt: skip
    y = torch.full((gemm.m, gemm.n), float("nan"), device=CUDA, dtype=TORCH[gemm.y])
    bias = torch.randn(gemm.n, device=CUDA, generator=generator).to(TORCH[gemm.y])
    return Operands(x, w, y, xs, ws, bias, w.t().contiguous() if gemm.turned else w)


def reference(gemm: Gemm, given: Operands) -> torch.Tensor:
    y = given.x.float() @ given.w.float().t()
    if gemm.scaling != "none":
        y = y * given.x_scale[:, None] * given.w_scale[None, :]
    return y + given.bias.float() if gemm.bias else y


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest error, as a part of the largest value. NaN where something was not written."""
    return float((got.float() - wanted).abs().max() / wanted.abs().max())


def check(device: Device, blas: CublasLt, stream: int) -> None:
    """Every kind of product against torch in float32. Limits are of the largest value: rounding y costs 2^-8 in bfloat16 and
    2^-11 in float16; sums of FP8 tensor cores keep about 13 bits, the fast ones through all of K."""
    rows: list[tuple[Any, ...]] = []
    for gemm, limit in (
        (Gemm(48, 512, 1024, "bfloat16", "bfloat16"), 2**-8 + 1e-5),
        (Gemm(48, 512, 1024, "bfloat16", "float32", turned=True), 1e-5),
        (Gemm(13, 512, 1024, "float16", "float16", bias=True), 2**-10),
        (Gemm(48, 512, 4096, "float8e4m3", "bfloat16", "outer"), 2**-8 + 2e-3),
        (Gemm(1, 512, 4096, "float8e4m3", "float16", "outer"), 2e-3),
        (Gemm(13, 512, 4096, "float8e4m3", "float32", "outer"), 2e-3),
        (Gemm(48, 512, 4096, "float8e4m3", "bfloat16", "outer", bias=True), 2**-8 + 2e-3),
        (Gemm(48, 512, 4096, "float8e4m3", "bfloat16", "outer", fast=True), 2**-8 + 5e-3),
        (Gemm(48, 512, 4096, "float8e4m3", "bfloat16", "tensor", fast=True), 2**-8 + 5e-3),
        (Gemm(48, 512, 4096, "float8e4m3", "bfloat16", "alpha"), 2**-8 + 2e-3),
    ):
        what = (
            f"{gemm.x} -> {gemm.y}, M {gemm.m}, {gemm.scaling}{' turned' * gemm.turned}{' bias' * gemm.bias}{' fast' * gemm.fast}"
        )
        given = operands(gemm, len(rows))
        wanted = reference(gemm, given)
        torch.cuda.synchronize()
        try:
            blas.run(blas.plan(gemm), given.pointers, stream)
        except IncompatibleError:
            rows.append((what, "cuBLASLt has none", ""))
            continue
        device.wait(stream)
        found = error(given.y, wanted)
        rows.append((what, f"{found:.1e}", "ok" if found < limit else f"WRONG, over {limit:.1e}"))
    print(f"\ncuBLASLt {blas.version}: error as a part of the largest value")
    table(("product", "error", ""), rows)
    assert not any("WRONG" in row[2] for row in rows)


def timed(device: Device, blas: CublasLt, stream: int, gemm: Gemm, choice: int = 0) -> float:
    """Seconds of one product, over cold weights."""
    item = 1 if gemm.x == "float8e4m3" else 2
    copies = max(2, min(32, -(-COLD // (gemm.n * gemm.k * item))))
    given = operands(gemm, 0)
    weights = [given.lies] + [given.lies.clone() for _ in range(copies - 1)]
    plan = blas.plan(gemm, choice)
    calls = [given.pointers._replace(w=one.data_ptr()) for one in weights]
    torch.cuda.synchronize()

    def work() -> None:
        for pointers in calls:
            blas.run(plan, pointers, stream)

    spent = seconds(device, stream, work, copies)
    assert not torch.isnan(given.y[0, 0])
    return spent


def cublas(device: Device, blas: CublasLt, stream: int) -> list[Callable[[], None]]:
    """Tables of M by shape: TFLOP/s, and the bytes read and written as a part of the memory's bandwidth."""
    most = peak(device)
    tables = []
    for kind, (x, y, scaling, fast) in KINDS.items():
        shapes = [*SHAPES, HEAD] if kind == "bf16" else list(SHAPES)
        rows = []
        for m in ROWS:
            cells = []
            for n, k in shapes:
                head = (n, k) == HEAD
                if head and m > 1024:
                    cells.append("")
                    continue
                gemm = Gemm(m, n, k, x, "float32" if head else y, scaling, fast=fast)
                try:
                    spent = timed(device, blas, stream, gemm)
                except IncompatibleError:
                    cells.append("none")
                    continue
                item, out = 1 if x == "float8e4m3" else 2, 4 if head else 2
                moved = n * k * item + m * k * item + m * n * out
                cells.append(f"{2 * m * n * k / spent / 1e12:.0f} {moved / spent / most:.0%} {spent * 1e6:.1f}us")
            rows.append((m, *cells))
        head_row = ("M", *[f"{n}x{k}" for n, k in shapes])
        tables.append(lambda kind=kind, head_row=head_row, rows=rows: (print(f"\ncuBLASLt {kind}: TFLOP/s, % of bandwidth, time"),
                                                                      table(head_row, rows)))  # fmt: skip
    rows = []
    for m in (16, 64, 1024):
        for n, k in SHAPES:
            gemm = Gemm(m, n, k, "float8e4m3", "bfloat16", "outer")
            count = len(blas.choices(gemm, 6))
            spent = [timed(device, blas, stream, gemm, choice) for choice in range(count)]
            if spent:
                best = int(np.argmin(spent))
                rows.append((m, f"{n}x{k}", count, best, f"{spent[0] / spent[best]:.2f}"))
    tables.append(lambda: (print("\nfp8 outer: the best of the first choices of the heuristic, against its first"),
                           table(("M", "shape", "choices", "best", "faster by"), rows)))  # fmt: skip
    return tables


def main() -> None:
    wanted = sys.argv[1:] or ["check", "cublas", "skinny", "load"]
    torch.backends.cuda.matmul.allow_tf32 = False
    began = time.perf_counter()
    torch.zeros(1, device=CUDA)
    device = Device(90)
    stream = device.stream()
    blas = CublasLt(device)
    print(f"{device.name}, cuBLASLt {blas.version}, bandwidth taken as {peak(device) / 1e12:.2f} TB/s")
    tables: list[Callable[[], Any]] = []
    spent = {}
    for name, part in (
        ("check", lambda: check(device, blas, stream)),
        ("skinny", lambda: tables.extend(skinny_bench.skinny(device, stream))),
        ("cublas", lambda: tables.extend(cublas(device, blas, stream))),
        ("load", lambda: tables.extend(load(device, stream))),
    ):
        if name in wanted:
            start = time.perf_counter()
            part()
            torch.cuda.empty_cache()
            spent[name] = f"{time.perf_counter() - start:.0f} s"
    for show in tables:
        show()
    blas.close()
    device.close()
    print(f"\n{spent}, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
