"""Every model and hardware file composes, and says what its publisher says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.checkpoints.names import roles, shape_of
from zoo.config import compose, conf_dir, hardware_specs, list_models
from zoo.spec import BuildSpec, ModelSpec

# Parameter counts as the publishers give them on their model pages, in thousands, tied tensors counted once.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gpt2": 124_439_808,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "smollm3-3b": 3_075_098_624,
    "granite-3.1-8b": 8_170_848_256,
    "seed-oss-36b": 36_151_104_512,
    "ernie-4.5-0.3b": 360_748_032,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "phi-3.5-mini": 3_821_079_552,
    "internlm2-7b": 7_737_708_544,
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "olmo-2-7b": 7_298_617_344,
    "olmo-3-7b": 7_298_011_136,
    "exaone-4.0-32b": 32_003_216_384,
}


def model_of(name: str) -> ModelSpec:
    return compose([f"models={name}"]).model


def parameters(model: ModelSpec) -> int:
    total = 0
    for role, _ in roles(model):
        if role == "lm_head" and model.tie_embeddings:
            continue
        count = 1
        for size in shape_of(model, role):
            count *= size
        total += count
    return total


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name: str) -> None:
    assert parameters(model_of(name)) == PARAMETERS[name]


def test_the_models_of_the_project() -> None:
    assert set(list_models()) >= {"zoo-demo", *PARAMETERS}


def test_published_settings() -> None:
    small, big, mistral = model_of("llama-3.2-1b"), model_of("llama-3.1-70b"), model_of("mistral-7b")
    assert small.tie_embeddings and small.rope.factor == 32 and small.max_positions == 131072 and small.head_dim == 64
    assert not big.tie_embeddings and (big.num_layers, big.num_heads, big.num_kv_heads) == (80, 64, 8)
    assert big.rope.kind == "llama3" and big.rope.original_max_positions == 8192 and big.rope.theta == 500000
    assert mistral.window == 4096 and mistral.window_of(31) == 4096 and not mistral.qkv_bias
    qwen2, qwen3, gpt2 = model_of("qwen2.5-7b"), model_of("qwen3-8b"), model_of("gpt2")
    assert qwen2.qkv_bias and not qwen2.out_bias and qwen2.norm_eps == 1e-6 and qwen2.rope.theta == 1e6
    assert qwen3.qk_norm == "head" and not qwen3.qkv_bias and qwen3.family == "qwen3"
    assert gpt2.norm == "layer" and gpt2.position == "learned" and gpt2.tensors.fused_qkv == "concat" and gpt2.tensors.conv1d


def test_the_demo_is_what_its_config_json_says() -> None:
    spec = compose([])
    folder = Path(spec.model.checkpoint)
    assert folder == conf_dir().parent / "checkpoints" / "zoo-demo"
    config = json.loads((folder / "config.json").read_text())
    model = spec.model
    ours = (model.vocab_size, model.hidden_size, model.num_layers, model.num_heads, model.num_kv_heads, model.intermediate_size)
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert ours == tuple(config[key] for key in keys)
    assert model.tie_embeddings == config["tie_word_embeddings"] and model.max_positions == config["max_position_embeddings"]


def test_hardware_has_published_numbers() -> None:
    specs = {spec.name: spec for spec in hardware_specs()}
    assert set(specs) >= {"cpu", "a100-80g", "l40s", "rtx-4090", "rtx-5090", "h100-sxm", "h200-sxm"}
    sms = {"a100-80g": 80, "l40s": 89, "rtx-4090": 89, "rtx-5090": 120, "h100-sxm": 90, "h200-sxm": 90}
    power = {"a100-80g": 400, "l40s": 350, "rtx-4090": 450, "rtx-5090": 575, "h100-sxm": 700, "h200-sxm": 700}
    for name, sm in sms.items():
        spec = specs[name]
        assert (spec.sm, spec.power) == (sm, power[name])
        assert spec.flops["bfloat16"] == spec.flops["float16"] > spec.flops["float32"] > 1e12
        assert 8e11 <= spec.bandwidth < 1e13 and 2e10 < spec.memory < 2e11
        assert 0 < spec.price < 20 and len(spec.price_date) == 7
        assert ("fp8" in spec.quants) == (sm >= 89) == ("float8e4m3" in spec.flops)
    assert specs["h200-sxm"].memory > specs["h100-sxm"].memory and specs["h200-sxm"].flops == specs["h100-sxm"].flops
    assert specs["cpu"].quants == ("none", "fp8") and specs["cpu"].dtypes == ("float32",)


@pytest.mark.parametrize(
    ("overrides", "profile", "dtype"),
    [
        ([], "none-cpu-onnxruntime-tp1", "float32"),
        (["quant=fp8"], "fp8-cpu-onnxruntime-tp1", "float32"),
        (["hardware=a100-80g"], "none-a100-80g-tensorrt_rtx-tp1", "bfloat16"),
        (["hardware=l40s", "quant=fp8"], "fp8-l40s-tensorrt_rtx-tp1", "bfloat16"),
        (["hardware=rtx-5090", "quant=fp8", "dtype=float16"], "fp8-rtx-5090-tensorrt_rtx-tp1", "float16"),
        (["hardware=l40s", "compiler=tensorrt"], "none-l40s-tensorrt-tp1", "bfloat16"),
        (["hardware=h200-sxm"], "none-h200-sxm-cuda-tp1", "bfloat16"),
        (["hardware=h200-sxm", "compiler=tensorrt"], "none-h200-sxm-tensorrt-tp1", "bfloat16"),
        (["hardware=l40s", "models=gpt2"], "none-l40s-tensorrt_rtx-tp1", "bfloat16"),
    ],
)
def test_compiler_and_dtype_are_chosen(overrides: list[str], profile: str, dtype: str) -> None:
    spec = compose(overrides)
    assert (spec.profile, spec.dtype) == (profile, dtype)
    assert isinstance(spec, BuildSpec) and spec.overrides == tuple(overrides)
    assert spec.limits.max_context == spec.model.max_positions
    assert spec.limits.max_rows == (1024 if spec.compiler == "cuda" else 16)
