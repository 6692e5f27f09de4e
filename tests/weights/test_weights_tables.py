"""Rotary tables against transformers' own rotary embeddings."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from zoo import ropetables
from zoo.errors import ArtifactError
from zoo.modelspec import RopeSpec
from zoo.weights.bind import TABLES, materialize
from zoo.weights.recipe import Recipe, Weight, computed
from zoo.weights.tables import rotary_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK = {"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.5, "factor": 40.0}
# name -> (rotary_dim, transformers' rope_parameters, ours)
CASES: dict[str, tuple[int, dict[str, Any], RopeSpec]] = {
    "default": (64, {"rope_type": "default", "rope_theta": 1e4}, RopeSpec()),
    "mistral": (128, {"rope_type": "default", "rope_theta": 1e6}, RopeSpec(theta=1e6)),
    "linear": (32, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, RopeSpec("linear", factor=4.0)),
    "llama 3.1": (
        128,
        {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192, **LLAMA3},
        RopeSpec("llama3", 5e5, original_max_positions=8192, **LLAMA3),
    ),
    "llama 3.2": (
        64,
        {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192, **LLAMA3, "factor": 32.0},
        RopeSpec("llama3", 5e5, original_max_positions=8192, **(LLAMA3 | {"factor": 32.0})),
    ),
    "llama3, short": (
        16,
        {"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 32, **LLAMA3, "low_freq_factor": 0.5},
        RopeSpec("llama3", original_max_positions=32, **(LLAMA3 | {"low_freq_factor": 0.5})),
    ),
    "yarn": (64, YARN, RopeSpec("yarn", factor=4.0, original_max_positions=64)),
    "yarn of gpt-oss": (
        64,
        YARN | {"rope_theta": 150000.0, "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
        RopeSpec("yarn", 150000.0, factor=32.0, truncate=False, original_max_positions=4096),
    ),
    "yarn of DeepSeek": (
        64,
        YARN | DEEPSEEK | {"original_max_position_embeddings": 4096},
        RopeSpec("yarn", factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.5),
    ),
    "yarn, sharp": (
        16,
        YARN | {"beta_fast": 3.0, "beta_slow": 2.5, "attention_factor": 0.75},
        RopeSpec("yarn", factor=4.0, original_max_positions=64, beta_fast=3.0, beta_slow=2.5, attention_factor=0.75),
    ),
    "yarn, no longer": (32, YARN | {"factor": 1.0}, RopeSpec("yarn", factor=1.0, original_max_positions=64)),
}


def table(kind: str, rope: RopeSpec, dim: int, context: int, spare: int = 0) -> np.ndarray:
    """A whole table, as a graph's weight is made, from a recipe that went through JSON."""
    rows, params = ropetables.params(rope, dim, context, context)
    recipe = Recipe.from_json(computed(kind, (rows + spare, dim // 2), **params).to_json())
    return materialize(Weight("t", "float32", recipe), None, {})


def reference(module: torch.nn.Module, dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [length, dim / 2] of one forward of so many tokens."""
    cos, sin = module(torch.zeros(1, length, dim), torch.arange(length)[None])
    return cos[0, :, : dim // 2].numpy(), sin[0, :, : dim // 2].numpy()


@pytest.mark.parametrize("name", CASES)
def test_equal_to_transformers(name: str) -> None:
    dim, theirs, ours = CASES[name]
    config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, head_dim=dim, rope_parameters=dict(theirs))
    module = LlamaRotaryEmbedding(config)
    params = ropetables.params(ours, dim, 300)[1]
    np.testing.assert_allclose(rotary_frequencies(params), module.inv_freq.numpy(), rtol=1e-6, atol=0)
    assert ropetables.attention_factor(ours) == pytest.approx(module.attention_scaling, rel=1e-12)
    for kind, expected in zip(("rope_cos", "rope_sin"), reference(module, dim, 300), strict=True):
        made = table(kind, ours, dim, 300)
        # an angle of 300 rad carries 300 ulp of its frequency: 300 * 6e-8, times yarn's factor of up to 1.35
        np.testing.assert_allclose(made, expected, rtol=0, atol=4e-5)
        np.testing.assert_allclose(made[:16], expected[:16], rtol=0, atol=3e-6)


def test_the_cases_of_yarn_differ() -> None:
    """Each option changes something, so that a table that forgets one of them would be found above."""
    plain = RopeSpec("yarn", factor=4.0, original_max_positions=4096)
    whole = table("rope_cos", plain, 64, 2000)
    changes = {"factor": 5.0, "original_max_positions": 2048, "beta_fast": 9.0, "beta_slow": 2.0, "truncate": False}
    for key, value in changes.items():
        assert np.abs(table("rope_cos", dataclasses.replace(plain, **{key: value}), 64, 2000) - whole).max() > 1e-2, key


def longrope(dim: int) -> tuple[dict[str, Any], RopeSpec]:
    short, long = [1.0 + 0.01 * i for i in range(dim // 2)], [2.0 + 0.5 * i for i in range(dim // 2)]
    theirs = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    ours = RopeSpec("longrope", factor=4.0, original_max_positions=32, short_factor=tuple(short), long_factor=tuple(long))
    return theirs, ours


def test_longrope_has_a_table_on_each_side_of_the_threshold() -> None:
    dim, (theirs, ours) = 16, longrope(16)
    config = Phi3Config(
        hidden_size=2 * dim,
        num_attention_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters=theirs,
        pad_token_id=0,
    )
    assert ropetables.tables(ours, 128) == (ropetables.Table(32, 0), ropetables.Table(128, 32))
    assert ropetables.attention_factor(ours) == pytest.approx(Phi3RotaryEmbedding(config).attention_scaling, rel=1e-12) != 1.0
    made = [table(kind, ours, dim, 128) for kind in ("rope_cos", "rope_sin")]
    assert made[0].shape == (160, 8)
    for length, first in ((1, 0), (31, 0), (32, 0), (33, 32), (100, 32), (128, 32)):
        for ours_, expected in zip(made, reference(Phi3RotaryEmbedding(config), dim, length), strict=True):
            np.testing.assert_allclose(ours_[first : first + length], expected, rtol=0, atol=4e-5)


def test_longrope_within_the_original_context_has_one_table() -> None:
    dim, (_, ours) = 16, longrope(16)
    assert ropetables.tables(ours, 128, 32) == ropetables.tables(ours, 32) == (ropetables.Table(32, 0),)
    short = table("rope_cos", ours, dim, 32)
    np.testing.assert_array_equal(short, table("rope_cos", ours, dim, 128)[:32])
    # a graph may want more rows for its steps than there are positions: the first ones stay what they are
    np.testing.assert_array_equal(table("rope_cos", ours, dim, 32, spare=500)[:32], short)
    np.testing.assert_array_equal(table("rope_cos", ours, dim, 128, spare=500)[:160], table("rope_cos", ours, dim, 128))


@pytest.mark.parametrize(("original", "context", "factor"), [(32, 128, 4.0), (32, 64, 2.0), (50, 70, 2.5), (48, 49, 8.0)])
def test_dynamic_has_tables_for_growing_lengths(original: int, context: int, factor: float) -> None:
    dim, ours = 16, RopeSpec("dynamic", factor=factor, original_max_positions=original)
    theirs = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": factor}
    config = LlamaConfig(
        hidden_size=2 * dim, num_attention_heads=2, head_dim=dim, max_position_embeddings=original, rope_parameters=theirs
    )
    made = ropetables.tables(ours, context)
    lengths = [one.length for one in made]
    assert lengths == sorted(set(lengths)) and (lengths[0], lengths[-1]) == (original, context)
    assert [one.first_row for one in made] == [sum(lengths[:place]) for place in range(len(made))]
    assert sum(lengths) <= 3 * context
    whole = [table(kind, ours, dim, context) for kind in ("rope_cos", "rope_sin")]
    for one in made:
        for mine, expected in zip(whole, reference(LlamaRotaryEmbedding(config), dim, one.length), strict=True):
            np.testing.assert_allclose(mine[one.first_row : one.first_row + one.length], expected, rtol=0, atol=4e-5)
    for mine, expected in zip(whole, reference(LlamaRotaryEmbedding(config), dim, original - 9), strict=True):
        np.testing.assert_allclose(mine[: original - 9], expected, rtol=0, atol=4e-5)
    if context > 2 * original:
        assert np.abs(whole[0][:original] - whole[0][made[-1].first_row :][:original]).max() > 0.1


@pytest.mark.parametrize(
    ("original", "context"), [(2048, 8192), (4096, 131072), (8192, 8193), (100, 101), (32768, 65536), (3, 7)]
)
def test_dynamic_tables_are_bounded(original: int, context: int) -> None:
    lengths = [one.length for one in ropetables.tables(RopeSpec("dynamic", factor=4.0, original_max_positions=original), context)]
    assert sum(lengths) <= 3 * context and len(lengths) <= 9 and lengths[-1] == context
    if context >= 2 * original and original > 1000:
        steps = [after / before for before, after in itertools.pairwise(lengths)]
        assert len(lengths) >= 4 and max(steps) < 1.01 * min(steps)


def test_kinds_without_lengths_have_one_table_and_only_their_numbers() -> None:
    rows, params = ropetables.params(RopeSpec(factor=7.0, beta_fast=2.0), 8, 100, 60)
    assert (rows, params) == (60, {"rotary_dim": 8, "kind": "default", "theta": 10000.0})
    for kind in ("default", "linear", "yarn", "llama3"):
        assert ropetables.tables(RopeSpec(kind, original_max_positions=10), 100, 60) == (ropetables.Table(60, 0),)


def test_a_table_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ArtifactError, match="does not fit rotary_dim 8"):
        TABLES["rope_cos"]((10, 8), {"rotary_dim": 8, "theta": 10000.0})
    with pytest.raises(ArtifactError, match="rotary kind 'fast' is not known; known are default, linear, dynamic, yarn"):
        TABLES["rope_cos"]((10, 4), {"rotary_dim": 8, "theta": 10000.0, "kind": "fast", "factor": 2.0})
    _, params = ropetables.params(longrope(16)[1], 16, 128)
    with pytest.raises(ArtifactError, match=r"does not fit rotary_dim 16 with tables for lengths 32, 128"):
        TABLES["rope_sin"]((159, 8), params)
    with pytest.raises(ArtifactError, match="3 factors for 8 frequencies"):
        TABLES["rope_sin"]((160, 8), params | {"short_factor": (1.0, 2.0, 3.0)})
