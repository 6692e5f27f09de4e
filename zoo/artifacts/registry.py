"""``Registry``: the engines stored on this machine. One folder, an OCI image layout per model; see docs/artifacts.md.

Readers take no lock: they see one index or the next. Writers hold a model's lock for the moment in which staged blobs
enter and the index changes. Any process may be killed at any moment: what was published stays whole, what was not is
swept away by the next store or by ``gc``.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo.artifacts.entries import PREFIX, Entry
from zoo.artifacts.gc import collect
from zoo.artifacts.layout import Descriptor, Layout, check_names
from zoo.artifacts.locks import Lock
from zoo.artifacts.manifest import Engine
from zoo.artifacts.opened import Opened, Problem, check_engine, check_layout, open_engine
from zoo.artifacts.publish import intact, merge, present_profiles, publish, stage_documents, write_version
from zoo.artifacts.refs import LATEST, Ref, is_digest, is_model, is_profile, is_tag, may_abbreviate
from zoo.artifacts.removal import take_out
from zoo.artifacts.select import Machine, check_compatible, choose, describe_machine
from zoo.artifacts.staging import FULL, Staging, disk_errors, remove_tree
from zoo.errors import ArtifactError, NotFoundError, ZooError
from zoo.resources import check_disk
from zoo.spec import digest_of

__all__ = ["Entry", "Opened", "Problem", "Registry", "default_root"]

WORK_PREFIX = ".build-"
LOCKS = ".locks"

log = logging.getLogger("zoo")


def default_root() -> Path:
    """The user's own registry: ``$ZOO_HOME/registry``, else ``zoo/registry`` in the XDG data folder."""
    if home := os.environ.get("ZOO_HOME"):
        return Path(home).expanduser() / "registry"
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "zoo" / "registry"


