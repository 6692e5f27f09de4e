"""Embeddings: texts in, one vector each out. Texts are packed into steps, a session runs them, hidden states are pooled.

T tokens, B texts, E hidden. An encoder has no cache: a text is computed in one step, whole, and forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError, EngineError, RequestError
from zoo.runtime.abi import Batch, EngineLimits, Float32, Int32, Session

OPEN = 32  # steps that still take a text, while they are packed
LEAST = 1e-12  # what a norm is divided by at least, as in torch's normalize


@dataclass
class EmbeddingOutput:
    """What one prompt gave. ``prompt`` is None when token ids were given; ``embedding`` is [E] float32."""

    prompt: str | None
    prompt_token_ids: list[int]
    embedding: Float32


class EncoderSession(Protocol):
    """A loaded encoder engine. Not thread-safe: one thread runs it.

    limits   rows and blocks are 0: there are none
    pooling  "mean", "first" or "none"
    """

    limits: EngineLimits
    vocab_size: int
    pooling: str

    def encode(self, batch: Batch) -> Float32:
        """Hidden states [T, E] of the texts of a batch, of which token_ids, positions and query_starts are read."""
        ...

    def close(self) -> None:
        """Free the engine. Calling it twice is allowed."""
        ...


def encoder_session(session: Session | EncoderSession) -> EncoderSession | None:
    """The session, if it is an encoder's. A session without the attribute ``pooling`` is not."""
    return cast(EncoderSession, session) if getattr(session, "pooling", "") else None


def encoder_limits(manifest: EngineManifest) -> EngineLimits:
    """The limits of an encoder engine. ArtifactError for others than those."""
    try:
        return EngineLimits(max_rows=0, max_blocks=0, block_size=0, **{key: int(n) for key, n in manifest.limits.items()})
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"engine.json: limits are malformed ({error}); rebuild the engine") from None


def vocabulary(manifest: EngineManifest) -> int:
    """How many token ids an encoder engine knows. Its outputs do not say, its model does."""
    size = manifest.spec.get("model", {}).get("vocab_size")
    if type(size) is not int or size < 1:
        raise ArtifactError(f"engine.json: spec.model.vocab_size is {size!r}; rebuild the engine")
    return size


class Embedder:
    """Runs texts through an encoder session, for several threads in turn. ``limits`` may be lower than the session's."""

    def __init__(self, session: EncoderSession, limits: EngineLimits | None = None) -> None:
        self.limits = limits or session.limits
        self._session = session
        self._lock = threading.Lock()
        self._closed = False

    def check(self, texts: Sequence[Sequence[int]]) -> None:
        """Raise RequestError for a text that is too long, and for token ids that the model does not have."""
        most = min(self.limits.max_context, self.limits.max_tokens)
        vocab = self._session.vocab_size
        for index, ids in enumerate(texts):
            if len(ids) > most:
                raise RequestError(
                    f"prompt {index} has {len(ids)} tokens and the engine takes {most}, because a text is one step; shorten it "
                    "or cut it in parts, or build the engine with a larger limits.max_tokens, up to the model's context"
                )
            if wrong := [token for token in ids if not 0 <= token < vocab]:
                raise RequestError(f"prompt {index} has the token id {wrong[0]}; the model knows 0 to {vocab - 1}")
        if self._session.pooling == "none":
            raise RequestError(
                "the engine's model says pooling none, so its texts have no embedding; build it with model.pooling=mean or first"
            )

    def embed(self, texts: Sequence[Sequence[int]], normalize: bool = True) -> list[Float32]:
        """One embedding [E] a text, in order. ``normalize``: of length 1 (L2).

        Raises what ``check`` raises before anything runs, and what the session raises: ResourceError, EngineError. Texts that
        are computed together do not see each other.
        """
        self.check(texts)
        found: dict[int, Float32] = {}
        for step in pack([len(ids) for ids in texts], self.limits):
            with self._lock:
                if self._closed:
                    raise RequestError("this LLM is closed; open another one")
                batch = batch_of([texts[index] for index in step])
                pooled = pool(self._session.encode(batch), batch.query_starts, self._session.pooling)
            if not np.isfinite(pooled).all():
                wrong = step[int(np.flatnonzero(~np.isfinite(pooled).all(axis=1))[0])]
                raise EngineError(f"prompt {wrong}: its embedding is not finite; check the model's weights")
            if normalize:
                pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), np.float32(LEAST))
            found |= zip(step, pooled, strict=True)
        return [np.array(found[index]) for index in range(len(texts))]

    def close(self) -> None:
        """Free the session. Calling it twice is allowed."""
        with self._lock:
            self._closed = True
            self._session.close()


def pack(lengths: Sequence[int], limits: EngineLimits) -> list[list[int]]:
    """Texts by number, in steps of at most max_tokens tokens and max_sequences texts.

    The longest first, each into the first of the last ``OPEN`` steps that it fits into (first fit decreasing: Johnson 1973, at
    most 11/9 of the fewest steps and one more, were all steps kept open).
    """
    steps: list[list[int]] = []
    room: dict[int, int] = {}  # step that still takes a text -> tokens that it takes
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        number = next((number for number, left in room.items() if lengths[index] <= left), len(steps))
        if number == len(steps):
            steps.append([])
            room[number] = limits.max_tokens
            if len(room) > OPEN:
                del room[next(iter(room))]
        steps[number].append(index)
        room[number] -= lengths[index]
        if len(steps[number]) == limits.max_sequences or not room[number]:
            del room[number]
    return steps


def batch_of(texts: Sequence[Sequence[int]]) -> Batch:
    """The texts of one step."""
    counts = np.array([len(ids) for ids in texts], np.int32)
    return Batch(
        token_ids=np.array([token for ids in texts for token in ids], np.int32),
        positions=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        query_starts=np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)]),
        kv_lengths=counts,
        block_tables={},
        logit_rows=np.zeros(0, np.int32),
    )


def pool(hidden: Float32, query_starts: Int32, pooling: str) -> Float32:
    """Hidden states [T, E] -> [B, E]: the mean over a text's tokens, special ones too, or its first token's."""
    starts = query_starts[:-1].astype(np.int64)
    if pooling == "first":
        first: Float32 = hidden[starts]
        return first
    counts = np.diff(query_starts)[:, None].astype(np.float32)
    sums: Float32 = np.add.reduceat(hidden, starts, axis=0)
    return np.divide(sums, counts, dtype=np.float32)
