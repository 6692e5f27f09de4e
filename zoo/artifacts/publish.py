"""From an engine and its staged files to the OCI documents that describe it, and into the index."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from zoo.artifacts.entries import PREFIX, annotations_of
from zoo.artifacts.layout import (
    CONFIG,
    CREATED,
    DOC,
    DOCUMENT_LIMIT,
    ENGINE_JSON_LIMIT,
    FILEPATH,
    INDEX,
    LICENSES,
    MANIFEST,
    WEIGHT,
    WEIGHT_CONFIG,
    Descriptor,
    ImageManifest,
    Layout,
    describe,
    index_json,
)
from zoo.artifacts.manifest import EngineManifest
from zoo.artifacts.refs import LATEST
from zoo.artifacts.staging import Staging
from zoo.errors import ArtifactError, DigestError, NotFoundError
from zoo.spec import canonical

WEIGHT_SUFFIXES = (".safetensors", ".plan", ".bin", ".cubin", ".npy", ".npz", ".data")
DOC_NAMES = ("license", "licence", "notice", "readme", "copying")


def media_type_of(name: str) -> str:
    """The layer type of a file, by its name: weights and plans, documents for people, everything else."""
    path = PurePosixPath(name)
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        return WEIGHT
    if path.suffix.lower() == ".md" or path.name.lower().startswith(DOC_NAMES):
        return DOC
    return WEIGHT_CONFIG


def param_size(model: Mapping[str, Any]) -> str:
    """Parameters of a decoder from its numbers, as ModelPack writes them ("1.2b"); norms and biases are left out."""
    keys = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    if not all(isinstance(model.get(key), int) for key in keys):
        return ""
    vocab, hidden, layers, heads, kv_heads, head_dim, inner = (model[key] for key in keys)
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    mlp = (3 if model.get("mlp") == "gated" else 2) * hidden * inner
    count = vocab * hidden * (1 if model.get("tie_embeddings") else 2) + layers * (attention + mlp)
    for unit, factor in (("b", 1e9), ("m", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f}{unit}"
    return str(count)


def config_json(manifest: EngineManifest, layers: list[Descriptor]) -> dict[str, Any]:
    """The ModelPack model config (application/vnd.cncf.model.config.v1+json, model-spec v0.0.7)."""
    spec = manifest.spec
    model, quant = spec.get("model", {}), spec.get("quant", {})
    descriptor = {
        "createdAt": manifest.created,
        "name": manifest.model,
        "version": manifest.version,
        "family": model.get("family", ""),
        "licenses": [model["license"]] if model.get("license") else [],
    }
    config = {
        "architecture": model.get("template", ""),
        "format": "onnx" if manifest.compiler.get("name") == "onnxruntime" else manifest.compiler.get("name", ""),
        "paramSize": param_size(model),
        "precision": spec.get("dtype", ""),
        "quantization": quant.get("method", "none"),
    }
    return {
        "descriptor": {key: value for key, value in descriptor.items() if value},
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},  # uncompressed: the layers' own digests
        "config": {key: value for key, value in config.items() if value},
    }


def stage_documents(staging: Staging, manifest: EngineManifest, files: Mapping[str, tuple[str, int]]) -> Descriptor:
    """Stage engine.json, the config and the image manifest of staged files (name -> digest, size).

    Returns the image manifest's descriptor with the annotations that the version's index carries. It has no artifactType
    (the manifest itself has): skopeo 1.9 drops that field from an index and then cannot keep the index's digest.
    """
    manifest = dataclasses.replace(
        manifest, files={name: {"digest": digest, "size": size} for name, (digest, size) in sorted(files.items())}
    )
    engine_json = json.dumps(manifest.to_json(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    if len(engine_json) > ENGINE_JSON_LIMIT:
        raise ArtifactError(f"engine.json has {len(engine_json)} bytes; at most {ENGINE_JSON_LIMIT} are allowed")
    layers = [Descriptor(WEIGHT_CONFIG, staging.add_bytes(engine_json), len(engine_json), {FILEPATH: "engine.json"})]
    layers += [Descriptor(media_type_of(name), digest, size, {FILEPATH: name}) for name, (digest, size) in sorted(files.items())]
    config = canonical(config_json(manifest, layers))
    annotations = annotations_of(manifest, sum(layer.size for layer in layers))
    image = ImageManifest(describe(config, CONFIG), tuple(layers), annotations)
    document = canonical(image.to_json())
    for text, name in ((config, "config"), (document, "image manifest")):
        if len(text) > DOCUMENT_LIMIT:
            raise ArtifactError(
                f"the {name} has {len(text)} bytes; at most {DOCUMENT_LIMIT} are allowed: too many files or names"
            )
        staging.add_bytes(text)
    return describe(document, MANIFEST, annotations)


def version_annotations(descriptors: list[Descriptor]) -> dict[str, str]:
    """What a version's index says of itself: what its profiles have in common, and when the newest was made."""
    newest = descriptors[-1].annotations
    kept = {key: newest[key] for key in (PREFIX + "model", PREFIX + "version", PREFIX + "base_model", LICENSES) if key in newest}
    return kept | {CREATED: max(one.annotations.get(CREATED, "") for one in descriptors)}


