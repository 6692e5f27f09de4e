"""The zoo's side of ``pipelines.bench.genai``, each part in a process of its own.

python -m pipelines.bench.zoo_worker rewrite CHECKPOINT           folder -> rewritten graph and weight table
python -m pipelines.bench.zoo_worker build CHECKPOINT REGISTRY    folder -> stored engine; verified; prints its REF
python -m pipelines.bench.zoo_worker serve REGISTRY REF THREADS   answers prefill and decode orders, line by line
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

LIMITS = ("limits.max_context=4096", "limits.max_tokens=512", "limits.max_sequences=4", "limits.max_blocks=1025")


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def compose(checkpoint: Path) -> Any:
    from zoo.checkpoints.adopt import adopt
    from zoo.config import compose_model

    return compose_model(adopt(checkpoint), ["quant=none", "hardware=cpu", *LIMITS])


def rewrite(checkpoint: Path) -> None:
    """Check the checkpoint, expand, rewrite, and lay the weights out; no weight is read."""
    import zoo.build
    from zoo.compilers.onnxruntime import bind_later

    spec, _ = zoo.build.open_checkpoint(compose(checkpoint))
    model, table = bind_later(zoo.build.rewrite(spec))
    say(nodes=len(model.graph.node), weights=len(table["weights"]), bytes=table["size"])


def build(checkpoint: Path, root: Path) -> None:
    """Build and store, then read every blob back and compare it with its digest."""
    import zoo.build
    from zoo.artifacts.registry import Registry

    registry = Registry(root)
    result = zoo.build.build(compose(checkpoint), registry)
    problems = registry.verify(result.entry.ref)
    say(ref=result.entry.ref, built=result.built, problems=[str(problem) for problem in problems])


class Stepper:
    """Greedy generation straight on a session, all sequences in step. Sequence i owns the blocks that follow i's."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.size = session.limits.block_size
        self.width = -(-session.limits.max_context // self.size)

    def batch(self, pieces: list[tuple[int, list[int], int]], rows: bool) -> Any:
        """One step over (sequence, new tokens, tokens computed before)."""
        import numpy as np

        from zoo.runtime.abi import Batch

        used = max(-(-(done + len(new)) // self.size) for _, new, done in pieces)
        starts = np.cumsum([0, *(len(new) for _, new, _ in pieces)])
        tables = [[1 + sequence * self.width + block for block in range(used)] for sequence, _, _ in pieces]
        for row, (_, new, done) in zip(tables, pieces, strict=True):
            row[-(-(done + len(new)) // self.size) :] = [0] * (used - -(-(done + len(new)) // self.size))
        return Batch(
            token_ids=np.array([token for _, new, _ in pieces for token in new], np.int32),
            positions=np.concatenate([np.arange(done, done + len(new), dtype=np.int32) for _, new, done in pieces]),
            query_starts=starts.astype(np.int32),
            kv_lengths=np.array([done + len(new) for _, new, done in pieces], np.int32),
            block_tables={"full": np.array(tables, np.int32)},
            logit_rows=(starts[1:] - 1).astype(np.int32) if rows else np.zeros(0, np.int32),
        )

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Chunked by the engine's token limit, one sequence after the other; gives the first new tokens."""
        first = []
        for sequence, prompt in enumerate(prompts):
            limit = self.session.limits.max_tokens
            for done in range(0, len(prompt), limit):
                last = done + limit >= len(prompt)
                result = self.session.step(self.batch([(sequence, prompt[done : done + limit], done)], last))
            first.append(int(result.logits[0].argmax()))
        return first

    def decode(self, prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
        """Seconds of ``count`` steps after the prompts, and the new tokens of each sequence, the first one included."""
        made = [[token] for token in self.prefill(prompts)]
        started = time.perf_counter()
        for step in range(count):
            pieces = [(row, made[row][-1:], len(prompt) + step) for row, prompt in enumerate(prompts)]
            logits = self.session.step(self.batch(pieces, True)).logits
            for row, token in enumerate(logits.argmax(axis=1)):
                made[row].append(int(token))
        return time.perf_counter() - started, made


def serve(root: Path, ref: str, threads: int) -> None:
    from zoo.artifacts.registry import Registry
    from zoo.runtime.sessions import open_session

    started = time.perf_counter()
    with Registry(root).open(ref) as opened:
        verified = time.perf_counter() - started
        session = open_session(opened.folder, opened.manifest, threads)
        say(load=time.perf_counter() - started, verify=verified)
        stepper = Stepper(session)
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "prefill":
                started = time.perf_counter()
                tokens = [[token] for token in stepper.prefill(order["prompts"])]
                say(seconds=time.perf_counter() - started, tokens=tokens)
            else:
                seconds, tokens = stepper.decode(order["prompts"], order["count"])
                say(seconds=seconds, tokens=tokens)
        session.close()


def main() -> None:
    match sys.argv[1:]:
        case ["rewrite", checkpoint]:
            rewrite(Path(checkpoint))
        case ["build", checkpoint, root]:
            build(Path(checkpoint), Path(root))
        case ["serve", root, ref, threads]:
            serve(Path(root), ref, int(threads))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
