"""Gemma, Cohere, GLM, Nemotron, StableLM: scaled embeddings and logits, soft caps, other norms, partial rotation.

Caps and scales are small or large enough here that a graph without them would not pass: at the defaults (30, 50, 0.0625) random
weights hardly show them.
"""

from __future__ import annotations

from typing import Any

from zoo_cases import Case

FULL, SLIDING = "full_attention", "sliding_attention"


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


def rope(kind: str = "default", **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


GEMMA3_ROPE: dict[str, Any] = {
    "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
        SLIDING: {"rope_type": "default", "rope_theta": 500.0},
    }
}

GEMMA = {
    "gemma-plain": Case("gemma", sizes(64, 4, 1, 96, head_dim=24)),
    "gemma-biases-untied": Case(
        "gemma",
        sizes(
            48,
            6,
            6,
            64,
            head_dim=10,
            hidden_act="gelu",
            attention_bias=True,
            tie_word_embeddings=False,
            **rope("linear", factor=4.0),
        ),
    ),
    "gemma2-windows": Case(
        "gemma2",
        sizes(
            64,
            4,
            2,
            96,
            3,
            head_dim=24,
            query_pre_attn_scalar=17,
            sliding_window=9,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
        ),
    ),
    "gemma2-listed-no-caps": Case(
        "gemma2",
        sizes(
            48,
            6,
            1,
            64,
            3,
            head_dim=10,
            query_pre_attn_scalar=10,
            sliding_window=7,
            layer_types=[FULL, SLIDING, SLIDING],
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "gemma3-pattern": Case(
        "gemma3_text", sizes(64, 4, 1, 96, 7, head_dim=24, query_pre_attn_scalar=24, sliding_window=9)
    ),  # of seven layers the sixth is full
    "gemma3-scaled-capped": Case(
        "gemma3_text",
        sizes(
            60,
            6,
            3,
            64,
            3,
            head_dim=10,
            query_pre_attn_scalar=13,
            sliding_window=7,
            layer_types=[SLIDING, FULL, SLIDING],
            final_logit_softcapping=2.5,
            attention_bias=True,
            tie_word_embeddings=False,
            **GEMMA3_ROPE,
        ),
    ),
}

COHERE = {
    "cohere-plain": Case("cohere", sizes(64, 4, 4, 96, logit_scale=2.0)),
    "cohere-normed-heads": Case(
        "cohere", sizes(60, 6, 2, 64, logit_scale=0.6, use_qk_norm=True, attention_bias=True, tie_word_embeddings=False)
    ),
    "cohere2-pattern": Case("cohere2", sizes(64, 4, 1, 96, 5, logit_scale=1.5, sliding_window=9)),
    "cohere2-listed": Case(
        "cohere2",
        sizes(
            48,
            6,
            3,
            64,
            3,
            logit_scale=1.0,
            sliding_window=7,
            layer_types=[FULL, SLIDING, SLIDING],
            attention_bias=True,
            tie_word_embeddings=False,
            **rope("yarn", factor=4.0, original_max_position_embeddings=16),
        ),
    ),
}

GLM = {
    "glm-plain": Case("glm", sizes(64, 4, 2, 96, head_dim=16)),
    "glm-odd-tied": Case(
        "glm",
        sizes(
            48, 6, 1, 64, head_dim=20, attention_bias=False, tie_word_embeddings=True, **rope(partial_rotary_factor=0.4)
        ),  # 8 of 20 are rotated
    ),
    "glm4-plain": Case("glm4", sizes(64, 4, 2, 96, head_dim=16)),
    "glm4-odd-tied": Case(
        "glm4",
        sizes(
            60,
            3,
            3,
            70,
            head_dim=12,
            attention_bias=False,
            tie_word_embeddings=True,
            **rope("linear", factor=3.0, partial_rotary_factor=1.0),
        ),
    ),
}

NEMOTRON = {
    "nemotron-plain": Case("nemotron", sizes(64, 4, 2, 96)),
    "nemotron-biases-tied": Case(
        "nemotron",
        sizes(
            48,
            3,
            1,
            70,
            head_dim=20,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            **rope("linear", factor=2.0, partial_rotary_factor=0.4),
        ),
    ),
}

STABLELM = {
    "stablelm-plain": Case("stablelm", sizes(64, 4, 4, 96)),
    "stablelm-biases-tied": Case("stablelm", sizes(48, 3, 1, 64, use_qkv_bias=True, tie_word_embeddings=True)),
    "stablelm-parallel": Case("stablelm", sizes(64, 2, 2, 70, use_parallel_residual=True)),
    "stablelm-parallel-normed-heads": Case(
        "stablelm",
        sizes(60, 6, 2, 64, use_parallel_residual=True, qk_layernorm=True, **rope(partial_rotary_factor=0.4)),
    ),
}

CASES: dict[str, Case] = GEMMA | COHERE | GLM | NEMOTRON | STABLELM
