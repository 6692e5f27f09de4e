"""Steps with more tokens than one sequence may have: many short prompts prefill together on an engine of a small context."""

from __future__ import annotations

from pathlib import Path

import families
import pytest

from zoo import LLM, SamplingParams


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_may_hold_more_tokens_than_the_context(tmp_path: Path, family: str) -> None:
    folder = families.make_checkpoint(tmp_path, family)
    prompts = [families.prompt(folder, length, seed=length) for length in (20, 23, 17, 22, 21)]
    with LLM(folder, registry=tmp_path / "registry", threads=1, max_context=32, max_tokens=256) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    assert [output.outputs[0].token_ids for output in outputs] == [
        families.reference_greedy(folder, prompt, 8) for prompt in prompts
    ]
