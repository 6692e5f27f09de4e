"""Encoder sessions on ONNX Runtime: weights as in ``zoo.runtime.sessions.onnxruntime``, no pools, hidden states out.

T tokens, B texts, E hidden.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError
from zoo.resources import check_memory
from zoo.runtime.abi import Batch, Float32
from zoo.runtime.embedding import encoder_limits, vocabulary
from zoo.runtime.indices import INDEX_BUILDERS
from zoo.runtime.sessions import check_threads, hugepages
from zoo.runtime.sessions.onnxruntime import SPARE, _built_threads, _data, _load, _step_error, _table


class OrtEncoder:
    """One encoder engine on this machine's CPU; ``threads`` and what it raises are those of ``OrtSession``."""

    def __init__(self, folder: Path, manifest: EngineManifest, threads: int = 0) -> None:
        self.limits, self.vocab_size, self.pooling = encoder_limits(manifest), vocabulary(manifest), manifest.pooling
        check_threads(threads)
        self.threads = threads or _built_threads(manifest) or len(os.sched_getaffinity(0))
        self._abi = manifest.abi
        if unknown := [one.name for one in self._abi.index_inputs if one.name not in INDEX_BUILDERS]:
            raise ArtifactError(
                f"engine.json: unknown index inputs {', '.join(unknown)}; it was written by another version of zoo"
            )
        table, weights = _table(folder)
        check_memory(table["size"] + SPARE, f"running {manifest.model} {manifest.profile}")
        self._session: Any = _load(folder, table, weights, self.threads)
        hugepages.collapse()

    def encode(self, batch: Batch) -> Float32:
        """Hidden states [T, E] of one batch. Raises ResourceError when memory ran out, EngineError when ONNX Runtime failed."""
        assert self._session is not None, "the session is closed"
        self._check(batch)
        feeds = {tensor.name: _data(batch, tensor.name) for tensor in self._abi.inputs}
        feeds |= {tensor.name: INDEX_BUILDERS[tensor.name](batch, self.limits) for tensor in self._abi.index_inputs}
        try:
            hidden: Float32 = self._session.run(["hidden"], feeds)[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise _step_error(error, len(batch.token_ids)) from error
        return hidden

    def close(self) -> None:
        """Free the weights. Calling it twice is allowed."""
        self._session = None

    def _check(self, batch: Batch) -> None:
        """Whoever packs texts keeps the limits; a batch that breaks them is a bug."""
        limits, counts, tokens = self.limits, batch.query_starts[1:] - batch.query_starts[:-1], len(batch.token_ids)
        assert 0 < tokens <= limits.max_tokens, f"{tokens} tokens in a step, the engine takes {limits.max_tokens}"
        assert 0 < len(counts) <= limits.max_sequences, f"{len(counts)} texts in a step, the engine takes {limits.max_sequences}"
        assert batch.query_starts[0] == 0 and batch.query_starts[-1] == tokens and counts.min() > 0
        assert batch.token_ids.min() >= 0 and batch.token_ids.max() < self.vocab_size, "a token id outside the vocabulary"
        assert batch.positions.max() < limits.max_context, "a text beyond the engine's context"
