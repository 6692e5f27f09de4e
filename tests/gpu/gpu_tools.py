"""What the scripts of this folder share. They run with plain python3 where there is a GPU, torch, triton and cuda-bindings, and
neither hydra nor onnx-graphsurgeon: ``zoo.plugins`` is imported without its list of zoo ops.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# Rooms whose __init__ needs onnx; of them, scripts take ``cuda`` and ``kernels`` alone.
ROOMS = ("cached_attention", "fp8_gemm", "gated_activation", "rms_norm", "rotary_cache")
for room in ("zoo.plugins", *(f"zoo.plugins.{name}" for name in ROOMS)):
    if room not in sys.modules:
        sys.modules[room] = bare = types.ModuleType(room)
        bare.__path__ = [str(ROOT.joinpath(*room.split(".")))]
        if room.endswith(".gated_activation"):
            vars(bare).update(SILU=0, GELU=1, GELU_TANH=2, RELU=3)

from zoo.plugins.kernels import Kernel  # noqa: E402
from zoo.runtime.cuda.driver import Device  # noqa: E402

PEAKS = {"H200": 4.35e12, "H100": 3.35e12}  # bytes a second that can be read: measured on an H200, the datasheet's of an H100


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    entry: str
    warps: int
    shared: int
    parameters: int  # of its PTX, hidden ones included


def triton_kernel(kernel: Kernel, sm: int = 90) -> Any:
    """Triton's own object of a kernel, compiled as ``zoo.compilers.cuda.aot`` does it: only pointers are known to be aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = kernel.source.partition(":")
    function = getattr(importlib.import_module(module), name)
    types_, constants = dict(kernel.args), dict(kernel.constants)
    source = ASTSource(
        fn=function,
        signature={one: types_.get(one, "constexpr") for one in function.arg_names},
        constexprs={(place,): constants[one] for place, one in enumerate(function.arg_names) if one in constants},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, one in enumerate(function.arg_names)
            if types_.get(one, "").startswith("*")
        },
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def compile_kernel(kernel: Kernel, sm: int = 90) -> Compiled:
    """One cubin."""
    made = triton_kernel(kernel, sm)
    head = made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    return Compiled(made.asm["cubin"], made.metadata.name, made.metadata.num_warps, made.metadata.shared, head.count(".param"))


def compile_all(kernels: Sequence[Kernel]) -> dict[Kernel, Compiled]:
    """All of them, in processes of their own, so that this one holds no triton. They stay in a cache of Triton's, too."""
    distinct = list(dict.fromkeys(kernels))
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
    workers = max(1, min(len(os.sched_getaffinity(0)) - 1, len(distinct), 15))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(distinct, pool.map(compile_kernel, distinct), strict=True))


def peak(device: Device) -> float:
    return next((value for name, value in PEAKS.items() if name in device.name), PEAKS["H100"])


def seconds(device: Device, stream: int, work: Callable[[], None], count: int, repeats: int = 5) -> float:
    """Seconds of one of the ``count`` things that ``work`` queues: captured, replayed, the median of ``repeats``."""
    work()
    device.wait(stream)
    graph = device.capture(stream, work)
    start, stop = device.event(timing=True), device.event(timing=True)
    times = []
    for _ in range(repeats + 1):
        device.record(start, stream)
        device.replay(graph, stream)
        device.record(stop, stream)
        device.wait_event(stop)
        times.append(device.elapsed(start, stop))
    for handle in (graph, start, stop):
        device.free(handle)
    return sorted(times[1:])[repeats // 2] / 1e3 / count


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as what stands in them."""
    cells = [[str(one) for one in row] for row in (head, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(head))]
    for row in cells:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
