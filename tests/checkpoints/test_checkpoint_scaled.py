"""Corners of the families of tests/zoo_cases/scaled.py: config.json of all releases, what is refused, published sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import zoo_cases
from zoo_cases.scaled import CASES, FULL, SLIDING

from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.families import read, recognise
from zoo.checkpoints.names import roles, shape_of
from zoo.config import compose, compose_model
from zoo.errors import CheckpointError
from zoo.spec import ModelSpec

CLASSES = {
    "GemmaForCausalLM": transformers.GemmaConfig,
    "Gemma2ForCausalLM": transformers.Gemma2Config,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
    "CohereForCausalLM": transformers.CohereConfig,
    "Cohere2ForCausalLM": transformers.Cohere2Config,
    "GlmForCausalLM": transformers.GlmConfig,
    "Glm4ForCausalLM": transformers.Glm4Config,
    "NemotronForCausalLM": transformers.NemotronConfig,
    "StableLmForCausalLM": transformers.StableLmConfig,
}
# Parameters as the model pages give them, tied tensors counted once.
PARAMETERS = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "command-r-v01": 34_980_831_232,
    "command-r7b": 8_028_033_024,
    "glm-4-9b-chat": 9_399_951_360,
    "glm-4-9b-0414": 9_400_279_040,
    "stablelm-3b": 2_795_443_200,
    "stablelm-2-1.6b": 1_644_515_328,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name: str) -> None:
    model = compose([f"models={name}"]).model
    counted = [shape_of(model, role) for role, _ in roles(model) if not (role == "lm_head" and model.tie_embeddings)]
    assert sum(int(np.prod(shape)) for shape in counted) == PARAMETERS[name]


def made(tmp_path: Path, case: str) -> Path:
    return zoo_cases.make_folder(tmp_path / case, CASES[case])


def spec(folder: Path) -> ModelSpec:
    return dataclasses.replace(compose_model(adopt(folder)).model, checkpoint="")


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    return read(config, *recognise(config, "config.json"), "config.json")


def config_of(case: str) -> dict[str, Any]:
    """config.json of a case as transformers writes it, without a model."""
    config = transformers.AutoConfig.for_model(CASES[case].kind, **CASES[case].config)
    names = [name for name, kind in CLASSES.items() if isinstance(config, kind)]
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": names}  # type: ignore[no-any-return]


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``config`` with other values; without the keys that get None."""
    return {key: value for key, value in (config | changes).items() if changes.get(key, 0) is not None}


