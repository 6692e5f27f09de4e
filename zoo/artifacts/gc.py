"""Deleting what nothing refers to and nobody uses, in one model's layout."""

from __future__ import annotations

import shutil

from zoo.artifacts.layout import Layout
from zoo.artifacts.locks import Lock
from zoo.artifacts.staging import remove_tree, sweep


def collect(layout: Layout) -> int:
    """Free what a layout does not need; the bytes freed.

    Under the layout's lock every blob without a reference is garbage, for blobs enter together with their reference.
    Staging folders, opened folders and partial downloads go unless their owners hold their locks. ArtifactError when
    a document cannot be read: the blobs stay then, because what it referred to is unknown.
    """
    with layout.lock():
        freed = sweep(layout.private / "staging")
        freed += _unlocked(layout)
        for name in (".index.json-*", ".oci-layout-*"):
            freed += sum(remove_tree(path) for path in layout.folder.glob(name))
        wanted = references(layout) if layout.exists() else set()
        freed += sum(remove_tree(path) for path in list(layout.iterate_blobs()) if path.name not in wanted)
        for marker in (layout.private / "bad").glob("*"):
            if marker.name not in wanted:
                marker.unlink(missing_ok=True)
        staging = layout.private / "staging"
        if not wanted and not (staging.is_dir() and any(staging.iterdir())):
            shutil.rmtree(layout.folder, ignore_errors=True)
    return freed


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
