"""The safetensors reader: bit for bit what the safetensors library reads, and nothing but CheckpointError for hostile files."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.errors import CheckpointError
from zoo.weights import reader
from zoo.weights.reader import INDEX, MAX_HEADER, NUMPY, Tensors, read_json

QUIET = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "float8e4m3": torch.float8_e4m3fn,
    "float8e5m2": torch.float8_e5m2,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def test_every_dtype_reads_as_the_library_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {name: torch.randint(0, 2, (3, 5), generator=generator).to(kind) for name, kind in TORCH.items()}
    stored |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.randn(7, 3, generator=generator).bfloat16()}
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt", "note": 'a "quoted" {note}'})
    with Tensors.open(tmp_path) as tensors:
        assert tensors.names == sorted(stored)
        for name, tensor in stored.items():
            array = tensors.array(name)
            assert tensors.shape(name) == tuple(tensor.shape) == array.shape
            assert array.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert not array.flags.writeable
            if name in TORCH:
                assert tensors.dtype(name) == name and array.dtype == NUMPY[name]


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    big = np.arange(1 << 20, dtype=np.float32)
    safetensors.numpy.save_file({"a": big, "b": big}, tmp_path / "model.safetensors")
    tracemalloc.start()
    with Tensors.open(tmp_path) as tensors:
        views = [tensors.array("a"), tensors.array("b")]
        assert tracemalloc.get_traced_memory()[1] < 200_000
        assert all((view == big).all() for view in views)
        tensors.release("a")
        assert (views[0] == big).all(), "released pages are read again"
    tracemalloc.stop()


def test_an_array_outlives_its_tensors(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.arange(5, dtype=np.int32)}, tmp_path / "model.safetensors")
    tensors = Tensors.open(tmp_path)
    array = tensors.array("a")
    tensors.close()
    tensors.close()
    assert array.tolist() == [0, 1, 2, 3, 4]


@QUIET
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]),
            st.lists(st.integers(0, 5), max_size=4),
        ),
        max_size=6,
    )
)
def test_any_good_file_reads_bit_for_bit(tmp_path: Path, chosen: dict[str, tuple[str, list[int]]]) -> None:
    generator = np.random.default_rng(len(chosen))
    stored = {name: np.asarray(generator.random(shape) * 200, dtype=kind) for name, (kind, shape) in chosen.items()}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(stored, path)
    library = safetensors.numpy.load_file(path)
    with Tensors.open(tmp_path) as tensors:
        assert tensors.names == sorted(library)
        for name, array in library.items():
            assert tensors.array(name).dtype == array.dtype and tensors.shape(name) == array.shape
            assert tensors.array(name).tobytes() == array.tobytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "", None]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | st.just([1 << 40, 1 << 40]) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3) | JSON,
    }
)


@QUIET
@given(st.dictionaries(st.text(max_size=4), ENTRIES | JSON, max_size=4) | JSON, st.binary(max_size=40))
def test_hostile_headers_are_refused_or_true(tmp_path: Path, header: Any, data: bytes) -> None:
    path = write(tmp_path / "x.safetensors", json.dumps(header).encode(), data)
    try:
        tensors = Tensors.from_files([path])
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert sum(tensors.array(name).nbytes for name in tensors.names) == len(data), "what is accepted covers the data exactly"


@QUIET
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_empty(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        assert Tensors.from_files([path]).names == []
    except CheckpointError as error:
        assert str(path) in str(error)


@QUIET
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_header_byte_never_escapes(tmp_path: Path, place: int, value: int) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32), "bb": np.zeros(7, np.int8)}, path)
    raw = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    raw[place % end] = value
    path.write_bytes(raw)
    try:
        tensors = Tensors.from_files([path])
        assert sum(tensors.array(name).nbytes for name in tensors.names) <= len(raw)
    except CheckpointError:
        pass


@QUIET
@given(st.integers(0, 200))
def test_truncation_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32), "b": np.zeros(7, np.int8)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: min(size, len(raw) - 1)])
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        Tensors.from_files([path])


REFUSED = [
    ({"a": entry(), "b": entry(offsets=(4, 12))}, b"0" * 12, "overlaps"),
    ({"a": entry(), "b": entry(offsets=(12, 20))}, b"0" * 20, "hole"),
    ({"a": entry(offsets=(0, 12))}, b"0" * 12, "takes 8 bytes"),
    ({"a": entry(offsets=(0, 800))}, b"0" * 8, "not inside the file"),
    ({"a": entry(offsets=(8, 0))}, b"0" * 8, "not inside the file"),
    ({"a": entry()}, b"0" * 9, "the file has 9"),
    ({"a": entry(dtype="F128")}, b"0" * 8, "known are F64"),
    ({"a": entry(shape=[1 << 62, 4])}, b"0" * 8, "takes"),
    ({"a": entry(shape=[-2])}, b"0" * 8, "list of at most"),
    ({"a": entry(shape=[True, 2])}, b"0" * 8, "list of at most"),
    ({"a": entry(shape=[2.0])}, b"0" * 8, "list of at most"),
    ({"a": entry() | {"pickle": "x"}}, b"0" * 8, "exactly dtype"),
    ({"a": [1]}, b"", "exactly dtype"),
    ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    ([], b"", "not a JSON object"),
    (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"0", "twice"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"", "not usable JSON"),
    (b'{"a": 1' + b"0" * 5000 + b"}", b"", "not usable JSON"),
    (b"\xff\xfe{}", b"", "UTF-8"),
    (b"version https://git-lfs", b"", "not valid JSON"),
]


@pytest.mark.parametrize(("header", "data", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        Tensors.from_files([path])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("raw", "length", "message"),
    [
        (b"{}", 1 << 63, "claims"),
        (b"{}", 3, "claims"),
        (b"{}" + b" " * 30, (16 << 20) + 1, "claims"),
        (b"", 0, "not valid JSON"),
    ],
)
def test_header_lengths(tmp_path: Path, raw: bytes, length: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tensors.from_files([write(tmp_path / "x.safetensors", raw, b"", length)])


@pytest.mark.parametrize(
    "bomb",
    [b"[" + b"[]," * (5 << 20) + b"[]]", b"{" + b",".join(b'"%x":1' % n for n in range(1_500_000)) + b"}", b" " * (17 << 20)],
)
def test_big_headers_cost_little_memory(tmp_path: Path, bomb: bytes) -> None:
    """At most eight times the largest header; the first alone would be 300 MB of lists."""
    path = write(tmp_path / "x.safetensors", bomb)
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        Tensors.from_files([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MAX_HEADER


def shards(folder: Path, placed: dict[str, str] | None = None) -> Path:
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, folder / "one.safetensors")
    safetensors.numpy.save_file({"b": np.full(4, 2, np.float16)}, folder / "two.safetensors")
    data = {"metadata": {"total_size": 20}, "weight_map": placed or {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(data))
    return folder


def test_shards(tmp_path: Path) -> None:
    with Tensors.open(shards(tmp_path)) as tensors:
        assert tensors.names == ["a", "b"] and tensors.array("b").tolist() == [2, 2, 2, 2]
        assert [file.name for file in tensors.files] == ["one.safetensors", "two.safetensors"]
        assert tensors.file_of("b").name == "two.safetensors"


def test_symbolic_links_to_blobs_are_followed(tmp_path: Path) -> None:
    """The Hugging Face cache keeps files as blobs and links to them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    assert Tensors.open(tmp_path / "snapshot").names == ["a"]


