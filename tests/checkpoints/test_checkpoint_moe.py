"""Corners of the families of tests/zoo_cases/moe.py: config.json as published and of all releases, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import transformers
import zoo_cases
from zoo_cases.moe import CASES

from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.families import read, recognise
from zoo.checkpoints.names import roles, shape_of
from zoo.checkpoints.settings import leaves
from zoo.config import compose
from zoo.errors import CheckpointError

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
# Keys of config.json as the publishers have them, of those that say how a model computes. DeepSeek-V3's and gpt-oss's have a
# quantization_config besides, for which test_settings_that_are_refused stands.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        **{"architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336},
        **{"max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2},
        **{"num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05},
        **{"rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000},
    },
    "qwen1.5-moe-a2.7b": {
        **{"architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048},
        **{"intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe"},
        **{"moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60},
        **{"num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06},
        **{"rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768},
        **{"tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936},
    },
    "qwen3-30b-a3b": {
        **{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128},
        **{"hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960},
        **{"max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768},
        **{"norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8},
        **{"num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None},
        **{"rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False},
        **{"vocab_size": 151936},
    },
    "olmoe-1b-7b": {
        **{"architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None, "hidden_act": "silu"},
        **{"hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe"},
        **{"norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
        **{"num_hidden_layers": 16, "num_key_value_heads": 16, "rope_scaling": None, "rope_theta": 10000.0},
        **{"tie_word_embeddings": False, "vocab_size": 50304},
    },
    "granite-3.1-1b-a400m": {
        **{"architectures": ["GraniteMoeForCausalLM"], "attention_bias": False, "attention_multiplier": 0.015625},
        **{"embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 512},
        **{"logits_scaling": 6.0, "max_position_embeddings": 131072, "model_type": "granitemoe", "num_attention_heads": 16},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32},
        **{"residual_multiplier": 0.22, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1500000.0},
        **{"tie_word_embeddings": True, "vocab_size": 49155},
    },
    "deepseek-v2-lite": {
        **{"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "first_k_dense_replace": 1, "hidden_act": "silu"},
        **{"hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840},
        **{"model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64},
        **{"n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6},
        **{"num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        **{"rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "tie_word_embeddings": False},
        **{"topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400},
    },
    "deepseek-v3": {
        **{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "first_k_dense_replace": 3, "hidden_act": "silu"},
        **{"hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840},
        **{"model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8},
        **{"n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1},
        **{"q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06},
        **{"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000, "routed_scaling_factor": 2.5},
        **{"scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc"},
        **{"v_head_dim": 128, "vocab_size": 129280},
    },
    "gpt-oss-20b": {
        **{"architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4, "head_dim": 64},
        **{"hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880},
        **{"layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072},
        **{"model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24},
        **{"num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05, "rope_theta": 150000},
        **{
            "rope_scaling": {
                **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
                **{"rope_type": "yarn", "truncate": False},
            }
        },
        **{"sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088},
    },
}
# Parameters as the publishers give them on their model pages (transformers' count where a page rounds), tied tensors once;
# DeepSeek-V3's without the layer behind the last.
PARAMETERS = {
    "mixtral-8x7b": 46_702_792_704,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "granite-3.1-1b-a400m": 1_334_628_352,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
}


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    return read(config, *recognise(config, "config.json"), "config.json")


def config_of(case: str) -> dict[str, Any]:
    """The config.json that transformers writes for a case."""
    about = CASES[case]
    config = transformers.AutoConfig.for_model(about.kind, vocab_size=262, **about.config)
    made: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return made | {"architectures": [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]}


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The same with other values; None takes a key away."""
    return {key: value for key, value in (config | changes).items() if changes.get(key, 0) is not None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_are_what_is_published(name: str) -> None:
    model = compose([f"models={name}"]).model
    config = PUBLISHED[name]
    assert model.family == recognise(config, "config.json")[0]
    for path, (theirs, _) in leaves(meaning(config)):
        ours: Any = model
        for part in path:
            ours = getattr(ours, part)
        if path != ("tensors", "ignored"):
            assert ours == (tuple(theirs) if isinstance(theirs, list) else theirs), path
    counted = [shape_of(model, role) for role, _ in roles(model) if not (role == "lm_head" and model.tie_embeddings)]
    assert sum(int(np.prod(shape)) for shape in counted) == PARAMETERS[name]


ARCHITECTURES = (
    *("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "GraniteMoeForCausalLM"),
    *("GraniteMoeSharedForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"),
)
KEYS = {
    **{"vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers"},
    **{"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "intermediate_size": "intermediate_size"},
    **{"max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"},
    **{"embed_scale": "embedding_multiplier", "residual_scale": "residual_multiplier", "attention_scale": "attention_multiplier"},
    **{
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "moe.top_k": "num_experts_per_tok",
    },
    **{"moe.size": "moe_intermediate_size", "moe.scale": "routed_scaling_factor", "moe.groups": "n_group"},
    **{"moe.top_groups": "topk_group", "latent.kv_rank": "kv_lora_rank", "latent.q_rank": "q_lora_rank"},
    **{"latent.rope_dim": "qk_rope_head_dim", "latent.value_dim": "v_head_dim", "head_dim": "qk_head_dim"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_config_json_leaves_out_means_what_transformers_means(architecture: str) -> None:
    config_class = getattr(transformers, architecture).config_class
    given = {"num_experts_per_tok": 3} if architecture == "DeepseekV2ForCausalLM" else {}  # whose class leaves it open
    theirs = config_class(**given)
    ours = meaning({"architectures": [architecture], "model_type": config_class.model_type, **given})
    flat = {".".join(path): value for path, (value, _) in leaves(ours)}
    compared = {key for key, name in KEYS.items() if key in flat and hasattr(theirs, name)}
    assert {key: flat[key] for key in compared} == {key: getattr(theirs, KEYS[key]) for key in compared}
    assert {"moe.top_k", "norm_eps", "num_kv_heads", "max_positions"} <= compared
    experts = [getattr(theirs, key) for key in ("num_local_experts", "num_experts", "n_routed_experts") if hasattr(theirs, key)]
    assert flat["moe.experts"] == experts[0]
    normalizes = getattr(theirs, "norm_topk_prob", True) and architecture != "DeepseekV2ForCausalLM"
    assert flat.get("moe.normalize", True) == normalizes
    assert flat["rope.theta"] == theirs.rope_parameters["rope_theta"] and flat["rope.kind"] == theirs.rope_parameters["rope_type"]
    assert flat.get("rope.factor") == theirs.rope_parameters.get("factor")
    shared = getattr(theirs, "n_shared_experts", 0) * getattr(theirs, "moe_intermediate_size", 0)
    shared = shared or getattr(theirs, "shared_expert_intermediate_size", getattr(theirs, "shared_intermediate_size", 0))
    assert flat.get("moe.shared", 0) == shared
    dense = list(range(getattr(theirs, "first_k_dense_replace", 0)))
    assert flat.get("moe.dense_layers", []) == dense
    windowed = [layer for layer, kind in enumerate(getattr(theirs, "layer_types", None) or []) if kind == "sliding_attention"]
    assert (flat["window"], flat["window_layers"]) == ((theirs.sliding_window, windowed) if windowed else (0, []))


def old_rope(case: str, **others: Any) -> dict[str, Any]:
    """Changes that give a case the rotary settings of transformers 4."""
    given = dict(config_of(case)["rope_parameters"])
    kind, theta = given.pop("rope_type"), given.pop("rope_theta")
    return {"rope_parameters": None, "rope_theta": theta, "rope_scaling": {"type": kind, **given}, **others}


# case, config.json of an earlier release or another program, in changes to what transformers writes now
EARLIER: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral rope_theta": ("mixtral-windowed-one-of-five", old_rope("mixtral-windowed-one-of-five")),
    "mixtral default theta": (
        "mixtral-plain",
        {"rope_parameters": None, "head_dim": None, "torch_dtype": "float32", "dtype": None},
    ),
    "mixtral num_experts": ("mixtral-plain", {"num_local_experts": None, "num_experts": 4}),
    "qwen2moe absent": (
        "qwen2moe-plain",
        {"layer_types": None, "mlp_only_layers": None, "qkv_bias": None, "sliding_window": None},
    ),
    "qwen3moe num_experts": ("qwen3moe-plain", {"num_local_experts": None, "num_experts": 8}),
    "qwen3moe yarn": ("qwen3moe-biases-windowed", old_rope("qwen3moe-biases-windowed")),
    "olmoe num_local_experts": ("olmoe-plain", {"num_experts": None, "num_local_experts": 8, "clip_qkv": None}),
    "granitemoe absent": ("granitemoe-shared-of-none", {"shared_intermediate_size": None, "num_key_value_heads": None}),
    "deepseek2 yarn": ("deepseek2-greedy-yarn", old_rope("deepseek2-greedy-yarn", moe_layer_freq=1, scoring_func="softmax")),
    "deepseek2 absent": (
        "deepseek2-low-rank-groups",
        {"head_dim": None, "qk_head_dim": None, "num_key_value_heads": None, "norm_topk_prob": None, "attention_bias": None},
    ),
    "deepseek3 yarn": (
        "deepseek3-groups-yarn",
        old_rope("deepseek3-groups-yarn", topk_method="noaux_tc", scoring_func="sigmoid", rope_interleave=None),
    ),
    "gptoss yarn": ("gptoss-yarn", old_rope("gptoss-yarn", swiglu_alpha=None, experts_per_token=2, initial_context_length=64)),
    "gptoss alternates": ("gptoss-yarn", {"layer_types": None, "attention_bias": None, "tie_word_embeddings": None}),
}


@pytest.mark.parametrize("name", EARLIER)
def test_config_json_of_earlier_releases(name: str) -> None:
    case, changes = EARLIER[name]
    config = config_of(case)
    assert meaning(changed(config, changes)) == meaning(config)


def test_layers_without_experts() -> None:
    config = config_of("qwen2moe-dense-layers-windowed")
    assert meaning(config)["moe"]["dense_layers"] == [0, 2, 3]
    assert "dense_layers" not in meaning(config | {"decoder_sparse_step": 1, "mlp_only_layers": []})["moe"]
    assert "dense_layers" not in meaning(config_of("deepseek3-one-group-halves"))["moe"]


def test_deepseek_without_a_shared_expert() -> None:
    config = config_of("deepseek2-greedy-yarn")
    assert meaning(config | {"n_shared_experts": None})["moe"]["shared"] == 0


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2moe window": (
        "qwen2moe-dense-layers-windowed",
        {"layer_types": None},
        "use_sliding_window True, layer_types None: config.json must list layer_types",
    ),
    "qwen2moe layers": ("qwen2moe-plain", {"decoder_sparse_step": 0}, "mlp_only_layers is .* and decoder_sparse_step 0"),
    "granitemoe scaling": ("granitemoe-biases", {"logits_scaling": 0}, "logits_scaling is 0"),
    "deepseek2 weights": ("deepseek2-greedy-yarn", {"norm_topk_prob": True}, "norm_topk_prob is True; only False is supported"),
    "deepseek2 choice": ("deepseek2-greedy-yarn", {"topk_method": "noaux_tc"}, "only 'greedy' or 'group_limited_greedy'"),
    "deepseek2 groups": (
        "deepseek2-low-rank-groups",
        {"n_group": None},
        "moe.groups: none of n_group is there",
    ),
    "deepseek2 biases": ("deepseek2-greedy-yarn", {"attention_bias": True}, "attention_bias is True"),
    "deepseek2 top_k": (
        "deepseek2-greedy-yarn",
        {"num_experts_per_tok": None},
        "moe.top_k: none of num_experts_per_tok is there",
    ),
    "deepseek3 score": ("deepseek3-groups-yarn", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    "deepseek3 choice": ("deepseek3-groups-yarn", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    "deepseek3 frequency": ("deepseek3-groups-yarn", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "deepseek3 float8": (
        "deepseek3-groups-yarn",
        {"quantization_config": FP8},
        "the checkpoint is quantized; use one in bfloat16",
    ),
    "gptoss limit": ("gptoss-yarn", {"swiglu_limit": 8.0}, r"swiglu_limit is 8\.0; only 7\.0 is supported"),
    "gptoss activation": ("gptoss-yarn", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "gptoss MXFP4": ("gptoss-yarn", {"quantization_config": MXFP4}, "the checkpoint is quantized; use one in bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(name: str) -> None:
    case, changes, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        meaning(changed(config_of(case), changes))


def test_a_checkpoint_in_mxfp4_is_refused_for_what_it_is(tmp_path: Path) -> None:
    """Its experts have other names, [experts, out, blocks, 16] and scales, but that is not the reason that a user needs."""
    folder = zoo_cases.make_folder(tmp_path / "quantized", CASES["gptoss-yarn"])
    zoo_cases.edit_config(folder, quantization_config=MXFP4)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    packed: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[f"{name}_blocks"] = np.zeros((*tensor.shape[::2], 2, 16), np.uint8)
            packed[f"{name}_scales"] = np.zeros((*tensor.shape[::2], 2), np.uint8)
        else:
            packed[name] = tensor
    safetensors.numpy.save_file(packed, file)
    with pytest.raises(CheckpointError, match="the checkpoint is quantized"):
        adopt(folder)


def test_the_layer_behind_the_last_of_deepseek3(tmp_path: Path) -> None:
    """A published checkpoint has one that predicts a token more; it is left out, and nothing beside it."""
    folder = zoo_cases.make_folder(tmp_path / "mtp", CASES["deepseek3-groups-yarn"])
    before, layers = adopt(folder), CASES["deepseek3-groups-yarn"].config["num_hidden_layers"]
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    extra = ("embed_tokens.weight", "enorm.weight", "eh_proj.weight", "shared_head.head.weight", "self_attn.o_proj.weight")
    tensors |= {f"model.layers.{layers}.{name}": np.zeros((4, 4), np.float32) for name in extra}
    safetensors.numpy.save_file(tensors, file)
    assert adopt(folder) == before
    zoo_cases.edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"5 tensors extra:\n +model\.layers\.3\.eh_proj\.weight"):
        adopt(folder)


def test_experts_as_transformers_has_them_in_memory_are_told_apart(tmp_path: Path) -> None:
    """One tensor for all experts of a layer, which ``save_original_format=False`` leaves; published ones have one for each."""
    case = CASES["qwen3moe-plain"]
    zoo_cases.random_model(case).save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(CheckpointError, match=r"(?s)missing:.*experts\.0\.gate_proj.*extra:.*mlp\.experts\.gate_up_proj"):
        adopt(tmp_path)
