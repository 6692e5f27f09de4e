"""Copying and hashing large files at the speed of the disk, in constant memory."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

COPY_CHUNK = 32 << 20
READ_CHUNK = 1 << 20
# Where the kernel cannot copy between two files by itself: other file systems, old kernels, special files.
NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


def sync_file(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def copy_hashed(source: int, target: Path) -> tuple[str, int]:
    """Copy an open file to a new one, bring it to the disk, and return the digest and size of what was written.

    One thread has the kernel copy (``copy_file_range``, which also shares blocks where the file system can) and then
    flushes; this one hashes the new file's pages right behind it. The cost is that of the slower of the two.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_CHUNK))
    with target.open("w+b", buffering=0) as file:
        copier = _Copier(source, file.fileno())
        copier.start()
        try:
            while (end := copier.wait_beyond(file.tell())) > file.tell():
                while count := file.readinto(buffer[: end - file.tell()]):
                    digest.update(buffer[:count])
        finally:
            copier.join()
        if copier.error:
            raise copier.error
        return "sha256:" + digest.hexdigest(), file.tell()


class _Copier(threading.Thread):
    """Appends one open file to another and says how far it is."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(name="zoo-copy", daemon=True)
        self._source, self._target = source, target
        self._copied, self._done = 0, False
        self._changed = threading.Condition()
        self.error: BaseException | None = None

    def wait_beyond(self, place: int) -> int:
        """Bytes that are copied, as soon as there are more than ``place`` or the copy has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._copied > place or self._done)
            return self._copied if not self.error else place

    def run(self) -> None:
        try:
            while count := self._copy():
                with self._changed:
                    self._copied += count
                    self._changed.notify()
            self._finish()  # nothing more to hash for: let the other thread end while this one flushes
            os.fsync(self._target)
        except BaseException as error:
            self.error = error
        finally:
            self._finish()

    def _finish(self) -> None:
        with self._changed:
            self._done = True
            self._changed.notify()

    def _copy(self) -> int:
        try:
            return os.copy_file_range(self._source, self._target, COPY_CHUNK, self._copied, self._copied)
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
        data = memoryview(os.pread(self._source, COPY_CHUNK // 8, self._copied))
        written = 0
        while written < len(data):
            written += os.pwrite(self._target, data[written:], self._copied + written)
        return written
