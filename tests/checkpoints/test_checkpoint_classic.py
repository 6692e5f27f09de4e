"""Corners of the families of tests/zoo_cases/classic.py: config.json of all releases, what is refused, published sizes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import zoo_cases
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from zoo_cases.classic import CASES, FALCON_RW, MPT

from zoo.checkpoints import Checkpoint
from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.families import read, recognise
from zoo.checkpoints.names import fit_names, roles, shape_of
from zoo.config import compose, compose_model
from zoo.errors import CheckpointError, ConfigError
from zoo.graph_templates import expand
from zoo.spec import ModelSpec

# Parameters as the publishers give them on their model pages (transformers' count where a page rounds), tied tensors once.
PARAMETERS = {
    "gpt2-xl": 1_557_611_200,
    "santacoder": 1_124_886_528,
    "starcoder": 15_517_456_384,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "gpt-j-6b": 6_050_882_784,
    "pythia-1.4b": 1_414_647_808,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    "gpt-neo-1.3b": 1_315_575_808,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064,
    "mpt-7b": 6_649_286_656,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "falcon-rw-1b": 1_311_625_216,
    "phi-2": 2_779_683_840,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name: str) -> None:
    model = compose([f"models={name}"]).model
    counted = [shape_of(model, role) for role, _ in roles(model) if not (role == "lm_head" and model.tie_embeddings)]
    unused = model.position_offset * model.hidden_size  # rows of a table that are in the checkpoint and never read
    assert sum(int(np.prod(shape)) for shape in counted) + unused == PARAMETERS[name]


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    family, architecture = recognise(config, "config.json")
    return read(config, family, architecture, "config.json")


ARCHITECTURES = (
    *("GPTBigCodeForCausalLM", "Starcoder2ForCausalLM", "GPTJForCausalLM", "CodeGenForCausalLM", "GPTNeoXForCausalLM"),
    *("GPTNeoForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "MptForCausalLM", "FalconForCausalLM", "PhiForCausalLM"),
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_config_json_leaves_out_means_what_transformers_means(architecture: str) -> None:
    config_class = getattr(transformers, architecture).config_class
    theirs, ours = config_class(), meaning({"architectures": [architecture], "model_type": config_class.model_type})
    assert ours["vocab_size"] == theirs.vocab_size
    assert ours["hidden_size"] == theirs.hidden_size
    assert ours["num_layers"] == theirs.num_hidden_layers
    assert ours["num_heads"] == theirs.num_attention_heads
    assert ours["tie_embeddings"] == theirs.tie_word_embeddings
    assert ours["norm_eps"] == next(
        (getattr(theirs, key) for key in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon") if hasattr(theirs, key)), 1e-5
    )
    if hasattr(theirs, "max_position_embeddings"):
        assert ours["max_positions"] == theirs.max_position_embeddings
    rope = getattr(theirs, "rope_parameters", None)
    if rope:
        assert ours["rope"]["theta"] == rope["rope_theta"]
        assert ours["rope"].get("fraction", 1.0) == rope.get("partial_rotary_factor", 1.0)


def spec_of(folder: Path) -> ModelSpec:
    model = compose_model(adopt(folder, "x")).model
    return dataclasses.replace(model, checkpoint="")


# case, config.json of an earlier release, in changes to what transformers writes now
EARLIER: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary_pct": ("gpt_neox-parallel", {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10000}),
    "rotary defaults": (
        "gpt_neox-parallel",
        {"rope_parameters": None, "attention_bias": None, "tie_word_embeddings": None, "use_parallel_residual": None},
    ),
    "gpt_neox scaling": (
        "gpt_neox-odd-tied",
        {
            "rope_parameters": None,
            "rope_scaling": {"type": "linear", "factor": 3.0},
            "rotary_pct": 0.4,
            "rotary_emb_base": 25000,
        },
    ),
    "rope_theta": ("starcoder2-one-kv-head", {"rope_parameters": None, "rope_theta": 999999.4420358813}),
    "no head_dim": ("starcoder2-window", {"head_dim": None, "dtype": None, "torch_dtype": "float32", "use_bias": None}),
    "yarn beside": (
        "starcoder2-yarn",
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
    "partial_rotary_factor": ("phi-grouped", {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.4}),
    "phi defaults": ("phi-plain", {"rope_parameters": None, "num_key_value_heads": None, "tie_word_embeddings": None}),
    "gptj names": ("gptj-plain", {"n_embd": None, "n_layer": None, "hidden_size": 64, "num_hidden_layers": 2, "n_inner": None}),
    "n_embed": ("bloom-plain", {"hidden_size": None, "n_embed": 64, "n_head": None, "num_attention_heads": 8}),
    "attention_layers": ("gpt_neo-windows", {"attention_types": None, "attention_layers": ["global", "local", "local"]}),
    "falcon names": (
        "falcon-new-decoder",
        {
            **{"rope_parameters": None, "num_hidden_layers": None, "num_attention_heads": None, "num_kv_heads": None},
            **{"n_layer": 2, "n_head": 4, "n_head_kv": 2, "ffn_hidden_size": None, "num_ln_in_parallel_attn": None},
        },
    ),
    "num_kv_heads unread": ("falcon-multi-query", {"num_kv_heads": 4, "tie_word_embeddings": None, "bias": None}),
    "no attn_config": ("mpt-plain", {"attn_config": None, "no_bias": True, "norm_type": None, "init_config": {"name": "normal"}}),
}


def config_of(case: str) -> dict[str, Any]:
    """The config.json that transformers writes for a case."""
    about = CASES[case]
    config = transformers.AutoConfig.for_model(about.kind, vocab_size=262, **about.config)
    made = json.loads(config.to_json_string(use_diff=False))
    architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    return made | {"architectures": [architecture]}


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The same with other values; None takes a key away."""
    return {key: value for key, value in (config | changes).items() if changes.get(key, 0) is not None}


