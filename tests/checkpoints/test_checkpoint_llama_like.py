"""The forms that config.json of Llama's relatives has had: what is left out, older names, what only looks supported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import zoo_cases
from zoo_cases.llama_like import CASES, FULL, SLIDING

from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.families import read, recognise
from zoo.config import compose_model
from zoo.errors import CheckpointError
from zoo.spec import ModelSpec

CLASSES = {
    "SmolLM3ForCausalLM": transformers.SmolLM3Config,
    "GraniteForCausalLM": transformers.GraniteConfig,
    "SeedOssForCausalLM": transformers.SeedOssConfig,
    "ArceeForCausalLM": transformers.ArceeConfig,
    "MinistralForCausalLM": transformers.MinistralConfig,
    "CwmForCausalLM": transformers.CwmConfig,
    "InternLM3ForCausalLM": transformers.InternLM3Config,
    "Ernie4_5ForCausalLM": transformers.Ernie4_5Config,
    "HyperCLOVAXForCausalLM": transformers.HyperCLOVAXConfig,
    "Phi3ForCausalLM": transformers.Phi3Config,
    "Olmo2ForCausalLM": transformers.Olmo2Config,
    "Olmo3ForCausalLM": transformers.Olmo3Config,
    "Exaone4ForCausalLM": transformers.Exaone4Config,
}


def made(tmp_path: Path, case: str) -> Path:
    return zoo_cases.make_folder(tmp_path / case, CASES[case])


def spec(folder: Path) -> ModelSpec:
    return dataclasses.replace(compose_model(adopt(folder)).model, checkpoint="")


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    return read(config, *recognise(config, "config.json"), "config.json")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def values(folder: Path) -> dict[str, Any]:
    """What a folder's config.json means, its tensors not looked at."""
    return meaning(config_of(folder))


def layers(folder: Path) -> tuple[int, list[int], list[int]]:
    """The window, the layers that have it, the layers that rotate; no layers: all."""
    ours = values(folder)
    return ours["window"], ours["window_layers"], ours.get("rope_layers", [])


def no_window(folder: Path) -> None:
    """A null in config.json, which is not the same as a key that is not there."""
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"sliding_window": None}))


@pytest.mark.parametrize("architecture", CLASSES)
def test_an_empty_config_means_what_its_class_means(architecture: str) -> None:
    theirs = CLASSES[architecture]()
    ours = meaning({"architectures": [architecture], "model_type": theirs.model_type})
    keys = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "activation": "hidden_act",
        "embed_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
    }
    for key, theirs_key in keys.items():
        if key in ours:
            assert ours[key] == getattr(theirs, theirs_key), key
    if "qkv_bias" in ours:
        assert ours["qkv_bias"] == (theirs.use_bias if architecture == "Ernie4_5ForCausalLM" else theirs.attention_bias)
    if "attention_scale" in ours:
        assert (ours["attention_scale"] or ours["head_dim"] ** -0.5) == theirs.attention_multiplier
    assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    rope = theirs.rope_parameters.get(FULL, theirs.rope_parameters)
    assert ours["rope"]["kind"] == rope["rope_type"] and ours["rope"]["theta"] == rope["rope_theta"]
    for number in ("factor", "low_freq_factor", "high_freq_factor"):
        assert ours["rope"].get(number) == rope.get(number)
    types = getattr(theirs, "layer_types", None) or []
    windowed = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    assert ours["window"] == (theirs.sliding_window if windowed else 0)
    assert ours["window_layers"] == (windowed if len(windowed) < len(types) else [])
    if architecture == "SmolLM3ForCausalLM":
        assert ours["rope_layers"] == [layer for layer, rotates in enumerate(theirs.no_rope_layers) if rotates]
    if architecture == "Exaone4ForCausalLM":
        assert ours["rope_layers"] == windowed


OLD = ("phi3-partial", "llama-yarn-numbers", "llama-llama3", "smollm3-interval", "granite-multipliers", "internlm2-dynamic")


@pytest.mark.parametrize("case", OLD)
def test_rotary_settings_in_the_form_of_transformers_4(tmp_path: Path, case: str) -> None:
    """rope_theta and partial_rotary_factor beside rope_scaling, whose kind is called type; torch_dtype for dtype."""
    folder = made(tmp_path, case)
    new, given = values(folder), dict(config_of(folder)["rope_parameters"])
    kind, theta, part = given.pop("rope_type"), given.pop("rope_theta"), given.pop("partial_rotary_factor", None)
    scaling = {"type": kind, **given} if kind != "default" else None
    changes = {"rope_parameters": None, "rope_theta": theta, "partial_rotary_factor": part, "rope_scaling": scaling}
    zoo_cases.edit_config(folder, **changes, dtype=None, torch_dtype="float32")
    assert values(folder) == new


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_first_names_of_longrope(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path, "phi3-long")
    new, rope = values(folder), values(folder)["rope"]
    assert (rope["kind"], rope["factor"], rope["original_max_positions"]) == ("longrope", 8.0, 16)
    scaling = {key: config_of(folder)["rope_parameters"][key] for key in ("short_factor", "long_factor")}
    zoo_cases.edit_config(folder, rope_parameters=None, rope_theta=10000.0, rope_scaling={"type": name, **scaling})
    assert values(folder) == new


