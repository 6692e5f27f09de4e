"""Safetensors files, mapped into memory and read without copying. Headers are treated as hostile.

The format (github.com/huggingface/safetensors): eight bytes, little-endian, the header's length; the header, one JSON
object of ``name -> {dtype, shape, data_offsets}``; the data, without holes. Everything a header claims is checked before
a byte of data is touched: sizes against shapes, offsets against each other and against the file.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from zoo.errors import CheckpointError

Array = np.ndarray[Any, Any]

NUMPY: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
# the format's own names
DTYPES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8e4m3",
    "F8_E5M2": "float8e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
MAX_HEADER = 16 << 20  # bytes; 100,000 tensors take about 10 MB
MAX_BRACKETS = 600_000  # of JSON objects and arrays in a header: bounds what parsing it can allocate
MAX_QUOTES = 2_500_000
MAX_RANK = 32
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``start`` is its byte offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Tensors:
    """A read-only view over one or more safetensors files. Arrays are views of the mapped files: nothing is copied."""

    def __init__(self, files: list[Path], maps: list[mmap.mmap], where: dict[str, tuple[int, Entry]]) -> None:
        self._files, self._maps, self._where = files, maps, where

    @classmethod
    def open(cls, folder: Path) -> Tensors:
        """Open ``model.safetensors`` of a folder, or the shards that ``model.safetensors.index.json`` names."""
        folder = Path(folder)
        if (folder / SINGLE).is_file():
            return cls.from_files([folder / SINGLE])
        if (folder / INDEX).is_file():
            return cls._from_index(folder / INDEX)
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise CheckpointError(
                f"{folder}: only PyTorch pickle files are here, and pickles can run code, so they are never opened; convert "
                "them: load the folder with transformers and call save_pretrained(folder, safe_serialization=True)"
            )
        raise CheckpointError(f"{folder}: found neither {SINGLE} nor {INDEX}")

    @classmethod
    def from_files(cls, files: Iterable[Path]) -> Tensors:
        """Open files together; a tensor name in two of them is an error."""
        paths = [Path(file) for file in files]
        if not paths:
            raise CheckpointError("no safetensors files to open")
        maps: list[mmap.mmap] = []
        where: dict[str, tuple[int, Entry]] = {}
        for number, path in enumerate(paths):
            mapped, entries = _open_file(path)
            maps.append(mapped)
            for name, entry in entries.items():
                if name in where:
                    raise CheckpointError(f"{path}: tensor {name!r} is also in {paths[where[name][0]].name}; keep one")
                where[name] = (number, entry)
        return cls(paths, maps, where)

    @classmethod
    def _from_index(cls, index: Path) -> Tensors:
        data = read_json(index)
        placed = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
            raise CheckpointError(f"{index}: expected an object with a 'weight_map' of tensor names to file names")
        for file in set(placed.values()):
            if Path(file).name != file or file in ("", ".", "..") or "\\" in file or "\0" in file:
                raise CheckpointError(f"{index}: shard {file!r} is not a plain file name beside the index")
        tensors = cls.from_files([index.parent / file for file in sorted(set(placed.values()))])
        wrong = [
            f"{name}: the index says {file}, it is in {tensors.file_of(name).name if name in tensors else 'no shard'}"
            for name, file in sorted(placed.items())
            if name not in tensors or tensors.file_of(name).name != file
        ]
        wrong += [f"{name}: in {tensors.file_of(name).name}, not in the index" for name in tensors.names if name not in placed]
        if wrong:
            raise CheckpointError(f"{index}: the index and the shards disagree:\n  " + "\n  ".join(wrong[:100]))
        return tensors

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    @property
    def files(self) -> list[Path]:
        return list(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def entry(self, name: str) -> Entry:
        """Where a tensor lies in its file. CheckpointError for a name that no file has."""
        return self._find(name)[1]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def dtype(self, name: str) -> str:
        """The stored dtype by this project's names: ``bfloat16``, ``float32``, ..."""
        return self._find(name)[1].dtype

    def file_of(self, name: str) -> Path:
        return self._files[self._find(name)[0]]

    def array(self, name: str) -> Array:
        """A read-only view of the mapped file. Keep the ``Tensors`` open while it is used."""
        number, entry = self._find(name)
        if entry.nbytes == 0:
            empty: Array = np.zeros(entry.shape, NUMPY[entry.dtype])
            empty.flags.writeable = False
            return empty
        mapped = self._maps[number]
        raw: Array = np.frombuffer(mapped, np.uint8, count=entry.nbytes, offset=entry.start)
        return raw.view(NUMPY[entry.dtype]).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Give the tensor's resident pages back to the system; they are read again when they are touched again."""
        number, entry = self._find(name)
        page = mmap.PAGESIZE
        start, stop = -(-entry.start // page) * page, (entry.start + entry.nbytes) // page * page
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[number].madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Forget the files. Arrays handed out keep their own mapping alive until they are gone."""
        maps, self._maps, self._where = self._maps, [], {}
        for mapped in maps:
            try:
                mapped.close()
            except BufferError:  # an array still looks into it; the garbage collector closes it
                continue

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, name: str) -> tuple[int, Entry]:
        try:
            return self._where[name]
        except KeyError:
            files = ", ".join(file.name for file in self._files[:3]) + (" ..." if len(self._files) > 3 else "")
            raise CheckpointError(f"tensor {name!r} is not in {files} (of {self._files[0].parent})") from None


def read_json(path: Path, limit: int = MAX_HEADER, *, scale: int = 1, once: bool = True) -> Any:
    """A JSON file of at most ``limit`` bytes. CheckpointError that names the file and, where it can, the line.

    ``scale`` multiplies how many objects, arrays and strings there may be; ``once`` refuses keys that appear twice.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > limit:
        raise CheckpointError(f"{path}: larger than {limit >> 20} MB; this is not what a checkpoint holds")
    return _parse_json(raw, str(path), scale, once)


def _parse_json(raw: bytes, where: str, scale: int = 1, once: bool = True) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: key {twice!r} appears twice")
        return data

    if raw.count(b"{") + raw.count(b"[") > scale * MAX_BRACKETS or raw.count(b'"') > scale * MAX_QUOTES:
        raise CheckpointError(f"{where}: the JSON has more objects, arrays or strings than any checkpoint needs")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique if once else None)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not usable JSON ({type(error).__name__})") from None


