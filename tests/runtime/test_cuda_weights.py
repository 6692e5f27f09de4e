"""Weights on a stand-in GPU: what each recipe takes, where it lies, and every byte against ``materialize``."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from cuda_standin import Driver
from cuda_standin import Kernel as StandinKernel

from zoo.errors import ArtifactError, CheckpointError, ResourceError
from zoo.plugins.weight_kernels import weight_kernels
from zoo.runtime.cuda import streaming, weights
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.runs import runs_of
from zoo.runtime.cuda.weights import (
    ALIGN,
    CHANNEL_SCALE,
    QUANTIZE,
    CompiledWeightKernels,
    Made,
    Quantized,
    Straight,
    arena_layout,
    load_weights,
    plan_weights,
)
from zoo.weights.bind import NUMPY, materialize
from zoo.weights.evaluate import _quantize
from zoo.weights.reader import Tensors
from zoo.weights.recipe import (
    Recipe,
    Weight,
    channel_scale,
    computed,
    concat,
    quantize,
    reshape,
    scale,
    slice_,
    tensor,
    transpose,
)

SHAPES = {
    "q": (32, 48),
    "k": (16, 48),
    "v": (16, 48),
    "norm": (48,),
    "half": (8, 32),
    "f32": (8, 32),
    "odd": (5, 7),
    "cube": (2, 3, 16),
}
KINDS = {"half": torch.float16, "f32": torch.float32}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    made = {name: torch.randn(shape, generator=generator).to(KINDS.get(name, torch.bfloat16)) for name, shape in SHAPES.items()}
    made["broken"] = torch.full((4, 16), float("nan"), dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("stored")
    names = list(made)
    safetensors.torch.save_file({name: made[name] for name in names[:4]}, folder / "a.safetensors")
    safetensors.torch.save_file({name: made[name] for name in names[4:]}, folder / "b.safetensors")
    return Tensors.from_files([folder / "a.safetensors", folder / "b.safetensors"])


def t(name: str) -> Recipe:
    return tensor(name, SHAPES[name])


def quantized(name: str, source: Recipe) -> list[Weight]:
    scales = channel_scale(source, 0)
    return [Weight(name, "float8e4m3", quantize(source, scales, 0)), Weight(f"{name}.scale", "float32", scales)]


QKV = concat([t("q"), t("k"), t("v")], 0)
TABLE = [
    Weight("embed", "bfloat16", t("q")),
    Weight("norm", "bfloat16", t("norm")),
    Weight("norm32", "float32", t("norm")),  # another dtype: made
    *quantized("qkv", QKV),
    *quantized("half", t("half")),
    *quantized("f32", slice_(t("f32"), 0, 3, 7)),
    *quantized("odd", t("odd")),  # 7 columns: made
    *quantized("turned", transpose(t("k"), (1, 0))),  # made
    Weight("joined", "bfloat16", QKV),
    Weight("part", "bfloat16", slice_(t("k"), 0, 4, 12)),
    Weight("columns", "bfloat16", slice_(t("k"), 1, 4, 12)),  # made
    Weight("row", "bfloat16", slice_(reshape(t("norm"), (1, 48)), 1, 16, 32)),
    Weight("flat", "bfloat16", reshape(t("cube"), (6, 16))),
    Weight("unit", "bfloat16", transpose(reshape(t("norm"), (1, 48)), (1, 0))),
    Weight("back", "bfloat16", transpose(t("k"), (1, 0))),  # made
    Weight("tied", "bfloat16", t("q")),
    Weight("cos", "float32", computed("rope_cos", (6, 4), rotary_dim=8, theta=10000.0)),
    Weight("x_scale", "float32", scale("layer.0.qkv.x")),
    Weight("only_scale", "float32", channel_scale(t("v"), 0, 100.0)),
    Weight("only_weight", "float8e4m3", quantize(t("v"), channel_scale(t("v"), 0, 50.0), 0)),
    Weight("empty", "bfloat16", slice_(t("q"), 0, 4, 4)),
]
SCALES = {"layer.0.qkv.x": 0.125}


def test_layout() -> None:
    slots, total = arena_layout(TABLE)
    assert list(slots) == [weight.name for weight in TABLE]
    assert slots["tied"] == slots["embed"]  # one copy of a tied embedding
    apart = sorted({(slot.offset, slot.nbytes) for slot in slots.values() if slot.nbytes})
    assert all(offset % ALIGN == 0 for offset, _ in apart)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(apart))
    assert apart[-1][0] + apart[-1][1] == total
    for weight in TABLE:
        slot = slots[weight.name]
        assert slot.dtype == weight.dtype and slot.nbytes == int(np.prod(weight.shape)) * NUMPY[weight.dtype].itemsize


def test_which_way_each_recipe_takes(tensors: Tensors) -> None:
    ways: dict[str, list[str]] = {"straight": [], "quantized": [], "made": []}
    names = {slot.offset: name for name, slot in reversed(arena_layout(TABLE)[0].items()) if slot.nbytes}
    for step in plan_weights(TABLE, tensors):
        match step:
            case Straight(slot, runs):
                ways["straight"].append(names[slot.offset])
                assert sum(run.nbytes for run in runs) == slot.nbytes
            case Quantized():
                ways["quantized"].append("+".join(names[slot.offset] for slot in (step.weight, step.scale) if slot))
            case Made(slot, _):
                ways["made"].append(names[slot.offset])
    assert ways == {
        "straight": ["embed", "norm", "joined", "part", "row", "flat", "unit"],
        "quantized": ["qkv+qkv.scale", "half+half.scale", "f32+f32.scale", "only_scale", "only_weight"],
        "made": ["norm32", "odd", "odd.scale", "turned", "turned.scale", "columns", "back", "cos", "x_scale"],
    }


def test_a_model_is_made_by_nothing_on_the_cpu(tensors: Tensors) -> None:
    """q, k, v joined and quantized, tied embeddings, norms: no step of a usual decoder goes through numpy."""
    table = [Weight("embed", "bfloat16", t("q")), *quantized("qkv", QKV), Weight("norm", "bfloat16", t("norm"))]
    assert not [step for step in plan_weights(table, tensors) if isinstance(step, Made)]


def standin(room: int = 1 << 24) -> Driver:
    """A GPU whose kernels do what those of ``zoo.plugins.weight_kernels`` do, in numpy."""
    cu = Driver(room=room)
    pointer, count, number = ctypes.c_uint64, ctypes.c_int32, ctypes.c_float

    def values(x: int, dtype: str, rows: int, columns: int) -> Any:
        return cu.view(x, NUMPY[dtype], rows * columns).reshape(rows, columns).astype(np.float32)

    for (name, dtype), kernel in weight_kernels().items():
        if name == "channel_scale":
            assert len(kernel.args) == len(CHANNEL_SCALE)

            def scales(grid: Any, x: int, scale: int, bad: int, columns: int, limit: float, dtype: str = dtype) -> None:
                peak = np.abs(values(x, dtype, grid[0], columns)).max(axis=1)
                if not np.isfinite(peak).all():
                    cu.view(bad, np.int32, 1)[0] = 1
                made = peak / np.float32(limit)
                cu.view(scale, np.float32, grid[0])[:] = np.where(made > 0, made, 1)

            cu.kernels[f"{name}.{dtype}"] = StandinKernel((pointer, pointer, pointer, count, number), scales)
        else:
            assert len(kernel.args) == len(QUANTIZE)

            def rounds(grid: Any, x: int, scale: int, y: int, columns: int, dtype: str = dtype) -> None:
                divisor = cu.view(scale, np.float32, grid[0])[:, None]
                made = _quantize(values(x, dtype, grid[0], columns), divisor, "float8e4m3")
                cu.view(y, np.uint8, made.size)[:] = made.view(np.uint8).reshape(-1)

            cu.kernels[f"{name}.{dtype}"] = StandinKernel((pointer, pointer, pointer, count), rounds)
    return cu


def kernels_of(device: Device) -> CompiledWeightKernels:
    loaded = device.load(b"\x7fELF")
    names = weight_kernels()
    return CompiledWeightKernels(device, {key: (device.function(loaded, ".".join(key)), 4, 0) for key in names})


@pytest.mark.parametrize("chunk", [1 << 20, 512, 100])
@pytest.mark.parametrize("window", [1 << 20, 300])
def test_every_byte(tensors: Tensors, monkeypatch: pytest.MonkeyPatch, chunk: int, window: int) -> None:
    """With buffers and windows of a few hundred bytes, so that pieces, rows and buffers end everywhere."""
    monkeypatch.setattr(weights, "WINDOW", window)
    monkeypatch.setattr(streaming.Streamer.__init__, "__defaults__", (8, chunk))
    cu = standin()
    device = Device(90, cu)
    stream, kernels = device.stream(), kernels_of(device)
    before = len(cu.live())
    places = load_weights(device, stream, TABLE, tensors, SCALES, kernels)
    assert list(places) == [weight.name for weight in TABLE]
    for weight in TABLE:
        assert places[weight.name] % ALIGN == 0
        if 0 not in weight.shape:
            wanted = materialize(weight, tensors, SCALES).reshape(-1).view(np.uint8)
            np.testing.assert_array_equal(cu.view(places[weight.name], np.uint8, wanted.size), wanted, err_msg=weight.name)
    assert len(cu.live()) == before + 1  # the arena
    device.close()
    assert cu.live() == []


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        (quantized("w", tensor("broken", (4, 16))), CheckpointError, "tensor broken: holds NaN or infinity, so it cannot be q"),
        ([Weight("w", "bfloat16", tensor("absent", (4, 16)))], CheckpointError, "tensor 'absent' is not in"),
        ([Weight("w", "bfloat16", tensor("q", (48, 32)))], CheckpointError, r"tensor 'q' is \[32, 48\], not \[48, 32\]"),
        ([Weight("w", "float32", scale("nothing"))], ArtifactError, "no calibrated scale for 'nothing'"),
        ([Weight("w", "float16", tensor("broken", (4, 16))), Weight("x", "int8", computed("?", (1,)))], ArtifactError, "unknown"),
    ],
)
def test_errors_are_those_of_the_cpu_and_leave_nothing(
    tensors: Tensors, table: list[Weight], error: type[Exception], words: str
) -> None:
    cu = standin()
    device = Device(90, cu)
    stream, kernels = device.stream(), kernels_of(device)
    before = len(cu.live())
    with pytest.raises(error, match=words):
        load_weights(device, stream, table, tensors, {}, kernels)
    with pytest.raises(error, match=words):
        for weight in table:
            materialize(weight, tensors, {})
    assert len(cu.live()) == before


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones((64, 64), dtype=torch.bfloat16)}, path)
    tensors = Tensors.from_files([path])
    with path.open("r+b") as file:
        file.truncate(4096)
    device = Device(90, standin())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte 4096, although it was longer"):
        load_weights(device, device.stream(), [Weight("w", "bfloat16", tensor("w", (64, 64)))], tensors, {}, kernels_of(device))


def test_no_room(tensors: Tensors) -> None:
    cu = standin(room=1024)
    device = Device(90, cu)
    with pytest.raises(ResourceError, match=r"cannot give .* for the weights: 1\.0 kB of its 1\.0 kB is free"):
        load_weights(device, device.stream(), TABLE, tensors, SCALES, kernels_of(device))


def test_without_a_checkpoint() -> None:
    device = Device(90, standin())
    table = [Weight("cos", "float32", computed("rope_cos", (6, 4), rotary_dim=8, theta=10000.0))]
    assert list(load_weights(device, device.stream(), table, None, {}, kernels_of(device))) == ["cos"]
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_weights(device, device.stream(), [Weight("w", "bfloat16", t("q"))], None, {}, kernels_of(device))


def test_runs_follow_the_files(tensors: Tensors) -> None:
    runs = runs_of(slice_(QKV, 0, 30, 50), tensors)
    assert runs is not None
    row = 48 * 2
    assert [(run.path.name, run.nbytes) for run in runs] == [
        ("a.safetensors", 2 * row),
        ("a.safetensors", 16 * row),
        ("a.safetensors", 2 * row),
    ]
    assert runs[0].offset == tensors.entry("q").start + 30 * row
    assert runs_of(transpose(t("cube"), (1, 0, 2)), tensors) is None
