"""From YAML to tokens by the ``cuda`` target, on a stand-in GPU: greedy and sampled requests through the engine loop.

Steps are planned and submitted ahead of their tokens, prompts are computed in chunks while others decode, blocks change hands.
"""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
from cuda_engines import Traffic, opened
from cuda_on_cpu import Gpu, gpu_on_cpu

from zoo import LLM, SamplingParams
from zoo.artifacts.machine import Gpu as Card
from zoo.artifacts.machine import Machine
from zoo.artifacts.registry import Registry
from zoo.build import build
from zoo.checkpoints.adopt import adopt
from zoo.config import compose_model

CASES = ["llama-grouped", "qwen3-norms", "gpt2", "mistral-window"]
TOKENS = 6


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def greedy(**more: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuations_are_transformers(base: Path, case: str) -> None:
    made, gpu, session = opened(base, case, dtype="float32")
    llm = LLM.from_session(session, max_tokens=16, max_sequences=3, max_blocks=12)
    prompts = [families.prompt(made.checkpoint, length, length) for length in (3, 17, 30, 9)]
    before = gpu.replays
    outputs = llm.generate(prompts, greedy())
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == families.reference_greedy(made.checkpoint, prompt, TOKENS)
    assert gpu.replays > before


@pytest.mark.parametrize("case", ["llama-grouped"])
def test_fp8_greedy_tokens_are_within_the_measured_error(base: Path, case: str) -> None:
    """Each token is float32's own, or its logit as near to the largest as the logits' measured error explains."""
    made, _, session = opened(base, case, "fp8-kv")
    prompts = [families.prompt(made.checkpoint, length, length) for length in (5, 20, 11)]
    outputs = LLM.from_session(session).generate(prompts, greedy())
    texts = {
        str(place): ids + output.outputs[0].token_ids[:-1]
        for place, (ids, output) in enumerate(zip(prompts, outputs, strict=True))
    }
    want = np.concatenate([families.reference_logits(made.checkpoint, ids) for ids in texts.values()])
    error = np.abs(Traffic(session).step(texts) - want).max()
    assert error < 0.4 * np.abs(want).max()
    gaps = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        rows = families.reference_logits(made.checkpoint, prompt + tokens[:-1])[-TOKENS:]
        gaps += (rows.max(axis=1) - rows[np.arange(TOKENS), tokens]).tolist()
    assert max(gaps) <= 2 * error and gaps.count(0.0) >= len(gaps) // 2, gaps


def test_a_request_draws_the_same_tokens_whoever_is_beside_it(base: Path) -> None:
    """By seed and counter alone: in company, in another order, by itself; beside requests whose tokens the host chooses."""
    made, _, session = opened(base, "llama-grouped", dtype="float32")
    llm = LLM.from_session(session)
    kinds: list[dict[str, object]] = [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.1, "seed": 6, "top_k": 20, "top_p": 0.9},
        {"logprobs": 2},
        {"temperature": 0.7, "seed": 8, "min_p": 0.05, "logprobs": 0},
        {"temperature": 0.9, "seed": 9},
    ]
    params = [greedy(**kind) for kind in kinds]
    prompts = [families.prompt(made.checkpoint, 4 + place, place) for place in range(5)]
    prompts[4] = prompts[0]
    together = llm.generate(prompts, params)
    found = [output.outputs[0].token_ids for output in together]
    order = [3, 0, 4, 2, 1]
    again = llm.generate([prompts[place] for place in order], [params[place] for place in order])
    assert [output.outputs[0].token_ids for output in again] == [found[place] for place in order]
    for place in (1, 3):
        assert llm.generate([prompts[place]], [params[place]])[0].outputs[0].token_ids == found[place]
    assert found[0] != found[4], "another seed"
    assert found[2] == families.reference_greedy(made.checkpoint, prompts[2], TOKENS)
    for place in (2, 3):
        logits = families.reference_logits(made.checkpoint, prompts[place] + found[place][:-1])[-TOKENS:].astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        logprobs = together[place].outputs[0].logprobs
        assert logprobs is not None and together[0].outputs[0].logprobs is None
        for row, token, told in zip(exact, found[place], logprobs, strict=True):
            assert token in told and len(told) >= (2 if place == 2 else 1)
            assert all(value == pytest.approx(row[one], abs=1e-4) for one, value in told.items())


def test_from_a_checkpoint_to_text(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The road of ``zoo engines`` and ``LLM(REF)``, with real cubins: composed, compiled, stored, verified, chosen, opened."""
    folder = families.make_checkpoint(base, "llama", dtype="bfloat16", num_hidden_layers=1)
    limits = [f"limits.{name}={value}" for name, value in (("max_tokens", 64), ("max_sequences", 4), ("max_context", 48))]
    spec = compose_model(adopt(folder), ["quant=fp8-kv", "hardware=h100-sxm", "compiler=cuda", *limits])
    machine = Machine(2, 1 << 34, (Card("NVIDIA H100 80GB HBM3", 90, 85_520_809_984),))
    for module in ("zoo.llm", "zoo.artifacts.registry"):
        monkeypatch.setattr(f"{module}.describe_machine", lambda: machine)
    registry = Registry(tmp_path / "registry")
    entry = build(spec, registry).entry
    assert entry.profile == "fp8-kv-h100-sxm-cuda-tp1" and entry.manifest.compiler["name"] == "cuda"
    gpu = Gpu()
    with registry.open(entry.ref) as files:
        gpu.learn(files.folder / "plan.json")
    with gpu_on_cpu(gpu), LLM(entry.ref, registry=tmp_path / "registry", max_blocks=9) as llm:
        outputs = llm.generate(["def main(", "class A:"], greedy(max_tokens=4))
        assert all(len(output.outputs[0].token_ids) == 4 for output in outputs)
        assert outputs[0].outputs[0].text == llm.decode(outputs[0].outputs[0].token_ids)
        assert llm.limits.max_blocks == 9
    assert gpu.ran["decode"] > 0 and gpu.ran["quantize"] > 0 and gpu.live() == []
