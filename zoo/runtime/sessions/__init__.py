"""Engine sessions: a folder of engine files and its manifest in, a ``Session`` (``zoo.runtime.abi``) out."""

from __future__ import annotations

from pathlib import Path

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import IncompatibleError
from zoo.runtime.abi import Session


def open_session(folder: Path, manifest: EngineManifest, threads: int = 0) -> Session:
    """Load the engine whose files lie in ``folder`` by their names in the artifact; digests are verified already.

    ``threads`` is for CPU engines; 0 means every core this process may use. Raises IncompatibleError when this machine
    cannot run the engine, UnavailableError without its GPU or packages, ResourceError when memory or disk are short,
    ArtifactError when files are missing or wrong.
    """
    name = manifest.compiler.get("name")
    if name == "onnxruntime":
        from zoo.runtime.sessions.onnxruntime import OrtSession

        return OrtSession(folder, manifest, threads)
    if name in ("tensorrt_rtx", "tensorrt"):
        from zoo.runtime.sessions.tensorrt import TensorRtSession

        return TensorRtSession(folder, manifest)
    raise IncompatibleError(
        f"engine {manifest.model}:{manifest.version}@{manifest.profile} was compiled by {name!r}, which this zoo cannot "
        "load; choose a profile for another compiler"
    )
