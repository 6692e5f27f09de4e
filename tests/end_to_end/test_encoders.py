"""Encoders against transformers: the plain graph, and embeddings through ``zoo add``'s road, the registry and the LLM.

Hidden states and embeddings are float32 and differ by at most 1e-4. Texts of all lengths run together; transformers sees one at a
time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import encoders
import numpy as np
import pytest
import tokenizers
import transformers
from fake_session import FakeSession, limits
from safetensors.numpy import load_file, save_file

from zoo import LLM, calibration
from zoo.checkpoints import Checkpoint
from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.names import roles, shape_of
from zoo.cli import main
from zoo.compilers.onnxruntime import run_reference
from zoo.config import compose, compose_model
from zoo.errors import RequestError
from zoo.graph_templates import expand
from zoo.passes.frame import check_graph
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors

LENGTHS = [40, 1, 7, 33, 2, 17, 39, 4, 4, 25, 1, 12]
TEXTS = ["def main(): return the sum", "a", "Something of a longer text, 123", "x" * 12]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


def folder_of(root: Path, name: str) -> Path:
    return root / name if (root / name).is_dir() else encoders.folder(root, name)


def normalized(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("name", encoders.CASES)
def test_plain_graph(root: Path, name: str) -> None:
    """By a ModelSpec written by hand. The engines below come from the families' YAML."""
    folder = folder_of(root, name)
    ids = encoders.texts([40])[0]
    want = encoders.reference(name, ids)
    assert 0.5 < np.abs(want).max() < 100, "hidden states of a size that an error would show in"
    graph = expand(encoders.spec(folder), "float32")
    check_graph(graph)
    with Tensors.open(folder) as tensors:
        weights = {key: materialize(weight, tensors, {}) for key, weight in graph.weights.items()}
    feeds = {"token_ids": np.array([ids, ids]), "positions": np.broadcast_to(np.arange(40), (2, 40)).copy()}
    found = run_reference(graph, {one.name: feeds[one.name] for one in graph.data_inputs}, weights)["hidden"]
    assert found.shape == (2, *want.shape) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack([want, want]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in encoders.CASES if name != "xlm-roberta"])
def test_embeddings(root: Path, name: str) -> None:
    texts = encoders.texts(LENGTHS)
    with LLM(folder_of(root, name), registry=root / "registry", threads=1, max_tokens=64, max_sequences=5) as llm:
        plain, unit = llm.embed(texts, normalize=False), llm.embed(texts)
    for text, one, other in zip(texts, plain, unit, strict=True):
        want = encoders.reference(name, text).mean(axis=0)
        assert one.prompt is None and one.prompt_token_ids == text and one.embedding.dtype == np.float32
        np.testing.assert_allclose(one.embedding, want, rtol=0, atol=1e-4)
        np.testing.assert_allclose(other.embedding, normalized(want), rtol=0, atol=1e-4)
        assert abs(float(np.linalg.norm(other.embedding)) - 1) < 1e-6


@pytest.fixture(scope="module")
def sentence(root: Path) -> Path:
    """A sentence-transformers folder that pools by the first token, with the tensor names of the first BERT exports."""
    folder = root / "sentence-bert"
    shutil.copytree(folder_of(root, "bert-masked-odd"), folder)
    encoders.write_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for ours, theirs in old.items():
        tensors = {name.replace(ours, theirs): array for name, array in tensors.items()}
    tensors["bert.embeddings.position_ids"] = np.arange(40)[None]
    tensors["bert.pooler.dense.weight"] = np.zeros((60, 60), np.float32)
    assert any(name.endswith("gamma") for name in tensors)
    save_file(tensors, folder / "model.safetensors")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    return folder


def test_texts_as_a_sentence_transformer_reads_them(root: Path, sentence: Path) -> None:
    """Special tokens as the tokenizer adds them, nothing cut or padded; the first token's hidden state."""
    theirs = transformers.AutoTokenizer.from_pretrained(sentence)
    own = tokenizers.Tokenizer.from_file(str(sentence / "tokenizer.json"))
    own.no_truncation()
    own.no_padding()
    with LLM(sentence, registry=root / "registry", threads=1, max_tokens=64) as llm:
        outputs = llm.embed(TEXTS)
        assert llm.embed("a")[0].prompt == "a"
    for text, output in zip(TEXTS, outputs, strict=True):
        ids = own.encode(text).ids
        assert output.prompt_token_ids == ids == theirs(text, truncation=False, padding=False)["input_ids"]
        assert (ids[0], ids[-1]) == (2, 3) and output.prompt == text
        want = encoders.reference("bert-masked-odd", ids)[0]
        np.testing.assert_allclose(output.embedding, normalized(want), rtol=0, atol=1e-4)
    assert max(len(output.prompt_token_ids) for output in outputs) > 9, "no text is longer than what the file would cut to"