def _open_file(path: Path) -> tuple[mmap.mmap, dict[str, Entry]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            if len(head) < 8:
                raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file")
            length = int.from_bytes(head, "little")
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes, the file has {size - 8} after its length; truncated, or no "
                    "safetensors file (a Git LFS pointer, perhaps)"
                )
            if length > MAX_HEADER:
                raise CheckpointError(f"{path}: a header of {length} bytes is over the limit of {MAX_HEADER}")
            raw = file.read(length)
            if len(raw) != length:
                raise CheckpointError(f"{path}: ends inside its header")
            entries = _entries(path, raw, 8 + length, size - 8 - length)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), entries
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def _entries(path: Path, raw: bytes, base: int, available: int) -> dict[str, Entry]:
    header = _parse_json(raw, f"{path}: header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    entries = {name: _entry(f"{path}: tensor {name!r}", data, base, available) for name, data in header.items()}
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            what = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} starts at byte {entry.start - base} of the data and {what}")
        end = entry.start + entry.nbytes
    if end != base + available:
        raise CheckpointError(f"{path}: the tensors end at byte {end - base} of the data, the file has {available}")
    return entries


def _entry(where: str, data: Any, base: int, available: int) -> Entry:
    if not isinstance(data, dict) or set(data) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(n) for n in shape):
        raise CheckpointError(f"{where}: the shape must be a list of at most {MAX_RANK} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise CheckpointError(f"{where}: data_offsets must be two sizes")
    start, stop = offsets
    if not start <= stop <= available:
        raise CheckpointError(f"{where}: bytes {start} to {stop} are not inside the file's {available} bytes of data")
    nbytes = NUMPY[DTYPES[dtype]].itemsize
    for size in shape:
        nbytes *= size
    if nbytes != stop - start:
        raise CheckpointError(f"{where}: {dtype} {shape} takes {nbytes} bytes, its offsets span {stop - start}")
    return Entry(DTYPES[dtype], tuple(shape), base + start, nbytes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
