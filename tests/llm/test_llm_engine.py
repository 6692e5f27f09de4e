"""``LLM`` over engines that are built here: in-flight batching with real logits, REFs, the demo model."""

from __future__ import annotations

import random
from pathlib import Path

import fake_session
import families
import pytest
from fake_session import FakeSession

import zoo.llm
from zoo import LLM, SamplingParams
from zoo.artifacts.machine import Machine
from zoo.artifacts.registry import Registry
from zoo.errors import IncompatibleError, NotFoundError, RequestError
from zoo.runtime.request import CompletionOutput

ROOT = Path(__file__).parents[2]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture(scope="module")
def small(checkpoint: Path, registry: Path) -> LLM:
    """Room for one context and a third: 21 blocks of 4, 16 tokens a step."""
    return LLM(
        checkpoint, registry=registry, threads=1, max_context=64, max_sequences=6, max_tokens=16, block_size=4, max_blocks=22
    )


def in_flight(llm: LLM, requests: list[tuple[list[int], int]], seed: int) -> tuple[dict[str, CompletionOutput], int]:
    """Requests arrive at random steps; some are cancelled on the way. Gives what came out and how many were preempted."""
    rng = random.Random(seed)
    engine = llm.engine
    before = engine.scheduler.preemptions
    outputs: dict[str, CompletionOutput] = {}

    def step() -> None:
        for piece in engine.step():
            outputs.setdefault(piece.request_id, CompletionOutput(0)).token_ids += piece.token_ids

    for index, (prompt, tokens) in enumerate(requests):
        engine.add_request(f"r{index}", prompt, greedy(tokens))
        for _ in range(rng.choice([0, 0, 1, 4])):
            step()
        if index % 8 == 7:
            engine.add_request("cancelled", prompt, greedy(tokens))
            step()
            assert engine.abort("cancelled")
            outputs.pop("cancelled", None)
    while engine.has_work:
        step()
    assert engine.scheduler.blocks.used_blocks == 0
    return outputs, engine.scheduler.preemptions - before


def test_sixty_four_requests_in_flight_give_what_each_gives_alone(small: LLM, checkpoint: Path) -> None:
    rng = random.Random(4)
    requests = [(families.prompt(checkpoint, rng.randint(1, 40), seed), rng.randint(1, 20)) for seed in range(64)]
    outputs, preempted = in_flight(small, requests, seed=5)
    assert preempted > 0
    for index, (prompt, tokens) in enumerate(requests):
        [alone] = small.generate([prompt], greedy(tokens))
        assert outputs[f"r{index}"].token_ids == alone.outputs[0].token_ids
        if index % 4 == 0:
            assert alone.outputs[0].token_ids == families.reference_greedy(checkpoint, prompt, tokens), "transformers disagrees"


def test_prompt_longer_than_the_engine_is_refused(small: LLM) -> None:
    with pytest.raises(RequestError, match="prompt has 64 tokens, but this engine holds 64"):
        small.generate([[1] * 64])


def test_refs_name_the_engine_again(small: LLM, checkpoint: Path, registry: Path) -> None:
    prompt = families.prompt(checkpoint, 12, 3)
    wanted = small.generate([prompt], greedy(6))[0].outputs[0].token_ids
    model = small.ref.partition(":")[0]
    for ref in (small.ref, model):
        with LLM(ref, registry=registry, threads=1) as llm:
            assert llm.ref == small.ref
            assert llm.generate([prompt], greedy(6))[0].outputs[0].token_ids == wanted
    with LLM(model, quant="none", hardware="cpu", registry=registry, threads=1, max_sequences=2) as llm:
        assert llm.limits.max_sequences == 2
        assert llm.generate([prompt] * 3, greedy(6))[2].outputs[0].token_ids == wanted
    with pytest.raises(NotFoundError, match=r"no engine with quant=fp8, hardware=any; there are none-cpu"):
        LLM(model, quant="fp8", registry=registry)
    with pytest.raises(NotFoundError, match="no-such-model"):
        LLM("no-such-model", registry=registry)
    with pytest.raises(RequestError, match="max_context is 128, but the engine was built with 64"):
        LLM(model, registry=registry, max_context=128)


