"""A family's rules, variants and options: what transformers means by the same keys, and what a wrong family is answered with."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import families
import pytest
import safetensors.torch
import torch
import transformers
import yaml

from zoo.checkpoints import Checkpoint, check_config
from zoo.checkpoints.adopt import _render, adopt
from zoo.checkpoints.config_language import ABSENT
from zoo.checkpoints.families import read, recognise
from zoo.checkpoints.layers_config import RULES
from zoo.checkpoints.settings import Settings, check_family
from zoo.config import compose_model
from zoo.config import families as all_families
from zoo.errors import CheckpointError, ConfigError

SLIDE, FULL = "sliding_attention", "full_attention"
BASE = """
family: trial
tensors: {model: {embed: e, final_norm: n, lm_head: h}, layer: {}}
config:
  num_layers: num_hidden_layers
  hidden_size: hidden_size
"""


def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *architectures: str, base: str = BASE) -> None:
    """A conf folder whose family ``trial`` has these architectures, each a YAML mapping with the name first."""
    folder = tmp_path / "conf" / "models" / "families"
    folder.mkdir(parents=True, exist_ok=True)
    text = base + "architectures:\n" + "".join(f"  {one}\n" for one in architectures)
    (folder / "trial.yaml").write_text(text)
    monkeypatch.setenv("ZOO_CONF", str(tmp_path / "conf"))


def meaning(config: dict[str, Any], architecture: str = "Trial") -> dict[str, Any]:
    return read({"num_hidden_layers": 6, "hidden_size": 64, **config}, "trial", architecture, "config.json")


# Which layers have a window. transformers says so in its own ``layer_types``.

PATTERNS: list[tuple[str, str]] = [
    ("Gemma2Config", "sliding_window: 4096, sliding_window_pattern: 2"),
    ("Gemma3TextConfig", "sliding_window: 4096, sliding_window_pattern: 6"),
    ("GptOssConfig", "sliding_window: 128, sliding_window_pattern: 2"),
    ("Cohere2Config", "sliding_window: 4096, sliding_window_pattern: 4"),
    ("Olmo3Config", "sliding_window: 4096, sliding_window_pattern: 4"),
    ("Exaone4Config", "sliding_window: 4096, sliding_window_pattern: 4"),
    ("CwmConfig", "sliding_window: 8192, global_attn_every_n_layers: 4"),
]


@pytest.mark.parametrize(("name", "defaults"), PATTERNS, ids=[name for name, _ in PATTERNS])
@pytest.mark.parametrize("change", [{}, {"sliding_window": 7}, {"layer_types": [FULL, SLIDE, SLIDE, FULL, FULL, FULL]}])
def test_layer_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, defaults: str, change: dict[str, Any]) -> None:
    trial(tmp_path, monkeypatch, f"Trial: {{model_type: t, window: layer_types, defaults: {{{defaults}}}}}")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    theirs = getattr(transformers, name)(num_hidden_layers=6, hidden_size=64, **sizes, **change)
    ours = meaning(change)
    assert ours["window"] == theirs.sliding_window
    assert ours["window_layers"] == [layer for layer, kind in enumerate(theirs.layer_types) if kind == SLIDE]


def test_layer_types_at_their_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(tmp_path, monkeypatch, "Trial: {model_type: t, window: layer_types, defaults: {sliding_window: 9}}")
    assert meaning({"layer_types": [FULL] * 6})["window"] == 0
    assert meaning({"sliding_window": None})["window"] == 0
    everywhere = meaning({"layer_types": [SLIDE] * 6})
    assert (everywhere["window"], everywhere["window_layers"]) == (9, [])
    assert meaning({"sliding_window_pattern": 3})["window_layers"] == [0, 1, 3, 4]
    for wrong, message in (
        ({}, "layer_types, sliding_window_pattern: neither is there"),
        ({"sliding_window_pattern": "LLG"}, "sliding_window_pattern is 'LLG'; it must be a whole number over 0"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0; it must be a whole number over 0"),
        ({"layer_types": [SLIDE]}, "layer_types names 1 layers of 6"),
        ({"layer_types": ["linear_attention"] * 6}, "layer_types: only full_attention and sliding_attention"),
        ({"layer_types": [SLIDE] * 6, "sliding_window": True}, "sliding_window is True"),
    ):
        with pytest.raises(CheckpointError, match="not understood") as error:
            meaning(wrong)
        assert message in str(error.value)


def test_layers_of_gpt_neo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(
        tmp_path,
        monkeypatch,
        "Trial: {model_type: t, window: attention_layers, config: {window: window_size}, defaults: {window_size: 256}}",
    )
    for types in ([[["global", "local"], 3]], [[["local"], 2], [["global", "global", "local", "global"], 1]]):
        theirs = transformers.GPTNeoConfig(num_layers=6, hidden_size=64, num_heads=4, attention_types=types)
        local = [layer for layer, kind in enumerate(theirs.attention_layers) if kind == "local"]
        assert meaning({"attention_types": types})["window_layers"] == local
        assert (
            meaning({"attention_layers": theirs.attention_layers, "attention_types": [[["local"], 6]]})["window_layers"] == local
        )
    for wrong in ([[["global", "odd"], 3]], [[["global"], 10**9]], [["global", 6]], "global", None):
        with pytest.raises(CheckpointError, match="attention_layers: expected a list of global and local"):
            meaning({"attention_types": wrong})


def test_the_window_of_a_family_may_have_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(
        tmp_path,
        monkeypatch,
        "Trial: {model_type: t, window: layer_types, config: {window: local / 2 + 1}, defaults: {sliding_window_pattern: 2}}",
        "Fixed: {model_type: f, options: {window: 5, window_layers: [1]}}",
    )
    assert meaning({"local": 128, "sliding_window": 3})["window"] == 65
    with pytest.raises(CheckpointError, match="window: local / 2 is 9 / 2, which is no whole number"):
        meaning({"local": 9})
    assert meaning({}, "Fixed") | {"rope": 0} == {
        "num_layers": 6,
        "hidden_size": 64,
        "window": 5,
        "window_layers": [1],
        "rope": 0,
    }


# Which layers rotate.


@pytest.mark.parametrize(
    "change", [{}, {"no_rope_layer_interval": 2}, {"no_rope_layers": [0, 1, 0, 1, 1, 1]}, {"no_rope_layers": [1] * 6}]
)
def test_layers_without_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    trial(tmp_path, monkeypatch, "Trial: {model_type: t, rope_layers: no_rope_layers, defaults: {no_rope_layer_interval: 4}}")
    theirs = transformers.SmolLM3Config(num_hidden_layers=6, **change).no_rope_layers
    layers = [layer for layer, rotates in enumerate(theirs) if rotates]
    assert meaning(change).get("rope_layers", list(range(6))) == layers


def test_layers_without_rotation_at_their_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(tmp_path, monkeypatch, "Trial: {model_type: t, rope_layers: no_rope_layers}")
    for wrong, message in (
        ({}, "no_rope_layer_interval is None; it must be a whole number over 0"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers: expected 0 or 1 for each of 6 layers"),
        ({"no_rope_layers": [2] * 6}, "no_rope_layers: expected 0 or 1 for each of 6 layers"),
        ({"no_rope_layers": [0] * 6}, "no layer rotates by the rule 'no_rope_layers'"),
    ):
        with pytest.raises(CheckpointError) as error:
            meaning(wrong)
        assert message in str(error.value)


def test_only_layers_with_a_window_rotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = "sliding_window: 9, sliding_window_pattern: 3"
    trial(tmp_path, monkeypatch, f"Trial: {{model_type: t, window: layer_types, rope_layers: window, defaults: {{{defaults}}}}}")
    assert meaning({})["rope_layers"] == [0, 1, 3, 4]
    assert "rope_layers" not in meaning({"layer_types": [SLIDE] * 6})
    assert "rope_layers" not in meaning({"sliding_window": None})
    with pytest.raises(CheckpointError, match="no layer rotates by the rule 'window'"):
        meaning({"layer_types": [FULL] * 6})


# Which layers of a mixture of experts have a plain MLP. transformers builds its own model to say so.


def sparse_layers(kind: str, **config: Any) -> list[int]:
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 6,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1,
        "shared_expert_intermediate_size": 8, "kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 4, "n_group": 1, "topk_group": 1, "pad_token_id": None,
    }  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **(sizes | config)))
    return [layer for layer, block in enumerate(made.model.layers) if hasattr(block.mlp, "experts")]


EXPERTS = "config: {moe.experts: experts}, defaults: {experts: 2, decoder_sparse_step: 1}"


@pytest.mark.parametrize(
    "change", [{}, {"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [5], "decoder_sparse_step": 3}]
)
def test_dense_layers_of_qwen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    trial(tmp_path, monkeypatch, f"Trial: {{model_type: t, dense_layers: mlp_only_layers, {EXPERTS}}}")
    sparse = sparse_layers("qwen3_moe", **change)
    assert meaning(change)["moe"].get("dense_layers", []) == [layer for layer in range(6) if layer not in sparse]


@pytest.mark.parametrize("change", [{"first_k_dense_replace": 0}, {"first_k_dense_replace": 2}, {"first_k_dense_replace": 6}])
def test_dense_layers_of_deepseek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    trial(tmp_path, monkeypatch, f"Trial: {{model_type: t, dense_layers: first_k_dense_replace, {EXPERTS}}}")
    sparse = sparse_layers("deepseek_v3", **change)
    assert meaning(change)["moe"].get("dense_layers", []) == [layer for layer in range(6) if layer not in sparse]


def test_dense_layers_at_their_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(
        tmp_path,
        monkeypatch,
        f"Trial: {{model_type: t, dense_layers: first_k_dense_replace, {EXPERTS}}}",
        f"Qwen: {{model_type: q, dense_layers: mlp_only_layers, {EXPERTS}}}",
    )
    assert meaning({"moe_layer_freq": 2})["moe"]["dense_layers"] == [1, 3, 5]
    assert meaning({"moe_layer_freq": [0, 1, 1, 0, 1, 1], "first_k_dense_replace": 2})["moe"]["dense_layers"] == [0, 1, 3]
    listed = {"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse", "sparse"], "first_k_dense_replace": 5}
    assert meaning(listed)["moe"]["dense_layers"] == [0, 3]
    assert meaning(listed, "Qwen")["moe"]["dense_layers"] == [0, 3]
    assert meaning({"experts": 0, "first_k_dense_replace": 3})["moe"] == {"experts": 0}
    for architecture, wrong, message in (
        ("Trial", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ("Trial", {"moe_layer_freq": [1]}, "moe_layer_freq [1]; expected a number of layers"),
        ("Trial", {"mlp_layer_types": ["dense"]}, "mlp_layer_types: expected dense or sparse for each of 6 layers"),
        ("Qwen", {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ("Qwen", {"decoder_sparse_step": 0}, "decoder_sparse_step 0; expected layer numbers"),
    ):
        with pytest.raises(CheckpointError) as error:
            meaning(wrong, architecture)
        assert message in str(error.value)


# Variants, options, defaults and other names.

VARIANTS = """Trial:
    model_type: t
    aliases: {width: hidden_size}
    defaults: {alibi: false, kind: a, size: {inner: 2, other: 3}}
    options: {norm: layer, rope: {interleaved: true}, rope.theta: 7.0}
    config: {moe.experts: size.inner, moe.top_k: 1, norm_bias: not bare}
    must: {norm_type: [null, plain], size.other: 3, checked: false}
    variants:
      - when: {kind: [b, c]}
        options: {moe: {score: sigmoid}, tensors.layer.q.bias: "l.{layer}.q.b", tensors: {fused_qkv: concat}}
        config: {moe.top_k: size.inner}
        must: {extra: [1, 2]}
      - when: {kind: d, size.inner: null}
        unsupported: sizes are needed here
      - when: {kind: [b, d]}
        options: {norm: rms}
      - - when: {alibi: true}
          options: {position: alibi, alibi.scaled: true}
          window: all
        - when: {}
          options: {block: parallel}"""


def test_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(tmp_path, monkeypatch, VARIANTS)
    config: dict[str, Any] = {"bare": False, "sliding_window": 5}
    plain = meaning(config)
    assert plain["moe"] == {"experts": 2, "top_k": 1} and plain["norm_bias"] is True and plain["window"] == 0
    assert (plain["norm"], plain["block"]) == ("layer", "parallel") and "position" not in plain
    assert plain["rope"] == {"kind": "default", "theta": 7.0, "interleaved": True}
    changed = meaning(config | {"kind": "c", "size": {"inner": 4}, "bare": True})
    assert changed["moe"] == {"experts": 4, "top_k": 4, "score": "sigmoid"} and changed["norm_bias"] is False
    assert changed["tensors"] == {"layer": {"q.bias": "l.{layer}.q.b"}, "fused_qkv": "concat"} and changed["norm"] == "layer"
    assert meaning(config | {"kind": "d"})["norm"] == "rms"
    biased = meaning(config | {"kind": "b", "alibi": True})
    assert (biased["position"], biased["alibi"], biased["window"], biased["norm"]) == ("alibi", {"scaled": True}, 5, "layer")
    assert "block" not in biased and biased["rope"] == {"interleaved": True, "theta": 7.0}
    assert meaning({"bare": False, "width": 48, "hidden_size": 32})["hidden_size"] == 32
    assert read({"num_hidden_layers": 2, "width": 48, "bare": False}, "trial", "Trial", "c")["hidden_size"] == 48
    for wrong, message in (
        ({"kind": "d", "size": {"inner": None}}, "kind 'd', size.inner None: sizes are needed here"),
        ({"kind": "b", "extra": 3}, "extra is 3; only 1 or 2 is supported"),
        ({"norm_type": "odd"}, "norm_type is 'odd'; only null or 'plain' is supported"),
        ({"size": {"other": 4}}, "size.other is 4; only 3 is supported"),
        ({"checked": 0}, "checked is 0; only False is supported"),
        ({"bare": 1}, "norm_bias: bare is 1; it must be true or false"),
    ):
        with pytest.raises(CheckpointError) as error:
            meaning(config | wrong)
        assert message in str(error.value), str(error.value)
    for fine in ({"norm_type": None}, {"norm_type": "plain"}, {"extra": 9}, {"kind": "c", "extra": 2}):
        meaning(config | fine)


def test_settings() -> None:
    about = {"defaults": {"a": 1, "c": {"d": 2, "e": None}, "f.g": 3}, "aliases": {"old": "new"}}
    settings = Settings(
        {"a": None, "c": {"x": 5}, "old": 7, "rope_scaling": {"type": "yarn"}, "rope_parameters": {"x": 1}}, about
    )
    assert settings.get("a", "none") == "none" and settings.get("c.d") == 2 and settings.get("c.e", 4) == 4
    assert (settings.get("c.x"), settings.get("f.g"), settings.get("new"), settings.get("old")) == (5, 3, 7, None)
    assert settings.get("rope_parameters.type") == "yarn"
    assert settings.first("missing", "a", "c.d") is ABSENT  # null in config.json counts as given
    assert Settings({}, about).first("missing", "c.d", "a") == 2 and Settings({"a": 5}, about).first("c.d", "a") == 5
    assert settings.reads("x", "c.d") and not settings.reads("c.x", "new")


WRONG_FAMILIES = [
    ("Trial: {model_type: t, config: {hidden_sze: 1}}", "hidden_sze is no key of a model; did you mean 'hidden_size'?"),
    ("Trial: {model_type: t, options: {moe.expert: 1}}", "moe.expert is no key of a model; did you mean 'experts'?"),
    ("Trial: {model_type: t, options: {norm.kind: 1}}", "norm.kind is no key of a model; norm has no keys inside"),
    ("Trial: {model_type: t, options: {rope: 3}}", "rope is 3; it must be a mapping of keys to values"),
    ("Trial: {model_type: t, config: {moe: experts}}", "moe is 'experts'; it must be a mapping"),
    ("Trial: {model_type: t, config: {softcap: a // b}}", "'a // b' cannot be read (at '/')"),
    ("Trial: {model_type: t, config: {softcap: {a: 1}}}", "softcap is {'a': 1}; it must be a key of config.json"),
    ("Trial: {model_type: t, window: some}", "window is 'some'; pick one of none, all, layers, layer_types, attention_layers"),
    ("Trial: {model_type: t, rope_layers: none}", "rope_layers is 'none'; pick one of all, no_rope_layers, window"),
    ("Trial: {model_type: t, dense_layers: all}", "dense_layers is 'all'; pick one of none, mlp_only_layers, first_k"),
    ("Trial: {model_type: t, variants: [{options: {norm: rms}}]}", "it must be a mapping with 'when' among its keys"),
    ("Trial: {model_type: t, variants: [3]}", "Trial: a variant is 3"),
    ("Trial: {model_type: t, variants: [[{when: [a]}]]}", "it must be a mapping with 'when'"),
    ("Trial: {model_type: t, variants: [{when: {}, option: {}}]}", "a variant has option; allowed are when, unsupported"),
    ("Trial: {model_type: t, variants: [{when: {}, options: {no: 1}}]}", "False is no key of a model; put it into quotes"),
    ("Trial: {model_type: t, variants: [{when: {}, must: 3}]}", "Trial: must of a variant is 3; it must be a mapping"),
    ("Trial: {model_type: t, variants: [{when: {}, window: 7}]}", "window is 7; pick one of none, all"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "message"), WRONG_FAMILIES, ids=[message[:40] for _, message in WRONG_FAMILIES])
def test_a_wrong_family_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, message: str) -> None:
    trial(tmp_path, monkeypatch, architecture)
    with pytest.raises(ConfigError) as error:
        meaning({})
    assert message in str(error.value) and str(error.value).startswith("conf/models/families/trial.yaml: "), str(error.value)


def test_every_family_of_the_zoo_can_be_read() -> None:
    for name, data in all_families().items():
        check_family(name, data)
        assert data["family"] == name and data["architectures"]


def test_the_families_of_the_page_can_be_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text()
    made = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    shown = [data for data in made if "architectures" in data]
    assert len(shown) == 2
    for data in shown:
        check_family("page", data)
    for rule in (rule for rules in RULES.values() for rule in rules):
        assert f"`{rule}`" in page


def test_nested_values_are_written_as_yaml_that_composes() -> None:
    values = {
        "vocab_size": 10, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
        "intermediate_size": 8, "max_positions": 64, "qkv_bias": True, "norm_eps": 1e-06,
        "rope": {
            "kind": "longrope", "theta": 1e4, "factor": 4.0, "original_max_positions": 16, "short_factor": [1.0, 2.5e-05] * 4,
            "long_factor": [9.0] * 8,
        },
        "moe": {"experts": 4, "top_k": 2, "dense_layers": [0], "score": "sigmoid"},
        "alibi": {"bias_max": 4.0},
        "tensors": {"layer": {"q": "a.{layer}.é", "q.bias": "b: {layer}, 'c' \"d\" # e", "on": "f"}},
    }  # fmt: skip
    text = _render("llama", "Trial", {"name": "x"}, values)
    assert yaml.safe_load(text)["tensors"]["layer"]["on"] == "f" and "rope: {kind: " in text
    model = compose_model(text).model
    assert model.rope.short_factor == (1.0, 2.5e-05) * 4 and model.rope.kind == "longrope" and model.norm_eps == 1e-06
    assert (model.moe.experts, model.moe.dense_layers, model.moe.score, model.alibi.bias_max) == (4, (0,), "sigmoid", 4.0)
    assert model.tensors.layer["q.bias"] == "b: {layer}, 'c' \"d\" # e" and model.tensors.layer["q"] == "a.{layer}.é"
    assert model.tensors.layer["k"] == "model.layers.{layer}.self_attn.k_proj.weight"  # the family's


def test_nested_differences_from_config_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    folder = families.make_checkpoint(tmp_path, "llama", rope_parameters=rope)
    model, checkpoint = compose_model(adopt(folder)).model, Checkpoint.open(folder)
    with caplog.at_level(logging.WARNING):
        check_config(model, checkpoint)
        assert not caplog.records
        check_config(dataclasses.replace(model, rope=dataclasses.replace(model.rope, factor=8.0, theta=3.0)), checkpoint)
    said = [record.getMessage().split(" in ")[1] for record in caplog.records]
    assert said == ["rope.theta: 3.0, config.json means 10000.0", "rope.factor: 8.0, config.json means 4.0"]


def test_a_part_that_changes_shapes_is_no_matter_of_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = families.make_checkpoint(tmp_path, "llama")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["HalfForCausalLM"], "experts": 2}
    (other / "config.json").write_text(json.dumps(config))
    half = all_families()["llama"] | {"family": "half", "architectures": {}}
    half["architectures"]["HalfForCausalLM"] = {
        "model_type": "half",
        "defaults": {"partial_rotary_factor": 0.5},
        "options": {"tensors": {"fused_qkv": "none"}},
    }
    (tmp_path / "conf" / "models" / "families").mkdir(parents=True)
    (tmp_path / "conf" / "models" / "families" / "half.yaml").write_text(yaml.safe_dump(half))
    monkeypatch.setenv("ZOO_CONF", str(tmp_path / "conf"))
    model, checkpoint = compose_model(adopt(other)).model, Checkpoint.open(other)
    assert model.rope.fraction == 0.5
    wrong = dataclasses.replace(
        model,
        rope=dataclasses.replace(model.rope, fraction=0.25),
        tensors=dataclasses.replace(model.tensors, fused_qkv="concat"),
    )
    with pytest.raises(CheckpointError, match="disagrees with model") as error:
        check_config(wrong, checkpoint)
    listed = {line.strip() for line in str(error.value).splitlines()[1:]}
    assert listed == {"rope.fraction: 0.25, config.json means 0.5", "tensors.fused_qkv: 'concat', config.json means 'none'"}


# A checkpoint whose tensors are another family's.


def folder_of(tmp_path: Path, config: dict[str, Any], names: list[str]) -> Path:
    tmp_path.mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    return tmp_path


def test_tensors_of_a_sibling_family_are_named(tmp_path: Path) -> None:
    gpt2 = families.make_checkpoint(tmp_path, "gpt2")
    names = Checkpoint.open(gpt2).tensors.names
    config = json.loads((families.make_checkpoint(tmp_path, "llama") / "config.json").read_text())
    folder = folder_of(tmp_path / "wrong", config, names)
    with pytest.raises(CheckpointError) as error:
        adopt(folder)
    text = str(error.value)
    assert "LlamaForCausalLM is of family llama, but its tensors are those of family gpt2 (GPT2LMHeadModel" in text
    assert "100% of their names are known there, 0% in llama (not transformer." in text


def test_a_few_strange_tensors_make_no_other_family(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama")
    config, names = json.loads((folder / "config.json").read_text()), list(Checkpoint.open(folder).tensors.names)
    odd = folder_of(tmp_path / "odd", config, [*names, "model.layers.0.self_attn.q_norm.weight", "other.weight"])
    assert recognise(config, "config.json", Checkpoint.open(odd).tensors) == ("llama", "LlamaForCausalLM")
    with pytest.raises(CheckpointError, match="tensors extra"):
        adopt(odd)
