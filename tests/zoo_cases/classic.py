"""Decoders of 2019 to 2023 and what kept their ways: learned positions, ALiBi, fused projections, plain MLPs, parallel blocks.

What transformers does not do as the models were trained, and how it is the judge all the same:
    Falcon's eager attention adds ALiBi twice, so its sdpa is asked; it rounds the biases to bfloat16, which changes nothing for
    eight heads and fewer
    MPT's alibi_bias_max is not read: tests/checkpoints/test_checkpoint_classic.py has it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo_cases import Case, edit_config

GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPTJ: dict[str, Any] = GPT2 | {"rotary_dim": 8}
GPTJ_ODD: dict[str, Any] = GPT2 | {"n_embd": 60, "n_head": 3, "n_inner": 70, "rotary_dim": 20}
NEOX: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
STARCODER2: dict[str, Any] = NEOX | {"num_key_value_heads": 2}
OPT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 80,
    "max_position_embeddings": 128,
}
BLOOM: dict[str, Any] = {"hidden_size": 64, "n_layer": 2, "n_head": 8}
MPT: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 8, "max_seq_len": 128}
NEO: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": 128,
    "window_size": 7,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
}
FALCON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FALCON_RW: dict[str, Any] = FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
FALCON_ODD: dict[str, Any] = FALCON_RW | {"hidden_size": 60, "num_attention_heads": 6, "bias": False}
FALCON_NEW: dict[str, Any] = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}


def as_published(folder: Path) -> None:
    """MPT's checkpoints came before transformers had the architecture, with a name of their own for it."""
    edit_config(folder, architectures=["MPTForCausalLM"])


CASES: dict[str, Case] = {
    "gpt2-plain": Case("gpt2", GPT2),
    "gpt2-odd": Case("gpt2", {**GPT2, "n_embd": 60, "n_head": 3, "n_inner": 50, "n_layer": 3, "activation_function": "gelu"}),
    "gpt2-untied-unscaled": Case("gpt2", GPT2 | {"tie_word_embeddings": False, "scale_attn_weights": False}),
    "gpt_bigcode-multi-query": Case("gpt_bigcode", GPT2),
    "gpt_bigcode-all-heads": Case("gpt_bigcode", GPT2 | {"n_embd": 54, "n_head": 3, "n_inner": 70, "multi_query": False}),
    "gpt_bigcode-untied-unscaled": Case("gpt_bigcode", GPT2 | {"tie_word_embeddings": False, "scale_attn_weights": False}),
    "starcoder2-window": Case("starcoder2", STARCODER2 | {"sliding_window": 9}),
    "starcoder2-one-kv-head": Case(
        "starcoder2",
        STARCODER2
        | {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "use_bias": False,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 999999.4420358813},
        },
    ),
    "starcoder2-yarn": Case(
        "starcoder2",
        STARCODER2
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "gptj-plain": Case("gptj", GPTJ),
    "gptj-odd-tied": Case("gptj", GPTJ_ODD | {"tie_word_embeddings": True}),
    "gptj-codegen": Case("codegen", GPTJ | {"n_head": 8, "rotary_dim": 6}),
    "gptj-codegen-odd": Case("codegen", GPTJ | {"n_embd": 48, "n_head": 12, "n_inner": 70, "rotary_dim": 4}),
    "gpt_neox-parallel": Case("gpt_neox", NEOX | {"rotary_pct": 0.25}),
    "gpt_neox-sequential": Case("gpt_neox", NEOX | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0}),
    "gpt_neox-odd-tied": Case(
        "gpt_neox",
        NEOX
        | {
            "hidden_size": 60,
            "num_attention_heads": 3,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_fast",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 25000.0, "factor": 3.0, "partial_rotary_factor": 0.4},
        },
    ),
    "gpt_neo-windows": Case("gpt_neo", NEO),
    "gpt_neo-odd": Case(
        "gpt_neo",
        NEO | {"hidden_size": 54, "num_heads": 3, "intermediate_size": 70, "num_layers": 2, "attention_types": [[["local"], 2]]},
    ),
    "gpt_neo-no-window": Case("gpt_neo", NEO | {"attention_types": [[["global"], 3]], "tie_word_embeddings": False}),
    "opt-plain": Case("opt", OPT),
    "opt-norm-behind": Case("opt", OPT | {"do_layer_norm_before": False, "num_attention_heads": 3, "hidden_size": 54}),
    "opt-no-bias-untied": Case("opt", OPT | {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "bloom-plain": Case("bloom", BLOOM),
    "bloom-odd": Case("bloom", BLOOM | {"hidden_size": 60, "n_head": 5, "n_layer": 3}),
    "bloom-many-heads": Case("bloom", BLOOM | {"n_head": 16, "tie_word_embeddings": False}),
    "mpt-plain": Case("mpt", MPT),
    "mpt-as-published": Case("mpt", MPT | {"n_heads": 4}, repack=as_published),
    "mpt-odd-clipped": Case(
        "mpt",
        MPT
        | {
            "d_model": 60,
            "n_heads": 6,
            "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.4},
            "tie_word_embeddings": False,
        },
    ),
    "falcon-multi-query": Case("falcon", FALCON),
    "falcon-sequential": Case(
        "falcon",
        FALCON
        | {
            "hidden_size": 60,
            "num_attention_heads": 3,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "ffn_hidden_size": 70,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "falcon-new-decoder": Case("falcon", FALCON_NEW),
    "falcon-new-decoder-one-norm": Case(
        "falcon", FALCON_NEW | {"num_ln_in_parallel_attn": 1, "num_kv_heads": 1, "bias": True, "tie_word_embeddings": False}
    ),
    "falcon-alibi": Case("falcon", FALCON_RW, attention="sdpa"),
    "falcon-alibi-odd": Case("falcon", FALCON_ODD | {"parallel_attn": True}, attention="sdpa"),
    "phi-plain": Case("phi", NEOX | {"partial_rotary_factor": 0.5}),
    "phi-grouped": Case(
        "phi",
        NEOX
        | {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.4,
        },
    ),
}