@pytest.mark.parametrize("name", EARLIER)
def test_config_json_of_earlier_releases(name: str) -> None:
    case, changes = EARLIER[name]
    config = config_of(case)
    assert meaning(changed(config, changes)) == meaning(config)


HEADS = [("bloom-plain", "transformer."), ("opt-plain", "model."), ("gpt2-plain", "transformer.")]


@pytest.mark.parametrize(("case", "head"), HEADS)
def test_exports_without_the_head_of_their_names(case: str, head: str, tmp_path: Path) -> None:
    folder = zoo_cases.make_folder(tmp_path / "bare", CASES[case])
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name.removeprefix(head): tensor for name, tensor in tensors.items()}, file)
    checkpoint = Checkpoint.open(folder).tensors
    assert all(not name.startswith(head) for name in checkpoint.names)
    assert fit_names(spec_of(folder), checkpoint).tensors.model["embed"] in checkpoint.names


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2 scales by layer": ("gpt2-plain", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "gpt2 cross attention": ("gpt2-plain", {"add_cross_attention": True}, "add_cross_attention is True"),
    "bigcode cross attention": ("gpt_bigcode-all-heads", {"add_cross_attention": True}, "add_cross_attention is True"),
    "gptj all rotated": ("gptj-plain", {"rotary_dim": 0}, "rotary_dim is 0; it must be a number over 0"),
    "opt plain norms": ("opt-plain", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
    "opt no final norm": ("opt-plain", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
    "bloom residual": ("bloom-plain", {"apply_residual_connection_post_layernorm": True}, "only False is supported"),
    "mpt biases": ("mpt-plain", {"no_bias": False}, "no_bias is False; only True is supported"),
    "mpt norm": ("mpt-plain", {"norm_type": "rmsnorm"}, "norm_type is 'rmsnorm'"),
    "mpt logits": ("mpt-plain", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale is 'inv_sqrt_d_model'"),
    "mpt positions": ("mpt-plain", {"attn_config": {"alibi": False}}, "attn_config.alibi is False"),
    "mpt heads": ("mpt-plain", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type is"),
    "mpt query norm": ("mpt-plain", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln is True"),
    "falcon sequential": ("falcon-new-decoder", {"parallel_attn": False}, "a new decoder has attention and MLP side by side"),
    "phi query norm": ("phi-plain", {"qk_layernorm": True}, "qk_layernorm is True; only False is supported"),
    "phi activation": ("phi-plain", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(name: str) -> None:
    case, changes, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        meaning(changed(config_of(case), changes))


def test_quarters_need_four_equal_parts() -> None:
    with pytest.raises(ConfigError, match="num_heads 6 and num_kv_heads 6 are not one multiple of 4"):
        dataclasses.replace(compose(["models=codegen-2b-mono"]).model, num_heads=6, num_kv_heads=6)


def test_an_embedding_of_another_width_is_refused(tmp_path: Path) -> None:
    """opt-350m projects its embeddings up; the tensors say so."""
    case = dataclasses.replace(CASES["opt-norm-behind"], config=CASES["opt-norm-behind"].config | {"word_embed_proj_dim": 30})
    folder = zoo_cases.make_folder(tmp_path / "narrow", case)
    with pytest.raises(CheckpointError) as caught:
        adopt(folder)
    for part in (
        "project_in.weight [54, 30]",
        "project_out.weight [30, 54]",
        "embed_tokens.weight: [262, 30], the model says [262, 54]",
    ):
        assert part in str(caught.value)


def plain_logits(folder: Path, ids: list[int]) -> np.ndarray:
    tensors = Checkpoint.open(folder).tensors
    return families.Plain(expand(fit_names(spec_of(folder), tensors), "float32"), tensors).logits([ids])[0]


def test_mpt_reads_the_largest_bias(tmp_path: Path) -> None:
    """transformers calls its own builder of biases without the setting; here it is called with it, as the models were trained."""
    case = zoo_cases.Case("mpt", MPT | {"n_heads": 6, "d_model": 60, "attn_config": {"alibi_bias_max": 16}})
    folder, model = zoo_cases.make_folder(tmp_path / "mpt", case), zoo_cases.random_model(case)
    build = model.transformer.build_mpt_alibi_tensor
    model.transformer.build_mpt_alibi_tensor = functools.partial(build, alibi_bias_max=16)
    ids = np.random.default_rng(0).integers(0, 256, 30).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(plain_logits(folder, ids), expected, rtol=0, atol=1e-4)


def test_falcon_without_rounded_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds Falcon's biases to bfloat16 in any dtype; BLOOM's builder makes the same ones and does not."""
    case = zoo_cases.Case("falcon", FALCON_RW | {"hidden_size": 60, "num_attention_heads": 15}, attention="sdpa")
    folder, model = zoo_cases.make_folder(tmp_path / "falcon", case), zoo_cases.random_model(case)
    ids = np.random.default_rng(0).integers(0, 256, 30).tolist()
    found = plain_logits(folder, ids)
    with torch.no_grad():
        rounded = model(torch.tensor([ids])).logits[0].numpy()
        monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", modeling_bloom.build_alibi_tensor)
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(rounded - expected).max() > 1e-3, "transformers no longer rounds: the case can go to tests/zoo_cases"
