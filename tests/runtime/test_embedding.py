"""Packing, pooling and the embedder against a fake session; the ONNX Runtime encoder session's own refusals."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import build_spec

from zoo.artifacts.manifest import EngineManifest
from zoo.build import _limits
from zoo.compilers.onnxruntime import OnnxRuntimeCompiler
from zoo.errors import ArtifactError, EngineError, IncompatibleError, RequestError
from zoo.graph_templates import expand
from zoo.llm import LLM
from zoo.passes import run_passes
from zoo.runtime.abi import Batch, EngineLimits
from zoo.runtime.embedding import Embedder, batch_of, encoder_limits, pack, pool
from zoo.runtime.sessions import open_encoder, open_session
from zoo.runtime.sessions.onnxruntime_encoder import OrtEncoder
from zoo.spec import Limits
from zoo.targets import TARGETS
from zoo.weights.reader import Tensors

WIDTH = 6


def limits(**changes: int) -> EngineLimits:
    base = EngineLimits(max_tokens=32, max_sequences=4, max_rows=0, max_context=20, max_blocks=0, block_size=0)
    return dataclasses.replace(base, **changes)


class FakeEncoder:
    """A token's hidden state is made from its id, its position and its text's ids; a text with the id ``bad`` gives NaN."""

    def __init__(self, pooling: str = "mean", bad: int = -1) -> None:
        self.limits, self.vocab_size, self.pooling, self.bad = limits(), 50, pooling, bad
        self.batches: list[Batch] = []
        self.closed = 0

    def encode(self, batch: Batch) -> np.ndarray:
        self.batches.append(batch)
        rows = []
        for begin, end in zip(batch.query_starts, batch.query_starts[1:], strict=False):
            rows.append(states(batch.token_ids[begin:end].tolist()))
            assert batch.positions[begin:end].tolist() == list(range(end - begin))
            if self.bad in batch.token_ids[begin:end]:
                rows[-1][:] = np.nan
        return np.concatenate(rows)

    def close(self) -> None:
        self.closed += 1


def states(ids: list[int]) -> np.ndarray:
    rng = np.random.default_rng(ids)
    return rng.standard_normal((len(ids), WIDTH)).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=80), tokens=st.integers(40, 90), sequences=st.integers(1, 9))
def test_packing(lengths: list[int], tokens: int, sequences: int) -> None:
    """Every text once, no step over its limits, and no more steps than half full ones would be."""
    steps = pack(lengths, limits(max_tokens=tokens, max_sequences=sequences))
    assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in step) for step in steps]
    assert all(0 < total <= tokens and len(step) <= sequences for total, step in zip(sums, steps, strict=True))
    least = max(-(-sum(lengths) // tokens), -(-len(lengths) // sequences))
    assert len(steps) <= 2 * least + 1, "far more steps than texts need"
    for step in steps:
        assert [lengths[index] for index in step] == sorted((lengths[index] for index in step), reverse=True)


def test_packing_fills_steps_with_short_texts() -> None:
    assert pack([3, 20, 12, 5], limits()) == [[1, 2], [3, 0]]
    assert len(pack([16] * 10, limits())) == 5 and len(pack([1] * 9, limits())) == 3


def test_a_batch() -> None:
    batch = batch_of([[7, 8, 9], [5]])
    assert batch.token_ids.tolist() == [7, 8, 9, 5] and batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.query_starts.tolist() == [0, 3, 4] and batch.kv_lengths.tolist() == [3, 1]
    assert all(array.dtype == np.int32 for array in (batch.token_ids, batch.positions, batch.query_starts))


def test_pooling() -> None:
    hidden = np.arange(12, dtype=np.float32).reshape(4, 3)
    starts = np.array([0, 3, 4], np.int32)
    np.testing.assert_array_equal(pool(hidden, starts, "mean"), [[3, 4, 5], [9, 10, 11]])
    np.testing.assert_array_equal(pool(hidden, starts, "first"), [[0, 1, 2], [9, 10, 11]])
    assert pool(hidden, starts, "mean").dtype == np.float32


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_come_in_order(pooling: str, normalize: bool) -> None:
    session = FakeEncoder(pooling)
    texts = [list(range(index, index + 1 + index * 7 % 19)) for index in range(25)]
    found = Embedder(session).embed(texts, normalize)
    assert len(session.batches) < len(texts)
    for text, vector in zip(texts, found, strict=True):
        want = states(text).mean(0) if pooling == "mean" else states(text)[0]
        want = want / np.linalg.norm(want) if normalize else want
        assert vector.dtype == np.float32 and vector.shape == (WIDTH,)
        np.testing.assert_allclose(vector, want, rtol=0, atol=1e-6)


def test_a_vector_of_zeros_has_no_direction() -> None:
    session = FakeEncoder()
    session.encode = lambda batch: np.zeros((len(batch.token_ids), WIDTH), np.float32)  # type: ignore[method-assign]
    np.testing.assert_array_equal(Embedder(session).embed([[1]])[0], np.zeros(WIDTH))


def test_what_cannot_be_embedded_is_said_before_anything_runs() -> None:
    session = FakeEncoder()
    embedder = Embedder(session, limits(max_tokens=10))
    for texts, words in (
        ([[1], [2] * 11], "prompt 1 has 11 tokens and the engine takes 10, because a text is one step"),
        ([[50]], "prompt 0 has the token id 50; the model knows 0 to 49"),
        ([[1, -1]], "token id -1"),
    ):
        with pytest.raises(RequestError, match=words):
            embedder.embed(texts)
    with pytest.raises(RequestError, match="prompt 0 has 21 tokens and the engine takes 20"):
        Embedder(session).embed([[1] * 21])
    with pytest.raises(RequestError, match=r"pooling none, so its texts have no embedding; build it with model.pooling=mean"):
        Embedder(FakeEncoder("none")).embed([[1]])
    assert not session.batches


def test_an_embedding_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(EngineError, match="prompt 2: its embedding is not finite"):
        Embedder(FakeEncoder(bad=33)).embed([[1], [2], [33, 4], [5]])


def test_threads_take_turns_and_closing_ends_it() -> None:
    session = FakeEncoder()
    embedder = Embedder(session)
    texts = [[index] * 9 for index in range(40)]
    found: list[Any] = [None] * 4

    def run(place: int) -> None:
        found[place] = embedder.embed(texts)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])
    embedder.close()
    with pytest.raises(RequestError, match="closed"):
        embedder.embed([[1]])
    assert session.closed == 1


def test_an_llm_over_an_encoder_session() -> None:
    with LLM.from_session(FakeEncoder(), max_sequences=2) as llm:
        assert llm.limits == limits(max_sequences=2)
        (output,) = llm.embed([3, 4, 5], normalize=False)
        assert (output.prompt, output.prompt_token_ids) == (None, [3, 4, 5])
        np.testing.assert_allclose(output.embedding, states([3, 4, 5]).mean(0), atol=1e-6)
        for call in (lambda: llm.generate([[1]]), lambda: llm.stream([1]), lambda: llm.chat([]), lambda: llm.engine):
            with pytest.raises(RequestError, match=r"this model is an encoder: it generates nothing; use LLM.embed"):
                call()
        with pytest.raises(RequestError, match=r"max_blocks is 3, but the engine was built with 0"):
            LLM.from_session(FakeEncoder(), max_blocks=3)
    with pytest.raises(RequestError, match="closed"):
        llm.embed([1])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineManifest]:
    root = tmp_path_factory.mktemp("encoder")
    checkpoint, folder = encoders.folder(root, "bert"), root / "engine"
    build = build_spec(encoders.spec(checkpoint), Limits(max_tokens=64, max_sequences=4))
    graph = run_passes(expand(build.model, "float32", build.limits.max_context), build, TARGETS["onnxruntime"])
    folder.mkdir()
    with Tensors.open(checkpoint) as tensors:
        compiled = OnnxRuntimeCompiler().compile(graph, build, tensors, {}, folder)
    (folder / "checkpoint").symlink_to(checkpoint)
    manifest = EngineManifest(
        model="bert",
        version="0" * 12,
        profile=build.profile,
        build="sha256:" + "0" * 64,
        made={},
        compiler={"name": "onnxruntime", "version": "1"},
        spec={"threads": 1, "model": {"vocab_size": 262}},
        needs=compiled.needs,
        limits=_limits(build),
        abi=compiled.abi,
        weights=compiled.weights,
        pooling="mean",
    )
    assert EngineManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    return folder, manifest


def test_the_session(engine: tuple[Path, EngineManifest]) -> None:
    folder, manifest = engine
    assert manifest.limits == {"max_tokens": 64, "max_sequences": 4, "max_context": 40}
    session = open_encoder(folder, manifest)
    assert isinstance(session, OrtEncoder) and (session.vocab_size, session.pooling, session.threads) == (262, "mean", 1)
    texts = encoders.texts([5, 1, 30])
    hidden = session.encode(batch_of(texts))
    want = np.concatenate([encoders.reference("bert", text) for text in texts])
    assert hidden.dtype == np.float32
    np.testing.assert_allclose(hidden, want, rtol=0, atol=1e-4)
    for wrong, words in (([[300]], "outside the vocabulary"), ([[1]] * 5, "5 texts in a step"), ([[1] * 41], "beyond")):
        with pytest.raises(AssertionError, match=words):
            session.encode(batch_of(wrong))
    session.close()
    session.close()


def test_what_a_session_refuses(engine: tuple[Path, EngineManifest]) -> None:
    folder, manifest = engine

    def opened(**changes: Any) -> None:
        open_encoder(folder, dataclasses.replace(manifest, **changes))

    for limit in ({}, {"max_tokens": 1}, manifest.limits | {"max_blocks": 4}):
        with pytest.raises(ArtifactError, match=r"engine.json: limits are malformed"):
            opened(limits=limit)
    for spec in ({}, {"model": {}}, {"model": {"vocab_size": "262"}}):
        with pytest.raises(ArtifactError, match=r"spec.model.vocab_size"):
            opened(spec=spec)
    with pytest.raises(IncompatibleError, match=r"by 'tensorrt_rtx', and engines of encoders run on onnxruntime and cuda"):
        opened(compiler={"name": "tensorrt_rtx"})
    with pytest.raises(IncompatibleError, match="is an encoder's: it gives embeddings"):
        open_session(folder, manifest)
    index = dataclasses.replace(manifest.abi.index_inputs[0], name="other")
    with pytest.raises(ArtifactError, match="unknown index inputs other"):
        opened(abi=dataclasses.replace(manifest.abi, index_inputs=(index,)))
    with pytest.raises(ArtifactError, match=r"pooling is 'sum'; expected one of none, first, mean"):
        EngineManifest.from_json(json.loads(json.dumps(manifest.to_json() | {"pooling": "sum"})))
    assert encoder_limits(manifest).max_blocks == 0
