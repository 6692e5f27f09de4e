"""Sending engines to a registry.

Order: blobs, then manifests, then the version's index, so that nothing is visible before it is whole. An index is shared
by everybody who publishes profiles of that version, and registries have no compare-and-swap for tags. So each manifest
gets a tag of its own first (``<version>.<profile>.<build>``), and whoever writes an index puts in everything that its
own read of index and tags gives, reads both again afterwards, and starts over when something tagged is missing. The
last writer tagged before it read, and every earlier one tagged before that; so what the last index lacks, its writer
sees in the tags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import httpx

from zoo.artifacts.copying import hash_file
from zoo.artifacts.entries import PREFIX, Entry
from zoo.artifacts.layout import (
    DOCUMENT_LIMIT,
    INDEX,
    MANIFEST,
    Descriptor,
    ImageManifest,
    Layout,
    describe,
    index_descriptors,
    parse_json,
)
from zoo.artifacts.publish import merge, version_index
from zoo.artifacts.refs import LATEST, Ref, is_tag
from zoo.artifacts.registry import Registry
from zoo.artifacts.remote.address import Address
from zoo.artifacts.remote.client import ATTEMPTS, RETRIED, Answer, Body, Client, pause, problem
from zoo.errors import ArtifactError, DigestError, NotFoundError

SMALL = 1 << 20  # blobs up to this go in one request
CHUNK = 32 << 20  # bytes of one PATCH: what is sent again at most when a connection is lost
PIECE = 1 << 20
MOUNT_FROM = 1 << 20  # smaller blobs are sent rather than asked for elsewhere
INDEX_ROUNDS = 20
Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all


def push(registry: Registry, ref: str, to: str, plain_http: bool = False, progress: Progress | None = None) -> list[str]:
    """Send what a REF names (a version with all its profiles, or one) to ``HOST[:PORT]/PATH``. Returns the remote REFs.

    Older builds of a profile go only when their digest is named. What the registry has already is not sent again; a
    manifest of the same ``build`` that is there already stays.
    Raises ArtifactError (address, login, refusals, lost connections), DigestError when a local blob is damaged.
    """
    wanted = Ref.parse(ref)
    address = Address.parse(to, plain_http, wanted.model)
    if address.ref.version or address.ref.profile or address.ref.digest:
        raise ArtifactError(f"remote {to!r}: name just a place; version and profile are those of {ref}")
    entries = registry.entries(ref)
    if not wanted.version and not wanted.digest:
        entries = [entry for entry in entries if entry.version == registry.version(wanted)]
    if not wanted.digest:
        entries = [entry for entry in entries if entry.current]
    version = entries[0].version
    with Client(address) as client:
        there = {one.annotations.get(PREFIX + "build"): one for one in remote_profiles(client, version, entries[0].layout)}
        new = [entry for entry in entries if entry.build not in there]
        blobs = {
            blob.digest: (name, blob)
            for entry in new
            for name, blob in [("config", entry.image.config), *entry.image.files.items()]
        }
        for name, blob in blobs.values():
            send_blob(client, entries[0].layout, blob, f"{entries[0].model}, {name}", _homes(registry, address, blob), progress)
        for entry in new:
            put_profile(client, entry)
        descriptors = publish_index(client, entries, registry.version(Ref(wanted.model)) == version)
    by_build = {one.annotations.get(PREFIX + "build"): one for one in descriptors}
    newest = {one.annotations.get(PREFIX + "profile"): one.digest for one in descriptors}
    return [_remote_ref(address, version, by_build[entry.build], newest) for entry in entries]


def _remote_ref(address: Address, version: str, one: Descriptor, newest: dict[str | None, str]) -> str:
    profile = one.annotations[PREFIX + "profile"]
    place = f"{address.host}/{address.repository}:{version}"
    return f"{place}@{profile if newest[profile] == one.digest else one.digest}"


def _homes(registry: Registry, address: Address, blob: Descriptor) -> list[str]:
    """Repositories beside this one that may hold a blob already: those of local models that have it."""
    if blob.size < MOUNT_FROM:
        return []
    return [
        address.beside(model) for model in registry.models() if model != address.ref.model and registry.layout(model).has(blob)
    ]


# -- blobs -----------------------------------------------------------------------------------------------------------


def send_blob(client: Client, layout: Layout, blob: Descriptor, what: str, homes: list[str], progress: Progress | None) -> None:
    """Bring one blob into the repository: there already, mounted from a neighbour, or sent after its digest is checked."""
    if client.send("HEAD", f"blobs/{blob.digest}", push=True).status == 200:
        return
    path = layout.blob(blob.digest)
    try:
        found = hash_file(path)
    except FileNotFoundError:
        raise NotFoundError(f"{what}: blob {blob.digest} is missing here; `zoo verify` lists all such") from None
    if found != blob.digest:
        raise DigestError(f"{what}: blob {blob.digest} does not match its digest: its bytes give {found}; it was not sent")
    location = ""
    for home in homes[:3]:
        answer = client.send("POST", f"blobs/uploads/?mount={blob.digest}&from={home}", push=True)
        if answer.status == 201:
            return
        if answer.status == 202:
            location = answer.headers.get("Location", "")
            break
    Upload(client, path, blob, what, location, progress).run()


class Upload:
    """One blob on its way: a small one in one piece, a large one in chunks.

    After a lost connection the registry is asked how far a large one got, and that is where to go on; a small one starts
    again. When the answer to the last request is lost, the blob may be there all the same, so that is asked first.
    """

    def __init__(self, client: Client, path: Path, blob: Descriptor, what: str, location: str, progress: Progress | None) -> None:
        self.client, self.path, self.blob, self.what, self.progress = client, path, blob, what, progress
        self.done = 0  # bytes that the registry has
        self.location = client.base
        if location:
            self._follow(location)
        else:
            self._begin()

    def run(self) -> None:
        for attempt in range(ATTEMPTS):
            if attempt:
                if self.client.send("HEAD", f"blobs/{self.blob.digest}", push=True).status == 200:
                    return
                pause(attempt)
                self._ask()
                if self.done and self.blob.size <= SMALL:
                    self._begin()
            if self.blob.size > SMALL:
                self._chunks()
            url = self.location.copy_merge_params({"digest": self.blob.digest})
            headers = {"Content-Type": "application/octet-stream"}
            answer, problem_seen = self._try("PUT", url, headers, self.path.read_bytes() if self.blob.size <= SMALL else b"")
            if answer and answer.status == 201:
                if self.progress:
                    self.progress(self.what, self.blob.size, self.blob.size)
                return
        raise self._failed(ATTEMPTS, problem_seen)

    def _chunks(self) -> None:
        failures = 0
        while self.done < self.blob.size:
            before, count = self.done, min(CHUNK, self.blob.size - self.done)
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(count),
                "Content-Range": f"{before}-{before + count - 1}",
            }
            answer, problem_seen = self._try("PATCH", self.location, headers, partial(_read, self.path, before, count))
            if answer and answer.status == 202:
                self.done += count
                self._follow(answer.headers.get("Location", ""))
            else:
                self._ask()
            if self.progress:
                self.progress(self.what, self.done, self.blob.size)
            failures = 0 if self.done > before else failures + 1
            if failures >= ATTEMPTS:
                raise self._failed(failures, problem_seen)
            if problem_seen:
                pause(failures)

    def _try(self, method: str, url: httpx.URL, headers: dict[str, str], body: Body) -> tuple[Answer | None, str]:
        """One request, once. Its answer, or what went wrong in a way that may be tried again; ArtifactError otherwise."""
        try:
            answer = self.client.send(method, url, headers=headers, body=body, push=True, attempts=1)
        except ArtifactError as error:
            if not isinstance(error.__cause__, httpx.TransportError):
                raise
            return None, str(error.__cause__) or type(error.__cause__).__name__
        if answer.status in (404, 416, *RETRIED):  # 404, 416: the registry lost the upload, or counts other bytes than we
            return answer, problem(answer)
        self.client.expect(answer, 201 if method == "PUT" else 202, f"sending {self.what}")
        return answer, ""

    def _failed(self, times: int, seen: str) -> ArtifactError:
        return ArtifactError(f"{self.client.address}: sending {self.what} failed {times} times at byte {self.done}: {seen}")

    def _begin(self) -> None:
        answer = self.client.send("POST", "blobs/uploads/", push=True)
        self.client.expect(answer, 202, f"sending {self.what}")
        self.done = 0
        self._follow(answer.headers.get("Location", ""))

    def _ask(self) -> None:
        """Ask the registry how much of the blob it has; begin again when it knows nothing of it."""
        answer = self.client.send("GET", self.location, push=True)
        if answer.status == 404:
            return self._begin()
        self.client.expect(answer, 204, f"resuming {self.what}")
        first, _, last = answer.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if first != "0" or not last.isdigit() or not 0 < int(last) < self.blob.size:
            return self._begin()  # "0-0" may mean no byte or one: not worth knowing
        self.done = int(last) + 1
        self._follow(answer.headers.get("Location", ""))

    def _follow(self, location: str) -> None:
        if location:
            self.location = self.client.base.join(location)


def _read(path: Path, start: int, count: int) -> Iterable[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while count:
            piece = file.read(min(PIECE, count))
            assert piece, f"{path} became shorter"
            count -= len(piece)
            yield piece


# -- documents -------------------------------------------------------------------------------------------------------


def profile_tag(version: str, annotations: dict[str, str]) -> str:
    """The tag of one engine beside its version's: what an index can be put together from again."""
    return f"{version}.{annotations[PREFIX + 'profile']}.{annotations[PREFIX + 'build'].removeprefix('sha256:')[:8]}"[:128]


