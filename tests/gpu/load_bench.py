"""How fast weights come from safetensors files in memory to this GPU. Part of gemm_bench.py."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_tools import compile_all, table

from zoo.plugins.weight_kernels import weight_kernels
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.streaming import Piece, Streamer
from zoo.runtime.cuda.weights import CompiledWeightKernels, load_weights
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight, channel_scale, quantize, tensor

SHAPE, COUNT = (8192, 16384), 15  # 268 MB of bfloat16 each: 4 GB


def write(path: Path) -> None:
    """``COUNT`` matrices of finite bfloat16."""
    nbytes = SHAPE[0] * SHAPE[1] * 2
    names = [f"w{number}" for number in range(COUNT)]
    header = {
        name: {"dtype": "BF16", "shape": list(SHAPE), "data_offsets": [place * nbytes, (place + 1) * nbytes]}
        for place, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = np.random.default_rng(0).standard_normal(16 << 20).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(COUNT * nbytes // len(block)):
            file.write(block)


def load(device: Device, stream: int) -> list[Callable[[], Any]]:
    """GB/s of the file: straight, quantized, and by threads and size of buffers."""
    names = weight_kernels()
    functions = {}
    for (key, kernel), made in zip(names.items(), compile_all(list(names.values())).values(), strict=True):
        del kernel
        functions[key] = (device.function(device.load(made.cubin), made.entry, made.shared), made.warps, made.shared)
    kernels = CompiledWeightKernels(device, functions)
    rows: list[tuple[Any, ...]] = []
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112
    with tempfile.TemporaryDirectory(dir=place) as folder:
        write(Path(folder) / "model.safetensors")
        with Tensors.open(Path(folder)) as tensors:
            sources = [tensor(f"w{number}", SHAPE) for number in range(COUNT)]
            total = sum(tensors.entry(f"w{number}").nbytes for number in range(COUNT))
            straight = [Weight(f"w{number}", "bfloat16", source) for number, source in enumerate(sources)]
            quantized = []
            for number, source in enumerate(sources):
                scales = channel_scale(source, 0)
                quantized += [
                    Weight(f"w{number}", "float8e4m3", quantize(source, scales, 0)),
                    Weight(f"s{number}", "float32", scales),
                ]
            for name, weights in (("straight", straight), ("straight again", straight), ("quantized", quantized)):
                began = time.perf_counter()
                found = load_weights(device, stream, weights, tensors, {}, kernels)
                spent = time.perf_counter() - began
                rows.append((f"load_weights, {name}", "", "", f"{spent:.2f}", f"{total / spent / 1e9:.1f}"))
                device.free(min(found.values()))
            arena = device.allocate(total)
            for threads, chunk in ((1, 16), (4, 16), (8, 16), (12, 16), (4, 64), (8, 8), (8, 32), (8, 4)):
                began = time.perf_counter()
                streamer = Streamer(device, stream, total, threads, chunk << 20)
                start = time.perf_counter()
                to = arena
                for number in range(COUNT):
                    entry = tensors.entry(f"w{number}")
                    streamer.add(Piece(tensors.file_of(f"w{number}"), entry.start, entry.nbytes, to))
                    to += entry.nbytes
                streamer.finish()
                done = time.perf_counter()
                streamer.close()
                rows.append((f"streaming; {1e3 * (start - began):.0f} ms to pin", threads, f"{chunk} MiB", f"{done - start:.2f}",
                             f"{total / (done - start) / 1e9:.1f}"))  # fmt: skip
            device.free(arena)
    return [lambda: (print("\nweights from files in memory"), table(("what", "threads", "buffer", "s", "GB/s"), rows))]