@pytest.mark.parametrize(
    "file", ["../one.safetensors", "/etc/passwd", "x/one.safetensors", "..", "", "x\\one.safetensors", "x\0"]
)
def test_an_index_cannot_leave_its_folder(tmp_path: Path, file: str) -> None:
    with pytest.raises(CheckpointError, match="plain file name"):
        Tensors.open(shards(tmp_path, {"a": file}))


def test_an_index_that_disagrees_lists_everything(tmp_path: Path) -> None:
    placed = {"a": "two.safetensors", "c": "one.safetensors"}
    with pytest.raises(CheckpointError, match="disagree") as error:
        Tensors.open(shards(tmp_path, placed))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == ["a", "c", "b"]


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_a_malformed_index(tmp_path: Path, index: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        Tensors.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        Tensors.open(tmp_path)


def test_a_name_in_two_files(tmp_path: Path) -> None:
    for file in ("one", "two"):
        safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / file)
    with pytest.raises(CheckpointError, match="is also in one"):
        Tensors.from_files([tmp_path / "one", tmp_path / "two"])


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization"):
        Tensors.open(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="found neither"):
        Tensors.open(tmp_path)


def test_unknown_names_say_where_they_were_looked_for(tmp_path: Path) -> None:
    tensors = Tensors.open(shards(tmp_path))
    with pytest.raises(CheckpointError, match=r"'c' is not in one.safetensors, two.safetensors"):
        tensors.array("c")


def test_json_has_a_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_HEADER", 100)
    (tmp_path / "a.json").write_text(" " * 101)
    with pytest.raises(CheckpointError, match="larger than"):
        read_json(tmp_path / "a.json", 100)
    (tmp_path / "b.json").write_text('{"a": 1,\n "b": oops}')
    with pytest.raises(CheckpointError, match="line 2, column 7"):
        read_json(tmp_path / "b.json")
