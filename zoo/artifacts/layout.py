"""The OCI image layout of one model, and the documents in it. Everything read here is checked, for anyone may have written it.

ROOT/zoo-demo/
  oci-layout  index.json                 tag -> version index: a version's name, and "latest"
  blobs/sha256/<hex>                     version index -> profiles -> manifest -> config and layers
  .zoo/lock                              held while blobs enter and the index changes
  .zoo/staging/<random>/                 files of a store or pull under way, each folder locked by its owner
  .zoo/partial/<hex>                     an interrupted download, to be resumed
  .zoo/open/<hex of the manifest>/       the files of an opened engine by name
  .zoo/bad/<hex>                         an empty marker: this blob failed verification, replace it when it is stored again
  .zoo/removed                           the last index of a model that was removed as a whole: all its blobs are garbage
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.artifacts.locks import Lock, replace_file, sync_folder
from zoo.artifacts.refs import LATEST, is_digest, is_tag
from zoo.errors import ArtifactError, DigestError, NotFoundError
from zoo.spec import canonical

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
LAYERS = (WEIGHT, WEIGHT_CONFIG, DOC)

REF_NAME = "org.opencontainers.image.ref.name"
CREATED = "org.opencontainers.image.created"
LICENSES = "org.opencontainers.image.licenses"
FILEPATH = "org.cncf.model.filepath"

DOCUMENT_LIMIT = 4 << 20  # bytes of an index, manifest or config
ENGINE_JSON_LIMIT = 16 << 20
LAYOUT_VERSION = {"imageLayoutVersion": "1.0.0"}
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*", re.ASCII)


@dataclass(frozen=True)
class Descriptor:
    """What an OCI document says of another blob."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict)
    artifact_type: str = ""

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            data["artifactType"] = self.artifact_type
        if self.annotations:
            data["annotations"] = self.annotations
        return data

    @classmethod
    def from_json(cls, data: Any, where: str) -> Descriptor:
        """Check a descriptor. ``where`` begins the ArtifactError's message."""
        if not isinstance(data, dict):
            raise ArtifactError(f"{where}: expected a descriptor, found {type(data).__name__}")
        if not is_digest(data.get("digest")):
            raise ArtifactError(f"{where}: the digest {str(data.get('digest'))[:80]!r} is not sha256 and 64 hex digits")
        size = data.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
            raise ArtifactError(f"{where}: the size {size!r} of {data['digest']} is not a byte count")
        media_type = data.get("mediaType")
        if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
            raise ArtifactError(f"{where}: {media_type!r} is not a media type")
        artifact_type = data.get("artifactType", "")
        if not isinstance(artifact_type, str):
            raise ArtifactError(f"{where}: artifactType must be a string")
        return cls(media_type, data["digest"], size, _annotations(data, where), artifact_type)