def version_index(descriptors: list[Descriptor]) -> tuple[bytes, Descriptor]:
    """The bytes of a version's index over its profiles, and their descriptor."""
    annotations = version_annotations(descriptors)
    data = canonical(index_json(descriptors, annotations))
    if len(data) > DOCUMENT_LIMIT:
        raise ArtifactError(f"the version's index has {len(data)} bytes; at most {DOCUMENT_LIMIT}: `zoo rm` some of its profiles")
    return data, describe(data, INDEX, {CREATED: annotations[CREATED]})


def merge(present: list[Descriptor], new: list[Descriptor]) -> list[Descriptor]:
    """Profiles with new ones behind them, each manifest once: the last of a name is what the name means."""
    digests = {one.digest for one in new}
    return [one for one in present if one.digest not in digests] + new


def intact(layout: Layout, descriptor: Descriptor) -> bool:
    """Whether a stored engine has all its blobs in full size, none known to be bad; documents are read, weights are not."""
    try:
        return layout.has(descriptor) and all(map(layout.has, layout.manifest(descriptor, descriptor.digest).blobs))
    except (NotFoundError, DigestError):
        return False


def publish(
    layout: Layout, staging: Staging, version: str, new: list[Descriptor], first_build_wins: bool = True
) -> list[Descriptor]:
    """Put staged blobs and new profiles into a layout, in one locked step. Returns what stands for each of ``new``.

    With ``first_build_wins``, a stored and intact manifest of the same ``build`` stays and the new one is dropped. Either
    way the profile's name and ``latest`` now mean it.
    """
    key = PREFIX + "build"
    with layout.lock():
        layout.create()
        present = present_profiles(layout, version)
        kept: list[Descriptor] = []
        for one in new:
            same = [old for old in present if first_build_wins and old.annotations.get(key) == one.annotations[key]]
            healthy = [old for old in same if intact(layout, old)]
            present = [old for old in present if old not in same or old in healthy]
            kept.append(healthy[0] if healthy else one)
        if not any(one in new for one in kept):
            staging.discard()
        write_version(layout, staging, version, merge(present, kept))
        return kept


def present_profiles(layout: Layout, version: str) -> list[Descriptor]:
    """The profiles of a version; none when there is no such version. DigestError says how to go on without a bad index."""
    tags = layout.tags()
    try:
        return layout.profiles(tags[version], f"{layout.model}:{version}") if version in tags else []
    except (DigestError, NotFoundError) as error:
        raise type(error)(f"{error}; `zoo rm {layout.model}:{version}`, then build or pull its profiles again") from None


def write_version(layout: Layout, staging: Staging, version: str, profiles: list[Descriptor]) -> None:
    """Replace a version's profiles and make it the latest, under the layout's lock, with all that is staged."""
    rows = [(tag, one) for tag, one in layout.tags().items() if tag not in (LATEST, version)]
    data, descriptor = version_index(profiles)
    staging.add_bytes(data)
    staging.move_in()
    layout.write_tags([*rows, (version, descriptor)])
