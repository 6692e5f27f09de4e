"""Where files wait, hashed and complete, until the locked step that puts them among a model's blobs.

Blobs enter ``blobs/`` in the same locked step that publishes the index which refers to them. So a blob without a
reference is garbage at any time, whatever else is running, and a killed process leaves nothing but its staging folder,
which the next store or ``zoo gc`` recognizes by its free lock and removes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from zoo.artifacts.copying import copy_hashed, hash_file, sync_file
from zoo.artifacts.layout import Descriptor, Layout
from zoo.artifacts.locks import Lock, sync_folder
from zoo.errors import ArtifactError, DigestError, ResourceError

# What a full disk, a quota or a file size limit answer with.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def disk_errors(what: str, folder: Path, removing: bool = False) -> Iterator[None]:
    """Turn a full disk into a ResourceError, a folder that may not be written into an ArtifactError, each with what to do.

    ``removing``: the work would free space, so that the advice is another.
    """
    try:
        yield
    except OSError as error:
        if error.errno in READ_ONLY:
            raise ArtifactError(
                f"{what}: {folder} may not be written ({error.strerror}); "
                + ("nothing was removed" if removing else "set ZOO_HOME to a folder of your own and build or pull there")
            ) from None
        if error.errno not in FULL:
            raise
        if removing:
            raise ResourceError(
                f"{what}: {error.strerror or 'no space'} at {folder}, not even for a smaller index; all other engines are whole. "
                "Removing a model as a whole (`zoo rm MODEL`) writes nothing; else free a few kilobytes and run it again"
            ) from None
        raise ResourceError(
            f"{what}: {error.strerror or 'no space'} at {folder}; nothing was stored. Free some space (`zoo gc` removes what "
            "nothing refers to) or set ZOO_HOME to another disk, then run it again"
        ) from None


class Staging:
    """A private folder beside a model's blobs; a context manager that removes it with whatever is still in it.

    ``owned``: folders whose files are the registry's own and may be linked instead of copied. Files of users are always
    copied, for a link would let a later change to them change the blob.
    """

    def __init__(self, layout: Layout, owned: tuple[Path, ...] = ()) -> None:
        self.layout = layout
        self._owned = tuple(folder.resolve() for folder in owned)
        self._staged: dict[str, Path] = {}
        root = layout.private / "staging"
        with layout.lock():
            sweep(root)
            root.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(dir=root))
            self._lock = Lock(self.folder / ".lock")
            self._lock.acquire()

    def temporary(self) -> Path:
        """The name of a new file in the folder."""
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        os.close(descriptor)
        return Path(name)

    def adopt(self, path: Path, digest: str) -> None:
        """Take a complete file whose digest the caller has checked, inside the staging folder or on its file system."""
        target = self.folder / digest.removeprefix("sha256:")
        path.replace(target)
        target.chmod(0o444)
        self._staged[digest] = target

    def add_bytes(self, data: bytes) -> str:
        """Stage bytes at hand. Returns their digest."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        path = self.temporary()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.adopt(path, digest)
        return digest

    def keep(self, blob: Descriptor) -> bool:
        """Hold a blob that is already stored, so that a garbage collection meanwhile cannot take it. False: it is not here."""
        if blob.digest in self._staged:
            return True
        if not self.layout.has(blob):
            return False
        target = self.folder / blob.digest.removeprefix("sha256:")
        try:
            target.hardlink_to(self.layout.blob(blob.digest))
        except OSError:  # gone since, or a file system without links: copy it again
            return False
        self._staged[blob.digest] = target
        return True

    def add_file(self, source: Path, expected: str = "", name: str = "") -> tuple[str, int]:
        """Stage a file and return its digest and size. With ``expected`` a stored blob of that digest is not copied again.

        Raises ArtifactError for what is not a regular file, DigestError when the bytes are not the expected ones.
        """
        where = f"file {name or source.name} ({source})"
        try:
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ArtifactError(f"{where}: cannot be read: {error.strerror}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"{where}: not a regular file")
            if expected and self.keep(Descriptor("", expected, status.st_size)):
                return expected, status.st_size
            path = self.temporary()
            if self._is_owned(source) and _relink(source, path):
                digest, size = hash_file(path), status.st_size
                sync_file(path)
            else:
                digest, size = copy_hashed(descriptor, path)
        finally:
            os.close(descriptor)
        if expected and digest != expected:
            raise DigestError(
                f"{where}: its bytes give {digest}, not {expected} as when the build began; do not change it meanwhile"
            )
        self.adopt(path, digest)
        return digest, size

    def _is_owned(self, source: Path) -> bool:
        if source.is_symlink() or source.stat().st_nlink != 1:
            return False
        resolved = source.resolve()
        return any(resolved.is_relative_to(folder) for folder in self._owned)

    def move_in(self) -> None:
        """Put every staged file among the blobs, under the layout's lock. A fresh copy replaces one of unknown health."""
        self.layout.blobs.mkdir(parents=True, exist_ok=True)
        for digest, path in self._staged.items():
            target = self.layout.blob(digest)
            if not (target.exists() and target.samefile(path)):
                path.replace(target)
                self.layout.bad_marker(digest).unlink(missing_ok=True)
        self._staged.clear()
        sync_folder(self.layout.blobs)

    def discard(self) -> None:
        """Forget what is staged; the files go with the folder."""
        self._staged.clear()

    def close(self) -> None:
        """Remove the folder and what is left in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def sweep(root: Path) -> int:
    """Remove the staging folders of dead processes, under the layout's lock. Returns the bytes freed."""
    freed = 0
    for folder in root.iterdir() if root.is_dir() else ():
        lock = Lock(folder / ".lock")
        with suppress(OSError):  # a folder without a lock file, on a disk too full to make one: another time
            if lock.acquire(wait=False):
                freed += remove_tree(folder)
                lock.release()
    return freed


def remove_tree(path: Path) -> int:
    """Remove a file or folder; the bytes freed, links that stay elsewhere not counted."""
    files = [path] if not path.is_dir() or path.is_symlink() else [file for file in path.rglob("*") if not file.is_dir()]
    freed = 0
    for file in files:
        with suppress(FileNotFoundError):
            status = file.lstat()
            freed += status.st_size if status.st_nlink == 1 else 0
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return freed


def _relink(source: Path, target: Path) -> bool:
    target.unlink()
    try:
        target.hardlink_to(source)
    except OSError:
        return False
    return True
