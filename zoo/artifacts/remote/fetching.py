"""Fetching engines from a registry. Nothing is visible before all of it is here and every digest is checked.

Small documents come first: an engine that is refused for its manifest costs no download. A download that is cut off
stays, and the next attempt, in this process or another, goes on where it ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import httpx

from zoo.artifacts.copying import hash_file
from zoo.artifacts.entries import PREFIX, Entry, check_manifest
from zoo.artifacts.layout import (
    DOCUMENT_LIMIT,
    ENGINE_JSON_LIMIT,
    Descriptor,
    ImageManifest,
    Layout,
    check_bytes,
    index_descriptors,
    parse_json,
)
from zoo.artifacts.locks import Lock
from zoo.artifacts.manifest import EngineManifest
from zoo.artifacts.publish import publish
from zoo.artifacts.refs import LATEST, is_tag, may_abbreviate
from zoo.artifacts.registry import Registry
from zoo.artifacts.remote.address import Address
from zoo.artifacts.remote.client import ATTEMPTS, RETRIED, Client, pause
from zoo.artifacts.select import Machine, choose, describe_machine
from zoo.artifacts.staging import Staging, disk_errors
from zoo.errors import ArtifactError, DigestError, NotFoundError
from zoo.resources import check_disk

Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all


def pull(
    registry: Registry,
    remote: str,
    plain_http: bool = False,
    everything: bool = False,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> list[Entry]:
    """Fetch ``HOST[:PORT]/[PATH/]model[:version][@profile]``: that profile, or without one the best for this machine.

    ``everything``: all profiles of the version. Returns the stored entries. Raises NotFoundError, IncompatibleError (no
    profile fits; a reason for each), DigestError (the registry sent other bytes than it said), ResourceError, and
    ArtifactError for logins, lost connections and whatever is malformed.
    """
    address = Address.parse(remote, plain_http)
    layout = registry.layout(address.ref.model)
    with Client(address) as client, disk_errors(f"pulling {address}", registry.root):
        entries = _wanted(client, layout, everything, machine)
        registry.create()
        with Staging(layout) as staging:
            images = [(entry, _documents(client, staging, entry)) for entry in entries]
            blobs = {blob.digest: (name, blob) for _, image in images for name, blob in image.files.items()}
            missing = {digest: blob for digest, (_, blob) in blobs.items() if not staging.keep(blob)}
            check_disk(sum(blob.size for blob in missing.values()) + (1 << 20), registry.root, f"pulling {address}")
            for digest, blob in missing.items():
                name = f"{address}, {blobs[digest][0]}"
                Download(client, staging, blob, name, progress).run()
            publish(layout, staging, entries[0].version, [entry.descriptor for entry in entries], first_build_wins=False)
    return [replace(entry, current=True) if entry is _last_of(entry, entries) else entry for entry in entries]


def _last_of(entry: Entry, entries: list[Entry]) -> Entry:
    return [one for one in entries if one.profile == entry.profile][-1]


def _wanted(client: Client, layout: Layout, everything: bool, machine: Machine | None) -> list[Entry]:
    """The engines of the remote version that were asked for."""
    ref, where = client.address.ref, str(client.address)
    tag = _tag(client)
    descriptors = index_descriptors(parse_json(client.manifest(tag), where), where)
    if not descriptors:
        raise NotFoundError(f"{where}: the version has no engines")
    version = descriptors[-1].annotations.get(PREFIX + "version", "") if tag == LATEST else tag
    if not is_tag(version) or version == LATEST:
        raise ArtifactError(f"{where}: 'latest' does not say which version it is; name one")
    newest = {one.annotations.get(PREFIX + "profile"): one.digest for one in descriptors}
    entries = [
        Entry.read(layout, version, one, newest[one.annotations.get(PREFIX + "profile")] == one.digest) for one in descriptors
    ]
    if ref.digest:
        found = [entry for entry in entries if entry.digest.startswith(ref.digest)]
    elif ref.profile:
        found = [entry for entry in entries if entry.profile == ref.profile and entry.current]
    elif everything:
        found = entries
    else:
        found = [choose([entry for entry in entries if entry.current], machine or describe_machine(), where)]
    if not found or (ref.digest and len(found) > 1):
        have = ", ".join(f"{entry.profile} ({entry.digest[:19]})" for entry in entries)
        raise NotFoundError(f"{where}: {'several begin so' if found else 'not there'}; version {version} has {have}")
    return found


def _tag(client: Client) -> str:
    """The tag that a remote REF means; an abbreviated version is looked up."""
    version = client.address.ref.version
    if not version or not may_abbreviate(version):
        return version or LATEST
    tags = [tag for tag in client.tags() if "." not in tag]
    found = [version] if version in tags else [tag for tag in tags if tag.startswith(version)]
    if len(found) != 1:
        raise NotFoundError(
            f"{client.address}: version {version!r} is {'several' if found else 'none'} of {', '.join(tags) or 'none at all'}"
        )
    return found[0]


def _documents(client: Client, staging: Staging, entry: Entry) -> ImageManifest:
    """Fetch and check an engine's manifest, config and engine.json, before any of its weights."""
    where = f"{client.address}, manifest"
    data = client.manifest(entry.digest)
    check_bytes(data, entry.descriptor, where)
    image = ImageManifest.from_json(parse_json(data, where), where)
    staging.add_bytes(data)
    config = _document(client, image.config, DOCUMENT_LIMIT, f"{client.address}, config")
    staging.add_bytes(config)
    engine_json = _document(client, image.files["engine.json"], ENGINE_JSON_LIMIT, f"{client.address}, engine.json")
    staging.add_bytes(engine_json)
    manifest = EngineManifest.from_json(parse_json(engine_json, f"{client.address}, engine.json"))
    check_manifest(manifest, image, entry.descriptor.annotations, str(client.address))
    return image


