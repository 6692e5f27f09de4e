"""Recipes carried out: against plain numpy over whole arrays, ONNX Runtime's QuantizeLinear, and in bounded memory."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.errors import ArtifactError, CheckpointError, ResourceError
from zoo.weights import bind, evaluate
from zoo.weights.bind import NUMPY, materialize, packed_layout, write_packed
from zoo.weights.reader import Tensors
from zoo.weights.recipe import (
    FLOAT8_MAX,
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

SHAPES = {"a": (6, 10), "b": (9, 10), "wide": (5, 33), "cube": (3, 4, 5), "row": (10,), "f32": (6, 10), "half": (6, 10)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    kinds = {"f32": torch.float32, "half": torch.float16}
    made = {name: torch.randn(shape, generator=generator).to(kinds.get(name, torch.bfloat16)) for name, shape in SHAPES.items()}
    folder = tmp_path_factory.mktemp("stored")
    safetensors.torch.save_file(made, folder / "model.safetensors")
    return Tensors.open(folder)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few elements, so that small arrays go through every path."""
    monkeypatch.setattr(evaluate, "TILE", 96)
    monkeypatch.setattr(evaluate, "BLOCK", 4)
    monkeypatch.setattr(bind, "RELEASE", 2)


def a(name: str) -> Recipe:
    return tensor(name, SHAPES[name])


def plain(recipe: Recipe, tensors: Tensors) -> np.ndarray:
    """The same recipe over whole arrays, in the obvious way; floats as float32."""
    parts = [plain(child, tensors) for child in recipe.inputs]
    match recipe.op:
        case "tensor":
            return tensors.array(recipe["name"]).astype(np.float32)
        case "transpose":
            return np.transpose(parts[0], recipe["perm"])
        case "concat":
            return np.concatenate(parts, recipe["axis"])
        case "slice":
            index: list[Any] = [slice(None)] * len(recipe.inputs[0].shape)
            index[recipe["axis"]] = slice(recipe["start"], recipe["stop"])
            return parts[0][tuple(index)]
        case "reshape":
            return parts[0].reshape(recipe.shape)
        case "channel_scale":
            others = tuple(axis for axis in range(parts[0].ndim) if axis != recipe["axis"] % parts[0].ndim)
            peak = np.abs(parts[0]).max(axis=others)
            return np.where(peak > 0, peak / np.float32(recipe["limit"]), 1).astype(np.float32)
        case "quantize":
            shape = [-1 if axis == recipe["axis"] % parts[0].ndim else 1 for axis in range(parts[0].ndim)]
            return np.clip(parts[0] / parts[1].reshape(shape), -FLOAT8_MAX, FLOAT8_MAX).astype(ml_dtypes.float8_e4m3fn)
    raise AssertionError(recipe.op)