def _annotations(data: dict[str, Any], where: str) -> dict[str, str]:
    found = data.get("annotations") or {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ArtifactError(f"{where}: annotations must map strings to strings")
    return dict(found)


@dataclass(frozen=True)
class ImageManifest:
    """A checked image manifest: the config and the layers of one engine. ``files`` maps names to layers."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str]

    @property
    def files(self) -> dict[str, Descriptor]:
        return {layer.annotations[FILEPATH]: layer for layer in self.layers}

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers."""
        return (self.config, *self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": self.config.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "annotations": self.annotations,
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> ImageManifest:
        """Check a manifest: types, config, layer types, and that every layer's file name is safe and stands once."""
        _expect(data, MANIFEST, where)
        if data.get("artifactType") != ARTIFACT:
            raise ArtifactError(f"{where}: artifactType is {data.get('artifactType')!r}; an engine has {ARTIFACT!r}")
        config = Descriptor.from_json(data.get("config"), f"{where}, config")
        if config.media_type != CONFIG:
            raise ArtifactError(f"{where}: the config's media type is {config.media_type!r}; an engine has {CONFIG!r}")
        if not isinstance(data.get("layers"), list):
            raise ArtifactError(f"{where}: layers must be a list")
        layers = tuple(Descriptor.from_json(layer, f"{where}, layer {i}") for i, layer in enumerate(data["layers"]))
        for layer in layers:
            if layer.media_type not in LAYERS:
                raise ArtifactError(f"{where}: unknown layer type {layer.media_type!r}; allowed: {', '.join(LAYERS)}")
            if FILEPATH not in layer.annotations:
                raise ArtifactError(f"{where}: layer {layer.digest} has no {FILEPATH} annotation")
        check_names([layer.annotations[FILEPATH] for layer in layers], where)
        if "engine.json" not in {layer.annotations[FILEPATH] for layer in layers}:
            raise ArtifactError(f"{where}: no engine.json among its layers; this is not an engine")
        return cls(config, layers, _annotations(data, where))


def _expect(data: Any, media_type: str, where: str) -> None:
    if not isinstance(data, dict) or data.get("schemaVersion") != 2:
        raise ArtifactError(f"{where}: expected an OCI document of schemaVersion 2")
    if data.get("mediaType", media_type) != media_type:
        raise ArtifactError(f"{where}: its media type is {data['mediaType']!r}; expected {media_type!r}")


def check_names(names: list[str], where: str) -> None:
    """Refuse file names that could leave the artifact's folder, hide one another or not be written everywhere."""
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")
        bad = (
            not name
            or len(name) > 1024
            or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
            or any(ord(char) < 32 or ord(char) == 127 or char in '\\:*?"<>|' for char in name)
        )
        if bad:
            raise ArtifactError(
                f"{where}: the file name {name[:120]!r} is refused: it must be a plain relative path of / and names"
            )
        folders |= {"/".join(parts[:end]) for end in range(1, len(parts))}
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArtifactError(f"{where}: the file name {twice[0]!r} stands twice")
    if both := sorted(folders & set(names)):
        raise ArtifactError(f"{where}: {both[0]!r} is a file and a folder at once")


def parse_json(data: bytes, where: str) -> Any:
    """JSON from bytes that anyone may have written. ArtifactError for what is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not JSON ({error})") from None


def index_descriptors(data: Any, where: str) -> list[Descriptor]:
    """The descriptors in an OCI index, checked."""
    _expect(data, INDEX, where)
    if not isinstance(data.get("manifests"), list):
        raise ArtifactError(f"{where}: manifests must be a list")
    return [Descriptor.from_json(one, f"{where}, entry {i}") for i, one in enumerate(data["manifests"])]


def index_json(descriptors: list[Descriptor], annotations: dict[str, str] | None = None) -> dict[str, Any]:
    """An OCI index as JSON data."""
    data: dict[str, Any] = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [one.to_json() for one in descriptors]}
    return data | ({"annotations": annotations} if annotations else {})


def describe(data: bytes, media_type: str, annotations: dict[str, str] | None = None, artifact_type: str = "") -> Descriptor:
    """The descriptor of bytes at hand."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return Descriptor(media_type, digest, len(data), annotations or {}, artifact_type)


@dataclass(frozen=True)
class Layout:
    """One model's folder. Methods that write expect the caller to hold ``lock()``."""

    folder: Path

    @property
    def blobs(self) -> Path:
        return self.folder / "blobs" / "sha256"

    @property
    def private(self) -> Path:
        return self.folder / ".zoo"

    @property
    def model(self) -> str:
        return self.folder.name

    def exists(self) -> bool:
        try:
            return (self.folder / "index.json").is_file() and (self.folder / "oci-layout").is_file()
        except OSError:  # a folder that may not be entered; ``damage`` says so
            return False

    @property
    def removed(self) -> Path:
        return self.private / "removed"

    def damage(self) -> str:
        """What keeps the folder from being a layout, "" for nothing. A removed model and an empty folder are not damaged."""
        try:
            if (self.folder / "index.json").is_file():
                return "" if (self.folder / "oci-layout").is_file() else "its oci-layout is missing"
            if not self.removed.exists() and any(self.iterate_blobs()):
                return "its index.json is missing"
        except OSError as error:
            return f"{self.folder} cannot be read: {error.strerror}"
        return ""

    def drop(self) -> None:
        """Remove the model, under the lock: one rename, which a full disk allows and a damaged index does not hinder."""
        self.private.mkdir(parents=True, exist_ok=True)
        try:
            (self.folder / "index.json").replace(self.removed)
        except FileNotFoundError:
            self.removed.touch()
        sync_folder(self.folder)

    @property
    def advice(self) -> str:
        """What to do about a layout that cannot be used."""
        return f"`zoo rm {self.model}` and `zoo gc` take it away, then build or pull it again"

    def lock(self) -> Lock:
        """The lock under which blobs enter and leave and the index changes. Readers take none."""
        return Lock(self.private / "lock")

    def create(self) -> None:
        """Make an empty layout where there is none."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "oci-layout").exists():
            replace_file(self.folder / "oci-layout", canonical(LAYOUT_VERSION))
        if not (self.folder / "index.json").exists():
            replace_file(self.folder / "index.json", canonical(index_json([])))
        self.removed.unlink(missing_ok=True)

    def blob(self, digest: str) -> Path:
        assert is_digest(digest), digest
        return self.blobs / digest.removeprefix("sha256:")

    def bad_marker(self, digest: str) -> Path:
        return self.private / "bad" / digest.removeprefix("sha256:")

    def has(self, blob: Descriptor) -> bool:
        """Whether a blob is here in full size and has not failed a verification since. Reads nothing of it."""
        try:
            return self.blob(blob.digest).stat().st_size == blob.size and not self.bad_marker(blob.digest).exists()
        except FileNotFoundError:
            return False

    def index_bytes(self) -> bytes:
        """The bytes of index.json."""
        path = self.folder / "index.json"
        try:
            with path.open("rb") as file:
                data = file.read(DOCUMENT_LIMIT + 1)
        except FileNotFoundError:
            raise NotFoundError(f"{path}: no such registry entry; `zoo list` shows what is stored") from None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}; {self.advice}") from None
        if len(data) > DOCUMENT_LIMIT:
            raise ArtifactError(f"{path}: larger than {DOCUMENT_LIMIT} bytes; {self.advice}")
        return data

    def tags(self, data: bytes | None = None) -> dict[str, Descriptor]:
        """Tag -> version index, in the order of publication: the newest last. ``latest`` is among them."""
        where = str(self.folder / "index.json")
        data = self.index_bytes() if data is None else data
        try:
            descriptors = index_descriptors(parse_json(data, where), where)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; {self.advice}") from None
        found = {}
        for one in descriptors:
            tag = one.annotations.get(REF_NAME, "")
            if is_tag(tag):
                found[tag] = one
        return found

    def document(self, blob: Descriptor, where: str, limit: int = DOCUMENT_LIMIT) -> Any:
        """Read and parse a JSON blob whose size and digest are checked first."""
        if blob.size > limit:
            raise ArtifactError(f"{where}: {blob.digest} is said to have {blob.size} bytes; at most {limit} are read")
        try:
            with self.blob(blob.digest).open("rb") as file:
                data = file.read(blob.size + 1)
        except FileNotFoundError:
            raise NotFoundError(f"{where}: blob {blob.digest} is missing from {self.blobs}") from None
        except OSError as error:
            raise ArtifactError(f"{where}: blob {blob.digest} cannot be read: {error.strerror}") from None
        check_bytes(data, blob, where)
        return parse_json(data, where)

    def profiles(self, version: Descriptor, where: str) -> list[Descriptor]:
        """The manifests of a version's index, in the order of publication."""
        if version.media_type != INDEX:
            raise ArtifactError(f"{where}: its media type is {version.media_type!r}; a version is an {INDEX!r}")
        found = index_descriptors(self.document(version, where), where)
        for one in found:
            if one.media_type != MANIFEST:
                raise ArtifactError(f"{where}: {one.digest} has the media type {one.media_type!r}; expected {MANIFEST!r}")
        return found

    def manifest(self, blob: Descriptor, where: str) -> ImageManifest:
        """A profile's image manifest, checked."""
        return ImageManifest.from_json(self.document(blob, where), where)

    def versions(self, only: str = "") -> list[tuple[str, list[Descriptor]]]:
        """Every version (or one) with its profiles, as one moment saw them; the newest version last."""
        for _ in range(100):
            data = self.index_bytes()
            try:
                tags = self.tags(data)
                wanted = [tag for tag in tags if tag != LATEST and only in ("", tag)]
                return [(tag, self.profiles(tags[tag], f"{self.model}:{tag}")) for tag in wanted]
            except NotFoundError:
                if data == self.index_bytes():
                    raise  # nobody changed it meanwhile: the blob really is missing
        raise ArtifactError(f"{self.folder}: its index changes faster than it can be read")

    def iterate_blobs(self) -> Iterator[Path]:
        """Every file in the blob folder."""
        if self.blobs.is_dir():
            yield from self.blobs.iterdir()

    def write_tags(self, versions: list[tuple[str, Descriptor]]) -> None:
        """Replace index.json: the versions in order, and ``latest`` on the last."""
        rows = [
            Descriptor(one.media_type, one.digest, one.size, one.annotations | {REF_NAME: tag}, one.artifact_type)
            for tag, one in versions
        ]
        if rows:
            last = rows[-1]
            rows.append(Descriptor(last.media_type, last.digest, last.size, last.annotations | {REF_NAME: LATEST}))
        replace_file(self.folder / "index.json", canonical(index_json(rows)))


def check_bytes(data: bytes, blob: Descriptor, where: str) -> None:
    """Compare bytes at hand with what their descriptor says. DigestError names both digests."""
    found = "sha256:" + hashlib.sha256(data).hexdigest()
    if len(data) != blob.size or found != blob.digest:
        raise DigestError(f"{where}: blob {blob.digest} ({blob.size} bytes) does not match its digest: its bytes give {found}")
