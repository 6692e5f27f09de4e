"""How fast this GPU copies and reads its memory: the ceilings of whatever moves more than it computes. Part of kernel tables.

A reading sums int32 in tiles, a program each, and in torch's own way; the ceiling is the fastest of them. torch is imported late:
processes that compile need none.
"""

from __future__ import annotations

import gpu_tools  # noqa: F401  packages that need onnx are bare
import triton
import triton.language as tl

from zoo.plugins.kernels import Kernel, Launch, fixed

BYTES = 2 << 30  # far more than any cache
TILINGS = ((4096, 4), (8192, 8), (16384, 8), (16384, 16))  # int32 of a tile, warps


@triton.jit
def sum_tiles(x, out, BLOCK: tl.constexpr):
    """x [programs * BLOCK] -> out [programs]."""
    place = tl.program_id(0)
    values = tl.load(x + place.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + place, tl.sum(values, 0))


def launches() -> list[Launch]:
    """One for each tiling."""
    found = []
    for block, warps in TILINGS:
        kernel = Kernel("bandwidth:sum_tiles", (("x", "*i32"), ("out", "*i32")), (("BLOCK", block),), num_warps=warps)
        found.append(Launch(kernel, (fixed(BYTES // 4 // block), fixed(1), fixed(1)), ("x", "out")))
    return found


def copied() -> float:
    """Bytes a second, read and written both counted, by a kernel: a copy in a graph is the copy engine's, which is slower."""
    import torch
    from attention_on_gpu import microseconds

    source, target = (torch.zeros(BYTES // 4, dtype=torch.int32, device="cuda") for _ in range(2))
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_or(source, 1, out=target))
    return 2 * BYTES / min(microseconds([way], 10) for way in ways) * 1e6


def read() -> float:
    """Bytes a second. The kernels of ``launches`` are prepared already, and their sums are checked."""
    import torch
    from attention_on_gpu import carry_out, microseconds

    x = torch.randint(-9, 10, (BYTES // 4,), dtype=torch.int32, device="cuda")
    spent = [microseconds([lambda: x.view(torch.float32).amax()], 10)]
    for one in launches():
        programs = one.grid[0].at({})
        given = {"x": x, "out": torch.full((programs,), -1, dtype=torch.int32, device="cuda")}
        spent.append(microseconds([lambda one=one, given=given: carry_out([one], given, {})], 10))
        assert torch.equal(given["out"].long(), x.view(programs, -1).sum(1)), f"{one.kernel}: wrong sums"
    return BYTES / min(spent) * 1e6
