"""Opening a Hugging Face folder: what it holds, digests that are computed once, and every way it can be wrong."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import families
import pytest

from zoo.checkpoints import Checkpoint, folder
from zoo.errors import CheckpointError


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = families.make_checkpoint(tmp_path, "llama")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_what_is_in_a_folder(made: Path) -> None:
    for name in ("LICENSE", "LICENSE.txt", "chat_template.jinja", "other.txt", "training_args.bin"):
        (made / name).write_text("x")
    checkpoint = Checkpoint.open(made)
    assert checkpoint.config["model_type"] == "llama"
    assert [file.name for file in checkpoint.weight_files] == ["model.safetensors"]
    names = [file.name for file in checkpoint.tokenizer_files]
    assert names == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "LICENSE.txt",
    ]
    digests = checkpoint.digests()
    assert sorted(digests) == sorted(["config.json", "model.safetensors", *names])
    for name, digest in digests.items():
        assert digest == "sha256:" + hashlib.sha256((made / name).read_bytes()).hexdigest()


def test_a_big_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = []
    true_sha256 = folder._sha256
    monkeypatch.setattr(folder, "_sha256", lambda path: read.append(path) or true_sha256(path))
    big = tmp_path / "big"
    big.write_bytes(b"a" * (2 << 20))
    first = folder.digest_file(big)
    assert folder.digest_file(big) == first == "sha256:" + hashlib.sha256(big.read_bytes()).hexdigest() and len(read) == 1
    time.sleep(0.01)
    big.write_bytes(b"b" * (2 << 20))
    assert folder.digest_file(big) == "sha256:" + hashlib.sha256(big.read_bytes()).hexdigest() != first and len(read) == 2
    for remembered in (tmp_path / "cache").rglob("*"):
        if remembered.is_file():
            remembered.write_text('{"key": "other", "digest": "sha256:' + "0" * 64 + '"}')
    assert folder.digest_file(big) != "sha256:" + "0" * 64 and len(read) == 3, "a damaged cache is not believed"
    small = tmp_path / "small"
    small.write_bytes(b"a")
    assert folder.digest_file(small) == folder.digest_file(small) and len(read) == 5


def test_digests_without_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    big = tmp_path / "big"
    big.write_bytes(b"a" * (2 << 20))
    assert folder.digest_file(big) == folder.digest_file(big)


def test_a_file_that_changes_while_it_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"a" * 10)

    def changing(path: Path) -> str:
        os.utime(path, ns=(1, 1))
        return "0" * 64

    monkeypatch.setattr(folder, "_sha256", changing)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        folder.digest_file(big)


def test_wrong_folders(made: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        Checkpoint.open(made / "nowhere")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        Checkpoint.open(made / "config.json")
    for text, message in (
        ("{", "config.json: not valid JSON at line 1"),
        ("[]", "config.json: expected a JSON object"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ('"' + "x" * (17 << 20) + '"', "larger than 16 MB"),
    ):
        (made / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(made)
    (made / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json.*it holds .*tokenizer.json"):
        Checkpoint.open(made)


def test_pickles_only(made: Path) -> None:
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle files.*convert"):
        Checkpoint.open(made)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b"{bad", "not valid JSON at line 1"),
        ("generation_config.json", b"[]", "expected a JSON object, found list"),
        ("generation_config.json", b'{"eos_token_id": [[1]]}', r"eos_token_id is \[\[1\]\]; it must be a token id"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("generation_config.json", b'{"eos_token_id": [1, true]}', "eos_token_id is "),
        ("generation_config.json", b'{"eos_token_id": 1.5}', "eos_token_id is 1.5"),
        ("generation_config.json", b'{"eos_token_id": -1}', "eos_token_id is -1"),
        ("generation_config.json", b'{"temperature": "hot"}', "temperature is 'hot'; it must be a number"),
        ("generation_config.json", b'{"top_k": 50.0}', "top_k is 50.0; it must be a whole number"),
        ("generation_config.json", b'{"top_p": true}', "top_p is True; it must be a number"),
        ("tokenizer.json", b'{"version": "1.0", "added_tok', "not valid JSON at line 1"),
        ("tokenizer.json", b"null", "expected a JSON object, found null"),
        ("tokenizer.json", b"[" * 100_000 + b"]" * 100_000, "not usable JSON"),
        ("tokenizer_config.json", b"[1]", "expected a JSON object, found list"),
        ("tokenizer_config.json", b"\xff", "not UTF-8 at byte 0"),
        ("special_tokens_map.json", b"", "not valid JSON"),
        ("added_tokens.json", b'"a"', "expected a JSON object, found str"),
        ("chat_template.jinja", b"a\xff", "not UTF-8 at byte 1"),
    ],
)
def test_broken_files_beside_the_weights(made: Path, name: str, content: bytes, message: str) -> None:
    (made / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        Checkpoint.open(made)


def test_end_tokens_that_are_fine(made: Path) -> None:
    for text in (
        "{}",
        '{"eos_token_id": null}',
        '{"eos_token_id": 0}',
        '{"eos_token_id": [1, 2]}',
        '{"eos_token_id": []}',
        '{"temperature": 1, "top_p": null}',
    ):
        (made / "generation_config.json").write_text(text)
        Checkpoint.open(made).close()


def test_what_is_no_file(made: Path) -> None:
    (made / "tokenizer.json").unlink()
    Checkpoint.open(made).close()
    (made / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is no plain file"):
        Checkpoint.open(made)
    (made / "tokenizer.json").rmdir()
    (made / "tokenizer.json").symlink_to(made / "gone")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is a link to nothing"):
        Checkpoint.open(made)


def test_names_outside_utf8(made: Path) -> None:
    strange = made.parent / os.fsdecode(b"x\xff")
    with pytest.raises(CheckpointError, match=r"x\\udcff': its name is not UTF-8"):
        Checkpoint.open(strange)
    (made / os.fsdecode(b"LICENSE\xff")).write_text("x")
    with pytest.raises(CheckpointError, match=r"LICENSE\\udcff': its name is not UTF-8"):
        Checkpoint.open(made)
