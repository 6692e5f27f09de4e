"""What a step costs on the host, beside the model: microseconds of scheduling and of turning logits into text.

    python -m pipelines.bench.scheduler [--tokenizer FOLDER] [--json]

The session does nothing: it hands out the same logits over a vocabulary of 64, so what is timed is bookkeeping. Each row is
the median over decode steps with all sequences running. ``schedule`` plans the step and lays the batch out; ``rest`` is
everything after the session: choosing greedily, text (with a tokenizer), end conditions, pieces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from zoo.runtime.abi import Batch, EngineLimits, StepResult
from zoo.runtime.engine import Engine
from zoo.runtime.request import SamplingParams
from zoo.runtime.tokenizer import Tokenizer

CASES = ((1, 100), (64, 100), (1024, 100), (64, 1_000), (64, 10_000), (64, 30_000), (1024, 1_000))  # (sequences, context)
VOCAB = 64
STEPS = 60
BLOCK = 16
BUDGET = 8192


class Idle:
    """A session without a model."""

    vocab_size = VOCAB

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self._logits = np.random.default_rng(0).standard_normal((limits.max_rows, VOCAB)).astype(np.float32)

    def step(self, batch: Batch) -> StepResult:
        return StepResult(logits=self._logits[: len(batch.logit_rows)])

    def close(self) -> None:
        pass


def measure(sequences: int, context: int, tokenizer: Tokenizer | None) -> dict[str, float]:
    """Median microseconds of a decode step with so many sequences of at least that context."""
    filling = 2 * sequences * context // BUDGET + 10  # steps in which the first sequences already go on
    longest = context + STEPS + filling
    blocks = 1 + sequences * (2 + longest // BLOCK)
    limits = EngineLimits(BUDGET, sequences, sequences, longest, blocks, BLOCK)
    engine = Engine(Idle(limits), tokenizer.detokenizer if tokenizer else None)
    for index in range(sequences):
        params = SamplingParams(temperature=0.0, max_tokens=None)
        engine.add_request(str(index), [1 + index % (VOCAB - 1)] * context, params)
    while any(s.computed < context for s in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    plan, rest = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        step = engine.scheduler.schedule()
        middle = time.perf_counter()
        assert step is not None and len(step.sampled) == sequences
        result = engine.session.step(step.batch)
        after = time.perf_counter()
        engine._postprocess(step, result)
        plan.append(middle - start)
        rest.append(time.perf_counter() - after)
    engine.close()
    return {
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
    rows = [measure(sequences, context, tokenizer) for sequences, context in CASES]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'sequences':>9} {'context':>8} {'schedule µs':>12} {'rest µs':>9} {'µs/sequence':>12}")
    for row in rows:
        each = (row["schedule_us"] + row["rest_us"]) / row["sequences"]
        print(f"{row['sequences']:>9} {row['context']:>8} {row['schedule_us']:>12} {row['rest_us']:>9} {each:>12.2f}")


if __name__ == "__main__":
    main()
