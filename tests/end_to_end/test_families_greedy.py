"""YAML to tokens against transformers: every family's random checkpoints through `zoo add`'s road, the registry and the LLM.

The engine is the shipped one: rewritten, lowered, stored, verified, bound. Requests of different lengths run together with a
small token budget, so that prompts are computed in chunks while others decode.
"""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest

from zoo import LLM, SamplingParams

TOKENS = 32
LENGTHS = (3, 17, 40)


@pytest.mark.parametrize("case", ["llama-grouped", "mistral-window", "qwen3-tied-wide", "gpt2-odd"])  # test_zoo.py has all
def test_greedy_continuations_equal_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = families.CASES[case]
    folder = families.make_checkpoint(tmp_path, family, **overrides)
    prompts = [families.prompt(folder, length, seed=length) for length in LENGTHS]
    with LLM(folder, registry=tmp_path / "registry", threads=1, max_tokens=16, max_sequences=3) as llm:
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=3)
        outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = families.reference_greedy(folder, prompt, TOKENS)
        found = output.outputs[0]
        assert found.token_ids == expected
        logits = families.reference_logits(folder, prompt + expected[:-1])[-TOKENS:].astype(np.float64)
        reference = (
            logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
        )
        for row, entry in zip(reference, found.logprobs or [], strict=True):
            for token, value in entry.items():
                assert value == pytest.approx(row[token], abs=1e-4)
