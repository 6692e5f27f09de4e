"""Every architecture of the zoo against transformers, on the public road: a folder, ``zoo add``, the plain graph, the engine.

Each case runs the plain graph on a prompt past its thresholds (1e-4 on float32 logits), then the engine on a mixed batch of three
prompts whose greedy continuations over 32 tokens must be transformers'. Where transformers' own two best logits are
closer than twice the largest error that was measured, either may come first and the comparison of that prompt ends.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import transformers
import zoo_cases

from zoo import LLM, SamplingParams
from zoo.checkpoints import Checkpoint
from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.names import fit_names
from zoo.config import compose_model
from zoo.graph_templates import expand
from zoo.ropetables import tables
from zoo.spec import ModelSpec

CASES = zoo_cases.all_cases()
TOKENS = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@cache
def made(root: Path, name: str) -> tuple[Path, transformers.PreTrainedModel]:
    """A case's folder and its reference, which is the model that was saved: a repacked folder has no other."""
    folder = zoo_cases.make_folder(root / name, CASES[name])
    return folder, zoo_cases.random_model(CASES[name])


def reference_logits(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def spec_of(folder: Path) -> ModelSpec:
    return fit_names(compose_model(adopt(folder)).model, Checkpoint.open(folder).tensors)


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


@pytest.mark.parametrize("name", CASES)
def test_plain_graph_equals_transformers(root: Path, name: str, record_property) -> None:
    folder, model = made(root, name)
    zoo_cases.about(folder, record_property)
    ids = tokens(CASES[name].past, 1)
    expected = reference_logits(model, ids)
    assert 0.5 < np.abs(expected).max() < 200, "logits of a size that an error would show in"
    spec = spec_of(folder)
    plain = families.Plain(expand(spec, "float32"), Checkpoint.open(folder).tensors)
    row = next(table.first_row for table in tables(spec.rope, spec.max_positions) if table.length >= len(ids))
    np.testing.assert_allclose(plain.logits([ids], row)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_engine_continues_as_transformers(root: Path, name: str, record_property, tmp_path: Path) -> None:
    folder, model = made(root, name)
    zoo_cases.about(folder, record_property)
    prompts = [tokens(length, length) for length in (3, 17, CASES[name].past)]
    with LLM(folder, registry=tmp_path / "registry", threads=1, max_tokens=16, max_sequences=3) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=0))
    compared = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        found = output.outputs[0].token_ids
        assert len(found) == TOKENS
        expected = reference_logits(model, prompt + found)[len(prompt) - 1 : -1]
        for step, token in enumerate(found):
            best = np.sort(expected[step])[-2:]
            if best[1] - best[0] < 2e-4:
                break  # too close to call at the tolerance of the logits
            assert token == int(expected[step].argmax()), f"{name}: token {step} behind {len(prompt)} tokens"
            compared += 1
    assert compared >= 2 * TOKENS, "ties ended the comparison too early to mean anything"
