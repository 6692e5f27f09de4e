"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, Granite-MoE, DeepSeek-V2 and V3, gpt-oss.

Latent norms of DeepSeek have an epsilon of their own, and clips, multipliers, windows and rotary scaling are such that a graph
without them would not pass.
"""

from __future__ import annotations

from typing import Any

from zoo_cases import Case
from zoo_cases.scaled import FULL, SLIDING, rope, sizes


def yarn(factor: float, original: int, **numbers: Any) -> dict[str, Any]:
    return rope("yarn", factor=factor, original_max_position_embeddings=original, **numbers)


MIXTRAL = {
    "mixtral-plain": Case("mixtral", sizes(64, 4, 2, 48, num_local_experts=4, num_experts_per_tok=2)),
    "mixtral-windowed-one-of-five": Case(
        "mixtral",
        sizes(
            48,
            6,
            1,
            40,
            head_dim=10,
            num_local_experts=5,
            num_experts_per_tok=1,
            sliding_window=9,
            tie_word_embeddings=True,
            **rope("linear", factor=2.0),
        ),
    ),
}

QWEN2 = {
    "qwen2moe-plain": Case(
        "qwen2_moe",
        sizes(64, 4, 4, 96, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=6, num_experts_per_tok=2),
    ),
    "qwen2moe-dense-layers-windowed": Case(
        "qwen2_moe",
        sizes(
            48,
            6,
            2,
            64,
            4,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=36,
            num_experts=5,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            mlp_only_layers=[3],  # of four layers only the second has experts
            qkv_bias=False,
            use_sliding_window=True,
            sliding_window=7,
            layer_types=[SLIDING, FULL, SLIDING, FULL],
            tie_word_embeddings=True,
        ),
    ),
}

QWEN3 = {
    "qwen3moe-plain": Case(
        "qwen3_moe",
        sizes(64, 4, 2, 96, head_dim=24, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True),
    ),
    "qwen3moe-biases-windowed": Case(
        "qwen3_moe",
        sizes(
            60,
            6,
            1,
            64,
            3,
            moe_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            mlp_only_layers=[1],
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=9,
            tie_word_embeddings=True,
            **yarn(4.0, 16),
        ),
    ),
}

OLMOE = {
    "olmoe-plain": Case("olmoe", sizes(64, 4, 4, 24, num_experts=8, num_experts_per_tok=3)),
    "olmoe-clipped-biases": Case(
        "olmoe",
        sizes(
            60,
            6,
            2,
            32,
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            clip_qkv=0.8,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
}

GRANITE = {
    "granitemoe-multipliers": Case(
        "granitemoe",
        sizes(
            64,
            4,
            2,
            24,
            num_local_experts=6,
            num_experts_per_tok=3,
            embedding_multiplier=3.0,
            attention_multiplier=0.4,
            residual_multiplier=0.6,
            logits_scaling=2.0,
            tie_word_embeddings=True,
        ),
    ),
    "granitemoe-biases": Case("granitemoe", sizes(60, 6, 6, 40, num_local_experts=3, num_experts_per_tok=1, attention_bias=True)),
    "granitemoe-shared": Case(
        "granitemoeshared",
        sizes(
            48,
            6,
            1,
            32,
            num_local_experts=5,
            num_experts_per_tok=2,
            shared_intermediate_size=20,
            embedding_multiplier=2.0,
            attention_multiplier=0.3,
            residual_multiplier=0.7,
            logits_scaling=1.5,
            tie_word_embeddings=True,
        ),
    ),
    "granitemoe-shared-of-none": Case("granitemoeshared", sizes(64, 4, 4, 24, num_local_experts=4, num_experts_per_tok=2)),
}


def deepseek(hidden: int, heads: int, wide: int, layers: int = 2, **others: Any) -> dict[str, Any]:
    """Sizes of a DeepSeek, with an rms_norm_eps that its latent norms do not have."""
    return sizes(hidden, heads, heads, wide, layers, rms_norm_eps=1e-2, **others)


DEEPSEEK2 = {
    "deepseek2-low-rank-groups": Case(
        "deepseek_v2",
        deepseek(
            64,
            4,
            96,
            q_lora_rank=24,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=1,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        ),
    ),
    "deepseek2-greedy-yarn": Case(
        "deepseek_v2",
        deepseek(
            60,
            6,
            64,
            3,
            q_lora_rank=None,
            kv_lora_rank=20,
            qk_nope_head_dim=10,
            qk_rope_head_dim=12,
            v_head_dim=18,
            n_routed_experts=5,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            n_group=5,
            topk_group=1,  # which greedy does not read
            tie_word_embeddings=True,
            **yarn(4.0, 16, mscale=0.5, mscale_all_dim=0.9),
        ),
    ),
}

DEEPSEEK3 = {
    "deepseek3-groups-yarn": Case(
        "deepseek_v3",
        deepseek(
            64,
            4,
            96,
            3,
            q_lora_rank=24,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=1,
            n_routed_experts=12,
            n_shared_experts=1,
            num_experts_per_tok=4,
            moe_intermediate_size=24,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
            **yarn(8.0, 16, mscale=1.0, mscale_all_dim=1.0),
        ),
    ),
    "deepseek3-one-group-halves": Case(
        "deepseek_v3",
        deepseek(
            48,
            3,
            64,
            q_lora_rank=None,
            kv_lora_rank=28,
            qk_nope_head_dim=12,
            qk_rope_head_dim=6,
            v_head_dim=10,
            first_k_dense_replace=0,
            n_routed_experts=6,
            n_shared_experts=2,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            rope_interleave=False,
            num_nextn_predict_layers=0,
            tie_word_embeddings=True,
        ),
    ),
}

GPT_OSS = {
    "gptoss-yarn": Case(
        "gpt_oss",
        sizes(
            64,
            4,
            2,
            48,
            head_dim=16,
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=9,
            **yarn(2.0, 64, rope_theta=50.0, truncate=False, beta_fast=4.0, beta_slow=1.0),
        ),
    ),
    "gptoss-listed-no-biases": Case(
        "gpt_oss",
        sizes(
            60,
            6,
            1,
            40,
            3,
            head_dim=20,
            num_local_experts=5,
            num_experts_per_tok=3,
            sliding_window=7,
            layer_types=[FULL, SLIDING, SLIDING],
            attention_bias=False,
            tie_word_embeddings=True,
            **rope(),
        ),
    ),
}

CASES: dict[str, Case] = MIXTRAL | QWEN2 | QWEN3 | OLMOE | GRANITE | DEEPSEEK2 | DEEPSEEK3 | GPT_OSS