QKV = transpose(concat([a("a"), a("b")], 0), (1, 0))
RECIPES = {
    "tensor": a("a"),
    "row": a("row"),
    "transpose": transpose(a("wide"), (1, 0)),
    "cube turned": transpose(a("cube"), (2, 0, 1)),
    "concat 0": concat([a("a"), a("b")], 0),
    "concat of a turned": QKV,
    "turned then joined": concat([transpose(a("a"), (1, 0)), transpose(a("b"), (1, 0))], 1),
    "concat -1": concat([a("a"), a("f32")], -1),
    "mixed dtypes": concat([a("a"), a("f32"), a("half")], 0),
    "slice 1": slice_(a("a"), 1, 3, 8),
    "slice of a turned": slice_(transpose(a("wide"), (1, 0)), 0, 7, 31),
    "slice of a concat": slice_(concat([a("a"), a("b")], 0), 0, 4, 12),
    "reshape": reshape(a("cube"), (6, 10)),
    "reshape of a turned": reshape(transpose(a("cube"), (1, 0, 2)), (20, 3)),
    "scales 0": channel_scale(a("b"), 0),
    "scales of a turned": channel_scale(QKV, 1),
    "scales of a turned cube": channel_scale(transpose(a("cube"), (2, 0, 1)), 1),
    "scales of float32": channel_scale(a("f32"), -1),
    "quantize": quantize(QKV, channel_scale(QKV, 1), 1),
    "quantize rows": quantize(a("f32"), channel_scale(a("f32"), 0), 0),
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("tiny_tiles")
def test_recipes_equal_whole_arrays(stored: Tensors, tmp_path: Path, name: str, kind: str) -> None:
    recipe = RECIPES[name]
    weight = Weight("w", "float8e4m3" if recipe.op == "quantize" else kind, recipe)
    wanted = plain(recipe, stored).astype(NUMPY[weight.dtype])
    made = materialize(weight, stored, {})
    assert made.shape == weight.shape and made.dtype == NUMPY[weight.dtype] and made.flags.c_contiguous
    assert made.tobytes() == np.ascontiguousarray(wanted).tobytes()
    write_packed(tmp_path / "w.bin", [weight], stored, {})
    assert (tmp_path / "w.bin").read_bytes() == made.tobytes()


def test_nothing_is_copied_when_nothing_changes(stored: Tensors) -> None:
    for recipe, dtype in ((a("a"), "bfloat16"), (slice_(a("a"), 0, 2, 5), "bfloat16"), (reshape(a("f32"), (60,)), "float32")):
        assert np.shares_memory(materialize(Weight("w", dtype, recipe), stored, {}), stored.array(next(recipe.leaves())["name"]))
    assert not np.shares_memory(materialize(Weight("w", "float32", a("a")), stored, {}), stored.array("a"))


def test_a_packed_file_is_laid_out_as_promised(stored: Tensors, tmp_path: Path) -> None:
    weights = [Weight(name, kind, recipe) for kind in ("float32", "bfloat16") for name, recipe in list(RECIPES.items())[:12]]
    layout, total = packed_layout(weights, align=256)
    seen: list[tuple[int, int]] = []
    write_packed(tmp_path / "w.bin", weights, stored, {}, lambda done, whole: seen.append((done, whole)), align=256, sync=True)
    raw = (tmp_path / "w.bin").read_bytes()
    assert len(raw) == total and [file.name for file in tmp_path.iterdir()] == ["w.bin"]
    end = 0
    for weight, place in zip(weights, layout, strict=True):
        assert place.offset % 256 == 0 and place.offset >= end and place.name == weight.name
        assert raw[place.offset : place.offset + place.nbytes] == materialize(weight, stored, {}).tobytes()
        assert not any(raw[end : place.offset]), "gaps are zeros"
        end = place.offset + place.nbytes
    assert seen == sorted(seen) and seen[-1] == (total, total)


def test_scales_and_constants() -> None:
    assert materialize(Weight("s", "float32", scale("x")), None, {"x": 0.25}) == np.float32(0.25)
    assert materialize(Weight("c", "float16", computed("constant", (2, 3), value=1.5)), None, {}).tolist() == [[1.5] * 3] * 2
    with pytest.raises(ArtifactError, match="no calibrated scale for 'y'"):
        materialize(Weight("s", "float32", scale("y")), None, {"x": 1.0})
    with pytest.raises(ArtifactError, match="unknown table 'nope'"):
        materialize(Weight("s", "float32", computed("nope", (1,))), None, {})


def test_a_file_with_odd_offsets(tmp_path: Path) -> None:
    """The format does not promise alignment of the data; odd offsets are read all the same."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"F32","shape":[3,4],"data_offsets":[1,49]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1" + values.tobytes())
    made = materialize(Weight("w", "float32", tensor("w", (3, 4))), Tensors.open(tmp_path), {})
    assert made.flags.aligned and (made == values).all()


def run_quantize_linear(x: np.ndarray, scales: np.ndarray, axis: int) -> bytes:
    kind = onnx.TensorProto.FLOAT8E4M3FN
    zero = onnx.helper.make_tensor("zero", kind, list(scales.shape), bytes(scales.size), raw=True)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["y"], axis=axis)],
        "q",
        [
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape),
            onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, scales.shape),
        ],
        [onnx.helper.make_tensor_value_info("y", kind, x.shape)],
        [zero],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": onnxruntime.OrtValue.ortvalue_from_numpy(x), "s": onnxruntime.OrtValue.ortvalue_from_numpy(scales)}
    return session.run_with_ort_values(["y"], feeds)[0].numpy().tobytes()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 30), st.sampled_from([1e-6, 0.01, 1.0, 300.0]))
def test_float8_equals_quantize_linear_and_ml_dtypes(seed: int, spread: float) -> None:
    generator = np.random.default_rng(seed)
    x = (generator.standard_normal((16, 40)) * spread).astype(np.float32)
    x.flat[:6] = [0.0, -0.0, 1e30, -1e30, 448.0, 464.0]
    scales = generator.uniform(0.3, 3.0, 40).astype(np.float32)
    made = evaluate._quantize(x, scales, "float8e4m3")
    assert made.tobytes() == run_quantize_linear(x, scales, 1)
    assert made.tobytes() == np.clip(x / scales, -448, 448).astype(ml_dtypes.float8_e4m3fn).tobytes()


def test_float8_of_every_kind_of_float32() -> None:
    """All upper halves of a float32, each with the lower halves around a tie; and every tie between two float8 values."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0xFFFF)])
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (codes[:-1] + codes[1:]) / 2
    x = np.concatenate([bits.view(np.float32), ties, -ties, np.nextafter(ties, 0), np.nextafter(ties, 500)])
    x = np.clip(x[np.isfinite(x)], -448, 448)
    assert evaluate._float8(x).tobytes() == x.astype(ml_dtypes.float8_e4m3fn).tobytes()


def test_a_channel_of_zeros_has_the_scale_one(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, 0.0], [448.0, -896.0]])
    safetensors.torch.save_file({"w": values}, tmp_path / "model.safetensors")
    tensors = Tensors.open(tmp_path)
    w = tensor("w", (2, 2))
    assert materialize(Weight("s", "float32", channel_scale(w, 0)), tensors, {}).tolist() == [1.0, 2.0]
    made = materialize(Weight("q", "float8e4m3", quantize(w, channel_scale(w, 0), 0)), tensors, {})
    assert made.astype(np.float32).tolist() == [[0.0, 0.0], [224.0, -448.0]]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_cannot_be_quantized(tmp_path: Path, kind: torch.dtype, value: float) -> None:
    safetensors.torch.save_file({"w": torch.tensor([[1.0, value]], dtype=kind)}, tmp_path / "model.safetensors")
    w = tensor("w", (1, 2))
    with pytest.raises(CheckpointError, match="tensor w: holds NaN or infinity"):
        materialize(Weight("q", "float8e4m3", quantize(w, channel_scale(w, 1), 1)), Tensors.open(tmp_path), {})


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.tensor([1.0, 1e5], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight 'x': values beyond the range of float16; build with dtype=bfloat16"):
        materialize(Weight("x", "float16", tensor("w", (2,))), Tensors.open(tmp_path), {})


def test_wrong_shapes_and_missing_checkpoints_are_named(stored: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'a' is \[6, 10\], not \[6, 11\]"):
        materialize(Weight("w", "float32", tensor("a", (6, 11))), stored, {})
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        materialize(Weight("w", "float32", a("a")), None, {})
    with pytest.raises(CheckpointError, match="'gone' is not in"):
        write_packed(
            tmp_path / "w.bin", [Weight("v", "float32", a("a")), Weight("w", "float32", tensor("gone", (1,)))], stored, {}
        )
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_disk_that_is_too_small(stored: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
        with pytest.raises(ResourceError, match="the weights take 240 bytes, the disk has 100 free"):
            write_packed(tmp_path / "w.bin", [Weight("w", "float32", a("a"))], stored, {})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(ResourceError, match="the disk is full; 240 bytes are needed"):
                write_packed(tmp_path / "w.bin", [Weight("w", "float32", a("a"))], stored, {})
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from zoo.weights.bind import write_packed
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight, channel_scale, quantize, tensor, transpose
folder = Path(sys.argv[1])
rows, columns = 40000, 1024
header = f'{{"w":{{"dtype":"BF16","shape":[{rows},{columns}],"data_offsets":[0,{rows * columns * 2}]}}}}'.encode()
with (folder / "model.safetensors").open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    for _ in range(rows // 1000):
        file.write(np.full(1000 * columns, 0x3F81, np.uint16).tobytes())
w = tensor("w", (rows, columns))
t = transpose(w, (1, 0))
weights = [Weight("a", "float32", w), Weight("b", "float32", t), Weight("c", "float8e4m3", quantize(t, channel_scale(t, 1), 1))]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_packed(folder / "out.bin", weights, Tensors.open(folder), {})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, (folder / "out.bin").stat().st_size >> 20)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """An 82 MB tensor written as float32, transposed and quantized: less than 90 MB more than before, mapped pages too."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 340 and grown < 90