def test_fp8(root: Path, sentence: Path) -> None:
    """Calibrated on texts between their special tokens; close to float32 in direction."""
    with LLM(sentence, registry=root / "registry", threads=1, max_tokens=64, quant="fp8") as llm:
        outputs = llm.embed(TEXTS)
        manifest = llm._opened.manifest  # type: ignore[union-attr]
    assert manifest.plugins == {"ZooFp8Linear": "1", "ZooPackedAttention": "1"} and manifest.pooling == "first"
    for output in outputs:
        want = normalized(encoders.reference("bert-masked-odd", output.prompt_token_ids)[0])
        assert 0.98 < float(output.embedding @ want) < 0.999999


def test_calibration_reads_texts_with_their_special_tokens(sentence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(calibration, "calibrate", lambda model, tensors, ids, *rest: seen.append(list(ids)) or {})
    checkpoint = Checkpoint.open(sentence)
    model = compose_model(adopt(sentence)).model
    calibration.calibrate_checkpoint(model, checkpoint, 100)
    (ids,) = seen
    assert len(ids) == 100 and model.max_positions == 40
    assert [place for place, token in enumerate(ids) if token == 2] == [0, 40, 80]
    assert [place for place, token in enumerate(ids) if token == 3] == [39, 79]


def test_what_an_encoder_and_a_decoder_do_not_do(root: Path, sentence: Path) -> None:
    with LLM(sentence, registry=root / "registry", threads=1, max_tokens=16) as llm:
        with pytest.raises(RequestError, match=r"sentence-bert:\w+@none-cpu-onnxruntime-tp1 is an encoder: it generates nothing"):
            llm.generate(TEXTS)
        with pytest.raises(RequestError, match="prompt 1 has 17 tokens and the engine takes 16, because a text is one step"):
            llm.embed(["a", "a " * 15])
        with pytest.raises(RequestError, match=r"prompt 0 is empty"):
            llm.embed([""])
        assert (llm.limits.max_context, llm.limits.max_tokens) == (16, 16)
    decoder = LLM.from_session(FakeSession(limits()))
    with decoder as llm, pytest.raises(RequestError, match=r"this model is a decoder: it gives no embeddings; use LLM.generate"):
        llm.embed([[1, 2]])


def test_the_command_line(root: Path, sentence: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(sentence, registry=root / "registry", threads=1, max_tokens=64) as llm:
        ref, outputs = llm.ref, llm.embed(TEXTS[:2], normalize=False)
    registry = ["--registry", str(root / "registry"), "--threads", "1"]
    assert main(["embed", ref, *TEXTS[:2], "--json", "--no-normalize", *registry]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["ref"], row["prompt"]) for row in rows] == [(ref, text) for text in TEXTS[:2]]
    for row, output in zip(rows, outputs, strict=True):
        assert row["prompt_token_ids"] == output.prompt_token_ids
        np.testing.assert_array_equal(np.array(row["embedding"], np.float32), output.embedding)
    assert main(["embed", ref, "a", "b", *registry]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["TEXT", "TOKENS", "EMBEDDING", "COSINE"] and len(lines) == 3
    assert lines[1].split()[:2] == ["a", "3"] and lines[1].endswith("1.0000") and "... (60)" in lines[2]
    for command in (["generate", ref, "a"], ["bench", ref, "--requests", "1"], ["serve", ref, "--port", "0"]):
        assert main([*command, *registry]) == 1
        assert "is an encoder: it generates nothing" in capsys.readouterr().err
    assert main(["embed", ref, "a " * 90, *registry]) == 1
    assert "prompt 0 has 92 tokens and the engine takes 40" in capsys.readouterr().err


# Parameters as the publishers count them, less what an embedding does not need: the pooler, types but the first, and rows of
# positions that no token has.
PUBLISHED = {
    "bert-base-uncased": 109_482_240 - (768 * 768 + 768) - 768,
    "roberta-base": 124_645_632 - (768 * 768 + 768) - 2 * 768,
    "modernbert-base": 149_014_272,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    spec = compose([f"models={name}"])
    model = spec.model
    assert sum(int(np.prod(shape_of(model, role))) for role, _ in roles(model)) == PUBLISHED[name]
    assert (model.template, model.pooling, model.num_heads * model.head_dim) == ("encoder", "mean", 768)
    assert spec.limits.max_context == 512 and spec.limits.max_blocks == 0
    if name == "modernbert-base":
        windows = [model.window_of(layer) for layer in range(22)]
        assert windows == [128 if layer % 3 else 0 for layer in range(22)] and model.max_positions == 8192
        assert [model.rope_of(layer).theta for layer in (0, 1, 3)] == [160000.0, 10000.0, 160000.0]  # type: ignore[union-attr]
