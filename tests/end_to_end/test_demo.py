"""The demo model, as shipped: the checkpoint in the repository, its YAML, its engine; judged by transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from zoo import LLM, SamplingParams
from zoo.artifacts.registry import Registry
from zoo.build import build
from zoo.config import compose

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "checkpoints" / "zoo-demo"
PROMPTS = ["def ", "import os\n\n\nclass Reader:\n    def __init__(self", "    for name in names:\n", "# é — ünïcode 🐍\nx = "]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("registry")
    limits = ["limits.max_tokens=64", "limits.max_context=256", "limits.max_blocks=30"]
    build(compose(["models=zoo-demo", "hardware=cpu", *limits]), Registry(root))
    with LLM("zoo-demo", registry=root, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(FOLDER)


def test_the_folder_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16_000_000


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_and_greedy_text_equal_transformers(llm: LLM, reference: tuple, prompt: str) -> None:
    model, tokenizer = reference
    inputs = tokenizer(prompt, return_tensors="pt")
    assert llm.encode(prompt) == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    new = generated[0, inputs["input_ids"].shape[1] :].tolist()
    output = llm.generate([prompt], SamplingParams(max_tokens=48, temperature=0.0))[0].outputs[0]
    assert output.token_ids == new
    assert output.text == tokenizer.decode(new, skip_special_tokens=True)


def test_log_probabilities_equal_transformers(llm: LLM, reference: tuple) -> None:
    model, tokenizer = reference
    ids = tokenizer(PROMPTS[1])["input_ids"]
    output = llm.generate([ids], SamplingParams(max_tokens=16, temperature=0.0, logprobs=5, ignore_eos=True))[0].outputs[0]
    with torch.no_grad():
        logits = model(torch.tensor([ids + output.token_ids[:-1]])).logits[0, -16:]
    expected = torch.log_softmax(logits.double(), -1)
    for row, entry in zip(expected, output.logprobs or [], strict=True):
        for token, value in entry.items():
            assert value == pytest.approx(float(row[token]), abs=1e-4)


def test_streaming_gives_the_text_of_generate(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.7, seed=3, top_p=0.9)
    whole = llm.generate([PROMPTS[3]], params)[0].outputs[0]
    pieces = list(llm.stream(PROMPTS[3], params))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert pieces[-1].finish_reason == whole.finish_reason


def test_64_requests_in_flight_equal_each_alone(llm: LLM) -> None:
    """Random lengths and arrival times; the pool (29 usable blocks) is too small for all of them, so some are preempted."""
    rng = random.Random(7)
    vocabulary = llm.engine.session.vocab_size
    requests = []
    for index in range(64):
        prompt = [rng.randrange(3, vocabulary) for _ in range(rng.choice((1, 5, 20, 90)))]
        params = SamplingParams(max_tokens=rng.randrange(1, 64), temperature=0.0, ignore_eos=True)
        requests.append((f"r{index}", prompt, params, rng.randrange(30)))
    alone = {name: llm.generate([prompt], params)[0].outputs[0].token_ids for name, prompt, params, _ in requests}

    engine = llm.engine
    together: dict[str, list[int]] = {name: [] for name, *_ in requests}
    waiting = sorted(requests, key=lambda request: request[3])
    preempted = engine.scheduler.preemptions
    step = 0
    while waiting or engine.has_work:
        while waiting and waiting[0][3] <= step:
            name, prompt, params, _ = waiting.pop(0)
            engine.add_request(name, prompt, params)
        for piece in engine.step():
            assert piece.error is None
            together[piece.request_id] += piece.token_ids
        step += 1
    assert together == alone
    assert engine.scheduler.preemptions > preempted, "the pool was meant to run out"
    assert engine.scheduler.blocks.used_blocks == 0 and engine.scheduler.blocks.free_blocks == 29
