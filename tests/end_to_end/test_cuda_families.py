"""Families whose layers have parts that the first models for ``cuda`` had not, as its engines compute them on a stand-in GPU.

Scales of embeddings and logits, soft caps, norms on both sides, norms of heads that go through ``join_heads``, norms without
biases, squared ReLUs, rotation of neighbours and of a part of each head. float32 kernels in Triton's interpreter against
transformers' float32 logits, through prompts, chunks and captured decode steps.
"""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
import torch
import zoo_cases
from cuda_engines import Made, compile_engine, feed, open_engine, some_tokens
from cuda_on_cpu import Gpu, gpu_on_cpu

from zoo.checkpoints import Checkpoint
from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.names import fit_names
from zoo.config import compose_model
from zoo.spec import ModelSpec

NAMES = [
    "gemma2-windows",
    "gemma3-scaled-capped",
    "cohere-normed-heads",
    "cohere2-listed",
    "glm4-plain",
    "nemotron-biases-tied",
    "stablelm-parallel-normed-heads",
]


def spec_of(folder: Path) -> ModelSpec:
    return fit_names(compose_model(adopt(folder)).model, Checkpoint.open(folder).tensors)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo_cases.all_cases()[name]
    folder, model = zoo_cases.make_folder(tmp_path / name, case), zoo_cases.random_model(case)
    monkeypatch.setattr(families, "spec", spec_of)
    made = Made(tmp_path / "engine", compile_engine(tmp_path / "engine", folder, dtype="float32"), folder)
    gpu = Gpu()
    session = open_engine(made, gpu, blocks=48)
    tokens = some_tokens(folder)
    with gpu_on_cpu(gpu):
        found = feed(session, tokens)
    for sequence, ids in tokens.items():
        with torch.no_grad():
            expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        np.testing.assert_allclose(found[sequence], expected, rtol=0, atol=1e-4)
    assert gpu.replays > 0
