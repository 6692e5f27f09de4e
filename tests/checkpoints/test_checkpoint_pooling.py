"""What a sentence-transformers folder says of pooling, and what it must not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoo.checkpoints.pooling import stored_pooling
from zoo.errors import CheckpointError

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def flags(*chosen: str) -> dict[str, Any]:
    return {"word_embedding_dimension": 64, "include_prompt": True} | {f"pooling_mode_{one}": one in chosen for one in FLAGS}


def write(folder: Path, modules: Any, config: Any = None) -> Path:
    (folder / "modules.json").write_text(json.dumps(modules))
    if config is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        (flags("mean_tokens"), "mean"),
        (flags("cls_token"), "first"),
        ({"pooling_mode": "cls", "embedding_dimension": 64}, "first"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_modes(tmp_path: Path, config: dict[str, Any], mode: str) -> None:
    assert stored_pooling(write(tmp_path, [TRANSFORMER, POOLING, NORMALIZE], config)) == mode


def test_folders_that_say_nothing(tmp_path: Path) -> None:
    assert stored_pooling(tmp_path) == ""
    assert stored_pooling(write(tmp_path, [TRANSFORMER])) == ""


@pytest.mark.parametrize(
    ("modules", "config", "words"),
    [
        (
            [TRANSFORMER, POOLING],
            flags("max_tokens"),
            "it pools by max_tokens; supported are the mean over all tokens",
        ),
        ([TRANSFORMER, POOLING], flags("cls_token", "mean_tokens"), "it pools by cls_token, mean_tokens"),
        ([TRANSFORMER, POOLING], flags(), "it pools by nothing"),
        ([TRANSFORMER, POOLING], [], "expected a JSON object"),
        ([TRANSFORMER, POOLING], None, r"1_Pooling/config.json: missing, but modules.json names it"),
        ([TRANSFORMER, POOLING | {"path": "../elsewhere"}], None, r"the path '../elsewhere' leads out of the folder"),
        ([TRANSFORMER, POOLING | {"path": "/etc"}], None, "leads out of the folder"),
        (
            [TRANSFORMER, {"type": "sentence_transformers.models.Dense"}],
            None,
            "the module Dense, which changes embeddings",
        ),
        ({}, None, "expected a list of modules"),
        (["Transformer"], None, "expected a list of modules"),
    ],
)
def test_what_an_engine_could_not_do(tmp_path: Path, modules: Any, config: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        stored_pooling(write(tmp_path, modules, config))