def test_olmo3_scales_only_the_layers_without_a_window(tmp_path: Path) -> None:
    folder = made(tmp_path, "olmo3-pattern")
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    zoo_cases.edit_config(folder, rope_parameters=None, rope_theta=500000.0, rope_scaling=yarn)
    ours, theirs = spec(folder), transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert (theirs[FULL]["rope_type"], theirs[SLIDING]["rope_type"]) == ("yarn", "default")
    assert (ours.rope.kind, ours.rope.factor, ours.local_rope.kind) == ("yarn", 8.0, "default")
    assert ours.rope.theta == ours.local_rope.theta == theirs[SLIDING]["rope_theta"]
    zoo_cases.edit_config(folder, layer_types=[FULL] * 4)
    ours = spec(folder)
    assert (ours.window, ours.local_rope.theta, ours.rope.kind) == (0, 0.0, "yarn")


def test_head_size_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama-plain")
    before = values(folder)
    zoo_cases.edit_config(folder, head_dim=None, num_key_value_heads=None)
    assert values(folder) == before and before["head_dim"] == 16
    zoo_cases.edit_config(folder, num_attention_heads=5)
    with pytest.raises(CheckpointError, match="hidden_size / num_attention_heads is 64 / 5, which is no whole number"):
        values(folder)


@pytest.mark.parametrize(("case", "tied"), [("smollm3-interval", True), ("smollm3-listed", False), ("granite-biases", False)])
def test_a_head_whose_tie_config_json_leaves_out(tmp_path: Path, case: str, tied: bool) -> None:
    """The class's default, unless the checkpoint stores a head of its own."""
    folder = made(tmp_path, case)
    zoo_cases.edit_config(folder, tie_word_embeddings=None)
    assert spec(folder).tie_embeddings is tied


def test_whole_numbers_for_multipliers(tmp_path: Path) -> None:
    folder = made(tmp_path, "granite-multipliers")
    zoo_cases.edit_config(folder, embedding_multiplier=12, logits_scaling=8)
    ours = spec(folder)
    assert (ours.embed_scale, ours.logit_scale) == (12.0, 0.125)
    zoo_cases.edit_config(folder, logits_scaling=0)
    with pytest.raises(CheckpointError, match="logit_scale: 1 / logits_scaling: logits_scaling is 0"):
        values(folder)


def test_internlm2_has_biases_unless_it_says_otherwise(tmp_path: Path) -> None:
    biased, plain = made(tmp_path, "internlm2-bias"), made(tmp_path, "internlm2-grouped")
    assert values(biased)["qkv_bias"] and values(biased)["out_bias"] and not values(plain)["qkv_bias"]
    for folder in (biased, plain):
        zoo_cases.edit_config(folder, bias=None)
    assert spec(biased).qkv_bias
    with pytest.raises(CheckpointError, match=r"attention\.wqkv\.bias"):
        adopt(plain)


def test_baichuan_by_its_config(tmp_path: Path) -> None:
    folder = made(tmp_path, "baichuan-13b")
    ours = spec(folder)
    assert (ours.position, ours.alibi.rule, ours.max_positions) == ("alibi", "bloom", 128)
    zoo_cases.edit_config(folder, max_position_embeddings=64)
    ours = spec(folder)
    assert (ours.position, ours.max_positions) == ("rope", 64)
    for key, value in (("z_loss_weight", 0), ("vocab_size", 125696)):
        before = config_of(folder).get(key)
        zoo_cases.edit_config(folder, **{key: value})
        with pytest.raises(CheckpointError, match=f"{key} {value}: Baichuan 2 divides each row of its head"):
            values(folder)
        zoo_cases.edit_config(folder, **{key: before})


def test_layers_of_smollm3(tmp_path: Path) -> None:
    folder = made(tmp_path, "smollm3-listed")
    assert layers(folder) == (8, [0], [1, 2])
    zoo_cases.edit_config(folder, layer_types=None)
    with pytest.raises(CheckpointError, match=r"config\.json must list layer_types"):
        values(folder)
    zoo_cases.edit_config(folder, use_sliding_window=False, no_rope_layers=None, no_rope_layer_interval=3)
    assert layers(folder) == (0, [], [0, 1])
    zoo_cases.edit_config(folder, no_rope_layers=[1, 0])
    with pytest.raises(CheckpointError, match="expected 0 or 1 for each of 3 layers"):
        values(folder)


def test_layers_of_exaone4(tmp_path: Path) -> None:
    folder = made(tmp_path, "exaone4-pattern")
    assert layers(folder) == (9, [0, 1, 2], [0, 1, 2])
    zoo_cases.edit_config(folder, layer_types=None, sliding_window_pattern=2)
    assert layers(folder) == (9, [0, 2], [0, 2])
    zoo_cases.edit_config(folder, layer_types=[SLIDING, FULL, FULL, FULL], sliding_window_pattern="LGGG")
    assert layers(folder) == (9, [0], [0])
    zoo_cases.edit_config(folder, layer_types=None)
    with pytest.raises(CheckpointError, match="sliding_window_pattern is 'LGGG'"):
        values(folder)
    zoo_cases.edit_config(folder, layer_types=[FULL] * 4)
    with pytest.raises(CheckpointError, match="no layer rotates"):
        values(folder)
    no_window(folder)
    assert layers(folder) == (0, [], [])


def test_layers_of_ministral(tmp_path: Path) -> None:
    folder = made(tmp_path, "ministral-listed")
    assert layers(folder)[:2] == (8, [1, 2])
    zoo_cases.edit_config(folder, layer_types=None)
    assert layers(folder)[:2] == (8, [])
    no_window(folder)
    assert layers(folder)[0] == 0
