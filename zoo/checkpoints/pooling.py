"""How a sentence-transformers folder pools: ``modules.json`` names the modules behind the encoder, a folder each.

    [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
     {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
     {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]

A Normalize module needs nothing: ``LLM.embed`` gives vectors of length 1 unless it is told not to.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from zoo.errors import CheckpointError
from zoo.weights.reader import read_json

KNOWN = ("Transformer", "Pooling", "Normalize")
# what they call it -> ours
MODES = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first"}
PREFIX = "pooling_mode_"


def stored_pooling(folder: Path) -> str:
    """``mean`` or ``first``; "" for a folder without modules.json. CheckpointError for modules that an engine does not have."""
    path = folder / "modules.json"
    if not path.is_file():
        return ""
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise CheckpointError(f"{path}: expected a list of modules")
    kinds = [str(one.get("type")).rpartition(".")[2] for one in modules]
    if strange := [kind for kind in kinds if kind not in KNOWN]:
        raise CheckpointError(
            f"{path}: it has the module {strange[0]}, which changes embeddings; supported are {', '.join(KNOWN)}. Without "
            "modules.json the folder is an encoder whose hidden states are averaged"
        )
    found = [_mode(folder, one) for one, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
    return found[0] if found else ""


def _mode(folder: Path, module: dict[str, Any]) -> str:
    inside = PurePosixPath(str(module.get("path", "")))
    if inside.is_absolute() or ".." in inside.parts:
        raise CheckpointError(f"{folder / 'modules.json'}: the path {str(inside)[:60]!r} leads out of the folder")
    path = folder / inside / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, but modules.json names it; it says how hidden states are pooled")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    flags = [key.removeprefix(PREFIX) for key, value in config.items() if key.startswith(PREFIX) and value is True]
    modes = [str(config["pooling_mode"])] if config.get("pooling_mode") else flags
    if len(modes) != 1 or modes[0] not in MODES:
        raise CheckpointError(
            f"{path}: it pools by {', '.join(modes)[:60] or 'nothing'}; supported are the mean over all tokens and the first"
        )
    return MODES[modes[0]]
