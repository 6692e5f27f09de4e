"""Mixture-of-experts blocks of transformers with random weights, and the ModelSpec and checkpoint of one layer for each."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.numpy import save_file

from zoo.graph import ModelGraph
from zoo.graph_templates.builder import Builder
from zoo.graph_templates.moe import moe
from zoo.modelspec import ModelSpec, MoeSpec, TensorNames
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors

E, F, X = 24, 20, 8
SIZES = {"hidden_size": E, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
DEEPSEEK = {"moe_intermediate_size": F, "n_shared_experts": 2, "n_routed_experts": X, "num_experts_per_tok": 3}


@dataclass(frozen=True)
class Case:
    """A block: where transformers has it, its config, and what MoeSpec says of it."""

    module: str  # in transformers.models
    config_class: str
    block: str
    config: Mapping[str, Any]
    moe: MoeSpec
    activation: str = "silu"


CASES: dict[str, Case] = {
    "mixtral": Case(
        "mixtral",
        "MixtralConfig",
        "MixtralSparseMoeBlock",
        {"intermediate_size": F, "num_local_experts": X, "num_experts_per_tok": 2},
        MoeSpec(X, 2, F),
    ),
    "qwen2_moe": Case(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeSparseMoeBlock",
        {
            "moe_intermediate_size": F,
            "num_experts": X,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 28,
            "norm_topk_prob": False,
        },
        MoeSpec(X, 3, F, normalize=False, shared=28, shared_gate=True),
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeSparseMoeBlock",
        {"moe_intermediate_size": F, "num_experts": X, "num_experts_per_tok": 4, "norm_topk_prob": True},
        MoeSpec(X, 4, F),
    ),
    "olmoe": Case(
        "olmoe",
        "OlmoeConfig",
        "OlmoeSparseMoeBlock",
        {"intermediate_size": F, "num_experts": X, "num_experts_per_tok": 2, "norm_topk_prob": False},
        MoeSpec(X, 2, F, normalize=False),
    ),
    "granitemoe": Case(
        "granitemoe",
        "GraniteMoeConfig",
        "GraniteMoeMoE",
        {"intermediate_size": F, "num_local_experts": X, "num_experts_per_tok": 2},
        MoeSpec(X, 2, F),
    ),
    "deepseek_v2": Case(
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2Moe",
        DEEPSEEK | {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7},
        MoeSpec(X, 3, F, normalize=False, groups=4, top_groups=2, scale=1.7, shared=2 * F),
    ),
    "deepseek_v2_greedy": Case(
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2Moe",
        DEEPSEEK | {"n_group": None, "topk_group": None, "topk_method": "greedy", "routed_scaling_factor": 1.0},
        MoeSpec(X, 3, F, normalize=False, shared=2 * F),
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3MoE",
        DEEPSEEK | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        MoeSpec(X, 3, F, "sigmoid", True, select_bias=True, groups=4, top_groups=2, group_score="top2", scale=2.5, shared=2 * F),
    ),
    "gpt_oss": Case(
        "gpt_oss",
        "GptOssConfig",
        "GptOssMLP",
        {"intermediate_size": F, "num_local_experts": X, "num_experts_per_tok": 4},
        MoeSpec(X, 4, F, router_bias=True, expert_bias=True),
        "swiglu_clamped",
    ),
}
# role -> the end of its parameter's name, in all blocks
ENDS = {
    "router": ("gate.weight", "router.weight"),
    "router.bias": ("router.bias",),
    "select_bias": ("gate.e_score_correction_bias",),
    "experts.gate_up": ("experts.gate_up_proj",),
    "experts.gate_up.bias": ("experts.gate_up_proj_bias",),
    "experts.down": ("experts.down_proj",),
    "experts.down.bias": ("experts.down_proj_bias",),
    "shared_gate": ("shared_expert_gate.weight",),
    **{
        f"shared.{part}": (f"shared_expert.{part}_proj.weight", f"shared_experts.{part}_proj.weight")
        for part in ("gate", "up", "down")
    },
}


@functools.cache
def block(name: str) -> torch.nn.Module:
    """A block with every parameter and buffer random, in float32; its experts one after the other, as its own code has them."""
    case = CASES[name]
    config = getattr(importlib.import_module(f"transformers.models.{case.module}"), case.config_class)(**SIZES, **case.config)
    config._experts_implementation = "eager"
    code = importlib.import_module(f"transformers.models.{case.module}.modeling_{case.module}")
    made = getattr(code, case.block)(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for one in (*made.parameters(), *made.buffers()):
            noise = torch.randn(one.shape, generator=generator)
            one.copy_(noise / math.sqrt(one.shape[-1]) if one.ndim > 1 else 0.3 * noise)
    return made


def reference(name: str, x: np.ndarray) -> np.ndarray:
    """What transformers' block gives."""
    with torch.no_grad():
        y = block(name)(torch.from_numpy(x))
    return (y[0] if isinstance(y, tuple) else y).numpy()


def spec(name: str) -> ModelSpec:
    """One layer of nothing but this block."""
    case, known = CASES[name], block(name).state_dict()
    names = {role: next((end for end in ends if end in known), "") for role, ends in ENDS.items()}
    tensors = TensorNames(
        layer={role: found for role, found in names.items() if found},
        fused_experts="interleaved" if name == "gpt_oss" else "concat",
        stacked_experts=True,
        conv1d_experts=name == "gpt_oss",
    )
    return ModelSpec(name, "moe", 32, E, 1, 2, 2, 12, 16, 64, activation=case.activation, moe=case.moe, tensors=tensors)


def checkpoint(name: str, folder: Path) -> Tensors:
    """The block's parameters as a checkpoint."""
    save_file({key: value.contiguous().numpy() for key, value in block(name).state_dict().items()}, folder / "model.safetensors")
    return Tensors.open(folder)


def plain_graph(model: ModelSpec, dtype: str = "float32") -> ModelGraph:
    """x [B, S, E] -> y [B, S, E]."""
    b = Builder(model, dtype)
    x = b.input("x", dtype, ("batch", "sequence", model.hidden_size))
    b.output(moe(b, 0, x), "y")
    return b.out


def run(graph: ModelGraph, weights: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The graph in ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x} | {name: weights[name] for name in graph.weights})
    return y


def weights_of(graph: ModelGraph, tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: materialize(weight, tensors, {}) for name, weight in graph.weights.items()}


def inputs(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, length, E), np.float32)
