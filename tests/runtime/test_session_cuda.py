"""The ``cuda`` session on a stand-in GPU: logits against transformers, captured steps against others, steps under way.

Pools and activations start as NaN. Engines of float32, which only the stand-in runs, are compared to 1e-5; one of bfloat16 is as
far from float32 as transformers' own bfloat16 is. FP8 is judged by the graph that became the plan, in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import families
import numpy as np
import pytest
from cuda_engines import Made, Traffic, compile_engine, feed, graph_logits, opened, relative, rounded_logits, shared, some_tokens
from cuda_on_cpu import Gpu, gpu_on_cpu

from zoo.compilers.cuda.memory import ALIGN, Block
from zoo.errors import EngineError
from zoo.runtime.abi import HOST, SAMPLING, Batch, Sampling
from zoo.runtime.sessions import cuda as module
from zoo.runtime.sessions.cuda import CudaSession
from zoo.spec import Limits

CASES = ["llama-grouped", "qwen3-norms", "gpt2", "mistral-window"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def joined(logits: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([logits[name] for name in sorted(logits)])


def by_transformers(made: Made, tokens: Mapping[str, list[int]]) -> np.ndarray:
    return joined({name: families.reference_logits(made.checkpoint, ids) for name, ids in tokens.items()})


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_are_transformers(base: Path, case: str) -> None:
    made, _, session = opened(base, case, dtype="float32")
    tokens = some_tokens(made.checkpoint)
    got, want = joined(feed(session, tokens)), by_transformers(made, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("case", ["llama-grouped"])
def test_bfloat16_logits_are_as_near_as_those_of_transformers(base: Path, case: str) -> None:
    made, gpu, session = opened(base, case)
    tokens, before = some_tokens(made.checkpoint, 5), gpu.replays
    got, want = joined(feed(session, tokens)), by_transformers(made, tokens)
    rounded = joined({name: rounded_logits(made.checkpoint, ids) for name, ids in tokens.items()})
    assert relative(got, want) < 1.25 * relative(rounded, want) + 1e-3
    assert gpu.replays > before and gpu.blas.starts > 0 and gpu.ran["skinny_gemm"] > 0, "some kind of step was left out"


@pytest.mark.parametrize(
    ("case", "quant", "bound"),
    [("llama-grouped", "fp8", 2e-6), ("llama-grouped", "fp8-kv", 0.06), ("gpt2", "fp8-kv", 0.06)],
)
def test_fp8_is_the_arithmetic_of_the_graph(base: Path, case: str, quant: str, bound: float) -> None:
    """A float8 pool is multiplied in float16, and what that moves lets some values round the other way: 3% is typical."""
    made, _, session = opened(base, case, quant, "float32")
    tokens = some_tokens(made.checkpoint, 7)
    got, want = joined(feed(session, tokens)), joined(graph_logits(made, quant, tokens))
    assert relative(got, want) < bound
    assert relative(want, by_transformers(made, tokens)) > 0.02, "nothing was quantized"


@pytest.mark.parametrize("case", ["qwen3-norms", "mistral-window"])
def test_fp8_in_bfloat16_is_as_far_as_fp8_is(base: Path, case: str) -> None:
    """Random models, whose sharp attention amplifies roundings of up to 2^-4: 16% is typical, 25% the bound."""
    made, _, session = opened(base, case, "fp8-kv")
    tokens = some_tokens(made.checkpoint, 9)
    assert 0.02 < relative(joined(feed(session, tokens)), by_transformers(made, tokens)) < 0.25


def test_a_captured_step_is_the_step_as_it_comes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences padded to six, launched and captured, then replayed; and unpadded: bit for bit."""
    made, gpu, session = opened(base, "llama-grouped", "fp8-kv")
    traffic, found = Traffic(session), []
    prompts = {name: families.prompt(made.checkpoint, 3 + 2 * place, place) for place, name in enumerate("vwxyz")}
    traffic.step(prompts)
    batch = traffic.batch({name: [7 + place] for place, name in enumerate(prompts)})
    for eager in (False, False, True):
        if eager:
            monkeypatch.setattr(module, "captured_size", lambda *_: 0)
        before = gpu.replays
        logits = session.step(batch).logits
        assert logits is not None
        found.append((logits.copy(), gpu.replays - before))
    assert [replays for _, replays in found] == [0, 1, 0]
    for logits, _ in found[1:]:
        np.testing.assert_array_equal(logits, found[0][0])


