"""Encoder sessions of the ``cuda`` target: one copy of inputs, a launch plan, one copy of hidden states back.

Steps are launched as they come, never captured: what launches cost the host is little beside a step of many tokens.

T tokens, B texts, E hidden.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError, ZooError
from zoo.runtime.abi import Batch, Float32
from zoo.runtime.cuda.checks import ENCODER_INPUTS
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.loading import load_engine
from zoo.runtime.embedding import encoder_limits

OTHERS = {"R": 0, "W": 0, "S": 1, "P": 1, "J": 0}  # sizes that a step of an encoder has not


class CudaEncoder:
    """One encoder engine on the first visible GPU of its SM; ``checkpoint`` and what it raises are those of ``CudaSession``.

    ``fill`` is for tests: a byte that the arena starts with.
    """

    def __init__(self, folder: Path, manifest: EngineManifest, checkpoint: Path | None = None, fill: int | None = None) -> None:
        if not (sm := manifest.needs.get("sm")):
            raise ArtifactError("engine.json: needs has no sm, which a cuda engine is for; rebuild the engine")
        self.limits, self.pooling = encoder_limits(manifest), manifest.pooling
        self._device = Device(int(sm))
        self._open = True
        try:
            self._stream = self._device.stream()
            self._engine = load_engine(self._device, self._stream, folder, manifest, checkpoint)
            self.vocab_size, self._width = self._engine.vocab_size, _width(manifest)
            if fill is not None:
                self._device.fill(self._engine.arena, fill, self._engine.arena_size, self._stream)
            self._engine.link()
            room = self._device.pinned(4 * self.limits.max_tokens * self._width)
            self._hidden = room.view(np.float32).reshape(-1, self._width)
            self._device.wait(self._stream)
        except BaseException:
            self.close()
            raise

    def encode(self, batch: Batch) -> Float32:
        """Hidden states [T, E] of one batch, a new array."""
        assert self._open, "the session is closed"
        self._check(batch)
        device, engine, tokens = self._device, self._engine, len(batch.token_ids)
        device.use()
        engine.inputs.send(0, {name: getattr(batch, name) for name in ENCODER_INPUTS}, self._stream)
        numbers = engine.symbols.set({"T": tokens, "B": len(batch.query_starts) - 1, **OTHERS})
        engine.programs["graph"].run(numbers, self._stream)
        device.fetch(self._hidden[:tokens], engine.logits, self._stream)
        device.wait(self._stream)
        return self._hidden[:tokens].copy()

    def close(self) -> None:
        """Free everything. Calling it twice is allowed."""
        if not self._open:
            return
        self._open = False
        if hasattr(self, "_engine"):
            with contextlib.suppress(ZooError):  # of a GPU that went wrong, which gives nothing back by itself
                self._engine.close()
        self._device.close()

    def _check(self, batch: Batch) -> None:
        """Whoever packs texts keeps the limits. With a batch that breaks them kernels would write beyond their tensors."""
        limits, ids, starts = self.limits, batch.token_ids, batch.query_starts
        counts = starts[1:] - starts[:-1]
        assert 0 < len(ids) <= limits.max_tokens, f"{len(ids)} tokens in a step, the engine takes {limits.max_tokens}"
        assert 0 < len(counts) <= limits.max_sequences, f"{len(counts)} texts in a step, the engine takes {limits.max_sequences}"
        assert len(batch.positions) == len(ids) and starts[0] == 0 and starts[-1] == len(ids) and counts.min() > 0
        assert ids.min() >= 0 and ids.max() < self.vocab_size, "a token id outside the vocabulary"
        assert batch.positions.min() >= 0 and batch.positions.max() < limits.max_context, "a text beyond the engine's context"
        for array in (ids, batch.positions, starts):
            assert array.dtype == np.int32, f"an array of {array.dtype}, the ABI says int32"


def _width(manifest: EngineManifest) -> int:
    """Numbers of a hidden state."""
    for output in manifest.abi.outputs:
        if output.name == "hidden" and len(output.shape) == 2 and isinstance(output.shape[1], int):
            return output.shape[1]
    raise ArtifactError("engine.json: no output hidden [T, hidden]; rebuild the engine")
