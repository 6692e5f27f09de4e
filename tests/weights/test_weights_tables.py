"""Rotary tables against transformers' own frequency functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from zoo.errors import ArtifactError
from zoo.weights.bind import TABLES, materialize
from zoo.weights.recipe import Weight, computed
from zoo.weights.tables import rotary_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "default": (64, {"rope_type": "default", "rope_theta": 10000.0}, {"kind": "default", "theta": 10000.0}),
    "mistral": (128, {"rope_type": "default", "rope_theta": 1e6}, {"kind": "default", "theta": 1e6}),
    "linear": (
        32,
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"kind": "linear", "theta": 1e4, "factor": 4.0},
    ),
    "llama 3.1": (
        128,
        {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192, **LLAMA3},
        {"kind": "llama3", "theta": 5e5, "original_max_positions": 8192, **LLAMA3},
    ),
    "llama 3.2": (
        64,
        {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192, **LLAMA3, "factor": 32.0},
        {"kind": "llama3", "theta": 5e5, "original_max_positions": 8192, **LLAMA3, "factor": 32.0},
    ),
    "llama3, short": (
        16,
        {"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 32, **LLAMA3, "low_freq_factor": 0.5},
        {"kind": "llama3", "theta": 1e4, "original_max_positions": 32, **LLAMA3, "low_freq_factor": 0.5},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_transformers(name: str) -> None:
    dim, theirs, ours = CASES[name]
    config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, head_dim=dim, rope_parameters=theirs)
    module = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(rotary_frequencies({"rotary_dim": dim, **ours}), module.inv_freq.numpy(), rtol=1e-6, atol=0)
    positions = torch.arange(300)[None]
    cos, sin = module(torch.zeros(1, 300, dim), positions)
    for table, reference in (("rope_cos", cos), ("rope_sin", sin)):
        made = materialize(Weight("t", "float32", computed(table, (300, dim // 2), rotary_dim=dim, **ours)), None, {})
        # an angle of 300 rad carries 300 ulp of its frequency: 300 * 6e-8
        np.testing.assert_allclose(made, reference[0, :, : dim // 2].numpy(), rtol=0, atol=4e-5)
        np.testing.assert_allclose(made[:16], reference[0, :16, : dim // 2].numpy(), rtol=0, atol=2e-6)


def test_a_table_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ArtifactError, match="does not fit rotary_dim 8"):
        TABLES["rope_cos"]((10, 8), {"rotary_dim": 8, "theta": 10000.0})
    with pytest.raises(ArtifactError, match="rotary kind 'yarn'"):
        TABLES["rope_cos"]((10, 4), {"rotary_dim": 8, "theta": 10000.0, "kind": "yarn", "factor": 2.0})
