"""Decode steps of a model with Llama-8B's layers in several forms: is each right, and how long does it take.

    python -m tests.gpu.step_check build FOLDER [HARDWARE] [NAME ...]      engines of all forms; no GPU
    python -m tests.gpu.step_check run FOLDER [NAME ...]                   on a GPU, with random weights; about two minutes

A form is a ``tuning`` of the hardware: products left to cuBLASLt, kernels for few rows with other tiles or prefetch, scales left
to the reader or not. Each is run with launches that overlap and with launches that wait for each other. Checked are: both give
the same bits, prefill and decode, again and again; and how far logits are from those of the first form (float8 activations move
to a neighbour now and then when a sum is rounded elsewhere). Timed are captured graphs, weights read from memory, no sampling:
the whole step, one layer of it, and by that the step of a model of 32 layers.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "llama-3.1-8b"
LAYERS, WHOLE = 8, 32
LIMITS = ("limits.max_tokens=2048", "limits.max_sequences=256", "limits.max_rows=256", "limits.max_context=1024")
CONTEXT = 96
SEQUENCES = (1, 2, 8, 16, 32, 64, 128, 256)
SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336", "128256x4096")
REPEATS = 30
FAR = 0.35  # relative error of logits of random FP8 layers from those of the first form; what is wrong is near 1 or NaN


def only(*rows: int) -> dict[str, Any]:
    """The default tilings, for these numbers of rows alone."""
    from zoo.plugins.skinny_gemm.cuda import tiling

    found: dict[str, Any] = {}
    for name in SHAPES:
        n, k = map(int, name.split("x"))
        dtype = "bfloat16" if name == SHAPES[-1] else "float8e4m3"
        found[name] = {str(most): list(dataclasses.astuple(tiling(most, n, k, dtype))) for most in rows}
    return found


def large_tiles() -> dict[str, Any]:
    """More bytes in flight for each program."""
    tiles = only(16, 32, 64)
    for name, splits in (("6144x4096", 2), ("4096x4096", 2), ("28672x4096", 1), ("4096x14336", 4)):
        tiles[name] |= {"16": [16, 64, 256, splits, 4, 4]}
    return tiles


def largest_tiles() -> dict[str, Any]:
    """One program for each multiprocessor where there are enough."""
    tiles = large_tiles()
    tiles["6144x4096"]["16"] = [16, 128, 256, 4, 8, 3]
    tiles["4096x4096"]["16"] = [16, 128, 256, 4, 8, 3]
    tiles["28672x4096"]["16"] = [16, 128, 256, 1, 8, 3]
    tiles["4096x14336"]["16"] = [16, 128, 256, 8, 8, 3]
    return tiles


def hybrid() -> dict[str, Any]:
    """The narrow products left to cuBLASLt."""
    tiles = large_tiles()
    return tiles | {"6144x4096": {}, "4096x4096": {}}


# name -> tuning
FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "cublas outer": lambda: {"skinny": {name: {} for name in SHAPES}, "deferred": False},
    "cublas": lambda: {"skinny": {name: {} for name in SHAPES}},
    "default": dict,
    "large": lambda: {"skinny": large_tiles()},
    "largest": lambda: {"skinny": largest_tiles()},
    "hybrid": lambda: {"skinny": hybrid()},
}


def build(folder: Path, hardware: str, names: list[str]) -> None:
    from zoo.artifacts.registry import Registry
    from zoo.build import build as build_engine
    from zoo.config import compose

    options = [f"models={MODEL}", f"model.num_layers={LAYERS}", "quant=fp8-kv", f"hardware={hardware}", "compiler=cuda", *LIMITS]
    for name in names:
        spec = compose(options)
        spec = dataclasses.replace(spec, hardware=dataclasses.replace(spec.hardware, tuning=FORMS[name]()))
        result = build_engine(spec, Registry(folder / name.replace(" ", "-")))
        print(name, result.entry.ref, f"{result.seconds:.1f} s", flush=True)


class Decoder:
    """Sequences of one length in a session, and graphs of a step of theirs."""

    def __init__(self, session: Any, vocab: int) -> None:
        self.session, self.device, self.stream = session, session._device, session._stream
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, vocab, (max(SEQUENCES), CONTEXT), dtype=np.int32)
        self.per = -(-CONTEXT // session.limits.block_size)
        self.table = 1 + rng.permutation(max(SEQUENCES) * self.per).astype(np.int32).reshape(-1, self.per)

    def batch(self, first: int, count: int, begin: int, end: int) -> Any:
        """Tokens ``begin`` to ``end`` of some sequences; logits of the last of each."""
        from zoo.runtime.abi import Batch

        new, rows = end - begin, np.arange(count, dtype=np.int32)
        return Batch(
            self.tokens[first : first + count, begin:end].reshape(-1),
            np.tile(np.arange(begin, end, dtype=np.int32), count),
            np.arange(count + 1, dtype=np.int32) * new,
            np.full(count, end, np.int32),
            {"full": self.table[first : first + count]},
            (rows + 1) * new - 1,
        )

    def prefill(self) -> np.ndarray:
        """All but the last token of every sequence; logits."""
        count = self.session.limits.max_tokens // (CONTEXT - 1)
        parts = []
        for first in range(0, max(SEQUENCES), count):
            batch = self.batch(first, min(count, max(SEQUENCES) - first), 0, CONTEXT - 1)
            parts.append(self.session.step(batch).logits.copy())
        return np.concatenate(parts)

    def decode(self, count: int, times: int) -> Iterator[np.ndarray]:
        """Logits of the last token: once as it comes, then by its graph."""
        self.session._graphs.clear()
        for _ in range(times):
            yield self.session.step(self.batch(0, count, CONTEXT - 1, CONTEXT)).logits.copy()

    def seconds(self, count: int) -> tuple[float, float]:
        """Of the graph of a step, and of one layer in it."""
        from zoo.runtime.cuda.program import Gemm
        from zoo.runtime.cuda.steps import bucket, captured_step

        session, engine = self.session, self.session._engine
        list(self.decode(count, 2))
        (graph,) = session._graphs.values()
        size = bucket(count, session.limits.max_sequences)
        step = captured_step(self.batch(0, count, CONTEXT - 1, CONTEXT), None, session.limits, engine, size)
        numbers = engine.symbols.set(step.sizes)
        program = engine.programs["graph"]
        places = [place for place, one in enumerate(program._steps) if isinstance(one, Gemm)][:-1]
        layers = program._steps[places[0] : places[-1] + 1]

        def record() -> None:
            engine.programs["resolve"].run(numbers, self.stream)  # a launch that overlaps has one to overlap with
            program.run_steps(layers, numbers, self.stream)

        part = self.device.capture(self.stream, record)
        spent = self.timed(graph), self.timed(part) / LAYERS
        self.device.free(part)
        return spent

    def timed(self, graph: int) -> float:
        device, stream = self.device, self.stream
        start, stop = device.event(timing=True), device.event(timing=True)
        times = []
        for _ in range(3):
            device.record(start, stream)
            for _ in range(REPEATS):
                device.replay(graph, stream)
            device.record(stop, stream)
            device.wait_event(stop)
            times.append(device.elapsed(start, stop) / REPEATS / 1e3)
        for event in (start, stop):
            device.free(event)
        return min(times)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    if not np.isfinite(got).all():
        return float("nan")
    return float(np.sqrt(((got - want).astype(np.float64) ** 2).mean() / (want.astype(np.float64) ** 2).mean()))


@dataclasses.dataclass
class Result:
    """Of one form: what is wrong, how far logits are from the first form's, (seconds of a step, of a layer) by overlap and
    sequences."""

    problems: list[str]
    errors: list[float]
    spent: dict[str, list[tuple[float, float]]]


def run(folder: Path, name: str, work: Path) -> Result:
    """One form. The first one's logits are kept in ``work`` for the others."""
    from pipelines.bench.gpu import write_random
    from zoo.artifacts.registry import Registry
    from zoo.runtime.sessions.cuda import CudaSession

    registry = Registry(folder / name.replace(" ", "-"))
    (entry,) = [entry for entry in registry.entries() if entry.current]
    checkpoint, kept = work / "checkpoint", work / "logits.npz"
    made: dict[tuple[bool, int], np.ndarray] = {}
    result = Result([], [], {})
    with registry.open(entry.ref) as opened:
        if not (checkpoint / "model.safetensors.index.json").exists():
            write_random(checkpoint, json.loads((opened.folder / "weights.json").read_text())["weights"])
        session = CudaSession(opened.folder, opened.manifest, checkpoint, blocks=4096, fill=0xFF)
        decoder = Decoder(session, session.vocab_size)
        for overlap in (False, True):
            session._device.overlap = overlap
            made[overlap, 0] = decoder.prefill()
            for count in SEQUENCES:
                several = list(decoder.decode(count, 6 if overlap else 3))
                made[overlap, count] = several[0]
                if not all(np.array_equal(one, several[0]) for one in several):
                    result.problems.append(f"{count} sequences, overlap {overlap}: not the same twice")
                result.spent.setdefault("+" * overlap, []).append(decoder.seconds(count))
        session.close()
    if not kept.exists():
        np.savez(kept, **{str(count): made[False, count] for count in (0, *SEQUENCES)})
    with np.load(kept) as want:
        for count in (0, *SEQUENCES):
            if not np.array_equal(made[True, count], made[False, count]):
                result.problems.append(f"{count} sequences: overlap changes the logits")
            result.errors.append(relative(made[True, count], want[str(count)]))
            if not result.errors[-1] < FAR:
                result.problems.append(f"{count} sequences: {result.errors[-1]:.2f} from the first form")
    return result