def _document(client: Client, blob: Descriptor, limit: int, where: str) -> bytes:
    if blob.size > limit:
        raise ArtifactError(f"{where}: is said to have {blob.size} bytes; at most {limit} are read")
    answer = client.send("GET", f"blobs/{blob.digest}", limit=limit)
    client.expect(answer, 200, f"reading {where}")
    check_bytes(answer.content, blob, where)
    return answer.content


class Download:
    """One blob on its way into ``.zoo/partial/``, under a lock, and from there into the staging folder when it is right."""

    def __init__(self, client: Client, staging: Staging, blob: Descriptor, what: str, progress: Progress | None) -> None:
        self.client, self.staging, self.blob, self.what, self.progress = client, staging, blob, what, progress
        self.path = staging.layout.private / "partial" / blob.digest.removeprefix("sha256:")

    def run(self) -> None:
        with Lock(self.path):  # another pull of this blob waits here and then finds it stored, or goes on with it
            if self.staging.keep(self.blob):
                self.path.unlink(missing_ok=True)
                return
            resumed = self.path.stat().st_size > 0
            digest = self._fetch()
            if digest != self.blob.digest and resumed:  # what an earlier attempt left may be what is wrong
                os.truncate(self.path, 0)
                digest = self._fetch()
            if digest != self.blob.digest:
                self.path.unlink()
                raise DigestError(
                    f"{self.what}: the registry sent bytes of {digest} for blob {self.blob.digest}; nothing was stored"
                )
            self.staging.adopt(self.path, self.blob.digest)

    def _fetch(self) -> str:
        """Bring the file to its full size, in as many connections as it takes while each brings something. Its digest."""
        failures = 0
        with self.path.open("r+b") as file:
            if file.seek(0, os.SEEK_END) > self.blob.size:
                file.truncate(0)
            while (start := file.seek(0, os.SEEK_END)) < self.blob.size:
                try:
                    problem = self._append(file.fileno(), start)
                except httpx.TransportError as error:
                    problem = str(error) or type(error).__name__
                reached = os.fstat(file.fileno()).st_size
                if reached == self.blob.size:
                    break
                failures = failures + 1 if reached <= start else 0
                if failures >= ATTEMPTS:
                    raise ArtifactError(
                        f"{self.what}: stopped at byte {reached} of {self.blob.size} ({problem}); "
                        "what came is kept: pull again to go on"
                    )
                pause(failures)
            os.fsync(file.fileno())
        return hash_file(self.path)

    def _append(self, file: int, start: int) -> str:
        """One connection: append what it brings. Returns what ended it early, if anything."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self.client.stream(f"blobs/{self.blob.digest}", headers) as response:
            if start and response.status_code in (200, 416):  # it cannot resume: from the beginning, then
                os.ftruncate(file, 0)
                if response.status_code == 416:
                    return "HTTP 416"
                start = 0
            elif response.status_code == 404:
                raise NotFoundError(f"{self.what}: the registry has no blob {self.blob.digest}")
            elif response.status_code in RETRIED:
                return f"HTTP {response.status_code}"
            elif response.status_code != (206 if start else 200):
                raise ArtifactError(f"{self.what}: HTTP {response.status_code} for blob {self.blob.digest}")
            elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise ArtifactError(f"{self.what}: asked for bytes from {start}, got {response.headers.get('Content-Range')!r}")
            place = start
            for piece in response.iter_raw():
                if place + len(piece) > self.blob.size:
                    os.ftruncate(file, 0)
                    raise DigestError(
                        f"{self.what}: the registry sent more than the {self.blob.size} bytes of blob {self.blob.digest}"
                    )
                view = memoryview(piece)
                while view:
                    written = os.pwrite(file, view, place)
                    place, view = place + written, view[written:]
                if self.progress:
                    self.progress(self.what, place, self.blob.size)
        return "" if place == self.blob.size else "the connection ended early"
