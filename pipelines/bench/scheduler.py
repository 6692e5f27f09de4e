"""What a step costs on the host, beside the model: microseconds of scheduling and of turning results into text.

    python -m pipelines.bench.scheduler [--tokenizer FOLDER] [--json]

The session does nothing, so what is timed is bookkeeping. There are two: ``logits`` hands out the same logits over a
vocabulary of 64, of which the engine takes the largest, and ``samples`` hands out tokens. Each row is the median over decode
steps with all sequences running. ``schedule`` plans the step and lays the batch out (and, where the session samples, gathers
how, and gives names to the tokens to come); ``rest`` is everything after the session: choosing, text (with a tokenizer), end
conditions, pieces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.runtime.abi import Batch, EngineLimits, Sampling, StepResult, Ticket
from zoo.runtime.engine import Engine
from zoo.runtime.request import SamplingParams
from zoo.runtime.tokenizer import Tokenizer

CASES = ((1, 100), (64, 100), (1024, 100), (64, 1_000), (64, 10_000), (64, 30_000), (1024, 1_000))  # (sequences, context)
VOCAB = 64
STEPS = 60
BLOCK = 16
BUDGET = 8192


class Idle:
    """A session without a model that gives logits."""

    vocab_size = VOCAB

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self._logits = np.random.default_rng(0).standard_normal((limits.max_rows, VOCAB)).astype(np.float32)

    def step(self, batch: Batch) -> StepResult:
        return StepResult(logits=self._logits[: len(batch.logit_rows)])

    def close(self) -> None:
        pass


class IdleSampler(Idle):
    """A session without a model that samples."""

    samples = True

    def submit(self, batch: Batch, sampling: Sampling | None = None) -> Ticket:
        return Over(StepResult(token_ids=self._logits[: len(batch.logit_rows)].argmax(axis=1).astype(np.int32)))


@dataclass
class Over:
    """The ticket of a step that is over."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


def measure(kind: str, sequences: int, context: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Median microseconds of a decode step with so many sequences of at least that context."""
    filling = 2 * sequences * context // BUDGET + 10  # steps in which the first sequences already go on
    longest = context + STEPS + filling
    blocks = 1 + sequences * (2 + longest // BLOCK)
    limits = EngineLimits(BUDGET, sequences, sequences, longest, blocks, BLOCK)
    session = IdleSampler(limits) if kind == "samples" else Idle(limits)
    engine = Engine(session, tokenizer.detokenizer if tokenizer else None, steps_ahead=0)
    for index in range(sequences):
        params = SamplingParams(temperature=0.0, max_tokens=None)
        engine.add_request(str(index), [1 + index % (VOCAB - 1)] * context, params)
    while any(s.computed < context for s in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    plan, rest = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        step = engine.scheduler.schedule()
        assert step is not None and len(step.sampled) == sequences
        sampling = None
        if isinstance(session, IdleSampler):
            sampling = engine.scheduler.rows.sample(step)
            engine.scheduler.rows.expect(step, sampling)
        middle = time.perf_counter()
        result = session.submit(step.batch, sampling).result() if isinstance(session, IdleSampler) else session.step(step.batch)
        after = time.perf_counter()
        engine._postprocess(step, sampling, result)
        plan.append(middle - start)
        rest.append(time.perf_counter() - after)
    engine.close()
    return {
        "session": kind,
        "sequences": sequences,
        "context": context,
        "schedule_us": round(statistics.median(plan) * 1e6, 1),
        "rest_us": round(statistics.median(rest) * 1e6, 1),
    }


def main() -> None:
    """Print a row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json, to time text too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    tokenizer = Tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    rows = [measure(kind, *case, tokenizer) for kind in ("logits", "samples") for case in CASES]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'session':>8} {'sequences':>9} {'context':>8} {'schedule µs':>12} {'rest µs':>9} {'µs/sequence':>12}")
    for row in rows:
        plan, rest = row["schedule_us"], row["rest_us"]
        each = (plan + rest) / row["sequences"]
        print(f"{row['session']:>8} {row['sequences']:>9} {row['context']:>8} {plan:>12} {rest:>9} {each:>12.2f}")


if __name__ == "__main__":
    main()
