"""Carrying recipes out: one weight as an array, or a whole table as the packed weight file of an engine.

``evaluate.py`` makes a weight tile by tile; here tiles become arrays and files. A packed file is written by a few threads
and takes a few megabytes of memory, whatever its size.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.errors import ResourceError
from zoo.weights.evaluate import Box, Maker, cut, tiles_of
from zoo.weights.reader import NUMPY, Array, Tensors
from zoo.weights.recipe import Weight
from zoo.weights.tables import TABLES

__all__ = ["NUMPY", "TABLES", "Packed", "materialize", "packed_layout", "write_packed"]

WORKERS = 2
RELEASE = 16  # tiles after which the pages that were read are given back
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Packed:
    """Where one weight lies in a packed file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def packed_layout(weights: Iterable[Weight], align: int = 4096) -> tuple[list[Packed], int]:
    """Offsets of weights in a packed file, each aligned, in the given order; and the file's size in bytes."""
    layout, end = [], 0
    for weight in weights:
        offset = -(-end // align) * align
        nbytes = math.prod(weight.shape) * NUMPY[weight.dtype].itemsize
        layout.append(Packed(weight.name, weight.dtype, weight.shape, offset, nbytes))
        end = offset + nbytes
    return layout, end


def materialize(weight: Weight, tensors: Tensors | None, scales: Mapping[str, float]) -> Array:
    """One weight as a C-contiguous array of its dtype; a view of the mapped file when nothing has to change.

    ``tensors`` may be None for weights that read no checkpoint. Raises CheckpointError when a tensor is missing or has
    another shape than the recipe says, or when values do not fit the dtype; ArtifactError for a malformed recipe.
    """
    maker = Maker(tensors, scales)
    dtype = NUMPY[weight.dtype]
    plain = maker.whole_view(weight.recipe)
    if plain is not None and plain.dtype == dtype and plain.flags.c_contiguous and plain.flags.aligned:
        return plain
    out: Array = np.empty(weight.shape, dtype)
    for number, box in enumerate(tiles_of(weight, maker), 1):
        maker.fill(weight, box, cut(out, box))
        if number % RELEASE == 0:
            maker.release(weight.recipe)
    return out


def write_packed(
    path: Path,
    weights: Iterable[Weight],
    tensors: Tensors | None,
    scales: Mapping[str, float],
    progress: Progress | None = None,
    *,
    align: int = 4096,
    sync: bool = False,
) -> None:
    """Write all weights into one file, laid out as ``packed_layout`` says, a tile at a time.

    The file is written aside and renamed; ``sync`` also flushes it to the disk, which a temporary file does not need.
    Raises ResourceError when the disk is too small; nothing is left behind then.
    """
    weights = list(weights)
    layout, total = packed_layout(weights, align)
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    room = shutil.disk_usage(path.parent).free
    if total > room:
        raise ResourceError(f"{path}: the weights take {total:,} bytes, the disk has {room:,} free; free some or write elsewhere")
    try:
        with aside.open("xb", buffering=0) as file:
            if hasattr(os, "posix_fallocate") and total:
                os.posix_fallocate(file.fileno(), 0, total)  # five times as fast to fill on ext4, and a full disk shows at once
            else:
                file.truncate(total)
            _write_all(file.fileno(), weights, layout, Maker(tensors, scales), progress, total)
            if sync:
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(f"{path}: the disk is full; {total:,} bytes are needed") from None
    finally:
        aside.unlink(missing_ok=True)


def _write_all(
    target: int, weights: Sequence[Weight], layout: Sequence[Packed], maker: Maker, progress: Progress | None, total: int
) -> None:
    """Tiles go to a few threads (numpy releases the interpreter lock); a queue of them is kept, so memory is bounded."""
    done = 0
    pending: dict[Future[int], None] = {}

    def collect(most: int) -> None:
        nonlocal done
        while len(pending) > most:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                del pending[future]
                done += future.result()
                if progress:
                    progress(done, total)

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for weight, place in zip(weights, layout, strict=True):
                maker.prepare(weight)
                for number, box in enumerate(tiles_of(weight, maker), 1):
                    pending[pool.submit(_write_tile, target, weight, place, box, maker)] = None
                    collect(2 * WORKERS)
                    if number % RELEASE == 0:
                        maker.release(weight.recipe)
                collect(0)
                maker.forget(weight)
        except BaseException:
            for future in pending:
                future.cancel()
            raise
    if progress:
        progress(total, total)


def _write_tile(target: int, weight: Weight, place: Packed, box: Box, maker: Maker) -> int:
    shape = tuple(part.stop - part.start for part in box)
    out: Array = np.empty(shape, NUMPY[place.dtype])
    maker.fill(weight, box, out)
    raw = out.reshape(-1).view(np.uint8)
    strides = [math.prod(place.shape[axis + 1 :]) for axis in range(len(shape))]
    # the last axis that the tile cuts: from there on its bytes lie in a row
    inner = max((axis for axis, size in enumerate(shape) if size != place.shape[axis]), default=0)
    runs = raw.reshape(math.prod(shape[:inner]), -1)
    for run, outer in zip(runs, np.ndindex(*shape[:inner]), strict=True):
        at = [part.start + (outer[axis] if axis < inner else 0) for axis, part in enumerate(box)]
        start = sum(number * stride for number, stride in zip(at, strides, strict=True))
        _pwrite(target, run, place.offset + start * out.itemsize)
    return out.nbytes


def _pwrite(target: int, raw: Array, offset: int) -> None:
    view = memoryview(raw.data)
    while view.nbytes:
        count = os.pwrite(target, view, offset)
        view, offset = view[count:], offset + count