def test_long_contexts_are_cut_and_merged(base: Path, tmp_path: Path) -> None:
    """A context of three parts beside one of a few tokens, as it comes, captured and replayed; then the short one alone."""
    checkpoint = families.make_checkpoint(base, "llama", max_position_embeddings=512, num_hidden_layers=1)
    limits = Limits(max_tokens=160, max_sequences=4, max_rows=8, max_context=320, block_size=16)
    manifest = compile_engine(tmp_path / "engine", checkpoint, limits=limits, dtype="float32")
    with gpu_on_cpu() as gpu:
        session = CudaSession(tmp_path / "engine", manifest, fill=0xFF)
    a, b = families.prompt(checkpoint, 305, 1), families.prompt(checkpoint, 9, 2)
    traffic = Traffic(session)
    for new in ({"a": a[:150]}, {"a": a[150:300], "b": b[:3]}):
        session.step(traffic.batch(new, rows=[]))
    assert gpu.ran["merge"] == 0, "nothing was decoded"
    steps = [({"a": a[300:301], "b": b[3:5]}, [0, 2])]  # a is cut, b is a chunk of a prompt
    steps += [({"a": [a[at]], "b": [b[at - 296]]}, [0, 1]) for at in (301, 302, 303, 304)]
    rows = [traffic.step(new, wanted) for new, wanted in steps]
    assert gpu.ran["merge"] == 5 and gpu.replays == 3
    for place, want in enumerate((families.reference_logits(checkpoint, a)[300:], families.reference_logits(checkpoint, b)[4:])):
        np.testing.assert_allclose(np.stack([one[place] for one in rows]), want, atol=1e-5 * np.abs(want).max(), rtol=0)
    traffic.step({"c": [5]})
    assert gpu.ran["merge"] == 5, "one token has one part"
    session.close()


def test_limits_that_no_padding_may_break(base: Path, tmp_path: Path) -> None:
    """Five sequences, where eight would be their bucket and the engine has room for six tokens and five rows."""
    made = shared(base, "llama-grouped", dtype="float32")
    limits = Limits(max_tokens=6, max_sequences=16, max_rows=5, max_context=16, block_size=4)
    manifest = compile_engine(tmp_path / "engine", made.checkpoint, limits=limits, dtype="float32")
    with gpu_on_cpu():
        session = CudaSession(tmp_path / "engine", manifest, fill=0xFF)
    traffic = Traffic(session)
    tokens = {name: families.prompt(made.checkpoint, 3, place) for place, name in enumerate("vwxyz")}
    rows = [traffic.step({name: [ids[place]] for name, ids in tokens.items()}) for place in range(3)]
    for place, ids in enumerate(tokens.values()):
        want = families.reference_logits(made.checkpoint, ids)
        np.testing.assert_allclose(np.stack([one[place] for one in rows]), want, atol=1e-5 * np.abs(want).max(), rtol=0)
    session.close()