class Registry:
    """Engines under one folder, which is created when the first is stored."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser()

    def layout(self, model: str) -> Layout:
        """The layout of a model, which need not exist."""
        if not is_model(model):
            raise ArtifactError(
                f"model {model!r}: a model's name is lower-case letters and digits with single . _ - between them"
            )
        return Layout(self.root / model)

    def models(self) -> list[str]:
        """The models that have a layout here."""
        return [path.name for path in self._folders() if Layout(path).exists()]

    def entries(self, ref: str = "") -> list[Entry]:
        """Every engine that a REF names (a model, a version, a profile or a digest); all engines without one.

        The newest version of a model comes last, and of one profile the newest build. NotFoundError when there is none.
        Without a REF a model or version that cannot be read is left out with a warning, for the others are sound.
        """
        if not ref:
            return [entry for path in self._folders() for entry in self._readable(path.name)]
        wanted = Ref.parse(ref)
        every = not wanted.version and (wanted.digest or not wanted.profile)
        found = self._read(wanted.model, "" if every else self.version(wanted))
        if wanted.profile:
            found = [entry for entry in found if entry.profile == wanted.profile]
        if wanted.digest:
            found = [entry for entry in found if entry.digest.startswith(wanted.digest)]
        if not found:
            have = ", ".join(entry.ref for entry in self._read(wanted.model))
            raise NotFoundError(f"REF {ref!r}: not among the engines of {wanted.model}: {have or 'there are none'}")
        return found

    def _read(self, model: str, version: str = "") -> list[Entry]:
        entries = []
        layout = self._existing(model)
        for tag, descriptors in layout.versions(version):
            newest = {one.annotations.get(PREFIX + "profile"): one.digest for one in descriptors}
            for one in descriptors:
                current = newest[one.annotations.get(PREFIX + "profile")] == one.digest
                entries.append(Entry.read(layout, tag, one, current))
        return entries

    def _readable(self, model: str) -> list[Entry]:
        """A model's engines, but for the versions that cannot be read: each is a warning that says what to do."""
        layout = self.layout(model)
        try:
            return self._read(model) if layout.exists() or layout.damage() else []
        except ArtifactError as error:
            if not layout.exists() and not layout.damage():
                return []  # removed meanwhile
            try:
                tags = [tag for tag in layout.tags() if tag != LATEST] if layout.exists() else []
            except ArtifactError:
                tags = []
            if not tags:
                log.warning("model %s is left out: %s", model, error)
        entries = []
        for tag in tags:
            try:
                entries += self._read(model, tag)
            except ArtifactError as error:
                log.warning("%s:%s is left out: %s; `zoo rm %s:%s`, then build or pull it again", model, tag, error, model, tag)
        return entries

    def _existing(self, model: str) -> Layout:
        layout = self.layout(model)
        if damage := layout.damage():
            raise ArtifactError(f"model {model!r} in {self.root}: {damage}; {layout.advice}")
        if not layout.exists():
            have = ", ".join(self.models()) or "nothing yet"
            raise NotFoundError(f"no model {model!r} in {self.root} (stored: {have}); build it: zoo engines models={model}")
        return layout

    def version(self, wanted: Ref) -> str:
        """The full version that a REF means: the latest, an exact one, or the only one that begins so."""
        tags = self._existing(wanted.model).tags()
        versions = [tag for tag in tags if tag != LATEST]
        if not versions:
            raise NotFoundError(
                f"model {wanted.model!r} has no engines in {self.root}; build one: zoo engines models={wanted.model}"
            )
        if wanted.version in ("", LATEST):
            named = [tag for tag in versions if LATEST in tags and tags[tag].digest == tags[LATEST].digest]
            return (named or versions)[-1]
        if wanted.version in versions:
            return wanted.version
        found = [tag for tag in versions if may_abbreviate(wanted.version) and tag.startswith(wanted.version)]
        if len(found) != 1:
            problem = (
                f"means several versions: {', '.join(found)}" if found else f"is none of its versions: {', '.join(versions)}"
            )
            raise NotFoundError(f"REF '{wanted}': version {wanted.version!r} {problem}")
        return found[0]

    def resolve(self, ref: str, machine: Machine | None = None) -> Entry:
        """The one engine that a REF means; without a profile, the best for ``machine`` (this one by default).

        NotFoundError when there is none, IncompatibleError with a reason for each candidate when none fits the machine.
        """
        wanted = Ref.parse(ref)
        if wanted.digest:
            found = self.entries(ref)
            if len({entry.digest for entry in found}) > 1:
                raise ArtifactError(
                    f"REF {ref!r}: several engines' digests begin so: {', '.join(entry.digest for entry in found)}"
                )
            return found[-1]
        exact = replace(wanted, version=self.version(wanted))
        found = [entry for entry in self.entries(str(exact)) if entry.current]
        return found[-1] if wanted.profile else choose(found, machine or describe_machine(), str(wanted))

    def find_build(self, model: str, version: str, build: str) -> Entry | None:
        """The stored engine of a build digest, if it is here in full; weights are not read."""
        layout = self.layout(model)
        if not layout.exists() or version not in layout.tags():
            return None
        found = [entry for entry in self._read(model, version) if entry.build == build and intact(layout, entry.descriptor)]
        return found[0] if found else None

    def store(self, engine: Engine) -> Entry:
        """Copy an engine's files in and publish it. The engine stays as it is; its files may be deleted afterwards.

        A manifest of the same build that is here already, in full, wins and is returned. Raises ResourceError when the
        disk is too small or full, DigestError when a file is not the one the manifest speaks of, ArtifactError for bad
        names; nothing is published then.
        """
        manifest = engine.manifest
        where = f"engine {manifest.model}:{manifest.version}@{manifest.profile}"
        _check(engine, where)
        if not manifest.created:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            manifest = replace(manifest, created=now)
        layout = self.layout(manifest.model)
        expected = {one["name"]: one["digest"] for one in manifest.weights.get("files", ()) if one.get("digest")}
        self.create()
        with disk_errors(f"storing {where}", self.root), Staging(layout, owned=(self.root,)) as staging:
            check_disk(self._bytes_to_write(engine, layout, expected), self.root, f"storing {where}")
            files = {name: staging.add_file(path, expected.get(name, ""), name) for name, path in sorted(engine.files.items())}
            descriptor = stage_documents(staging, manifest, files)
            kept = publish(layout, staging, manifest.version, [descriptor])[0]
        return Entry.read(layout, manifest.version, kept)

    def _bytes_to_write(self, engine: Engine, layout: Layout, expected: dict[str, str]) -> int:
        """What storing will add to the disk; files of our own folders are linked, known blobs stay."""
        total = 1 << 20
        for name, path in engine.files.items():
            try:
                size = path.stat().st_size
            except OSError:  # said when it is its turn
                continue
            known = expected.get(name)
            if not (known and layout.has(Descriptor("", known, size))) and not path.resolve().is_relative_to(self.root.resolve()):
                total += size
        return total

    def promote(self, entry: Entry) -> None:
        """Make an engine what its profile's name and ``latest`` mean, as if it had been stored just now."""
        layout = entry.layout
        with disk_errors(f"promoting {entry.ref}", self.root), Staging(layout) as staging, layout.lock():
            profiles = present_profiles(layout, entry.version)
            if entry.digest not in {one.digest for one in profiles}:
                raise NotFoundError(f"{entry.ref}: was removed meanwhile; build it again")
            write_version(layout, staging, entry.version, merge(profiles, [entry.descriptor]))

    def open(self, ref: str | Entry, check: bool = True, machine: Machine | None = None) -> Opened:
        """Verify every byte of an engine and lay its files out in a folder under their names.

        ``check`` refuses an engine that this machine (or ``machine``) cannot run, before anything is read.
        Raises NotFoundError, IncompatibleError, DigestError (each bad blob and its file), ArtifactError.
        """
        if isinstance(ref, Entry) and not check:
            return open_engine(ref)
        machine = machine or describe_machine()
        entry = ref if isinstance(ref, Entry) else self.resolve(ref, machine)
        if check:
            check_compatible(entry, machine)
        return open_engine(entry)

    def rows(self) -> list[dict[str, Any]]:
        """A row per engine, as ``zoo list --json`` prints them; newest last within a model."""
        return [entry.row() for entry in self.entries()]

    def remove(self, ref: str) -> list[str]:
        """Take what a REF names out of the index: a model, a version, a profile with all its builds, or one digest.

        A version whose index cannot be read any more can be removed too, and a model of which nothing can be read. Returns
        the REFs removed; ``gc`` frees the disk. Works on a full disk (see removal.py); ResourceError when even that has no way.
        """
        wanted = Ref.parse(ref)
        layout = self.layout(wanted.model)
        whole = not wanted.version and not wanted.profile and not wanted.digest
        if not (whole and layout.damage()):
            self._existing(wanted.model)
        with disk_errors(f"removing {ref}", layout.folder, removing=True), layout.lock():
            if whole:
                try:
                    versions = [f"{wanted.model}:{tag}" for tag in layout.tags() if tag != LATEST]
                except ArtifactError:
                    versions = []
                layout.drop()
                return versions or [wanted.model]
            if not wanted.profile and not wanted.digest:
                version = self.version(wanted)
                take_out(layout, {version: []})
                return [f"{wanted.model}:{version}"]
            gone = self.entries(ref)
            digests = {(entry.version, entry.digest) for entry in gone}
            left = {
                version: [one for one in profiles if (version, one.digest) not in digests]
                for version, profiles in layout.versions()
                if version in {entry.version for entry in gone}
            }
            take_out(layout, left)
        return [entry.ref for entry in gone]

    def verify(self, ref: str | None = "") -> list[Problem]:
        """Read every blob of what a REF names, or of everything. Returns all that is wrong; empty means sound.

        NotFoundError when the registry's folder does not exist, unless it is the user's own and nothing was stored yet.
        """
        if ref:
            return [problem for entry in self.entries(ref) for problem in check_engine(entry)]
        problems: list[Problem] = []
        folders = self._folders()
        if not self.root.exists() and self.root != default_root():
            raise NotFoundError(f"registry {self.root}: no such folder; nothing was verified. Check --registry and ZOO_HOME")
        for path in folders:
            problems += check_layout(Layout(path), self._read)
        return problems

    def gc(self) -> int:
        """Delete what nothing refers to and nothing uses: blobs, leftovers of killed processes, opened folders, partial
        downloads. Safe beside any other process. Returns the bytes freed.

        A model that cannot be collected is a warning and does not hinder the others; when nothing could be freed because of
        it, its error is raised.
        """
        freed = 0
        failed: list[ZooError] = []
        for path in self._folders():
            try:
                freed += collect(Layout(path))
            except ZooError as error:
                failed.append(error)
        with disk_errors(f"collecting {self.root}", self.root, removing=True):
            freed += self._collect_builds()
        if failed and not freed:
            raise failed[0]
        for one in failed:
            log.warning("%s", one)
        return freed

    def _collect_builds(self) -> int:
        """Remove the work folders and locks of builds, when no build runs."""
        left = [*self.root.glob(f"{WORK_PREFIX}*"), *(self.root / LOCKS).glob("build-*")]
        builders = Lock(self.root / LOCKS / "builders")
        if not left or not builders.acquire(wait=False):
            return 0
        with builders:
            return sum(remove_tree(path) for path in left)

    def _folders(self) -> list[Path]:
        """Folders named as models, in order; none without a registry. ArtifactError where there cannot be one."""
        try:
            return sorted(path for path in self.root.iterdir() if is_model(path.name) and path.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"registry {self.root}: {error.strerror}; give a folder of your own with --registry, or set ZOO_HOME to one"
        )

    def create(self) -> None:
        """Make the registry's folder. ArtifactError, or ResourceError on a full disk, where there cannot be one."""
        with disk_errors(f"making the registry {self.root}", self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if error.errno in FULL:
                    raise
                raise self._unusable(error) from None

    @contextmanager
    def building(self, build: str) -> Iterator[None]:
        """Hold the right to build one engine; a second builder of it waits here. Dropped when the process dies."""
        assert is_digest(build), build
        self.create()
        builders = Lock(self.root / LOCKS / "builders")
        lock = Lock(self.root / LOCKS / f"build-{build.removeprefix('sha256:')}")
        with disk_errors("building an engine", self.root):
            builders.acquire(shared=True)
            try:
                lock.acquire()
            except BaseException:
                builders.release()
                raise
        with builders, lock:
            try:
                yield
            finally:
                lock.path.unlink(missing_ok=True)  # whoever waits for it makes it anew


def _check(engine: Engine, where: str) -> None:
    """Refuse an engine that could not be found or opened again."""
    manifest = engine.manifest
    if not is_model(manifest.model):
        raise ArtifactError(f"{where}: a model's name is lower-case letters and digits with single . _ - between them; rename it")
    if not is_tag(manifest.version) or manifest.version == LATEST or not is_profile(manifest.profile):
        raise ArtifactError(f"{where}: a version and a profile are letters, digits, . _ - and at most 128 of them")
    if digest_of(manifest.made) != manifest.build:
        raise ArtifactError(f"{where}: 'build' {manifest.build} is not the digest of 'made', {digest_of(manifest.made)}")
    if "engine.json" in engine.files:
        raise ArtifactError(f"{where}: engine.json is written by the registry; leave it out of the files")
    check_names([*engine.files, "engine.json"], where)
    if strange := sorted({str(one.get("name")) for one in manifest.weights.get("files", ())} - set(engine.files)):
        raise ArtifactError(f"{where}: weights.files names {', '.join(strange)}, which is not among the engine's files")