def test_bare_name_is_the_stored_model_before_a_folder_of_that_name(
    small: LLM, checkpoint: Path, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small.ref.partition(":")[0]
    other = families.make_checkpoint(tmp_path, "gpt2")
    (tmp_path / model).symlink_to(other)
    monkeypatch.chdir(tmp_path)
    limits = {"max_context": 32, "max_sequences": 1}
    with LLM(model, registry=registry, threads=1) as llm:
        assert llm.ref == small.ref
    elsewhere = tmp_path / "registry"
    with LLM(model, registry=elsewhere, threads=1, **limits) as llm:  # not stored there: the folder
        built = llm.ref
        assert built != small.ref and built.startswith(f"{model}:")
    for folder in (f"./{model}", Path(model)):
        with LLM(folder, registry=elsewhere, threads=1, **limits) as llm:
            assert llm.ref == built


def test_folder_that_was_built_is_not_built_again(small: LLM, checkpoint: Path, registry: Path) -> None:
    before = [row["digest"] for row in Registry(registry).rows()]
    limits = {"max_context": 64, "max_sequences": 6, "max_tokens": 16, "block_size": 4, "max_blocks": 22}
    with LLM(str(checkpoint), registry=registry, threads=1, **limits) as llm:
        assert llm.ref == small.ref
    assert [row["digest"] for row in Registry(registry).rows()] == before


def test_folder_for_hardware_that_is_not_here_is_not_built(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo.llm, "describe_machine", lambda: Machine(2, 1 << 34))
    with pytest.raises(IncompatibleError, match=r"'l40s' cannot run here: .*no GPU.*zoo engines models=NAME hardware=l40s"):
        LLM(checkpoint, hardware="l40s", registry=tmp_path / "registry")
    assert not (tmp_path / "registry").exists()


def test_other_limits_are_another_build_and_both_stay(small: LLM, checkpoint: Path, registry: Path) -> None:
    with LLM(checkpoint, registry=registry, threads=1, max_context=32, max_sequences=2) as llm:
        assert (llm.limits.max_context, llm.limits.max_sequences) == (32, 2)
    limits = {"max_context": 64, "max_sequences": 6, "max_tokens": 16, "block_size": 4, "max_blocks": 22}
    with LLM(checkpoint, registry=registry, threads=1, **limits) as llm:
        assert llm.limits == small.limits


def test_demo_model_in_flight_and_as_text(registry: Path) -> None:
    """The demo checkpoint: 64 prompts from real source in few blocks, alone as together; transformers judges the text."""
    folder = ROOT / "checkpoints" / "zoo-demo"
    source = Path(random.__file__).read_text()
    with LLM(folder, registry=registry, threads=1, max_context=128, max_sequences=8, max_tokens=64, max_blocks=10) as llm:
        import transformers

        judge = transformers.AutoTokenizer.from_pretrained(folder)
        rng = random.Random(6)
        requests = []
        for _ in range(64):
            at = rng.randrange(len(source) - 400)
            text = source[at : at + rng.randint(3, 300)]
            prompt = llm.encode(text)
            assert prompt == judge(text)["input_ids"]
            requests.append((prompt[:60], rng.randint(1, 40)))
        outputs, preempted = in_flight(llm, requests, seed=7)
        assert preempted > 0
        for index, (prompt, tokens) in enumerate(requests):
            if index % 4 == 0:
                [alone] = llm.generate([prompt], greedy(tokens))
                assert outputs[f"r{index}"].token_ids == alone.outputs[0].token_ids
                assert alone.outputs[0].text == judge.decode(alone.outputs[0].token_ids, skip_special_tokens=True)
            if index % 16 == 0:
                assert outputs[f"r{index}"].token_ids == families.reference_greedy(folder, prompt, tokens)
        [default] = llm.generate(["def main("], SamplingParams(temperature=0.0, max_tokens=24, logprobs=5))
        streamed = list(llm.stream("def main(", SamplingParams(temperature=0.0, max_tokens=24)))
        assert "".join(piece.text for piece in streamed) == default.outputs[0].text
        assert all(5 <= len(entry) <= 6 for entry in default.outputs[0].logprobs or [{}])


def test_a_step_that_is_interrupted_ends_what_was_running_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another caller's step is interrupted: a request that had finished keeps its end, and the batch comes to its own."""

    def interrupted() -> None:
        for name in list(llm.engine.scheduler._sequences):
            llm.engine.abort(name)
        raise KeyboardInterrupt

    with LLM.from_session(FakeSession(fake_session.limits())) as llm:
        pieces = llm._run({"short": ([3, 4], greedy(1)), "long": ([5, 6], greedy(9))})
        first = next(pieces)
        assert (first.request_id, first.finish_reason) == ("short", "length")
        monkeypatch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm._step()
        rest = list(pieces)
    assert [(piece.request_id, piece.finish_reason) for piece in rest if piece.finished] == [("long", "error")]
