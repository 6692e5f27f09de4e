"""Deleting what nothing refers to and nobody uses, in one model's layout."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress

from zoo.artifacts.layout import Layout
from zoo.artifacts.locks import Lock
from zoo.artifacts.staging import disk_errors, remove_tree, sweep
from zoo.errors import ArtifactError

log = logging.getLogger("zoo")


def collect(layout: Layout) -> int:
    """Free what a layout does not need; the bytes freed. Writes nothing, so that a full disk does not hinder it.

    Under the layout's lock every blob without a reference is garbage, for blobs enter together with their reference.
    Staging folders, opened folders and partial downloads go unless their owners hold their locks. Where a document
    cannot be read the blobs stay, because what it referred to is unknown, and a warning says what to do.
    """
    with disk_errors(f"collecting {layout.model}", layout.folder, removing=True), layout.lock():
        freed = free_unused(layout)
        if _empty(layout):
            (layout.folder / "index.json").unlink(missing_ok=True)  # first, so that no reader takes the rest for a loss
            shutil.rmtree(layout.folder, ignore_errors=True)
    return freed


def free_unused(layout: Layout) -> int:
    """What ``collect`` does, under the layout's lock, all but removing a folder in which nothing is left."""
    freed = sweep(layout.private / "staging")
    freed += _unlocked(layout)
    for name in (".index.json-*", ".oci-layout-*"):
        freed += sum(remove_tree(path) for path in layout.folder.glob(name))
    try:
        if damage := layout.damage():
            raise ArtifactError(f"{layout.folder}: {damage}; {layout.advice}")
        wanted = references(layout) if layout.exists() else set()
    except ArtifactError as error:
        log.warning("%s: its blobs are kept, for it cannot be read: %s", layout.model, error)
        return freed
    freed += sum(remove_tree(path) for path in list(layout.iterate_blobs()) if path.name not in wanted)
    for marker in (layout.private / "bad").glob("*"):
        if marker.name not in wanted:
            marker.unlink(missing_ok=True)
    return freed


def _empty(layout: Layout) -> bool:
    """Whether nothing is stored in the folder, nothing is about to be, and no engine of it is open."""
    used = any(True for name in ("staging", "open") for _ in (layout.private / name).glob("*"))
    try:
        return not used and not any(layout.iterate_blobs()) and not layout.damage() and not (layout.exists() and layout.tags())
    except ArtifactError:
        return False


def references(layout: Layout) -> set[str]:
    """The hex digests of every blob that the layout's index leads to."""
    wanted = set()
    for tag, version in layout.tags().items():
        where = f"{layout.model}:{tag}"
        wanted.add(version.digest)
        for profile in layout.profiles(version, where):
            wanted.add(profile.digest)
            wanted |= {blob.digest for blob in layout.manifest(profile, f"{where}, {profile.digest}").blobs}
    return {digest.removeprefix("sha256:") for digest in wanted}


def _unlocked(layout: Layout) -> int:
    """Remove opened folders and partial downloads that no process holds."""
    freed = 0
    opened, partial = layout.private / "open", layout.private / "partial"
    names = {path.name.removesuffix(".lock") for path in opened.glob("*")}
    for name in names:
        lock = Lock(opened / f"{name}.lock")
        with suppress(OSError):  # a folder without a lock file, on a disk too full to make one: another time
            if lock.acquire(wait=False):
                with lock:
                    freed += remove_tree(opened / name)
                    lock.path.unlink(missing_ok=True)
    for path in partial.glob("*"):
        lock = Lock(path)
        if lock.acquire(wait=False):
            with lock:
                freed += remove_tree(path)
    return freed
