"""Engine sessions: a folder of engine files and its manifest in, a ``Session`` (``zoo.runtime.abi``) out, or of an encoder an
``EncoderSession`` (``zoo.runtime.embedding``).
"""

from __future__ import annotations

import os
from pathlib import Path

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import IncompatibleError, RequestError
from zoo.runtime.abi import Session
from zoo.runtime.embedding import EncoderSession


def most_threads() -> int:
    """How many threads an engine may be given here: 4 for each core this process may use, 1024 in all."""
    return min(1024, 4 * len(os.sched_getaffinity(0)))


def check_threads(threads: int) -> None:
    """Raise RequestError for a number of threads that no session takes. 0 means all cores."""
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads <= most_threads():
        raise RequestError(
            f"threads is {threads!r}; it must be a whole number from 0 (all cores) to {most_threads()} (4 for each core here)"
        )


def open_session(
    folder: Path, manifest: EngineManifest, threads: int = 0, blocks: int = 0, checkpoint: Path | None = None
) -> Session:
    """Load the engine whose files lie in ``folder`` by their names in the artifact; digests are verified already.

    ``threads`` is for CPU engines; 0 means every core this process may use. ``blocks``: how many blocks of the pools the
    caller will use; 0: all. ``checkpoint``: the folder of an engine that was built without one. Raises RequestError for a
    number of threads out of range, IncompatibleError when this machine cannot run the engine, UnavailableError without its
    GPU or packages, ResourceError when memory or disk are short, ArtifactError when files are missing or wrong.
    """
    name = manifest.compiler.get("name")
    if manifest.pooling:
        raise IncompatibleError(
            f"engine {manifest.model}:{manifest.version}@{manifest.profile} is an encoder's: it gives embeddings (LLM.embed, "
            "`zoo embed`) and generates nothing"
        )
    if name == "onnxruntime":
        from zoo.runtime.sessions.onnxruntime import OrtSession

        return OrtSession(folder, manifest, threads, blocks=blocks)
    if name in ("tensorrt_rtx", "tensorrt"):
        from zoo.runtime.sessions.tensorrt import TensorRtSession

        return TensorRtSession(folder, manifest)
    if name == "cuda":
        from zoo.runtime.sessions.cuda import CudaSession

        return CudaSession(folder, manifest, checkpoint, blocks)
    raise IncompatibleError(
        f"engine {manifest.model}:{manifest.version}@{manifest.profile} was compiled by {name!r}, which this zoo cannot "
        "load; choose a profile for another compiler"
    )


def open_encoder(folder: Path, manifest: EngineManifest, threads: int = 0, checkpoint: Path | None = None) -> EncoderSession:
    """As ``open_session``, of an encoder engine. IncompatibleError for compilers without such a session."""
    name = manifest.compiler.get("name")
    if name == "onnxruntime":
        from zoo.runtime.sessions.onnxruntime_encoder import OrtEncoder

        return OrtEncoder(folder, manifest, threads)
    if name == "cuda":
        from zoo.runtime.sessions.cuda_encoder import CudaEncoder

        return CudaEncoder(folder, manifest, checkpoint)
    raise IncompatibleError(
        f"engine {manifest.model}:{manifest.version}@{manifest.profile} was compiled by {name!r}, and engines of encoders run on "
        "onnxruntime and cuda only so far; build it for hardware=cpu, or for hardware that cuda builds for"
    )
