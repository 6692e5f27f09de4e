"""Slopes of linear biases are those that BLOOM, Falcon and MPT have in transformers, for any number of heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt_tensor

from zoo.errors import ArtifactError
from zoo.weights.alibi import alibi_slopes
from zoo.weights.bind import materialize
from zoo.weights.recipe import Weight, computed

HEADS = [1, 2, 3, 5, 6, 7, 8, 12, 16, 20, 31, 32, 33, 40, 48, 64, 71, 112]
MASK = torch.ones(1, 2)


def slopes(heads: int, **params: Any) -> np.ndarray:
    return alibi_slopes((heads,), {"heads": heads, **params})


@pytest.mark.parametrize("heads", HEADS)
def test_bloom_and_falcon(heads: int) -> None:
    """The bias of position 1 beside that of position 0; Falcon's are bfloat16 there, so to 2 ** -8."""
    made = slopes(heads)
    assert made.dtype == np.float32 and (made > 0).all()
    np.testing.assert_allclose(made, bloom_tensor(MASK, heads, torch.float32)[:, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(made, falcon_tensor(MASK, heads, torch.float32)[:, 0, 1].float(), rtol=2**-8)


@pytest.mark.parametrize("bias_max", [8, 4, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_mpt(heads: int, bias_max: int) -> None:
    want = -mpt_tensor(heads, 2, alibi_bias_max=bias_max)[:, 0, 0]
    np.testing.assert_allclose(slopes(heads, rule="mpt", bias_max=bias_max), want, rtol=1e-6)


def test_a_weight_of_them() -> None:
    """As a recipe; ``factor`` multiplies."""
    recipe = computed("alibi_slopes", (12,), heads=12, rule="bloom", bias_max=8.0, factor=0.125)
    made = materialize(Weight("alibi.slopes", "float32", recipe), None, {})
    np.testing.assert_allclose(made, slopes(12) / 8, rtol=1e-7)


@pytest.mark.parametrize(
    ("shape", "params"),
    [
        ((4,), {"heads": 8}),
        ((8, 1), {"heads": 8}),
        ((0,), {"heads": 0}),
        ((8,), {"heads": 8, "rule": "opt"}),
        ((8,), {"heads": 8, "factor": 0.0}),
        ((8,), {"heads": 8, "factor": float("nan")}),
    ],
)
def test_what_makes_no_table(shape: tuple[int, ...], params: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"alibi slopes: .* do not make a table of the shape .*; rebuild the engine"):
        alibi_slopes(shape, params)
