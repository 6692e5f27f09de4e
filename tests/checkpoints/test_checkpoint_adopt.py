"""``zoo add``: what it writes composes to what transformers means by the same config.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import families
import pytest
import safetensors.torch
import transformers

from zoo.checkpoints import Checkpoint, check_config
from zoo.checkpoints.adopt import add_model, adopt, name_for
from zoo.checkpoints.families import read, recognise
from zoo.config import compose, compose_model, list_models
from zoo.errors import CheckpointError, ConfigError
from zoo.spec import ModelSpec


def numbers(model: ModelSpec) -> dict[str, Any]:
    """What a spec means, its names apart."""
    data = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    for key in ("family", "tensors"):
        del data[key]
    if model.position == "learned":
        del data["rope"]
    return data


@pytest.mark.parametrize("case", families.CASES)
def test_equal_to_the_spec_written_by_hand(case: str, tmp_path: Path) -> None:
    family, changes = families.CASES[case]
    folder = families.make_checkpoint(tmp_path, family, **changes)
    made = compose_model(adopt(folder, "x")).model
    assert numbers(made) == numbers(dataclasses.replace(families.spec(folder), name="x"))


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    family, architecture = recognise(config, "config.json")
    return read(config, family, architecture, "config.json")


MINIMAL = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"]


@pytest.mark.parametrize("architecture", MINIMAL)
def test_what_config_json_leaves_out_means_what_transformers_means(architecture: str) -> None:
    """Configs were long written as differences to a class's defaults; an empty one is the extreme."""
    config_class = getattr(transformers, architecture).config_class
    theirs = config_class()
    ours = meaning({"architectures": [architecture], "model_type": config_class.model_type})
    assert ours["vocab_size"] == theirs.vocab_size
    assert ours["hidden_size"] == theirs.hidden_size
    assert ours["num_layers"] == theirs.num_hidden_layers
    assert ours["num_heads"] == theirs.num_attention_heads
    assert ours["max_positions"] == theirs.max_position_embeddings
    assert ours["tie_embeddings"] == theirs.tie_word_embeddings
    if architecture == "GPT2LMHeadModel":
        assert (ours["intermediate_size"], ours["activation"], ours["norm_eps"]) == (4 * 768, "gelu_tanh", 1e-5)
        return
    assert ours["num_kv_heads"] == theirs.num_key_value_heads
    assert ours["head_dim"] == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours["intermediate_size"] == theirs.intermediate_size
    assert ours["norm_eps"] == theirs.rms_norm_eps
    assert ours["rope"] == {"kind": theirs.rope_parameters["rope_type"], "theta": theirs.rope_parameters["rope_theta"]}
    assert ours["window"] == (theirs.sliding_window or 0 if architecture == "MistralForCausalLM" else 0)


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5e5},
    {"rope_theta": 10000, "rope_scaling": None},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e5},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 4096, "max_position_embeddings": 64},
    {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
]  # fmt: skip


@pytest.mark.parametrize("change", ROPES, ids=range(len(ROPES)))
def test_rotary_settings_of_every_release(change: dict[str, Any]) -> None:
    theirs = transformers.LlamaConfig(**json.loads(json.dumps({**LLAMA, **change}))).rope_parameters
    ours = meaning({**LLAMA, **change})["rope"]
    assert ours["kind"] == theirs["rope_type"] and ours["theta"] == theirs["rope_theta"]
    for key, name in (
        ("factor", "factor"),
        ("low_freq_factor",) * 2,
        ("original_max_positions", "original_max_position_embeddings"),
    ):
        assert ours.get(key) == theirs.get(name)


QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_hidden_layers": 2}
SLIDE, FULL = "sliding_attention", "full_attention"
WINDOWS: list[dict[str, Any]] = [
    {"sliding_window": 8},
    {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDE, FULL, FULL, SLIDE]},
    {"use_sliding_window": True, "sliding_window": 8},
]  # fmt: skip


