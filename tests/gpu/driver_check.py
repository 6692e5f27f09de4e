"""Does the lowest layer of the cuda session work on this GPU? ``python3 tests/gpu/driver_check.py``, under a minute.

Kernels are compiled in other processes; this one imports neither torch nor triton, which is asserted at the end. Every line
that it prints ends in ``ok`` or in numbers; anything wrong is an AssertionError or a ZooError.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from gpu_tools import Compiled, compile_all, seconds, table

from zoo.errors import ArtifactError, CheckpointError, IncompatibleError, ResourceError
from zoo.plugins.kernels import Kernel
from zoo.plugins.weight_kernels import SOURCES, weight_kernels
from zoo.runtime.cuda.arguments import HIDDEN, Arguments
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.weights import CompiledWeightKernels, load_weights
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight, channel_scale, concat, quantize, slice_, tensor

SCALES = Kernel(
    "zoo.plugins.weight_kernels.kernels:quantize",
    (("x", "*fp32"), ("scale", "*fp32"), ("y", "*fp8e4nv"), ("columns", "i32")),
    (("BLOCK", 1024),),
)
ROWS: list[tuple[str, str]] = []


def note(what: str, found: str = "ok") -> None:
    ROWS.append((what, found))


def copies(device: Device, stream: int) -> None:
    size = 256 << 20
    pinned, back = device.pinned(size), device.pinned(size)
    place, other = device.allocate(size), device.allocate(size)
    pinned[:] = np.resize(np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8), size)
    back[:] = 0
    device.send(place, pinned, stream)
    device.copy(other, place, size, stream)
    device.fetch(back, other, stream)
    device.wait(stream)
    assert np.array_equal(pinned, back)
    device.fill(place, 7, size, stream)
    device.fill_float(place, 0.1, 4096, stream)
    device.fetch(back, place, stream)
    device.wait(stream)
    assert (back[: 4 * 4096].view(np.float32) == np.float32(0.1)).all() and (back[4 * 4096 :] == 7).all()
    start, stop = device.event(timing=True), device.event(timing=True)
    for name, work, moved in (
        ("pinned to GPU, GB/s", lambda: device.send(place, pinned, stream), size),
        ("GPU to pinned, GB/s", lambda: device.fetch(back, place, stream), size),
        ("within the GPU, read + write, GB/s", lambda: device.copy(other, place, size, stream), 2 * size),
    ):
        device.record(start, stream)
        for _ in range(4):
            work()
        device.record(stop, stream)
        device.wait_event(stop)
        note(name, f"{4 * moved / device.elapsed(start, stop) / 1e6:.1f}")
    for handle in (place, other, int(pinned.ctypes.data), int(back.ctypes.data)):
        device.free(handle)


def launches(device: Device, stream: int, made: Compiled) -> None:
    """A kernel with two hidden parameters; blocks; what a launch costs; graphs."""
    assert made.parameters == len(SCALES.args) + HIDDEN, f"{made.parameters} parameters in the PTX"
    function = device.function(device.load(made.cubin, "quantize"), made.entry, made.shared)
    cu, count = device._driver, 0
    while int(cu.cuFuncGetParamInfo(function, count)[0]) == 0:
        count += 1
    assert count == made.parameters, f"the driver counts {count} parameters"
    note("hidden parameters of this Triton", f"{count - len(SCALES.args)} (blocks give {HIDDEN})")
    rows, columns = 4, 1600
    x = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32) * 100
    scale = np.array([1, 2, 0.3, 4], np.float32)
    places = [device.allocate(x.nbytes) for _ in range(3)]
    device.send(places[0], x, stream)
    device.send(places[1], scale, stream)
    got, poison = np.empty((rows, columns), np.uint8), 0x7F
    params = Arguments([kind for _, kind in SCALES.args], (*places, columns))

    def launch() -> None:
        device.launch(function, (rows, 1, 1), made.warps, made.shared, params, stream)

    def result(queue: object = launch) -> np.ndarray:
        device.fill(places[2], poison, got.nbytes, stream)
        queue()  # type: ignore[operator]
        device.fetch(got, places[2], stream)
        device.wait(stream)
        return got.copy()

    wanted = np.clip(x / scale[:, None], -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(result(), wanted)
    params[3] = 800  # rows are half as long now: the kernel sees it
    short = result()
    assert np.array_equal(short.reshape(-1)[: 4 * 800].reshape(4, 800)[0], wanted[0, :800])
    assert (short.reshape(-1)[4 * 800 :] == poison).all()
    graph = device.capture(stream, launch)
    params[3] = columns
    assert np.array_equal(result(lambda: device.replay(graph, stream)), short), "a graph keeps its arguments"
    note("argument blocks, launch, capture, replay")
    many = 400
    began = time.perf_counter_ns()
    for _ in range(many):
        launch()
    note("launch, ns of the calling thread", f"{(time.perf_counter_ns() - began) / many:.0f}")
    device.wait(stream)
    began = time.perf_counter_ns()
    for _ in range(100_000):
        params[3] = columns
    note("writing an argument, ns", f"{(time.perf_counter_ns() - began) / 100_000:.0f}")
    spent = seconds(device, stream, lambda: [launch() for _ in range(200)] and None, 200)
    note("small kernel in a graph of 200, us", f"{spent * 1e6:.2f}")
    one = device.capture(stream, launch)
    began = time.perf_counter_ns()
    for _ in range(200):
        device.replay(one, stream)
    note("replay of a graph of one, ns of the calling thread", f"{(time.perf_counter_ns() - began) / 200:.0f}")
    device.wait(stream)
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            device.use()
            launch()
            device.wait(stream)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failed, failed
    note("another thread")


def refusals(device: Device, made: Compiled) -> None:
    for wrong, what in (
        (lambda: Device(80), IncompatibleError),
        (lambda: device.load(b"no cubin at all", "k"), ArtifactError),
        (lambda: device.function(device.load(made.cubin), "absent"), ArtifactError),
        (lambda: device.allocate(1 << 45, "the weights"), ResourceError),
    ):
        try:
            wrong()
        except what as error:
            print(f"  refused: {error}")
        else:
            raise AssertionError(f"not refused with {what.__name__}")
    note("refusals")


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    kinds = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    header, at = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": kinds[str(array.dtype)], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values()))


def weights(device: Device, stream: int, kernels: CompiledWeightKernels, folder: Path) -> None:
    """Every byte that ``load_weights`` puts on the GPU, against the CPU evaluator's."""
    rng = np.random.default_rng(2)
    arrays = {}
    for dtype, kind in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)):
        x = rng.standard_normal((700, 2080)) * np.exp(rng.uniform(-6, 6, (700, 1)))
        x[0], x[1] = 0, rng.choice([1.0, 448.0, 17.0, 19.0, -0.0], 2080)
        x[2] = rng.integers(-9, 9, 2080) * (1e-7 if dtype == "float16" else 1e-39)
        arrays[dtype] = x.astype(kind)
    arrays["nan"] = np.full((16, 32), np.nan, np.float16)
    write_safetensors(folder / "model.safetensors", arrays)
    table_ = [Weight("straight", "bfloat16", concat([tensor("bfloat16", (700, 2080)), tensor("bfloat16", (700, 2080))], 0))]
    for dtype in SOURCES:
        source = slice_(tensor(dtype, (700, 2080)), 0, 0, 690)
        scales = channel_scale(source, 0)
        table_ += [Weight(dtype, "float8e4m3", quantize(source, scales, 0)), Weight(f"{dtype}.scale", "float32", scales)]
    table_.append(Weight("made", "float32", tensor("bfloat16", (700, 2080))))
    with Tensors.open(folder) as tensors:
        places = load_weights(device, stream, table_, tensors, {}, kernels)
        for weight in table_:
            wanted = materialize(weight, tensors, {})
            got = np.empty_like(wanted)
            device.fetch(got, places[weight.name], stream)
            device.wait(stream)
            different = int((got.reshape(-1).view(np.uint8) != wanted.reshape(-1).view(np.uint8)).sum())
            assert not different, f"{weight.name}: {different} of {wanted.nbytes} bytes differ from the CPU's"
        source = tensor("nan", (16, 32))
        try:
            load_weights(device, stream, [Weight("w", "float32", channel_scale(source, 0))], tensors, {}, kernels)
        except CheckpointError as error:
            print(f"  refused: {error}")
        else:
            raise AssertionError("NaN was quantized")
    note("weights equal the CPU's, byte for byte")


def main() -> None:
    began = time.perf_counter()
    names = weight_kernels()
    compiled = compile_all([SCALES, *names.values()])
    note("compiling, s", f"{time.perf_counter() - began:.1f}")
    began = time.perf_counter()
    device = Device(90)
    note(f"{device.name}, {device.multiprocessors} SMs, CUDA {device.driver_version}; start, ms",
         f"{(time.perf_counter() - began) * 1e3:.0f}")  # fmt: skip
    try:
        stream = device.stream()
        copies(device, stream)
        launches(device, stream, compiled[SCALES])
        refusals(device, compiled[SCALES])
        functions = {}
        for key, kernel in names.items():
            made = compiled[kernel]
            functions[key] = (device.function(device.load(made.cubin), made.entry, made.shared), made.warps, made.shared)
        with tempfile.TemporaryDirectory() as folder:
            weights(device, stream, CompiledWeightKernels(device, functions), Path(folder))
    finally:
        device.close()
    assert not {"torch", "triton"} & set(sys.modules), "this process was to need neither torch nor triton"
    table(("what", "found"), ROWS)


if __name__ == "__main__":
    main()
