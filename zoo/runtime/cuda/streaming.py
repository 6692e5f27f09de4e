"""File pieces to the GPU at the speed of the slower of disk and bus: threads read into pinned memory while copies run.

    threads     read ──▶ [buffer 0] [buffer 1] ... ──▶ copy ──▶ GPU      queued in order by one thread, on one stream

A buffer holds one or more pieces. It is read again when the copies out of it are done, which an event tells. Whatever is
queued on the stream by ``then`` sees the pieces before it in place.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import CheckpointError
from zoo.runtime.cuda.driver import Device

Array = np.ndarray[Any, Any]

CHUNK = 16 << 20  # bytes of a buffer, and the most that one thread reads at a time
THREADS = 8


@dataclass(frozen=True)
class Piece:
    """Bytes for one place on the GPU: of a file from an offset on, or of an array in memory."""

    source: Path | Array
    offset: int
    nbytes: int
    to: int


class Streamer:
    """Sends pieces to the GPU in order. ``total``: about how many bytes will come, so that little takes little memory.

    Pinned memory: two buffers a thread, 256 MB at most. Raises CheckpointError when a file cannot be read or ends early.
    """

    def __init__(self, device: Device, stream: int, total: int, threads: int = THREADS, chunk: int = CHUNK) -> None:
        threads = max(1, min(threads, len(os.sched_getaffinity(0)), -(-total // chunk)))
        self._device, self._stream = device, stream
        self._chunk = min(chunk, max(total, 1))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights")
        self._buffers = [device.pinned(self._chunk) for _ in range(min(2 * threads, -(-total // chunk) or 1))]
        self._events = [device.event(blocking=True) for _ in self._buffers]
        self._pending: deque[tuple[Future[None] | None, int, list[Piece], Callable[[], None] | None]] = deque()
        self._batch: list[Piece] = []
        self._filled = 0
        self._next = 0
        self._files: dict[Path, int] = {}

    def add(self, piece: Piece) -> None:
        """Queue a piece of any size; the array of one stays alive until it is sent."""
        done = 0
        while done < piece.nbytes:
            part = min(piece.nbytes - done, self._chunk - self._filled)
            self._batch.append(Piece(piece.source, piece.offset + done, part, piece.to + done))
            done, self._filled = done + part, self._filled + part
            if self._filled == self._chunk:
                self._flush(None)

    def then(self, action: Callable[[], None]) -> None:
        """Call ``action`` when all pieces so far are queued on the stream: kernels that it launches see them in place."""
        self._flush(action)

    def finish(self) -> None:
        """Until everything has arrived and every action was called."""
        self._flush(None)
        while self._pending:
            self._issue()
        self._device.wait(self._stream)

    def close(self) -> None:
        """Let go of buffers, threads and files, also after an error."""
        for future, *_ in self._pending:
            if future:
                future.cancel()
        self._pool.shutdown(wait=True)
        self._pending.clear()
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if self._buffers:
            self._device.wait(self._stream)
        for event in self._events:
            self._device.free(event)
        for buffer in self._buffers:
            self._device.free(int(buffer.ctypes.data))
        self._events, self._buffers = [], []

    def _flush(self, action: Callable[[], None] | None) -> None:
        batch, self._batch, self._filled = self._batch, [], 0
        if not batch:
            if action and self._pending:
                self._pending.append((None, -1, [], action))
            elif action:
                action()
            return
        number, self._next = self._next, (self._next + 1) % len(self._buffers)
        while any(used == number for _, used, *_ in self._pending):
            self._issue()
        for piece in batch:
            if isinstance(piece.source, Path) and piece.source not in self._files:
                self._files[piece.source] = _open(piece.source)
        self._pending.append((self._pool.submit(self._read, number, batch), number, batch, action))

    def _issue(self) -> None:
        """Wait for the oldest buffer to be read, and queue its copies."""
        future, number, batch, action = self._pending.popleft()
        if future:
            future.result()
            at, buffer = 0, self._buffers[number]
            for piece in batch:
                self._device.send(piece.to, buffer[at : at + piece.nbytes], self._stream)
                at += piece.nbytes
            self._device.record(self._events[number], self._stream)
        if action:
            action()

    def _read(self, number: int, batch: list[Piece]) -> None:
        self._device.wait_event(self._events[number])  # what this buffer held before is copied
        at, buffer = 0, self._buffers[number]
        for piece in batch:
            into = buffer[at : at + piece.nbytes]
            if isinstance(piece.source, Path):
                _read_file(self._files[piece.source], piece, memoryview(into.data))
            else:
                into[:] = piece.source.reshape(-1).view(np.uint8)[piece.offset : piece.offset + piece.nbytes]
            at += piece.nbytes


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _read_file(file: int, piece: Piece, into: memoryview) -> None:
    offset = piece.offset
    while into.nbytes:
        try:
            count = os.preadv(file, [into], offset)
        except OSError as error:
            raise CheckpointError(f"{piece.source}: cannot be read ({error.strerror})") from None
        if not count:
            raise CheckpointError(f"{piece.source}: ends at byte {offset}, although it was longer when it was opened")
        into, offset = into[count:], offset + count
