"""Taking engines out of a model's index, on a full disk too.

A whole model goes with one rename. What is left of a model needs a new index, which is smaller than the old one but is
written beside it; where even that finds no space, garbage is freed first, and then the blobs of the very engines that
are to go and that no other engine shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from zoo.artifacts.gc import free_unused
from zoo.artifacts.layout import Descriptor, Layout
from zoo.artifacts.locks import replace_file
from zoo.artifacts.publish import version_index
from zoo.artifacts.refs import LATEST
from zoo.artifacts.staging import FULL, remove_tree
from zoo.errors import ArtifactError


def take_out(layout: Layout, left: Mapping[str, list[Descriptor]]) -> None:
    """Leave the versions in ``left`` these profiles, under the layout's lock; a version without any goes.

    Other versions stay as they are, and the last one is the latest. OSError when the disk is full beyond help.
    """
    for make_room in (free_unused, lambda layout: _free_doomed(layout, left), None):
        if _fits(layout, left, make_room):
            return


def _fits(layout: Layout, left: Mapping[str, list[Descriptor]], make_room: Callable[[Layout], int] | None) -> bool:
    """Write the new index; when the disk is full make room for another attempt, or give up if nothing is left to try."""
    try:
        _rewrite(layout, left)
        return True
    except OSError as error:
        if error.errno not in FULL or make_room is None:
            raise
    make_room(layout)
    return False


def _rewrite(layout: Layout, left: Mapping[str, list[Descriptor]]) -> None:
    """Each new version index enters the blobs in one step, and then all at once become the index."""
    rows = []
    for tag, descriptor in layout.tags().items():
        if tag != LATEST and tag not in left:
            rows.append((tag, descriptor))
        elif tag != LATEST and left[tag]:
            data, smaller = version_index(left[tag])
            replace_file(layout.blob(smaller.digest), data)
            layout.blob(smaller.digest).chmod(0o444)
            rows.append((tag, smaller))
    if rows:
        layout.write_tags(rows)
    else:
        layout.drop()


def _free_doomed(layout: Layout, left: Mapping[str, list[Descriptor]]) -> int:
    """Delete the layers that only engines on their way out have. Their manifests stay, for the old index still names them.

    Nothing is deleted when a document cannot be read: whose blobs are whose is unknown then.
    """
    kept: set[str] = set()
    doomed: set[str] = set()
    with suppress(ArtifactError):
        for tag, version in layout.tags().items():
            if tag == LATEST:
                continue
            profiles = layout.profiles(version, f"{layout.model}:{tag}")
            staying = {one.digest for one in left.get(tag, profiles)}
            for profile in profiles:
                layers = {blob.digest for blob in layout.manifest(profile, profile.digest).blobs}
                (kept if profile.digest in staying else doomed).update(layers)
        return sum(remove_tree(layout.blob(digest)) for digest in doomed - kept)
    return 0
