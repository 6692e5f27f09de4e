"""``Entry``: one engine in a registry, and the annotations that say so in its OCI index."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zoo.artifacts.layout import (
    ARTIFACT,
    CREATED,
    ENGINE_JSON_LIMIT,
    LICENSES,
    MANIFEST,
    Descriptor,
    ImageManifest,
    Layout,
)
from zoo.artifacts.manifest import EngineManifest
from zoo.artifacts.refs import is_digest, is_profile
from zoo.errors import ArtifactError, DigestError
from zoo.spec import digest_of

PREFIX = "zoo."
# Annotations every engine has. All values are strings; numbers are decimal, tables are JSON.
REQUIRED = ("model", "version", "profile", "build", "quant", "hardware", "kind", "sm", "memory", "compiler", "tp", "pp", "size")
SHORT_DIGEST = 12


def annotations_of(manifest: EngineManifest, size: int) -> dict[str, str]:
    """What an index says of an engine, so that one can be chosen without fetching anything else. ``size`` in bytes."""
    spec, needs = manifest.spec, manifest.needs
    hardware, parallel, model = spec.get("hardware", {}), spec.get("parallel", {}), spec.get("model", {})
    found = {
        "model": manifest.model,
        "version": manifest.version,
        "profile": manifest.profile,
        "build": manifest.build,
        "quant": spec.get("quant", {}).get("name", "none"),
        "hardware": hardware.get("name", ""),
        "kind": needs.get("kind", "cpu"),
        "sm": needs.get("sm", 0),
        "memory": needs.get("memory", 0),
        "packages": needs.get("packages", {}),
        "compiler": manifest.compiler.get("name", ""),
        "compiler.version": manifest.compiler.get("version", ""),
        "compilers": ",".join(hardware.get("compilers", ())),
        "hardware_memory": hardware.get("memory", 0),
        "dtype": spec.get("dtype", ""),
        "tp": parallel.get("tp", 1),
        "pp": parallel.get("pp", 1),
        "limits": manifest.limits,
        "plugins": manifest.plugins,
        "base_model": model.get("base_model", ""),
        "size": size,
    }
    written = {PREFIX + key: _text(value) for key, value in found.items() if value not in ("", {}, None)}
    if model.get("license"):
        written[LICENSES] = str(model["license"])
    return written | {CREATED: manifest.created}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


@dataclass(frozen=True)
class Entry:
    """One engine of a registry. ``current``: it is what its profile's name means; older builds are reached by digest."""

    layout: Layout
    descriptor: Descriptor
    model: str
    version: str
    profile: str
    current: bool = True

    @classmethod
    def read(cls, layout: Layout, version: str, descriptor: Descriptor, current: bool = True) -> Entry:
        """Make an entry from an index's descriptor. ArtifactError when its annotations are not an engine's."""
        where = f"{layout.model}:{version}, entry {descriptor.digest}"
        values = {key: descriptor.annotations.get(PREFIX + key, "") for key in REQUIRED}
        if missing := [PREFIX + key for key in REQUIRED if not values[key]]:
            raise ArtifactError(f"{where}: not an engine of this zoo: no annotation {', '.join(missing)}")
        if descriptor.artifact_type not in ("", ARTIFACT):
            raise ArtifactError(f"{where}: artifactType is {descriptor.artifact_type!r}; an engine has {ARTIFACT!r}")
        if descriptor.media_type != MANIFEST:
            raise ArtifactError(f"{where}: media type {descriptor.media_type!r}; expected {MANIFEST!r}")
        for key in ("sm", "memory", "tp", "pp", "size"):
            if not values[key].isascii() or not values[key].isdigit() or len(values[key]) > 18:
                raise ArtifactError(f"{where}: annotation {PREFIX + key} is {values[key][:40]!r}; expected a number")
        if not is_profile(values["profile"]) or not is_digest(values["build"]):
            raise ArtifactError(f"{where}: profile {values['profile'][:80]!r} or build {values['build'][:80]!r} is malformed")
        if (values["model"], values["version"]) != (layout.model, version):
            raise ArtifactError(
                f"{where}: says it is {values['model'][:80]}:{values['version'][:80]}; the index stands under another name"
            )
        return cls(layout, descriptor, layout.model, version, values["profile"], current)

    def get(self, key: str) -> str:
        """An annotation of ours, without its prefix; empty when absent."""
        return self.descriptor.annotations.get(PREFIX + key, "")

    def number(self, key: str) -> int:
        """A numeric annotation."""
        return int(self.get(key) or 0)

    @property
    def digest(self) -> str:
        """Digest of the image manifest."""
        return self.descriptor.digest

    @property
    def build(self) -> str:
        return self.get("build")

    @property
    def size(self) -> int:
        """Bytes of all files of the engine."""
        return self.number("size")

    @property
    def created(self) -> str:
        return self.descriptor.annotations.get(CREATED, "")

    @property
    def ref(self) -> str:
        """The REF that means exactly this engine."""
        if self.current:
            return f"{self.model}:{self.version}@{self.profile}"
        return f"{self.model}:{self.version}@{self.digest[: len('sha256:') + SHORT_DIGEST]}"

    def row(self) -> dict[str, Any]:
        """The columns of ``zoo list --json``."""
        return {
            "ref": self.ref,
            "model": self.model,
            "version": self.version,
            "profile": self.profile,
            "quant": self.get("quant"),
            "hardware": self.get("hardware"),
            "compiler": self.get("compiler"),
            "tp": self.number("tp"),
            "digest": self.digest,
            "size": self.size,
            "created": self.created,
        }

    @cached_property
    def image(self) -> ImageManifest:
        """The OCI manifest, its digest checked."""
        return self.layout.manifest(self.descriptor, self.ref)

    @cached_property
    def manifest(self) -> EngineManifest:
        """The engine's own manifest; its digest, its name and what it says of its files are checked."""
        blob = self.image.files["engine.json"]
        document = self.layout.document(blob, f"{self.ref}, engine.json", ENGINE_JSON_LIMIT)
        return check_manifest(EngineManifest.from_json(document), self.image, self.descriptor.annotations, self.ref)


def check_manifest(manifest: EngineManifest, image: ImageManifest, annotations: dict[str, str], where: str) -> EngineManifest:
    """Compare an engine's manifest with itself, with the layers it came with and with what the index says of it."""
    if digest_of(manifest.made) != manifest.build:
        made = digest_of(manifest.made)
        raise DigestError(f"{where}: engine.json: 'build' is {manifest.build}, but its ingredients ('made') give {made}")
    layers = {name: {"digest": blob.digest, "size": blob.size} for name, blob in image.files.items() if name != "engine.json"}
    if layers != manifest.files:
        wrong = sorted(name for name in layers.keys() | manifest.files.keys() if layers.get(name) != manifest.files.get(name))
        raise DigestError(f"{where}: engine.json and the layers disagree on {', '.join(wrong[:5])}")
    for key, value in annotations_of(manifest, sum(layer.size for layer in image.layers)).items():
        if (said := annotations.get(key, value)) != value:
            raise DigestError(f"{where}: engine.json gives {key} as {value!r}, the index as {said!r}: one was tampered with")
    return manifest
