"""Llama and its relatives. InternLM2 and Baichuan are not in transformers: their folders are Llama's, repacked.

Baichuan 13B's reference is transformers' Llama all the same: with every position 0 nothing rotates, and the linear biases, which
transformers makes for BLOOM, go into the attention mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from zoo_cases import Case, edit_config

FULL, SLIDING = "full_attention", "sliding_attention"
TENSORS = "model.safetensors"


def sizes(hidden: int, heads: int, kv_heads: int, wide: int, layers: int = 2, **others: Any) -> dict[str, Any]:
    """The numbers that every config has, and some others."""
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "max_position_embeddings": 128,
        **others,
    }


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


class BiasedLlamaConfig(transformers.LlamaConfig):
    model_type = "biased_llama"


class BiasedLlama(transformers.LlamaForCausalLM):
    """Llama with linear biases (ALiBi) instead of rotation."""

    config_class = BiasedLlamaConfig

    def forward(self, input_ids: torch.Tensor, **settings: Any) -> Any:
        length, heads = input_ids.shape[1], self.config.num_attention_heads
        biases = build_alibi_tensor(torch.ones(1, length), heads, torch.float32).view(1, heads, 1, length)
        hidden = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        return super().forward(input_ids, attention_mask=biases + hidden, position_ids=torch.zeros_like(input_ids), **settings)


transformers.AutoConfig.register("biased_llama", BiasedLlamaConfig)  # as transformers would have it in its own lists
transformers.AutoModelForCausalLM.register(BiasedLlamaConfig, BiasedLlama)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Replace a folder's tensors by what ``change`` makes of them; gives config.json as it was."""
    config = json.loads((folder / "config.json").read_text())
    made = change(safetensors.torch.load_file(folder / TENSORS), config)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in made.items()}, folder / TENSORS)
    return config


def renamed(tensors: dict[str, torch.Tensor], *pairs: tuple[str, str]) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        made[name] = tensor
    return made


