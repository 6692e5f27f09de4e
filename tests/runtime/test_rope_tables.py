"""Which rotary table a sequence reads: chosen at admission, the same in every step, seen by nothing but the table's rows."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import transformers
from fake_session import FakeSampler, FakeSession, collect, drain, greedy, limits, params

from zoo import LLM, SamplingParams
from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError
from zoo.runtime.abi import Batch, EngineLimits
from zoo.runtime.cuda_indices import CUDA_INDEX_BUILDERS
from zoo.runtime.engine import Engine
from zoo.runtime.indices import INDEX_BUILDERS, token_positions
from zoo.runtime.request import CompletionOutput
from zoo.runtime.scheduler import Scheduler
from zoo.runtime.sequence import Sequence

TABLES = ((16, 0), (32, 16), (64, 48))


def expected(limit: int) -> int:
    """Where the table of a sequence that may become so long begins."""
    return 0 if limit <= 16 else 16 if limit <= 32 else 48


class Rotating:
    """A fake session that has several rotary tables. It checks and records where positions begin, then takes that off.

    A prompt's first token is its name here: ``limit_of`` says how long its sequence may become.
    """

    rope_tables = TABLES

    def prepare(self, limit_of: dict[int, int]) -> None:
        self.limit_of, self.named, self.seen = limit_of, {}, []

    def _check(self, batch: Batch) -> None:
        sequence, positions = token_positions(batch)
        first = batch.positions - positions
        for index, table in enumerate(batch.block_tables["full"]):
            mine = sequence == index
            if positions[mine][0] == 0:
                self.named[int(table[0])] = int(batch.token_ids[mine][0])
            name = self.named[int(table[0])]
            assert set(first[mine].tolist()) == {expected(self.limit_of[name])}, f"sequence of token {name}"
            self.seen.append((name, int(positions[mine][0]), int(mine.sum()), int(first[mine][0])))
        batch.positions = positions.astype(np.int32)
        super()._check(batch)


class RotatingSession(Rotating, FakeSession):
    pass


class RotatingSampler(Rotating, FakeSampler):
    pass


@pytest.mark.parametrize("kind", [RotatingSession, RotatingSampler])
@pytest.mark.parametrize(
    ("changes", "preempts"),
    [({}, False), ({"max_tokens": 9}, False), ({"max_blocks": 20, "max_tokens": 16}, True)],
    ids=["roomy", "chunked", "preempting"],
)
def test_every_step_of_a_sequence_reads_its_own_table(
    kind: type[RotatingSession], changes: dict[str, int], preempts: bool
) -> None:
    rng = random.Random(3)
    session = kind(limits(**changes), vocab_size=200)
    engine = Engine(session, end_token_ids=[1])
    session.prepare({})
    outputs: dict[str, CompletionOutput] = {}
    requests = {}
    for name in range(2, 42):
        prompt = [name] + [rng.randrange(100, 200) for _ in range(rng.randrange(0, 40))]
        new = rng.choice([1, 5, 12, 23, None])
        session.limit_of[name] = 64 if new is None else min(64, len(prompt) + new)
        engine.add_request(str(name), prompt, params(max_tokens=new, ignore_eos=True))
        requests[str(name)] = prompt
        if rng.random() < 0.3:
            collect(engine, outputs)
    drain(engine, outputs)
    for name, prompt in requests.items():
        wanted = greedy(prompt, session.limit_of[int(name)] - len(prompt), vocab_size=200, end=None)
        assert outputs[name].token_ids == wanted and outputs[name].finish_reason == "length"
    assert (engine.scheduler.preemptions > 0) == preempts
    assert {first for *_, first in session.seen} == {0, 16, 48}
    several, starts = [count for *_, count, _ in session.seen if count > 1], [start for _, start, *_ in session.seen]
    assert several and max(starts) > 30, "prompts in pieces, and decode in the last table"
    if "max_tokens" in changes:
        assert any(start and count > 1 for _, start, count, _ in session.seen), "a chunk that does not begin a prompt"


def test_overlapped_steps_are_planned_with_the_table() -> None:
    session = RotatingSampler(limits(), vocab_size=200)
    session.prepare({2: 30, 3: 60})
    engine = Engine(session)
    engine.add_request("a", [2, 100], params(max_tokens=28))
    engine.add_request("b", [3, 101], params(max_tokens=58))
    drain(engine)
    assert session.most_open == 2
    assert {(name, first) for name, _, _, first in session.seen} == {(2, 16), (3, 48)}


@pytest.mark.parametrize("limit", [2, 15, 16, 17, 32, 33, 64])
def test_the_first_table_that_is_long_enough(limit: int) -> None:
    for tables, first in ((TABLES, expected(limit)), (((64, 0),), 0), ((), 0)):
        scheduler: Scheduler[Sequence] = Scheduler(limits(), tables)
        sequence = Sequence("a", [1] * (limit - 1), SamplingParams(), limit)
        scheduler.add(sequence)
        assert sequence.first_row == first
        step = scheduler.schedule()
        assert step is not None and step.batch.positions.tolist() == list(range(first, first + limit - 1))
        assert step.batch.positions.dtype == np.int32


def test_a_lower_context_takes_shorter_tables() -> None:
    """Limits that are lowered for scheduling bound a sequence, and with it the table."""
    session = RotatingSession(limits(), vocab_size=200)
    session.prepare({2: 20})
    engine = Engine(session, limits=limits(max_context=20))
    engine.add_request("a", [2, 100], params(max_tokens=None))
    assert len(drain(engine)["a"].token_ids) == 18
    assert {first for *_, first in session.seen} == {16}


@pytest.mark.parametrize("name", [*INDEX_BUILDERS, *CUDA_INDEX_BUILDERS])
def test_index_inputs_do_not_depend_on_where_positions_begin(name: str) -> None:
    rng = np.random.default_rng(5)
    bounds = EngineLimits(max_tokens=64, max_sequences=4, max_rows=4, max_context=40, max_blocks=60, block_size=4)
    counts, lengths = np.array([1, 7, 3, 1]), np.array([30, 7, 20, 1])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]).astype(np.int32)
    table = (1 + rng.permutation(40).reshape(4, 10)).astype(np.int32)
    batch = Batch(positions, positions, starts, lengths.astype(np.int32), {"full": table}, starts[1:] - np.int32(1))
    moved = dataclasses.replace(batch, positions=positions + np.repeat([48, 0, 16, 16], counts).astype(np.int32))
    build = (INDEX_BUILDERS | CUDA_INDEX_BUILDERS)[name]
    np.testing.assert_array_equal(build(batch, bounds), build(moved, bounds))
    assert [part.tolist() for part in token_positions(moved)] == [np.repeat(np.arange(4), counts).tolist(), positions.tolist()]


# Manifests.


def manifest_with(tables: object, max_context: int = 64) -> EngineManifest:
    data = {
        "model": "m", "version": "v", "profile": "p", "build": "b", "made": {}, "compiler": {}, "spec": {},
        "needs": {"kind": "cpu"}, "limits": {"max_context": max_context}, "schema": 1,
        "abi": {"inputs": [], "outputs": [], "caches": [], **({} if tables is None else {"rope_tables": tables})},
    }  # fmt: skip
    return EngineManifest.from_json(json.loads(json.dumps(data)))


def test_tables_travel_in_the_manifest_where_there_are_several() -> None:
    made = manifest_with(TABLES)
    assert made.abi.rope_tables == TABLES
    assert json.loads(json.dumps(made.to_json()))["abi"]["rope_tables"] == [[16, 0], [32, 16], [64, 48]]
    assert manifest_with(None).abi.rope_tables == () and "rope_tables" not in manifest_with(None).to_json()["abi"]


@pytest.mark.parametrize(
    "tables",
    [
        [[16, 0], [64, 17]], [[16, 0], [16, 16]], [[64, 1]], [[0, 0], [64, 0]], [[16], [64, 16]], [[16, 0, 0], [64, 16]],
        [16, 64], [[16, -1]], [[16, 0], ["64", 16]], [[True, 0]], {"16": 0}, 3, [[1 << 31, 0]], [[16, 0], [63, 16]],
        [[16, 0], [(1 << 31) - 1, 16]],
        [[]],
    ],
)  # fmt: skip
def test_hostile_tables_are_refused(tables: object) -> None:
    with pytest.raises(ArtifactError, match=r"engine\.json: .*rope_tables"):
        manifest_with(tables)


# A whole engine, judged by transformers.


def test_an_engine_with_longrope_on_both_sides_of_the_threshold(tmp_path: Path) -> None:
    """Requests in one batch read different tables; each gives what transformers gives for its whole length at once."""
    config = transformers.Phi3Config(
        vocab_size=262,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        original_max_position_embeddings=24,
        pad_token_id=None,
        bos_token_id=families.BEGIN,
        eos_token_id=families.END,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 24,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.5 + i for i in range(8)],
        },
    )
    torch.manual_seed(3)
    model = transformers.Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "phi3")
    requests = [(4, 20), (20, 4), (4, 21), (20, 60), (50, 3), (23, 2)]  # prompt and new tokens: up to 24 in all, and beyond
    prompts = [np.random.default_rng(length).integers(0, 256, length).tolist() for length, _ in requests]
    wanted = [SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, logprobs=0) for _, new in requests]
    with LLM(tmp_path / "phi3", registry=tmp_path / "registry", threads=1, max_tokens=16, max_sequences=4) as llm:
        assert llm.engine.scheduler.rope_tables == ((24, 0), (96, 24))
        outputs = [output.outputs[0] for output in llm.generate(prompts, wanted)]
    for prompt, output, (length, new) in zip(prompts, outputs, requests, strict=True):
        ids = prompt + output.token_ids
        with (
            torch.no_grad()
        ):  # a table is chosen by the longest that a sequence may become, so all that it had is looked at at once
            positions = torch.arange(len(ids))[None]
            logits = model(torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0]
        expected_logprobs = torch.log_softmax(logits, -1)[length - 1 : -1].numpy()
        found = [piece[token] for piece, token in zip(output.logprobs, output.token_ids, strict=True)]
        np.testing.assert_allclose(
            found, expected_logprobs[np.arange(new), output.token_ids], rtol=0, atol=1e-4, err_msg=f"{length} and {new} tokens"
        )