@pytest.mark.parametrize("architecture", CLASSES)
def test_an_empty_config_means_what_its_class_means(architecture: str) -> None:
    theirs = CLASSES[architecture]()
    ours = meaning({"architectures": [architecture], "model_type": theirs.model_type})
    keys = {
        "vocab_size": ("vocab_size",),
        "hidden_size": ("hidden_size",),
        "num_layers": ("num_hidden_layers",),
        "num_heads": ("num_attention_heads",),
        "num_kv_heads": ("num_key_value_heads", "num_attention_heads"),
        "head_dim": ("head_dim",),
        "intermediate_size": ("intermediate_size",),
        "max_positions": ("max_position_embeddings",),
        "norm_eps": ("rms_norm_eps", "layer_norm_eps", "norm_eps"),
        "tie_embeddings": ("tie_word_embeddings",),
        "qkv_bias": ("attention_bias", "use_qkv_bias"),
        "logit_scale": ("logit_scale",),
        "softcap": ("attn_logit_softcapping",),
        "logit_softcap": ("final_logit_softcapping",),
    }
    for key, names in keys.items():
        found = [getattr(theirs, name) for name in names if getattr(theirs, name, None) is not None]
        if key in ours and (found or key != "head_dim"):
            assert ours[key] == (found[0] if found else 0), key
    assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.get("embed_scale", 1.0) == (theirs.hidden_size**0.5 if "Gemma" in architecture else 1.0)
    activation = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    assert ours["activation"] == {"gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation)
    if "attention_scale" in ours:
        assert ours["attention_scale"] == theirs.query_pre_attn_scalar**-0.5
    rope = theirs.rope_parameters.get(FULL, theirs.rope_parameters)
    assert (ours["rope"]["kind"], ours["rope"]["theta"]) == (rope["rope_type"], rope["rope_theta"])
    assert ours["rope"].get("fraction", 1.0) == rope.get("partial_rotary_factor", 1.0)
    if SLIDING in theirs.rope_parameters:
        assert ours["local_rope"]["theta"] == theirs.rope_parameters[SLIDING]["rope_theta"]
    types = getattr(theirs, "layer_types", None) or []
    windowed = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    assert (ours["window"], ours["window_layers"]) == (theirs.sliding_window if windowed else 0, windowed)
    assert ours.get("rope_layers", []) == (windowed if architecture == "Cohere2ForCausalLM" else [])


# Windows, bases and caps as config.json has them in earlier releases: the YAMLs have them spelled out.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2b": {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None},
    "gemma-2-9b": {"architectures": ["Gemma2ForCausalLM"], "cache_implementation": "hybrid", "query_pre_attn_scalar": 256},
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "command-r7b": {
        "architectures": ["Cohere2ForCausalLM"],
        "logit_scale": 0.25,
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "order_of_interleaved_layers": "local_attn_first",
    },
    "glm-4-9b-0414": {"architectures": ["Glm4ForCausalLM"], "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    "nemotron-mini-4b": {"architectures": ["NemotronForCausalLM"], "partial_rotary_factor": 0.5, "head_dim": 128},
    "stablelm-2-12b": {
        "architectures": ["StableLmForCausalLM"],
        "partial_rotary_factor": 0.25,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_what_its_config_json_means(name: str) -> None:
    model = compose([f"models={name}"]).model
    eps = {"gemma": "rms_norm_eps", "glm": "rms_norm_eps", "nemotron": "norm_eps"}.get(name.split("-")[0], "layer_norm_eps")
    sizes = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_positions,
        "torch_dtype": model.dtype,
        eps: model.norm_eps,
    }
    ours = meaning(sizes | PUBLISHED[name])
    parts = {part: ours.pop(part, {}) for part in ("rope", "local_rope")}
    assert ours.pop("tensors", None) is None
    for key, value in ours.items():
        found = getattr(model, key)
        assert (list(found) if isinstance(found, tuple) else found) == value, key
    for part, keys in parts.items():
        for key, value in keys.items():
            assert getattr(getattr(model, part), key) == value, f"{part}.{key}"


OLD = ("gemma-biases-untied", "cohere2-listed", "glm-odd-tied", "glm4-odd-tied", "nemotron-biases-tied", "stablelm-plain")


@pytest.mark.parametrize("case", OLD)
def test_rotary_settings_in_the_form_of_transformers_4(case: str) -> None:
    """rope_theta and partial_rotary_factor beside rope_scaling, whose kind is called type."""
    new = config_of(case)
    given = dict(new["rope_parameters"])
    kind, theta, part = given.pop("rope_type"), given.pop("rope_theta"), given.pop("partial_rotary_factor", None)
    scaling = {"type": kind, **given} if kind != "default" else None
    old = changed(new, rope_parameters=None, rope_theta=theta, partial_rotary_factor=part, rope_scaling=scaling)
    assert "rope_parameters" not in old and meaning(old) == meaning(new)


def test_gemma3_scales_only_the_layers_without_a_window(tmp_path: Path) -> None:
    folder = made(tmp_path, "gemma3-scaled-capped")
    new = spec(folder)
    assert (new.rope.kind, new.rope.theta, new.rope.factor) == ("linear", 50000.0, 8.0)
    assert (new.local_rope.kind, new.local_rope.theta, new.window_layers) == ("default", 500.0, (0, 2))
    old = {"rope_theta": 50000.0, "rope_local_base_freq": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    zoo_cases.edit_config(folder, rope_parameters=None, layer_types=None, sliding_window_pattern=2, **old)
    zoo_cases.edit_config(folder, dtype=None, torch_dtype="float32")
    assert spec(folder) == new
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert theirs.layer_types == [SLIDING, FULL, SLIDING] and theirs.rope_parameters[FULL]["factor"] == 8.0


@pytest.mark.parametrize(("case", "tied"), [("gemma-plain", True), ("gemma-biases-untied", False), ("glm-plain", False)])
def test_a_head_whose_tie_config_json_leaves_out(tmp_path: Path, case: str, tied: bool) -> None:
    """The class's default, unless the checkpoint stores a head of its own."""
    folder = made(tmp_path, case)
    zoo_cases.edit_config(folder, tie_word_embeddings=None)
    assert spec(folder).tie_embeddings is tied


def test_caps_that_are_null_are_off() -> None:
    config = config_of("gemma2-windows")
    assert (meaning(config)["softcap"], meaning(config)["logit_softcap"]) == (1.5, 2.0)
    config |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    assert (meaning(config)["softcap"], meaning(config)["logit_softcap"]) == (0, 0)
    left_out = {key: value for key, value in config.items() if "softcapping" not in key}
    assert (meaning(left_out)["softcap"], meaning(left_out)["logit_softcap"]) == (50.0, 30.0)


@pytest.mark.parametrize("given", [{}, {"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}])
def test_gemmas_gelu_is_the_one_by_tanh(given: dict[str, str]) -> None:
    config = changed(config_of("gemma-plain"), hidden_act=None)
    assert meaning(config | given)["activation"] == "gelu_tanh"


def test_minitron_says_kv_channels() -> None:
    config = config_of("nemotron-biases-tied")
    assert meaning(changed(config, head_dim=None, kv_channels=20)) == meaning(config)
    assert meaning(changed(config, head_dim=None))["head_dim"] == 16


def test_each_norm_of_a_head_is_missed_by_its_name(tmp_path: Path) -> None:
    folder = made(tmp_path, "stablelm-parallel-normed-heads")
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.1.self_attn.k_layernorm.norms.1.weight"
    safetensors.torch.save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=r"1 tensors missing:\n  " + name.replace(".", r"\.") + r" \[10\]"):
        adopt(folder)
    safetensors.torch.save_file(tensors | {name.replace("norms.1", "norms.2"): torch.ones(10)}, file)
    with pytest.raises(CheckpointError, match=r"k_layernorm\.norms\.2\.weight \[10\] \(it would be layer\.1\.k_norm"):
        adopt(folder)
    safetensors.torch.save_file(tensors, file)
    zoo_cases.edit_config(folder, qk_layernorm=False)
    with pytest.raises(CheckpointError, match=r"16 tensors extra:"):
        adopt(folder)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma sees both ways": ("gemma-plain", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "gemma2 sees both ways": ("gemma2-windows", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "gemma another activation": ("gemma-plain", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    "gemma two activations": (
        "gemma-plain",
        {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
        "releases of transformers differ in which of the two they read",
    ),
    "gemma3 capped scores": ("gemma3-pattern", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "gemma2 part of a head": ("gemma2-windows", {"partial_rotary_factor": 0.5}, "this architecture rotates whole heads"),
    "cohere2 norms": ("cohere2-pattern", {"use_qk_norm": True}, "use_qk_norm is True; only False is supported"),
    "cohere2 no window": ("cohere2-pattern", {"sliding_window": None}, "layers without a window do not rotate"),
    "cohere2 all full": ("cohere2-pattern", {"layer_types": [FULL] * 5}, "no layer rotates by the rule 'window'"),
    "cohere windows": ("cohere-plain", {"layer_types": [SLIDING, FULL]}, "this architecture has full_attention on every layer"),
    "glm activation": ("glm-plain", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
    "glm two rotations": (
        "glm-plain",
        {"rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "this architecture rotates all layers alike",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(name: str) -> None:
    case, changes, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        meaning(config_of(case) | changes)
