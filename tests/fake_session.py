"""Sessions without a model, for the scheduler and the engine loop: one that gives logits, one that samples.

They keep a paged pool as real engines do, but of token ids: each step writes its tokens into the slots that the block
table and the positions name, then reads every sequence back from its slots and makes logits from exactly what it read. A wrong
table, position or length changes the tokens that come out. Slots nobody wrote hold POISON.
"""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections import deque

import numpy as np

from zoo.runtime.abi import HOST, SAMPLING, STEPS_AHEAD, Batch, EngineLimits, Sampling, StepResult
from zoo.runtime.engine import Engine
from zoo.runtime.request import CompletionOutput, SamplingParams
from zoo.runtime.sampler import candidates

POISON = -(2**31)
GARBAGE = -1  # the id of NaN logits
ARRAYS = ("token_ids", "positions", "query_starts", "kv_lengths", "logit_rows")
END = 1  # its logit is raised now and then, so that some sequences end by themselves


def limits(**changes: int) -> EngineLimits:
    base = EngineLimits(max_tokens=64, max_sequences=8, max_rows=8, max_context=64, max_blocks=129, block_size=4)
    return dataclasses.replace(base, **changes)


class FakeSession:
    """``end_bias`` is added to token 1's logit; ``poisoned`` maps a first token to the length from which its logits are NaN."""

    def __init__(self, limits: EngineLimits, vocab_size: int = 50, end_bias: float = 0.5) -> None:
        self.limits = limits
        self.vocab_size = vocab_size
        self.end_bias = end_bias
        self.poisoned: dict[int, int] = {}
        self.pool = np.full((limits.max_blocks, limits.block_size), POISON, np.int64)
        self.batches: list[Batch] = []
        self.closed = False
        self.fail_next: Exception | None = None

    def step(self, batch: Batch) -> StepResult:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.batches.append(batch)
        self._check(batch)
        size = self.limits.block_size
        table = batch.block_tables["full"]
        owner = np.repeat(np.arange(len(batch.kv_lengths)), np.diff(batch.query_starts))
        blocks = table[owner, batch.positions // size]
        assert (blocks > 0).all(), "a token would be written to the reserved block"
        self.pool[blocks, batch.positions % size] = batch.token_ids
        logits = np.empty((len(batch.logit_rows), self.vocab_size), np.float32)
        for index, row in enumerate(batch.logit_rows.tolist()):
            logits[index] = self._logits(batch, row, int(owner[row]))
        return StepResult(logits=logits)

    def _logits(self, batch: Batch, row: int, sequence: int) -> np.ndarray:
        length = int(batch.positions[row]) + 1
        tokens = self.pool[batch.block_tables["full"][sequence]].reshape(-1)[:length]
        assert (tokens != POISON).all(), "a slot is read that nobody wrote"
        logits = fake_logits(tokens.tolist(), self.vocab_size, self.end_bias)
        first = int(tokens[0])
        if first in self.poisoned and length >= self.poisoned[first]:
            logits[7] = np.nan
        return logits

    def _check(self, batch: Batch) -> None:
        limits = self.limits
        sequences = len(batch.kv_lengths)
        counts = np.diff(batch.query_starts)
        for array in (
            batch.token_ids,
            batch.positions,
            batch.query_starts,
            batch.kv_lengths,
            batch.logit_rows,
            batch.block_tables["full"],
        ):
            assert array.dtype == np.int32 and array.flags.c_contiguous
        assert 0 < len(batch.token_ids) == len(batch.positions) == batch.query_starts[-1] <= limits.max_tokens
        assert batch.query_starts[0] == 0 and (counts > 0).all() and len(counts) == sequences <= limits.max_sequences
        assert (
            len(batch.logit_rows) <= limits.max_rows
            and (batch.token_ids >= 0).all()
            and (batch.kv_lengths <= limits.max_context).all()
        )
        for index in range(sequences):
            mine = batch.positions[batch.query_starts[index] : batch.query_starts[index + 1]]
            assert (np.diff(mine) == 1).all() and mine[-1] + 1 == batch.kv_lengths[index]
        held = [
            set(row[: -(-n // limits.block_size)].tolist())
            for row, n in zip(batch.block_tables["full"], batch.kv_lengths, strict=True)
        ]
        assert sum(map(len, held)) == len(set().union(*held)), "two sequences share a block"
        assert 0 not in set().union(*held)

    def close(self) -> None:
        self.closed = True


class FakeSampler(FakeSession):
    """A fake session that samples: what a step does, it does when its result is asked for, in order of submits.

    A row with a temperature draws from the candidates of ``zoo.runtime.sampler``, by seed and counter alone; what the device
    gives for a row of the host is GARBAGE. ``fail_submit`` is raised by the next submit, which does nothing; ``fail_result``
    by the next result.
    """

    samples = True

    def __init__(self, limits: EngineLimits, vocab_size: int = 50, end_bias: float = 0.5) -> None:
        super().__init__(limits, vocab_size, end_bias)
        self.fail_submit: BaseException | None = None
        self.fail_result: BaseException | None = None
        self.most_open = 0
        self.open: deque[FakeTicket] = deque()
        self._last: tuple[Batch, Sampling | None] | None = None  # the step submitted last, None if that failed
        self._sampled: np.ndarray | None = None  # what the step that ran last gave, None if it failed

    def reserve(self, slots: int) -> bool:
        """It adjusts no logits; ``fake_adjusting`` has one that does."""
        return False

    def adjust(self, batch: Batch, sampling: Sampling, logits: np.ndarray) -> None:
        assert sampling.adjusting is None

    def submit(self, batch: Batch, sampling: Sampling | None = None) -> FakeTicket:
        if self.fail_submit is not None:
            self._last, error, self.fail_submit = None, self.fail_submit, None
            raise error
        assert len(self.open) <= STEPS_AHEAD
        batch = dataclasses.replace(
            batch,
            **{name: getattr(batch, name).copy() for name in ARRAYS},
            block_tables={"full": batch.block_tables["full"].copy()},
        )
        for name in set(-1 - batch.token_ids[batch.token_ids < 0]):
            assert self._last is not None and self._last[1] is not None, "there is no step before, or it has no tokens"
            assert name < len(self._last[0].logit_rows) and name not in self._last[1].host_rows
        if sampling is not None:
            adjusting = copy.deepcopy(sampling.adjusting)
            sampling = Sampling(sampling.rows.copy(), sampling.host_rows.copy(), sampling.greedy, adjusting)
            assert sampling.rows.dtype == SAMPLING and len(sampling.rows) == len(batch.logit_rows)
            assert np.flatnonzero(sampling.rows["flags"] & HOST).tolist() == sampling.host_rows.tolist()
            drawn = np.delete(sampling.rows["temperature"], sampling.host_rows)
            assert sampling.greedy == (not drawn.any())
        self._last = (batch, sampling)
        self.open.append(FakeTicket(self, batch, sampling))
        self.most_open = max(self.most_open, len(self.open))
        return self.open[-1]

    def run(self, batch: Batch, sampling: Sampling | None) -> StepResult:
        named = batch.token_ids < 0
        if named.any():  # what a step that failed has left there is not looked at: 0 will do
            before = np.zeros(self.limits.max_rows, np.int32) if self._sampled is None else self._sampled
            batch.token_ids[named] = np.maximum(before[-1 - batch.token_ids[named]], 0)
        self._sampled = None
        logits = super().step(batch).logits
        assert logits is not None
        if sampling is not None:
            self.adjust(batch, sampling, logits)
        if self.fail_result is not None:
            error, self.fail_result = self.fail_result, None
            raise error
        if sampling is None:
            return StepResult(logits=logits)
        ids = np.array([fake_sample(row, record) for row, record in zip(logits, sampling.rows, strict=True)], np.int32)
        ids[sampling.host_rows] = GARBAGE
        self._sampled = ids
        return StepResult(logits=logits[sampling.host_rows] if len(sampling.host_rows) else None, token_ids=ids.copy())

    def step(self, batch: Batch) -> StepResult:
        return self.submit(batch).result()

    def close(self) -> None:
        self.open.clear()
        super().close()


class FakeTicket:
    """A step of a ``FakeSampler``, to be asked for its result once and in order."""

    def __init__(self, session: FakeSampler, batch: Batch, sampling: Sampling | None) -> None:
        self._run = lambda: session.run(batch, sampling)
        self._open = session.open

    def result(self) -> StepResult:
        assert self._open[0] is self, "asked for out of order, or twice"
        self._open.popleft()
        return self._run()


def fake_sample(logits: np.ndarray, record: np.ndarray) -> int:
    """What a ``FakeSampler`` gives for a row [V] with a ``SAMPLING`` record."""
    if not np.isfinite(logits.max()):
        return -1
    if not record["temperature"]:
        return int(logits.argmax())
    values = {name: float(record[name]) for name in ("temperature", "top_p", "min_p")}
    ids, weights = candidates(logits, SamplingParams(**values, top_k=int(record["top_k"])))
    random = np.random.default_rng([*record["seed"].tolist(), int(record["counter"])])
    return int(random.choice(ids, p=weights))


def fake_logits(tokens: list[int], vocab_size: int, end_bias: float = 0.5) -> np.ndarray:
    """Logits that every earlier token and its place decide."""
    random = np.random.default_rng(zlib.crc32(np.array(tokens, np.int64).tobytes()))
    logits = random.standard_normal(vocab_size).astype(np.float32)
    logits[END] += end_bias
    return logits


def greedy(prompt: list[int], tokens: int, vocab_size: int = 50, end_bias: float = 0.5, end: int | None = END) -> list[int]:
    """What a request alone must give, computed without engine, scheduler or pool."""
    known = list(prompt)
    while len(known) < len(prompt) + tokens:
        known.append(int(fake_logits(known, vocab_size, end_bias).argmax()))
        if known[-1] == end:
            break
    return known[len(prompt) :]


def drain(
    engine: Engine, outputs: dict[str, CompletionOutput] | None = None, steps: int = 100_000
) -> dict[str, CompletionOutput]:
    """Step until nothing is left, and put the pieces together."""
    outputs = {} if outputs is None else outputs
    while engine.has_work:
        steps -= 1
        assert steps > 0, "the engine does not come to an end"
        collect(engine, outputs)
    return outputs


def collect(engine: Engine, outputs: dict[str, CompletionOutput]) -> None:
    """One step."""
    for piece in engine.step():
        output = outputs.setdefault(piece.request_id, CompletionOutput(0))
        assert output.finish_reason is None, "a piece after the last"
        output.text += piece.text
        output.token_ids += piece.token_ids
        if piece.logprobs is not None:
            output.logprobs = (output.logprobs or []) + piece.logprobs
        output.finish_reason, output.stop_reason, output.error = piece.finish_reason, piece.stop_reason, piece.error


def params(**values: object) -> SamplingParams:
    """Greedy unless said otherwise."""
    return SamplingParams(**{"temperature": 0.0, **values})  # type: ignore[arg-type]