def put_profile(client: Client, entry: Entry) -> None:
    """Send one engine's manifest, under its digest's name and its own tag."""
    data = entry.layout.blob(entry.digest).read_bytes()
    if describe(data, MANIFEST).digest != entry.digest:
        raise DigestError(f"{entry.ref}: manifest {entry.digest} does not match its digest; it was not sent")
    client.put_manifest(entry.digest, data, MANIFEST)
    client.put_manifest(profile_tag(entry.version, entry.descriptor.annotations), data, MANIFEST)


def remote_index(client: Client, tag: str) -> list[Descriptor]:
    """The profiles in a remote version's index; none when there is no such version."""
    try:
        data = client.manifest(tag)
    except NotFoundError:
        return []
    where = f"{client.address.host}/{client.address.repository}:{tag}"
    return index_descriptors(parse_json(data, where), where)


def tagged_profiles(client: Client, version: str, known: list[Descriptor], layout: Layout) -> list[Descriptor]:
    """Engines of a version that have a tag and are not among ``known`` by their build. Tags of others are passed over."""
    tags = {
        profile_tag(version, one.annotations) for one in known if {PREFIX + "profile", PREFIX + "build"} <= one.annotations.keys()
    }
    found = []
    for tag in sorted(set(client.tags()) - tags):
        if not tag.startswith(f"{version}.") or not is_tag(tag):
            continue
        try:
            data = client.manifest(tag)
            image = ImageManifest.from_json(parse_json(data, tag), f"{client.address.host}/{client.address.repository}:{tag}")
            one = describe(data, MANIFEST, image.annotations)
            Entry.read(layout, version, one)
        except ArtifactError:
            continue  # somebody else's tag that begins alike
        if profile_tag(version, one.annotations) == tag:
            found.append(one)
    return found