@pytest.mark.parametrize(("case", "quant"), [("llama-grouped", "fp8-kv"), ("gpt2", "none")])
def test_no_step_writes_beyond_its_tensors(
    base: Path, tmp_path: Path, case: str, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor and scratch in a place of its own with a moat behind it, which stays as it was: the numbers of one arena."""
    moats: list[tuple[int, int]] = []

    def apart(blocks: Sequence[Block]) -> tuple[dict[str, int], int]:
        offsets, end = {}, 0
        for block in blocks:
            offsets[block.name] = -(-end // ALIGN) * ALIGN
            end = offsets[block.name] + block.size + 4096
            moats.append((offsets[block.name] + block.size, end))
        return offsets, end

    made, _, shared_one = opened(base, case, quant)
    monkeypatch.setattr("zoo.compilers.cuda.plan.place", apart)
    manifest = compile_engine(tmp_path / "engine", made.checkpoint, quant)
    with gpu_on_cpu() as gpu:
        session = CudaSession(tmp_path / "engine", manifest, blocks=48, fill=0xFF)
    tokens = some_tokens(made.checkpoint, 3)
    np.testing.assert_array_equal(joined(feed(session, tokens)), joined(feed(shared_one, tokens)))
    arena = gpu.memory[session._engine.arena]
    assert len(moats) > 20 and all((arena[start:end] == 0xFF).all() for start, end in moats)
    session.close()


def records(count: int, **values: float) -> np.ndarray:
    made = np.zeros(count, SAMPLING)
    for name, value in values.items():
        made[name] = value
    return made


def greedy(rows: int) -> Sampling:
    return Sampling(records(rows, top_p=1), np.empty(0, np.int32), True)


def test_steps_under_way_name_the_tokens_before_them(base: Path) -> None:
    """Each step is submitted before the one before it is read, and names its tokens: transformers' greedy continuation."""
    made, gpu, session = opened(base, "qwen3-norms", dtype="float32")
    prompts = {"a": families.prompt(made.checkpoint, 5, 1), "b": families.prompt(made.checkpoint, 9, 2)}
    traffic = Traffic(session)
    last = session.submit(traffic.batch(prompts, rows=[4, 13]), greedy(2))
    said, before = [], gpu.ran["decode"]
    for _ in range(5):
        ticket = session.submit(traffic.batch({"a": [-1], "b": [-2]}), greedy(2))
        if not said:
            assert gpu.ran["decode"] == before, "submit does not wait"
        said.append(last.result().token_ids.tolist())
        last = ticket
    said.append(last.result().token_ids.tolist())
    for place, prompt in enumerate(prompts.values()):
        assert [tokens[place] for tokens in said] == families.reference_greedy(made.checkpoint, prompt, 6)


def test_logits_of_some_rows_beside_tokens_of_the_others(base: Path) -> None:
    made, _, session = opened(base, "llama-grouped", dtype="float32")
    prompts = {name: families.prompt(made.checkpoint, 4, place) for place, name in enumerate("abc")}
    rows = records(3, top_p=1)
    rows["flags"][1] = HOST
    result = session.submit(
        Traffic(session).batch(prompts, rows=[3, 7, 11]), Sampling(rows, np.array([1], np.int32), True)
    ).result()
    want = [families.reference_logits(made.checkpoint, ids)[-1] for ids in prompts.values()]
    assert result.logits is not None and result.token_ids is not None and result.logits.shape == (1, session.vocab_size)
    np.testing.assert_allclose(result.logits[0], want[1], atol=1e-5 * np.abs(want[1]).max(), rtol=0)
    assert [result.token_ids[row] for row in (0, 2)] == [want[row].argmax() for row in (0, 2)]


def test_steps_without_rows_and_without_tokens_of_the_device(base: Path) -> None:
    """A chunk of a prompt whose logits nobody wants; a step whose only row is the host's."""
    made, _, session = opened(base, "llama-grouped", dtype="float32")
    prompt, traffic = families.prompt(made.checkpoint, 10, 3), Traffic(session)
    empty = session.submit(traffic.batch({"a": prompt[:6]}, rows=[]), greedy(0)).result()
    assert empty.logits is None and empty.token_ids is not None and empty.token_ids.shape == (0,)
    assert session.step(traffic.batch({"a": prompt[6:9]}, rows=[])).logits is None
    rows = records(1, top_p=1, flags=HOST)
    result = session.submit(traffic.batch({"a": prompt[9:]}), Sampling(rows, np.zeros(1, np.int32), True)).result()
    want = families.reference_logits(made.checkpoint, prompt)[-1]
    assert result.logits is not None
    np.testing.assert_allclose(result.logits[0], want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_a_results_arrays_stay_until_the_next_but_one_submit(base: Path) -> None:
    made, _, session = opened(base, "llama-grouped", dtype="float32")
    traffic = Traffic(session)
    first = session.submit(traffic.batch({"a": families.prompt(made.checkpoint, 3)})).result().logits
    assert first is not None
    kept = first.copy()
    session.submit(traffic.batch({"a": families.prompt(made.checkpoint, 2, 5)}))
    np.testing.assert_array_equal(first, kept)


def test_batches_beyond_the_limits_are_bugs(base: Path) -> None:
    made, _, session = opened(base, "llama-grouped", dtype="float32")
    good = Traffic(session).batch({"a": families.prompt(made.checkpoint, 5), "b": [3]}, rows=[4, 5])
    pool = session.limits.max_blocks

    def broken(sampling: Sampling | None = None, **changes: object) -> None:
        with pytest.raises(AssertionError):
            session.submit(Batch(**(vars(good) | changes)), sampling)

    session.step(good)  # no step of tokens: nothing may be named
    ids = good.token_ids
    broken(token_ids=np.full_like(ids, session.vocab_size))
    broken(token_ids=np.full_like(ids, -1))
    broken(token_ids=ids.astype(np.int64))
    broken(token_ids=np.empty(0, np.int32))
    broken(positions=good.positions[:-1])
    broken(query_starts=np.array([0, 4, 5], np.int32))
    broken(query_starts=np.array([0, 6], np.int32))
    broken(kv_lengths=np.array([65, 1], np.int32))
    broken(kv_lengths=np.array([9, 1], np.int32))  # its table has one block
    broken(logit_rows=np.array([6], np.int32))
    broken(logit_rows=np.array([-1], np.int32))
    broken(logit_rows=np.zeros(97, np.int32))
    broken(block_tables={"full": np.full((2, 1), pool, np.int32)})
    broken(block_tables={"full": np.full((2, 9), 1, np.int32)})
    broken(block_tables={"full": np.full((1, 1), 1, np.int32)})
    broken(greedy(1))
    session.step(good)


def test_failing_steps_are_errors_and_the_session_goes_on(base: Path) -> None:
    made, gpu, session = opened(base, "llama-grouped", dtype="float32")
    prompt, traffic = families.prompt(made.checkpoint, 6), Traffic(session)
    batch = traffic.batch({"a": prompt})
    gpu.fails["cuMemcpyHtoDAsync"] = 700
    with pytest.raises(EngineError, match=r"the GPU .* cannot copy to the GPU: an illegal memory access"):
        session.submit(batch)
    gpu.fails.clear()
    want = families.reference_logits(made.checkpoint, prompt)
    for _ in range(4):  # every slot
        np.testing.assert_allclose(session.step(batch).logits, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_graphs_that_there_is_no_memory_for_are_done_without(base: Path) -> None:
    made, gpu, session = opened(base, "llama-grouped", dtype="float32")
    ids = families.prompt(made.checkpoint, 60, 4)
    traffic, before = Traffic(session), gpu.replays
    traffic.step({"a": ids[:57]})
    gpu.fails["cuGraphInstantiate"] = 2
    got = [traffic.step({"a": [token]})[0] for token in ids[57:59]]
    gpu.fails.clear()
    got.append(traffic.step({"a": ids[59:]})[0])
    want = families.reference_logits(made.checkpoint, ids)[57:]
    np.testing.assert_allclose(np.stack(got), want, atol=1e-5 * np.abs(want).max(), rtol=0)
    assert gpu.replays == before


def test_a_gpu_that_went_wrong_is_closed_all_the_same(base: Path) -> None:
    made, gpu = shared(base, "llama-grouped"), Gpu()
    with gpu_on_cpu(gpu):
        session = CudaSession(made.folder, made.manifest, blocks=20)
    gpu.fails = dict.fromkeys(("cuMemFree", "cuEventSynchronize", "cuStreamSynchronize"), 700)
    with pytest.raises(EngineError, match="an illegal memory access was encountered; if it goes on, start the process anew"):
        session.step(Traffic(session).batch({"a": [3]}))
    session.close()
    assert gpu.contexts == 0 and not gpu.blas.things


def test_close_gives_everything_back_with_steps_under_way(base: Path) -> None:
    made, gpu = shared(base, "llama-grouped"), Gpu()
    with gpu_on_cpu(gpu):
        session = CudaSession(made.folder, made.manifest, blocks=20)
    batch = Traffic(session).batch({"a": families.prompt(made.checkpoint, 3)})
    session.submit(batch)
    session.close()
    session.close()
    assert gpu.live() == [] and not gpu.blas.things
    with pytest.raises(AssertionError, match="closed"):
        session.step(batch)