@pytest.mark.parametrize("change", WINDOWS, ids=range(len(WINDOWS)))
def test_windows_of_qwen2(change: dict[str, Any]) -> None:
    theirs = transformers.Qwen2Config(**{key: value for key, value in {**QWEN, **change}.items() if key != "architectures"})
    ours = meaning({**QWEN, **change})
    layers = [layer for layer, kind in enumerate(theirs.layer_types) if kind == SLIDE and theirs.sliding_window]
    windowed = ours["window_layers"] or (list(range(4)) if ours["window"] else [])
    assert windowed == layers and ours["window"] == (theirs.sliding_window if layers else 0)


def test_windows_of_mistral() -> None:
    for change in ({}, {"sliding_window": 7}, {"sliding_window": None}):
        window = transformers.MistralConfig(**change).sliding_window
        assert meaning({**MISTRAL, **change})["window"] == (window or 0)
        redundant = {"layer_types": [SLIDE if window else FULL] * 2}
        assert meaning({**MISTRAL, **change, **redundant}) == meaning({**MISTRAL, **change})


UNDERSTOOD_NOT = [
    (LLAMA | {"rope_scaling": {"rope_type": "fast", "factor": 4.0}}, "rotary kind 'fast' is not supported; supported are"),
    (LLAMA | {"rope_scaling": {"rope_type": ["yarn"], "factor": 4.0}}, "rope_parameters.rope_type: rotary kind ['yarn'] is not"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "speed": 2}}, "speed of kind yarn is not understood"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}}, "rotary truncate is 1; it must be true"),
    (LLAMA | {"rope_scaling": {"type": "su", "long_factor": [1.0]}}, "rotary short_factor is None; it must be a list"),
    (LLAMA | {"rope_scaling": {"type": "su", "long_factor": ["2"], "short_factor": [1.0]}}, "rotary long_factor is ['2']"),
    (LLAMA | {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 5.0}}}, "rotates all layers alike"),
    (LLAMA | {"rope_theta": -1}, "rotary theta is -1; it must be a number over 0"),
    (LLAMA | {"hidden_size": 4099}, "head_dim: hidden_size / num_attention_heads is 4099 / 4, which is no whole number"),
    (LLAMA | {"rope_parameters": {"rope_type": "linear"}}, "rotary factor is None; it must be a number over 0"),
    (LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": True}}, "rotary factor is True"),
    (LLAMA | {"rope_parameters": [1]}, "expected an object"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (LLAMA | {"hidden_act": "gelu_10"}, "activation 'gelu_10' is not supported; supported are silu"),
    (LLAMA | {"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
    (LLAMA | {"num_attention_heads": 0}, "head_dim"),
    (LLAMA | {"tie_word_embeddings": 1}, "tie_embeddings is 1; it must be true or false"),
    (LLAMA | {"rms_norm_eps": "1e-5"}, "norm_eps is '1e-5'; it must be a number"),
    (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "the checkpoint is quantized"),
    (QWEN | {"layer_types": ["chunked_attention"] * 4}, "layer_types: only full_attention and sliding_attention"),
    (QWEN | {"use_sliding_window": True, "layer_types": [SLIDE]}, "layer_types names 1 layers of 4"),
    (QWEN | {"use_sliding_window": True, "sliding_window": -1}, "sliding_window is -1"),
    (QWEN | {"layer_types": [["x"]]}, "layer_types: only full_attention and sliding_attention"),
    (QWEN | {"layer_types": [{}] * 4}, "layer_types: only full_attention and sliding_attention"),
    (MISTRAL | {"layer_types": [FULL, SLIDE]}, "layer_types: this architecture has sliding_attention on every layer"),
    (MISTRAL | {"layer_types": [FULL, SLIDE], "sliding_window": None}, "has full_attention on every layer"),
    (LLAMA | {"layer_types": [FULL, SLIDE], "sliding_window": 4}, "has full_attention on every layer"),
    (LLAMA | {"num_hidden_layers": 10**9}, "num_layers is 1000000000; it must be at most 1024"),
    (QWEN | {"num_hidden_layers": 10**9, "use_sliding_window": True, "sliding_window": 4}, "num_layers is 1000000000"),
    (LLAMA | {"vocab_size": 10**9}, "vocab_size is 1000000000; it must be at most 16777216"),
    ({"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True}, "only False is supported"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), UNDERSTOOD_NOT, ids=[message[:30] for _, message in UNDERSTOOD_NOT])
def test_settings_that_are_not_understood(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match="settings that are not understood") as error:
        meaning(config)
    assert message in str(error.value)


def test_all_settings_that_are_not_understood_are_listed_at_once() -> None:
    with pytest.raises(CheckpointError) as error:
        meaning(LLAMA | {"hidden_size": "64", "rms_norm_eps": None, "hidden_act": "x", "rope_scaling": {"type": "dynamic"}})
    assert len(str(error.value).splitlines()) == 6  # head_dim falls with hidden_size
    assert "rotary factor is None" in str(error.value)


def test_an_unsupported_architecture_names_the_nearest(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "qwen3")
    strange = tmp_path / "strange"
    strange.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["NovelForCausalLM"], "model_type": "novel"}
    (strange / "config.json").write_text(json.dumps(config))
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.router.weight"] = state["model.norm.weight"].clone()
    safetensors.torch.save_file(state, strange / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        adopt(strange)
    text = str(error.value)
    assert "architecture NovelForCausalLM is not supported; supported are " in text and all(name in text for name in MINIMAL)
    assert "The nearest family is qwen3: config.json has 12 of the 12 keys that it reads" in text
    assert "14 of 15 tensor names of the first layer are its own (not model.layers.0.mlp.router.weight)" in text
    assert "it does not know" not in text
    (strange / "config.json").write_text(json.dumps({"num_experts": 4, "use_cache": True} | config | {"vocab_size": None}))
    with pytest.raises(CheckpointError, match=r"The nearest family is qwen3: .*; it does not know num_experts; 14 of 15"):
        adopt(strange)
    del config["rms_norm_eps"]
    (strange / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has 11 of the 12 keys that it reads \(not rms_norm_eps\)"):
        adopt(strange)
    with pytest.raises(CheckpointError, match="architecture model_type 'novel' is not supported"):
        recognise({"model_type": "novel"}, "config.json")
    with pytest.raises(CheckpointError, match="LlamaForSequenceClassification is not supported"):
        recognise({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "config.json")
    assert recognise({"model_type": "mistral"}, "config.json") == ("llama", "MistralForCausalLM")


def test_a_config_that_disagrees_lists_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    folder = families.make_checkpoint(tmp_path, "llama", rope_parameters=rope)
    model = compose_model(adopt(folder)).model
    checkpoint = Checkpoint.open(folder)
    check_config(model, checkpoint)
    check_config(dataclasses.replace(model, max_positions=64), checkpoint)  # rotary positions may stop early
    assert not caplog.records
    tuned = dataclasses.replace(model, norm_eps=1e-3, window=5, rope=dataclasses.replace(model.rope, factor=3.0))
    check_config(tuned, checkpoint)  # no shape depends on these: set apart on purpose, and said
    said = sorted(record.getMessage().split(" in ")[1] for record in caplog.records)
    assert [line.split(":")[0] for line in said] == ["norm_eps", "rope.factor", "window"]
    wrong = dataclasses.replace(tuned, hidden_size=128, qkv_bias=True, max_positions=256)
    with pytest.raises(CheckpointError) as error:
        check_config(wrong, checkpoint)
    listed = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(line.split(":")[0] for line in listed) == ["hidden_size", "max_positions", "qkv_bias"]
    assert "hidden_size: 128, config.json means 64" in listed
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM is of family llama, but model '.*' is of family gpt2"):
        check_config(dataclasses.replace(model, family="gpt2"), checkpoint)
    learned = families.make_checkpoint(tmp_path, "gpt2")
    shorter = dataclasses.replace(compose_model(adopt(learned)).model, max_positions=64)
    with pytest.raises(CheckpointError, match=r"max_positions: 64, config\.json means 128"):
        check_config(shorter, Checkpoint.open(learned))


def test_the_dtype_is_what_the_files_hold(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama", dtype="bfloat16")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for changed in (config, config | {"dtype": "float16"}, {key: value for key, value in config.items() if key != "dtype"}):
        (other / "config.json").write_text(json.dumps(changed))
        assert compose_model(adopt(other)).model.dtype == "bfloat16"


def test_add_writes_a_file_that_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "conf"
    mine.mkdir()
    monkeypatch.setenv("ZOO_CONF", str(mine))
    folder = families.make_checkpoint(tmp_path, "qwen2")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b-1.5\n---\n# x\n")
    path = add_model(folder, "my-model-1.5")
    assert path == mine / "models" / "my-model-1.5.yaml" and list(path.parent.iterdir()) == [path]
    assert "my-model-1.5" in list_models()
    model = compose(["models=my-model-1.5"]).model
    assert (model.name, model.license, model.base_model, model.qkv_bias) == ("my-model-1.5", "apache-2.0", "a/b-1.5", True)
    assert model.checkpoint == str(folder)
    with pytest.raises(ConfigError, match="there is a model of this name"):
        add_model(folder, "my-model-1.5")
    path.write_text("broken")
    assert compose(["models=" + add_model(folder, "my-model-1.5", force=True).stem]).model == model
    assert add_model(folder).stem == name_for(folder)
    (folder / "README.md").unlink()


def test_a_checkpoint_beside_conf_is_written_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.setenv("ZOO_CONF", str(tmp_path / "conf"))
    (tmp_path / "checkpoints").mkdir()
    folder = families.make_checkpoint(tmp_path / "checkpoints", "llama", seed=5)
    path = add_model(folder, "beside")
    assert f'checkpoint: "checkpoints/{folder.name}"' in path.read_text()
    assert compose(["models=beside"]).model.checkpoint == str(folder)


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "../x", "a/b", "-a", "a-", "a..b", "a@b", "a:b", "x" * 101, "ä"])
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    if not name:
        return
    with pytest.raises(ConfigError, match="use lower case letters and digits"):
        adopt(families.make_checkpoint(tmp_path, "llama"), name)


def test_names_from_folders() -> None:
    assert [name_for(Path(name)) for name in ("Llama-3.2-1B", "My Model (v2)", "...", "a..b", "Qwen2.5_7B")] == [
        "llama-3.2-1b", "my-model-v2", "model", "a-b", "qwen2.5-7b"]  # fmt: skip


def test_a_checkpoint_that_does_not_fit_is_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.setenv("ZOO_CONF", str(tmp_path / "conf"))
    folder = families.make_checkpoint(tmp_path, "llama")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"intermediate_size": 97}))
    with pytest.raises(CheckpointError, match="6 tensors misshapen"):
        add_model(bad)
    (bad / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    with pytest.raises(ConfigError, match="num_heads 4 is not divisible by num_kv_heads 3"):
        add_model(bad)
    assert not (tmp_path / "conf" / "models").exists()


def copied(folder: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_folders_with_names_that_yaml_or_hydra_read_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.setenv("ZOO_CONF", str(tmp_path / "conf"))
    folder = families.make_checkpoint(tmp_path, "llama")
    for name in ("1000", "null", "~x", "???", "a, 'b' \\ \"c\" ü\n"):
        place = copied(folder, tmp_path / name)
        path = add_model(place)
        model = compose([f"models={path.stem}"]).model
        assert Path(model.checkpoint) == place and model.name == path.stem
        path.unlink()
    path = add_model(folder, "2024")
    assert path.name == "2024.yaml" and compose(["models=2024"]).model.name == "2024"


def test_paths_that_yaml_would_interpolate(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama")
    for name in ("l${limits.max_tokens}", "${oc.env:HOME}", "\\${x}"):
        with pytest.raises(ConfigError, match=r"\$\{ would refer to another key; rename the folder, or link to it"):
            adopt(copied(folder, tmp_path / name))
    (tmp_path / "plain").symlink_to(tmp_path / "${oc.env:HOME}")
    assert compose_model(adopt(tmp_path / "plain")).model.checkpoint == str(tmp_path / "plain")


def test_a_home_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="there is no user of this name"):
        adopt(Path("~no-such-user/x"))