def run_all(folder: Path, names: list[str], work: Path) -> int:
    """Every form in a process of its own: one that fails takes nothing with it."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    done: dict[str, Result] = {}
    wrong = 0
    for name in names:
        started, out = time.perf_counter(), work / "result.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.gpu.step_check", "one", str(folder), name]
        try:
            failed = subprocess.run(command, timeout=240, check=False).returncode
        except subprocess.TimeoutExpired:
            failed = -1
        spent = time.perf_counter() - started
        if failed or not out.exists():
            print(f"{name}: FAILED ({failed}) after {spent:.0f} s", flush=True)
            wrong += 1
            continue
        result = done[name] = Result(**json.loads(out.read_text()))
        wrong += len(result.problems)
        verdict = f"WRONG {result.problems}" if result.problems else "ok"
        errors = ", ".join(f"{count}: {error:.3f}" for count, error in zip((0, *SEQUENCES), result.errors, strict=True))
        print(f"{name}: {verdict}; off by {errors}; {spent:.0f} s", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    show(done)
    return wrong


def show(done: dict[str, Result]) -> None:
    print(f"\nus of one layer of a decode step, by sequences; and ms of a step of {WHOLE} layers, without sampling")
    print(f"{'':<16}" + "".join(f"{count:>8}" for count in SEQUENCES) + "   |" + "".join(f"{count:>8}" for count in SEQUENCES))
    for name, result in done.items():
        for overlap, rows in result.spent.items():
            layers = "".join(f"{layer * 1e6:8.1f}" for _, layer in rows)
            steps = "".join(f"{(step + (WHOLE - LAYERS) * layer) * 1e3:8.3f}" for step, layer in rows)
            print(f"{name + ' ' + overlap:<16}{layers}   |{steps}")
    print("+ : launches overlap")


def main() -> int:
    action, folder, *names = sys.argv[1:]
    hardware = names.pop(0) if action == "build" and names and names[0] not in FORMS else "h100-sxm"
    if unknown := [name for name in names if name not in FORMS]:
        raise SystemExit(f"unknown forms {', '.join(unknown)}; there are {', '.join(FORMS)}")
    names = names or list(FORMS)
    work = Path("/dev/shm/zoo-step-check")
    match action:
        case "build":
            build(Path(folder), hardware, names)
        case "one":
            (work / "result.json").write_text(json.dumps(dataclasses.asdict(run(Path(folder), names[0], work))))
        case "run":
            wrong = run_all(Path(folder), names, work)
            print(f"{wrong} problems")
            return int(wrong > 0)
        case _:
            raise SystemExit("build or run")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