def internlm2(folder: Path) -> None:
    """A Llama folder as InternLM2's: wqkv has, for each key/value head, its queries, its key, its value."""

    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
        kv, size = config["num_key_value_heads"], config["head_dim"]
        for layer in range(config["num_hidden_layers"]):
            for part in ("weight", "bias") if config["attention_bias"] else ("weight",):
                start = f"model.layers.{layer}.self_attn"
                q, k, v = (tensors.pop(f"{start}.{name}_proj.{part}").unflatten(0, (kv, -1)) for name in "qkv")
                assert k.shape[1] == v.shape[1] == size
                tensors[f"{start}.wqkv.{part}"] = torch.cat([q, k, v], 1).flatten(0, 1)
        return renamed(
            tensors,
            ("self_attn.o_proj", "attention.wo"),
            ("self_attn.wqkv", "attention.wqkv"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("model.embed_tokens", "model.tok_embeddings"),
            ("lm_head", "output"),
        )

    config = rewrite(folder, change)
    about = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": config["attention_bias"]}
    edit_config(folder, **about, attention_bias=None, mlp_bias=None, head_dim=None)


def baichuan(folder: Path) -> None:
    """A Llama folder as Baichuan's: W_pack has all queries, then all keys, then all values."""

    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
        for layer in range(config["num_hidden_layers"]):
            start = f"model.layers.{layer}.self_attn"
            tensors[f"{start}.W_pack.weight"] = torch.cat([tensors.pop(f"{start}.{name}_proj.weight") for name in "qkv"])
        return tensors

    rewrite(folder, change)
    gone = dict.fromkeys(("attention_bias", "mlp_bias", "head_dim", "num_key_value_heads"))
    edit_config(folder, architectures=["BaiChuanForCausalLM"], model_type="baichuan", **gone)


def baichuan13(folder: Path) -> None:
    baichuan(folder)
    gone = dict.fromkeys(("max_position_embeddings", "rope_parameters", "rope_theta"))
    edit_config(folder, architectures=["BaichuanForCausalLM"], model_max_length=128, **gone)


def internlm3(folder: Path) -> None:
    edit_config(folder, architectures=["InternLM3ForCausalLM"])


LLAMA = {
    "llama-plain": Case("llama", sizes(64, 4, 4, 96)),
    "llama-biases": Case("llama", sizes(48, 6, 2, 80, head_dim=10, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama-linear": Case("llama", sizes(60, 5, 1, 64, **rope("linear", factor=4.0))),
    "llama-dynamic": Case("llama", sizes(48, 3, 3, 64, **rope("dynamic", factor=4.0))),
    "llama-yarn": Case("llama", sizes(64, 4, 2, 96, **rope("yarn", factor=8.0, original_max_position_embeddings=16))),
    "llama-yarn-numbers": Case(
        "llama",
        sizes(
            64,
            2,
            2,
            96,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                attention_factor=1.25,
                beta_fast=8.0,
                beta_slow=0.5,
                truncate=False,
            ),
        ),
    ),
    "llama-llama3": Case(
        "llama",
        sizes(
            56,
            7,
            1,
            64,
            **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
        ),
    ),
    "mistral-window": Case("mistral", sizes(48, 4, 2, 96, head_dim=16, sliding_window=9)),
    "mistral-full": Case("mistral", sizes(60, 6, 1, 64, sliding_window=None, tie_word_embeddings=True)),
    "qwen2-tied": Case("qwen2", sizes(56, 7, 1, 64, tie_word_embeddings=True)),
    "qwen2-window": Case("qwen2", sizes(64, 4, 2, 64, 3, use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen2-yarn": Case("qwen2", sizes(48, 6, 3, 64, **rope("yarn", factor=4.0, original_max_position_embeddings=16))),
    "qwen3-plain": Case("qwen3", sizes(48, 6, 3, 64, head_dim=16)),
    "qwen3-biases": Case(
        "qwen3",
        sizes(
            64,
            4,
            1,
            96,
            3,
            head_dim=12,
            attention_bias=True,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=[SLIDING, FULL, SLIDING],
        ),
    ),
}

VARIANTS = {
    "smollm3-interval": Case("smollm3", sizes(64, 4, 2, 96, 3, no_rope_layer_interval=2)),
    "smollm3-listed": Case(
        "smollm3",
        sizes(
            48,
            6,
            1,
            64,
            3,
            no_rope_layers=[0, 1, 1],
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=[SLIDING, FULL, FULL],
        ),
    ),
    "granite-multipliers": Case(
        "granite",
        sizes(
            64,
            4,
            2,
            96,
            tie_word_embeddings=True,
            embedding_multiplier=3.0,
            attention_multiplier=0.4,
            residual_multiplier=0.6,
            logits_scaling=2.5,
        ),
    ),
    "granite-biases": Case(
        "granite", sizes(48, 6, 6, 64, attention_bias=True, mlp_bias=True, attention_multiplier=0.2, residual_multiplier=2.0)
    ),
    "seed-oss-wide": Case("seed_oss", sizes(48, 6, 2, 64, head_dim=16)),
    "seed-oss-biases": Case("seed_oss", sizes(64, 4, 1, 80, head_dim=None, attention_out_bias=True, mlp_bias=True)),
    "seed-oss-none": Case("seed_oss", sizes(64, 2, 2, 80, head_dim=24, attention_bias=False, tie_word_embeddings=True)),
    "arcee-plain": Case("arcee", sizes(64, 4, 2, 96)),
    "arcee-biases": Case("arcee", sizes(60, 5, 1, 64, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "ministral-all": Case("ministral", sizes(48, 6, 2, 64, head_dim=8, sliding_window=9)),
    "ministral-listed": Case(
        "ministral", sizes(64, 4, 4, 96, 3, head_dim=12, sliding_window=8, layer_types=[FULL, SLIDING, SLIDING])
    ),
    "cwm-pattern": Case(
        "cwm",
        sizes(
            48,
            6,
            2,
            64,
            5,
            head_dim=16,
            sliding_window=9,
            **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
        ),
    ),
    "cwm-listed": Case("cwm", sizes(64, 4, 1, 96, head_dim=12, sliding_window=8, layer_types=[SLIDING, FULL], mlp_bias=True)),
    "internlm3-plain": Case("internlm3", sizes(48, 6, 2, 64, head_dim=16), internlm3),
    "internlm3-biases": Case("internlm3", sizes(64, 4, 1, 96, attention_bias=True, mlp_bias=True, head_dim=None), internlm3),
    "ernie4_5-interleaved": Case("ernie4_5", sizes(48, 6, 2, 64, head_dim=16)),
    "ernie4_5-biases": Case("ernie4_5", sizes(64, 4, 1, 80, head_dim=None, use_bias=True, tie_word_embeddings=False)),
    "hyperclovax-multipliers": Case(
        "hyperclovax",
        sizes(
            48,
            6,
            2,
            64,
            head_dim=16,
            embedding_multiplier=3.0,
            attention_multiplier=0.4,
            residual_multiplier=0.6,
            logits_scaling=0.5,
        ),
    ),
    "hyperclovax-one-norm": Case(
        "hyperclovax",
        sizes(64, 4, 1, 80, use_post_norm=False, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
}

FUSED = {
    "phi3-window": Case("phi3", sizes(48, 6, 6, 64, sliding_window=9)),
    "phi3-short": Case(
        "phi3",
        sizes(
            64,
            4,
            2,
            96,
            original_max_position_embeddings=100,
            **rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0], long_factor=[9.0] * 8),
        ),
    ),
    "phi3-long": Case(
        "phi3",
        sizes(
            48,
            3,
            1,
            64,
            original_max_position_embeddings=16,
            **rope("longrope", short_factor=[1.0] * 8, long_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0]),
        ),
    ),
    "phi3-partial": Case(
        "phi3",
        sizes(
            64,
            4,
            1,
            96,
            original_max_position_embeddings=16,
            sliding_window=200,
            tie_word_embeddings=True,
            **rope("longrope", partial_rotary_factor=0.75, short_factor=[1.0] * 6, long_factor=[1.0, 1.2, 1.5, 2.0, 3.0, 5.0]),
        ),
    ),
    "internlm2-grouped": Case("llama", sizes(48, 6, 2, 64), internlm2),
    "internlm2-bias": Case("llama", sizes(60, 5, 1, 64, attention_bias=True), internlm2),
    "internlm2-dynamic": Case("llama", sizes(64, 4, 4, 64, tie_word_embeddings=True, **rope("dynamic", factor=2.0)), internlm2),
    "baichuan-7b": Case("llama", sizes(56, 7, 7, 64), baichuan),
    "baichuan-7b-tied": Case("llama", sizes(64, 2, 2, 96, tie_word_embeddings=True), baichuan),
    "baichuan-13b": Case("biased_llama", sizes(48, 6, 6, 64), baichuan13),
    "baichuan-13b-power": Case("biased_llama", sizes(64, 4, 4, 96, tie_word_embeddings=True), baichuan13),
}

AFTER = {
    "olmo2-plain": Case("olmo2", sizes(64, 4, 4, 96)),
    "olmo2-biases": Case("olmo2", sizes(48, 6, 2, 64, attention_bias=True, tie_word_embeddings=True)),
    "olmo3-yarn": Case(
        "olmo3",
        sizes(
            48,
            6,
            3,
            64,
            3,
            sliding_window=9,
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters={
                FULL: {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16},
                SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
    ),
    "olmo3-pattern": Case("olmo3", sizes(64, 4, 1, 64, 4, sliding_window=8, attention_bias=True, tie_word_embeddings=True)),
    "exaone4-pattern": Case("exaone4", sizes(48, 6, 2, 64, 4, sliding_window=9)),
    "exaone4-full": Case(
        "exaone4", sizes(64, 4, 1, 96, head_dim=12, sliding_window=None, layer_types=[FULL, FULL], tie_word_embeddings=True)
    ),
}

CASES: dict[str, Case] = LLAMA | VARIANTS | FUSED | AFTER
