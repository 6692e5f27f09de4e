"""The zoo beside ONNX Runtime GenAI on one checkpoint, in one run: building, then float32 generation on this CPU.

    python -m pipelines.bench.genai [--checkpoint FOLDER] [--shape llama-3.2-1b] [--parts rewrite,build,generate]

rewrite    folder -> rewritten graph and weight table, beside GenAI's builder (fp16) as a whole
build      folder -> stored, verified engine that loads, beside the same builder run
generate   decode of 1 and 4 sequences and prefill of 2,048 tokens, float32 both, turn by turn; peak memory of load and prefill

Without --checkpoint a random one of the shape is written first. GenAI lives in an environment of its own (.bench-venv, made
here from genai-requirements.txt). Every step runs in a fresh process; memory is that of the process with its children.
The table goes to standard output; the exit status says whether every goal was met.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pipelines.bench.make_checkpoint import SHAPES, write_checkpoint
from pipelines.bench.measure import Measured, Worker, run

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".bench-venv"
PEER = VENV / "bin" / "python"
REQUIREMENTS = Path(__file__).with_name("genai-requirements.txt")
PARTS = ("rewrite", "build", "generate")


@dataclass
class Row:
    """One line of the table; ``goal`` says what must hold, ``met`` whether it did (None: nothing is asked)."""

    what: str
    ours: str
    theirs: str
    goal: str = ""
    met: bool | None = None


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def setup_peer() -> None:
    """Make GenAI's environment, once; a marker says that it is complete."""
    marker = VENV / "requirements.txt"
    if marker.exists() and marker.read_bytes() == REQUIREMENTS.read_bytes():
        return
    print(f"setting up {VENV.name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([str(PEER), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS)], check=True)
    shutil.copyfile(REQUIREMENTS, marker)


def ours(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.bench.zoo_worker", *arguments]


def peer_build(checkpoint: Path, out: Path, precision: str, work: Path) -> Measured:
    """GenAI's model builder for CPUs; its progress goes into a log."""
    builder = [str(PEER), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out)]
    return run([*builder, "-p", precision, "-e", "cpu", "-c", str(work / "cache")], work / f"builder-{precision}.log")


def last_json(log: Path) -> dict[str, object]:
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    answer: dict[str, object] = json.loads(lines[-1])
    return answer


def building(checkpoint: Path, work: Path, parts: list[str]) -> list[Row]:
    """Parts rewrite and build. One unmeasured run each warms the page cache, so that both read the checkpoint from memory."""
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    rows = []
    fresh = {"XDG_CACHE_HOME": str(work / "xdg")}  # no digest or bytecode of an earlier run
    shutil.rmtree(work / "fp16", ignore_errors=True)
    theirs = peer_build(checkpoint, work / "fp16", "fp16", work)
    shutil.rmtree(work / "fp16")
    if "rewrite" in parts:
        mine = run(ours("rewrite", str(checkpoint)), work / "rewrite.log", fresh)
        rows += [
            Row(
                "rewrite: seconds", f"{mine.seconds:.2f}", f"{theirs.seconds:.2f}", "<= 1/10", mine.seconds <= theirs.seconds / 10
            ),
            Row("rewrite: peak memory", gb(mine.rss), gb(theirs.rss), "<= 1/10", mine.rss <= theirs.rss / 10),
        ]
    if "build" in parts:
        shutil.rmtree(work / "registry", ignore_errors=True)
        mine = run(ours("build", str(checkpoint), str(work / "registry")), work / "build.log", fresh)
        found = last_json(work / "build.log")
        sound = found["built"] is True and found["problems"] == []
        rows += [
            Row(
                "build and verify: seconds", f"{mine.seconds:.2f}", f"{theirs.seconds:.2f}", "<=", mine.seconds <= theirs.seconds
            ),
            Row("build and verify: peak memory", gb(mine.rss), gb(theirs.rss), "<= 1/4", mine.rss <= theirs.rss / 4),
            Row("build: stored and verified", str(found["ref"]), "", "sound", sound),
        ]
    return rows


def generating(checkpoint: Path, work: Path, threads: int, rounds: int, count: int, prefill: int) -> list[Row]:
    """Part generate: two workers, one order at a time, the order of the two drawn anew each round."""
    run(ours("build", str(checkpoint), str(work / "registry")), work / "build.log")  # finds what is built already
    ref = str(last_json(work / "build.log")["ref"])
    if not (work / "fp32" / "genai_config.json").exists():
        peer_build(checkpoint, work / "fp32", "fp32", work)
    config = json.loads((checkpoint / "config.json").read_text())
    draw = random.Random(0)  # noqa: S311

    def prompts(number: int, length: int) -> list[list[int]]:
        return [[draw.randrange(2, config["vocab_size"]) for _ in range(length)] for _ in range(number)]

    def mine() -> Worker:
        return Worker(ours("serve", str(work / "registry"), ref, str(threads)), work / "serve.log")

    def peer() -> Worker:
        script = str(Path(__file__).with_name("genai_worker.py"))
        return Worker([str(PEER), script, str(work / "fp32"), str(threads)], work / "peer.log")

    rows = []
    long = prompts(1, prefill)
    starters: tuple[Callable[[], Worker], ...] = (mine, peer)
    workers = [start() for start in starters]
    try:
        seconds = [worker.ask("prefill", prompts=long)["seconds"] for worker in workers]
        peaks = [worker.peak for worker in workers]
        bound = weight_bytes(config) + 1_000_000_000
        rows += [
            Row("load, seconds (ours verifies and binds)", *(f"{worker.ready['load']:.1f}" for worker in workers)),
            Row(f"prefill {prefill}, tokens/s", *(f"{prefill / s:.1f}" for s in seconds)),
            Row("load + prefill: peak memory", *(gb(p.rss) for p in peaks), f"<= {gb(bound)}", peaks[0].rss <= bound),
            Row("load + prefill: peak anonymous memory", *(gb(p.anonymous) for p in peaks)),
        ]
        for number in (1, 4):
            given = prompts(number, 64)
            rates: tuple[list[float], list[float]] = ([], [])
            agree = True
            for _ in range(rounds):
                answers = {}
                for index in draw.sample((0, 1), 2):
                    answers[index] = workers[index].ask("decode", prompts=given, count=count)
                    rates[index].append(number * count / answers[index]["seconds"])
                agree &= [tokens[:4] for tokens in answers[0]["tokens"]] == [tokens[:4] for tokens in answers[1]["tokens"]]
            middle = [median(rate) for rate in rates]
            ratio = median(mine / theirs for mine, theirs in zip(*rates, strict=True))
            both = [f"{m:.2f} ({max(rate):.2f})" for m, rate in zip(middle, rates, strict=True)]
            what = f"decode, {number} sequence{'s' * (number > 1)}, tokens/s: median of {rounds} (best)"
            rows += [
                Row(what, *both, goal=">=", met=middle[0] >= middle[1]),
                Row(f"decode, {number}: ours / theirs, median of rounds", f"{ratio:.3f}", ""),
                Row(f"decode, {number}: the same first tokens", str(agree), str(agree), "equal", agree),
            ]
    finally:
        for worker in workers:
            worker.close()
    return rows


def weight_bytes(config: dict[str, int]) -> int:
    """float32 bytes of the checkpoint's parameters."""
    from math import prod

    from pipelines.bench.make_checkpoint import tensors_of

    return 4 * sum(prod(shape) for _, shape in tensors_of(config))


def show(rows: list[Row]) -> None:
    """The table, in Markdown."""
    lines = [("", "zoo", "GenAI 0.18", "goal", "")]
    lines += [(r.what, r.ours, r.theirs, r.goal, {True: "met", False: "MISSED", None: ""}[r.met]) for r in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for number, line in enumerate(lines):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, help="folder that is kept; default: a temporary one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=16, help="tokens a sequence in one decode measurement")
    parser.add_argument("--prefill", type=int, default=2048)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; pick from {', '.join(PARTS)}")
    setup_peer()
    with tempfile.TemporaryDirectory(prefix="zoo-bench-") as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        checkpoint = arguments.checkpoint or work / arguments.shape
        if not (checkpoint / "config.json").exists():
            write_checkpoint(checkpoint, arguments.shape)
        rows = building(checkpoint, work, parts) if {"rewrite", "build"} & set(parts) else []
        if "generate" in parts:
            rows += generating(checkpoint, work, arguments.threads, arguments.rounds, arguments.count, arguments.prefill)
        show(rows)
    return int(any(row.met is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