def remote_profiles(client: Client, version: str, layout: Layout) -> list[Descriptor]:
    """Every engine of a version that the registry knows of, by index or by tag; those that are not engines left out."""
    listed = []
    for one in remote_index(client, version):
        try:
            Entry.read(layout, version, one)
        except ArtifactError:
            continue
        listed.append(one)
    return tagged_profiles(client, version, listed, layout) + listed


def publish_index(client: Client, entries: list[Entry], latest: bool) -> list[Descriptor]:
    """Put engines into their version's remote index without losing anybody else's. Returns the index as it then stands."""
    version, layout = entries[0].version, entries[0].layout
    ours = {entry.build: entry.descriptor for entry in entries}
    for attempt in range(INDEX_ROUNDS):
        present = remote_index(client, version)
        tagged = tagged_profiles(client, version, present, layout)
        lost = [one for one in tagged if one.annotations[PREFIX + "build"] not in ours]
        there = {one.annotations.get(PREFIX + "build") for one in present}
        new = [one for build, one in ours.items() if build not in there]
        if not lost and not new:
            break  # read after the last write, by us or by somebody else, and nothing is missing
        data, _ = version_index(merge([*lost, *present], new))
        assert len(data) <= DOCUMENT_LIMIT
        client.put_manifest(version, data, INDEX)
        if attempt:
            pause(min(attempt, 4))
    else:
        raise ArtifactError(
            f"{client.address}: the index of {version} changed {INDEX_ROUNDS} times while it was written; push again"
        )
    if latest or LATEST not in client.tags():
        client.put_manifest(LATEST, client.manifest(version), INDEX)
    return present
