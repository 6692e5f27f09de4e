"""Opening an engine: every digest is checked, then its files stand in a folder under their names."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from zoo.artifacts.copying import hash_file
from zoo.artifacts.entries import Entry
from zoo.artifacts.layout import WEIGHT, Descriptor, Layout
from zoo.artifacts.locks import Lock
from zoo.artifacts.manifest import EngineManifest
from zoo.artifacts.refs import LATEST
from zoo.artifacts.staging import READ_ONLY, disk_errors
from zoo.errors import ArtifactError, DigestError, NotFoundError

HASH_THREADS = 2
PREFIX = ".zoo-open-"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a stored engine."""

    ref: str
    file: str  # name in the artifact, or which document
    digest: str
    reason: str

    def __str__(self) -> str:
        return f"{self.ref}: {self.file}: blob {self.digest} {self.reason}"


@dataclass
class Opened:
    """An engine's files by name, verified. ``folder`` stays until ``close`` (or the end of the process), then ``zoo gc`` may
    remove it. Files that are not the artifact's own may be written there, as a cache; the artifact's are read-only links.
    The folder of an engine in a registry that may not be written is a temporary one, which goes on ``close``.
    """

    folder: Path
    manifest: EngineManifest
    entry: Entry
    _lock: Lock = field(repr=False)
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def close(self) -> None:
        """Let ``zoo gc`` have the folder, or remove a temporary one. Calling it twice is allowed."""
        if self._temporary:
            self._temporary.cleanup()
        self._lock.release()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_blobs(layout: Layout, blobs: Iterable[tuple[str, Descriptor]], ref: str) -> list[Problem]:
    """Read blobs (file name, descriptor) and compare them with their digests, two at a time, large ones first.

    A blob that fails is marked, so that storing or pulling it again replaces it; the mark goes when it passes.
    """

    def check(item: tuple[str, Descriptor]) -> Problem | None:
        name, blob = item
        marker, reason = layout.bad_marker(blob.digest), ""
        try:
            path = layout.blob(blob.digest)
            size = path.stat().st_size
            if size != blob.size:
                reason = f"does not match its digest: it has {size} bytes instead of {blob.size}"
            elif (found := hash_file(path)) != blob.digest:
                reason = f"does not match its digest: its bytes give {found}"
        except FileNotFoundError:
            return Problem(ref, name, blob.digest, "is missing")
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        try:
            if reason:
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
            else:
                marker.unlink(missing_ok=True)
        except OSError:  # a registry that is mounted read-only is verified all the same
            pass
        return Problem(ref, name, blob.digest, reason) if reason else None

    ordered = sorted(blobs, key=lambda item: -item[1].size)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return [problem for problem in pool.map(check, ordered) if problem]


def named_blobs(entry: Entry) -> list[tuple[str, Descriptor]]:
    """Config and layers of an engine with their names."""
    return [("config", entry.image.config), *entry.image.files.items()]


def check_engine(entry: Entry) -> list[Problem]:
    """Everything that is wrong with one engine: every blob is read, and its documents are compared with one another."""
    try:
        problems = check_blobs(entry.layout, named_blobs(entry), entry.ref)
        if not problems:
            _ = entry.manifest
    except ArtifactError as error:
        return [Problem(entry.ref, "manifest", entry.digest, f"cannot be used: {error}")]
    return problems


def check_layout(layout: Layout, read: Callable[[str, str], list[Entry]]) -> list[Problem]:
    """Everything that is wrong with a model: its documents and each engine. ``read`` gives the engines of a model and version."""
    if damage := layout.damage():
        return [Problem(layout.model, "layout", "(none)", f"cannot be used: {damage}; {layout.advice}")]
    if not layout.exists():
        return []
    try:
        tags = {tag: one for tag, one in layout.tags().items() if tag != LATEST}
    except ArtifactError as error:
        return [Problem(layout.model, "index.json", "(none)", f"cannot be used: {error}")]
    problems = []
    for tag, version in tags.items():
        try:
            problems += [problem for entry in read(layout.model, tag) for problem in check_engine(entry)]
        except ArtifactError as error:
            problems.append(Problem(f"{layout.model}:{tag}", "version index", version.digest, f"cannot be used: {error}"))
    return problems


def open_engine(entry: Entry) -> Opened:
    """Verify an engine and lay its files out. DigestError names every bad blob and its file."""
    if problems := check_blobs(entry.layout, named_blobs(entry), entry.ref):
        raise DigestError(
            "; ".join(map(str, problems)) + f". Nothing was loaded; `zoo rm {entry.ref}`, then build or pull it again"
        )
    manifest = entry.manifest
    try:
        with disk_errors(f"opening {entry.ref}", entry.layout.private):
            try:
                return _open_inside(entry, manifest)
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
        with disk_errors(f"opening {entry.ref}", Path(tempfile.gettempdir())):
            return _open_outside(entry, manifest)
    except FileNotFoundError:
        raise NotFoundError(f"{entry.ref}: was removed while it was opened; build or pull it again") from None


def _open_inside(entry: Entry, manifest: EngineManifest) -> Opened:
    """Lay the files out in the registry, as hard links."""
    root = entry.layout.private / "open"
    folder = root / entry.digest.removeprefix("sha256:")
    lock = Lock(root / f"{folder.name}.lock")
    try:
        lock.acquire(shared=True)
        for name, blob in entry.image.files.items():
            _place(entry.layout.blob(blob.digest), folder / name, blob)
    except BaseException:
        lock.release()
        raise
    return Opened(folder, manifest, entry, lock)


def _open_outside(entry: Entry, manifest: EngineManifest) -> Opened:
    """Lay the files out among temporary files: weights and plans as links by name, the small rest as verified copies.

    The rest is copied since ONNX Runtime takes no external data through a link that leads out of the model's folder.
    """
    _sweep(Path(tempfile.gettempdir()))
    temporary = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    lock = Lock(Path(temporary.name) / "lock")
    try:
        lock.acquire()
        folder = Path(temporary.name) / "files"
        for name, blob in entry.image.files.items():
            source, target = entry.layout.blob(blob.digest).resolve(strict=True), folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if blob.media_type == WEIGHT:
                target.symlink_to(source)
                continue
            shutil.copyfile(source, target)
            if (found := hash_file(target)) != blob.digest:
                raise DigestError(f"{name}: the copy of blob {blob.digest} gives {found}; is the disk sound?")
    except BaseException:
        temporary.cleanup()
        lock.release()
        raise
    return Opened(folder, manifest, entry, lock, temporary)


def _sweep(root: Path) -> None:
    """Remove temporary folders of our own whose process was killed: their locks are free."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid() or not (folder / "lock").exists():
                continue
            stale = Lock(folder / "lock")
            if stale.acquire(wait=False):
                with stale:
                    shutil.rmtree(folder, ignore_errors=True)


def _place(blob_path: Path, target: Path, blob: Descriptor) -> None:
    """Make ``target`` the verified blob: a link to it, or on a file system without links a verified copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and not target.is_symlink() and (target.samefile(blob_path) or hash_file(target) == blob.digest):
        return
    temporary = target.parent / f".zoo-{secrets.token_hex(8)}"
    try:
        try:
            temporary.hardlink_to(blob_path)
        except OSError:
            shutil.copyfile(blob_path, temporary)
            if (found := hash_file(temporary)) != blob.digest:
                raise DigestError(f"{target.name}: the copy of blob {blob.digest} gives {found}; is the disk sound?") from None
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
