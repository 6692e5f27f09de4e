"""``zoo add``: from a Hugging Face folder to a model YAML that composes, its checkpoint compared before it is written."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from zoo.checkpoints.families import check_config, read, recognise
from zoo.checkpoints.folder import Checkpoint
from zoo.checkpoints.names import check_tensors, has_own_head
from zoo.checkpoints.pooling import stored_pooling
from zoo.errors import ConfigError

NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
PLAIN = re.compile(r"(?!(no|on|off|yes|true|false|null)$)[a-z_]{2,}[a-z0-9_.]*")  # a key that YAML reads as the text it is
FLOATS = ("float32", "float16", "bfloat16")


def adopt(folder: Path, name: str | None = None) -> str:
    """The YAML of a model for a checkpoint folder; ``zoo.config.compose_model`` composes it as it is.

    Raises CheckpointError for an architecture, a setting or tensors that are not supported, ConfigError for a bad name.
    """
    return model_yaml(folder, name)


def model_yaml(folder: Path, name: str | None = None, relative_to: Path | None = None) -> str:
    """As ``adopt``; the checkpoint's path is written relative to a folder when it lies inside it."""
    from zoo.config import compose_model, families
    from zoo.config.files import expand

    folder = expand(folder).absolute()
    if "${" in str(folder):
        raise ConfigError(
            f"checkpoint {folder}: in a model's YAML, ${{ would refer to another key; rename the folder, or link to it "
            "by another name"
        )
    checkpoint = Checkpoint.open(folder)
    try:
        where = str(folder / "config.json")
        family, architecture = recognise(checkpoint.config, where, checkpoint.tensors)
        values = read(checkpoint.config, family, architecture, where)
        head = {"name": check_name(name) if name else name_for(folder), "checkpoint": str(folder), **_about(folder)}
        if families()[family].get("template") == "encoder" and (pooling := stored_pooling(folder)):
            values["pooling"] = pooling
        values["dtype"] = _dtype(checkpoint)
        text = _render(family, architecture, head, values)
        model = compose_model(text).model
        if model.tie_embeddings and has_own_head(model, checkpoint.tensors):
            values["tie_embeddings"] = False  # what transformers does, whatever config.json says
            text = _render(family, architecture, head, values)
            model = compose_model(text).model
        check_config(model, checkpoint)
        check_tensors(model, checkpoint.tensors)
    finally:
        checkpoint.close()
    below = folder.relative_to(relative_to).as_posix() if relative_to and folder.is_relative_to(relative_to) else ""
    if below and below != "???" and not below.startswith("~"):  # which would mean a missing value, and a user's home
        head["checkpoint"] = below
        text = _render(family, architecture, head, values)
    return text


def add_model(folder: Path, name: str | None = None, *, force: bool = False) -> Path:
    """Write the YAML into the user's conf folder (``ZOO_CONF``), else into the checkout's. Gives its path."""
    from zoo.config import conf_dir, user_dir

    target = user_dir() or conf_dir()
    if user_dir() is None and target.parent.name == "_data":
        raise ConfigError(
            "an installed zoo keeps its own models; name a folder for yours, such as ZOO_CONF=~/zoo-conf, and try again"
        )
    text = model_yaml(folder, name, relative_to=target.parent)
    found = re.search(r'^name: "(.*)"$', text, re.MULTILINE)
    assert found
    path = target / "models" / f"{found[1]}.yaml"
    if path.exists() and not force:
        raise ConfigError(f"{path}: there is a model of this name; choose another with --name, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=".add-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    finally:
        Path(aside).unlink(missing_ok=True)
    return path


def check_name(name: str) -> str:
    """A model name as it is, or ConfigError: it becomes part of file names, REFs and repositories."""
    if not NAME.fullmatch(name) or len(name) > 100:
        near = name_for(Path(name))
        raise ConfigError(
            f"model name {name!r}: use lower case letters and digits, with single dots or dashes inside, such as {near!r}"
        )
    return name


def name_for(folder: Path) -> str:
    """A usable name from a folder's own."""
    return re.sub(r"[.-]{2,}", "-", re.sub(r"[^a-z0-9.-]+", "-", folder.name.lower())).strip(".-")[:100] or "model"


def _dtype(checkpoint: Checkpoint) -> str:
    """What the checkpoint's tensors are, by bytes; config.json is only asked when they are none of the known floats."""
    sizes: dict[str, int] = {}
    for name in checkpoint.tensors.names:
        entry = checkpoint.tensors.entry(name)
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    found = max(sizes, key=lambda dtype: sizes[dtype], default="float32")
    if found in FLOATS:
        return found
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix("torch.")
    return named if named in FLOATS else "float32"


def _about(folder: Path) -> dict[str, str]:
    """Licence and base model from the head of the model card, where one is."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        text = file.read(8192).decode("utf-8", "replace")
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    about = {}
    for key in ("license", "base_model"):
        line = re.search(rf"^{key}: *[\"']?([\w./-]+)[\"']?\s*$", head[1], re.MULTILINE) if head else None
        if line:
            about[key] = line[1]
    return about


def _render(family: str, architecture: str, head: dict[str, str], values: dict[str, Any]) -> str:
    lines = ["# @package model", f"# Written by `zoo add` from a {architecture} checkpoint.", "defaults:"]
    lines += [f"  - families/{family}@_here_", "  - _self_", ""]
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    lines += [f"{key}: {_flow(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value as YAML on one line: a mapping with plain keys where they can be, everything else as JSON."""
    if isinstance(value, dict):
        inside = (f"{key if PLAIN.fullmatch(key) else json.dumps(key)}: {_flow(one)}" for key, one in value.items())
        return "{" + ", ".join(inside) + "}"
    return json.dumps(value, ensure_ascii=False)
