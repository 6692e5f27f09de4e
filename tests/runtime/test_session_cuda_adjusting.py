"""The ``cuda`` session on a stand-in GPU: logits adjusted in captured, overlapped steps give the tokens of the host's sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import families
import numpy as np
import pytest
from cuda_engines import Made, Traffic, change_plan, compile_engine, copied, open_engine
from cuda_on_cpu import Gpu, gpu_on_cpu
from gpu.adjusted import KINDS, check_adjusted

from zoo import LLM, SamplingParams
from zoo.runtime.abi import SAMPLING, SLOT_SHIFT, Adjusting, Sampling
from zoo.runtime.adjusting import adjustment_of
from zoo.runtime.cuda import slots
from zoo.runtime.request import RequestOutput
from zoo.runtime.sessions.cuda import CudaSession
from zoo.spec import Limits

TOKENS = 5
GREEDY = [kind for kind in KINDS if "temperature" not in kind]
LIMITS = Limits(max_tokens=64, max_sequences=5, max_rows=8, max_context=48, block_size=8)
Opened = tuple[Made, Gpu, CudaSession]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One layer with one head: the interpreter takes a millisecond for each program."""
    folder = tmp_path_factory.mktemp("adjusting")
    checkpoint = families.make_checkpoint(folder, "llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    return Made(folder / "engine", compile_engine(folder / "engine", checkpoint, limits=LIMITS, dtype="float32"), checkpoint)


@pytest.fixture(scope="module")
def engine(made: Made) -> Iterator[Opened]:
    """Pools, activations and slots start as NaN."""
    with gpu_on_cpu() as gpu:
        session = CudaSession(made.folder, made.manifest, fill=0xFF)
    yield made, gpu, session
    session.close()
    assert gpu.live() == []


def prompts_of(made: Made, count: int, longest: int = 20) -> list[list[int]]:
    return [families.prompt(made.checkpoint, 1 + (5 * place + 3) % longest, place) for place in range(count)]


def params(place: int, **more: object) -> SamplingParams:
    fixed = {"max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
    return SamplingParams(**{**fixed, **GREEDY[place % len(GREEDY)], **more})  # type: ignore[arg-type]


def generate(
    session: CudaSession, prompts: Sequence[list[int]], wanted: list[SamplingParams], **limits: int
) -> list[RequestOutput]:
    return LLM.from_session(session, **limits).generate(prompts, wanted)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def on_host(session: CudaSession, monkeypatch: pytest.MonkeyPatch, *asked: object, **limits: int) -> list[RequestOutput]:
    """The same, chosen by ``zoo.runtime.sampler``."""
    with monkeypatch.context() as patch:
        patch.setattr(session, "reserve", lambda slots: False)
        return generate(session, *asked, **limits)  # type: ignore[arg-type]


def test_every_token_is_the_samplers_step_by_step_and_overlapped(engine: Opened) -> None:
    """All kinds, five at once, two of which draw; what ``tests.gpu.check_engines`` does on a GPU."""
    made, gpu, session = engine
    before, replays = gpu.ran.copy(), gpu.replays
    for first in (0, 5):
        judged, problems = check_adjusted(session, prompts_of(made, 5, 8), 3, first)
        assert not problems and judged == 15
    assert gpu.replays > replays and all(gpu.ran[name] > before[name] for name in ("count_tokens", "adjust_listed", "penalize"))


def test_chunks_preemption_and_the_host_give_the_same_tokens(engine: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, requests that start over, one whose log-probabilities are the host's; the judge chooses on the host."""
    made, gpu, session = engine
    prompts = [families.prompt(made.checkpoint, length, length) for length in (7, 15, 5, 12)]
    wanted = [params(0), params(2), params(4, logprobs=1), params(6, min_tokens=3)]
    tight = {"max_tokens": 12, "max_blocks": 5}
    llm = LLM.from_session(session, **tight)
    found = llm.generate(prompts, wanted)
    assert llm.engine.scheduler.preemptions > 0 and not llm.engine.scheduler.rows.adjusts
    before = gpu.ran["penalize"]
    expected = on_host(session, monkeypatch, prompts, wanted)
    assert gpu.ran["penalize"] == before and tokens(found) == tokens(expected)
    assert len(found[2].outputs[0].logprobs or ()) == TOKENS
    for prompt, one in zip(prompts, tokens(found), strict=True):
        assert one != families.reference_greedy(made.checkpoint, prompt, len(one)), "no effect"


def test_plain_steps_launch_nothing_more(engine: Opened) -> None:
    made, gpu, session = engine
    before = gpu.ran.copy()
    plain = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, min_tokens=2)  # there is no end token to ban
    generate(session, prompts_of(made, 3), [plain] * 3)
    ran = gpu.ran - before
    assert not {"count_tokens", "adjust_listed", "penalize"} & set(ran) and ran["greedy_combine"] > 0


def test_a_cancelled_request_leaves_its_slot_to_another(engine: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, session = engine
    llm = LLM.from_session(session)
    a, b = prompts_of(made, 2)
    stream = llm.stream(a, params(0, max_tokens=30))
    for _ in range(3):
        next(stream)
    assert llm.engine.scheduler.rows.adjusts
    stream.close()
    assert not llm.engine.scheduler.rows.adjusts
    assert tokens(llm.generate([b], params(0))) == tokens(on_host(session, monkeypatch, [b], [params(0)]))


def test_memory_for_slots_comes_when_it_is_wanted_and_its_lack_leaves_them_to_the_host(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu()
    session = open_engine(made, gpu)
    held = sum(block.nbytes for block in gpu.memory.values())
    prompts, wanted = prompts_of(made, 3, 5), [params(place, max_tokens=4, min_tokens=4) for place in range(3)]
    expected = tokens(on_host(session, monkeypatch, prompts, wanted))
    assert sum(block.nbytes for block in gpu.memory.values()) == held, "nobody asked for slots"
    monkeypatch.setattr(slots, "CHUNK", 2)
    assert session.reserve(1) and session._engine.slots.made == 2
    monkeypatch.setattr(slots, "LEFT", 1 << 40)
    assert not session.reserve(3) and session.reserve(2), "what was granted stays"
    assert tokens(generate(session, prompts, wanted)) == expected
    session.close()
    assert gpu.live() == []


def test_a_gpu_that_gives_no_memory_is_no_error(made: Made) -> None:
    gpu = Gpu()
    session = open_engine(made, gpu)
    gpu.fails["cuMemAlloc"] = 2
    assert not session.reserve(1)
    gpu.fails.clear()
    assert not session.reserve(1), "a request's tokens would depend on when it comes"
    session.close()


def test_engines_without_these_kernels_leave_all_to_the_host(made: Made, tmp_path: Path) -> None:
    old = copied(made, tmp_path / "engine")
    change_plan(old, lambda plan: [plan["sampling"].pop(part) for part in ("count", "listed", "penalized")] and None)
    session = open_engine(old)
    assert not session.reserve(1)
    session.close()


def test_slots_that_nobody_reserved_are_bugs(engine: Opened) -> None:
    made, _, session = engine
    assert session.reserve(1)
    prompt, room = families.prompt(made.checkpoint, 4), session._engine.slots.made
    found = adjustment_of(SamplingParams(presence_penalty=1.0), 4, 9, (), session.vocab_size)
    assert found is not None

    def submit(slot: int, counted: list[int], started: int) -> None:
        rows = np.zeros(1, SAMPLING)
        rows["flags"] = slot << SLOT_SHIFT
        adjusting = Adjusting([(started, found.words)], np.array(counted, np.int32), False, True)
        sampling = Sampling(rows, np.empty(0, np.int32), True, adjusting)
        session.submit(Traffic(session).batch({"a": prompt}, rows=[3]), sampling).result()

    submit(1, [1], 1)
    for slot, counted, started in (
        (room + 1, [1], 1),
        (1, [room + 1], 1),
        (1, [-1], 1),
        (1, [1, 1], 1),
        (1, [1], 0),
        (1, [1], room + 1),
    ):
        with pytest.raises(AssertionError, match="slot"):
            submit(slot, counted, started)
