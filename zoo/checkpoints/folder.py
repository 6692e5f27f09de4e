"""``Checkpoint``: one Hugging Face folder, opened read-only. Nothing in it is executed, and pickles are never read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import CheckpointError
from zoo.weights.reader import Tensors, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
SAMPLING: dict[str, Any] = {
    "temperature": int | float,
    "top_k": int,
    "top_p": int | float,
    "min_p": int | float,
    "repetition_penalty": int | float,
    "max_new_tokens": int,
}
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
MAX_TOKENIZER = 256 << 20  # bytes; the largest in use are about 35 MB
PIECE = 8 << 20  # bytes hashed at a time


@dataclass
class Checkpoint:
    """An opened folder.

    folder           where it is
    config           config.json as it stands
    tensors          its safetensors files, mapped
    """

    folder: Path
    config: dict[str, Any]
    tensors: Tensors

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a folder. CheckpointError says what is missing or malformed, and names the file."""
        folder = Path(folder)
        _check_text(folder)
        if not folder.is_dir():
            what = "is a file; give the folder that holds it" if folder.exists() else "does not exist"
            raise CheckpointError(f"checkpoint {folder}: {what}")
        config = read_config(folder)
        check_beside(folder)
        return cls(folder, config, Tensors.open(folder))

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in order."""
        return self.tensors.files

    @property
    def tokenizer_files(self) -> list[Path]:
        """What travels with an engine beside its weights: tokenizer, chat template, generation config, licence."""
        return _beside(self.folder)

    def digests(self) -> dict[str, str]:
        """``sha256:...`` of every file above and of config.json, by name.

        Digests of big files are remembered by path, inode, size and modification time in the user's cache folder, so that
        a checkpoint is hashed once.
        """
        files = [self.folder / "config.json", *self.weight_files, *self.tokenizer_files]
        return {file.name: digest_file(file) for file in files}

    def close(self) -> None:
        """Close the mapped files."""
        self.tensors.close()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. CheckpointError when it is missing, too big or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        held = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder}: no config.json, so this is no Hugging Face checkpoint folder; it holds {held}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return config


def check_beside(folder: Path) -> None:
    """Refuse tokenizer and generation files that no engine could be used with. CheckpointError names the file.

    What they mean is checked when they are loaded; here, that they are what their names say: JSON objects, text, end tokens.
    """
    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.is_file() and (path.exists() or path.is_symlink()):
            what = "is no plain file" if path.exists() else "is a link to nothing"
            raise CheckpointError(f"{path}: {what}; put the file there, or take it away")
    for path in _beside(folder):
        _check_text(path)
        if path.suffix == ".json":
            data = read_json(path, MAX_TOKENIZER, scale=8, once=False)
            if not isinstance(data, dict):
                raise CheckpointError(f"{path}: expected a JSON object, found {'null' if data is None else type(data).__name__}")
            if path.name == "generation_config.json":
                _check_generation(path, data)
        elif path.suffix == ".jinja":
            try:
                path.read_bytes().decode("utf-8")
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None


def _beside(folder: Path) -> list[Path]:
    names = [folder / name for name in TOKENIZER_FILES]
    names += sorted({file for pattern in LICENSES for file in folder.glob(pattern)})
    return [file for file in names if file.is_file()]


def _check_generation(path: Path, data: dict[str, Any]) -> None:
    """The values of generation_config.json that an engine reads are of the right type; ranges are checked where they are used."""
    for key, wanted in SAMPLING.items():
        value = data.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
            what = "a whole number" if wanted is int else "a number"
            raise CheckpointError(f"{path}: {key} is {repr(value)[:60]}; it must be {what}")
    found = data.get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in listed):
        raise CheckpointError(f"{path}: eos_token_id is {repr(found)[:60]}; it must be a token id or a list of them")


def _check_text(path: Path) -> None:
    """Names are published with an engine, as UTF-8."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: its name is not UTF-8; rename it, or link to it by another name"
        ) from None


def digest_file(path: Path) -> str:
    """``sha256:<hex>`` of a file, remembered for files of a megabyte and more as long as the file does not change."""
    try:
        status = path.stat()
        key = f"{path.resolve()}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
        remembered = _cache_path(key) if status.st_size >= 1 << 20 else None
        if remembered and (digest := _recall(remembered, key)):
            return digest
        digest = "sha256:" + _sha256(path)
        now = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if (now.st_ino, now.st_size, now.st_mtime_ns) != (status.st_ino, status.st_size, status.st_mtime_ns):
        raise CheckpointError(f"{path}: changed while it was read; try again when nothing writes to it")
    if remembered:
        _remember(remembered, key, digest)
    return digest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(PIECE)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _cache_path(key: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(home) / "zoo" / "digests" / hashlib.sha256(key.encode()).hexdigest()


def _recall(path: Path, key: str) -> str:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ""
    digest = data.get("digest") if isinstance(data, dict) and data.get("key") == key else ""
    return digest if isinstance(digest, str) and len(digest) == 71 and digest.startswith("sha256:") else ""


def _remember(path: Path, key: str, digest: str) -> None:
    """Write aside and rename. A cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"key": key, "digest": digest}, file)
        Path(file.name).replace(path)
    except OSError:
        return
