"""Throughput of a ``cuda`` engine on the GPU at hand, with random weights of the model's shape, and where a step's time goes.

    python -m pipelines.bench.gpu REGISTRY REF [--cases 128/128/2048,1000/1000/1024,...] [--profile] [--work FOLDER]

REF is an engine that was built without a checkpoint (`zoo engines models=llama-3.1-8b quant=fp8-kv hardware=h200-sxm`). A random
checkpoint of its tensors is written first (needs torch, for speed), with uniform activation scales, which change no timing.
Requests are all queued at once, greedy, fixed lengths (input/output/requests). Each case runs once after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from argparse import Namespace
from math import prod
from pathlib import Path
from typing import Any

SHARD = 4_000_000_000  # bytes of one file
SCALE = 0.02  # of every activation: random weights of 0.02 give values around 1


def write_random(folder: Path, table: list[dict[str, Any]]) -> int:
    """Every tensor that a weight table reads, bfloat16, in safetensors shards, and scales.json. Gives the bytes."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {}
    scales: dict[str, float] = {}

    def visit(recipe: dict[str, Any]) -> None:
        if recipe["op"] == "tensor":
            shapes[recipe["name"]] = tuple(recipe["shape"])
        if recipe["op"] == "scale":
            scales[recipe["name"]] = SCALE
        for child in recipe.get("inputs", ()):
            visit(child)

    for row in table:
        visit(row["recipe"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scales.json").write_text(json.dumps(scales))
    generator = torch.Generator("cuda").manual_seed(0)
    names, written, shard = list(shapes), 0, 0
    places: dict[str, str] = {}
    while names:
        part: list[str] = []
        size = 0
        while names and (not part or size + 2 * prod(shapes[names[0]]) <= SHARD):
            size += 2 * prod(shapes[names[0]])
            part.append(names.pop(0))
        header, at = {}, 0
        for name in part:
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, at + 2 * prod(shapes[name])]}
            at += 2 * prod(shapes[name])
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        shard += 1
        places |= dict.fromkeys(part, f"model-{shard:05d}.safetensors")
        with (folder / places[part[0]]).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in part:
                values = torch.randn(shapes[name], device="cuda", generator=generator, dtype=torch.float32)
                values = values * 0.02 if len(shapes[name]) > 1 else 1 + 0.02 * values
                file.write(values.to(torch.bfloat16).cpu().view(torch.uint8).numpy().data)
        written += size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    torch.cuda.empty_cache()
    return written


def run_case(llm: Any, isl: int, osl: int, requests: int) -> dict[str, Any]:
    from zoo.commands.bench import measure

    return measure(llm, Namespace(requests=requests, input_tokens=isl, output_tokens=osl), llm._opened.manifest)


def profile(llm: Any, sequences: int, context: int, steps: int = 20) -> list[tuple[str, float]]:
    """Milliseconds of a decode step by kind of launch, each launch timed by events of its own, and of its captured graph."""
    import numpy as np

    from zoo.runtime.abi import SAMPLING, Batch, Sampling
    from zoo.runtime.cuda.program import Gemm
    from zoo.runtime.cuda.steps import bucket, captured_step

    session = llm.engine.session
    device, engine, stream = session._device, session._engine, session._stream
    size = session.limits.block_size
    per = -(-context // size)
    assert 1 + sequences * per <= session.limits.max_blocks, "the pools are too small for this profile"
    table = 1 + np.arange(sequences * per, dtype=np.int32).reshape(sequences, per)
    count = np.arange(sequences, dtype=np.int32)
    batch = Batch(
        count % 1000,
        np.full(sequences, context - 1, np.int32),
        np.arange(sequences + 1, dtype=np.int32),
        np.full(sequences, context, np.int32),
        {"full": table},
        count,
    )
    sampling = Sampling(np.zeros(sequences, SAMPLING), np.zeros(0, np.int32), True)
    for _ in range(3):
        session.submit(batch, sampling).result()
    start, stop = device.event(timing=True), device.event(timing=True)
    device.record(start, stream)
    for _ in range(steps):
        ticket = session.submit(batch, sampling)
        ticket.result()
    device.record(stop, stream)
    device.wait(stream)
    rows = [("step, captured", device.elapsed(start, stop) / steps)]
    step = captured_step(batch, sampling, session.limits, engine, bucket(sequences, session.limits.max_sequences))
    numbers = engine.symbols.set(step.sizes)
    graph = next(value for key, value in session._graphs.items() if key == (step.chooser, *step.sizes.values()))
    device.record(start, stream)
    for _ in range(steps):
        device.replay(graph, stream)
    device.record(stop, stream)
    device.wait(stream)
    rows.append(("graph alone", device.elapsed(start, stop) / steps))
    names = {function.handle: name.rpartition("-")[0] for name, function in engine.functions.items()}
    kinds: dict[str, list[Any]] = {}
    for program in ("graph", "greedy"):
        for one in engine.programs[program]._steps:
            kind = f"gemm {one.n}x{one.k}" if isinstance(one, Gemm) else names[one.function.handle]
            kinds.setdefault(kind, []).append(one)
    for kind, launches in kinds.items():

        def body(launches: list[Any] = launches) -> None:
            engine.programs["graph"].run_steps(launches, numbers, stream)

        body()
        captured = device.capture(stream, body)
        device.replay(captured, stream)
        device.record(start, stream)
        for _ in range(steps):
            device.replay(captured, stream)
        device.record(stop, stream)
        device.wait(stream)
        rows.append((f"{kind} x{len(launches)}", device.elapsed(start, stop) / steps))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry", type=Path)
    parser.add_argument("ref")
    parser.add_argument("--cases", default="128/128/2048,1000/1000/1024,2048/128/512,780/128/1024,128/128/1")
    parser.add_argument("--profile", default="", help="sequences/context pairs of decode steps to take apart: 64/1024,1/200")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/zoo-bench"))  # noqa: S108
    parser.add_argument("--no-overlap", action="store_true", help="launch every kernel behind the end of the one before")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()

    from zoo.artifacts.registry import Registry
    from zoo.llm import LLM

    with Registry(arguments.registry).open(arguments.ref) as opened:
        table = json.loads((opened.folder / "weights.json").read_text())["weights"]
    if not (arguments.work / "model.safetensors.index.json").exists():
        started = time.perf_counter()
        size = write_random(arguments.work, table)
        print(f"random checkpoint: {size / 1e9:.1f} GB in {time.perf_counter() - started:.1f} s", flush=True)
    started = time.perf_counter()
    llm = LLM(arguments.ref, registry=arguments.registry, checkpoint=arguments.work)
    loaded = time.perf_counter() - started
    from zoo.runtime.request import SamplingParams

    llm.generate([[1] * 128], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    first = time.perf_counter() - started
    session = llm.engine.session
    session._device.overlap = not arguments.no_overlap
    cache = session.limits.max_blocks * session.limits.block_size
    name = session._device.name
    print(f"{name}: loaded in {loaded:.1f} s, first token after {first:.1f} s, {cache:,} tokens of cache", flush=True)
    for pair in arguments.profile.split(",") if arguments.profile else ():
        sequences, context = map(int, pair.split("/"))
        print(f"\ndecode step of {sequences} sequences at context {context}, ms")
        for name, spent in profile(llm, sequences, context):
            print(f"  {name:<34} {spent:8.3f}", flush=True)
    print("\n| ISL/OSL | requests | output tok/s | total tok/s | steps | TTFT p50, ms | inter-token p50, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in arguments.cases.split(",") if arguments.cases else ():
        isl, osl, requests = map(int, case.split("/"))
        found = run_case(llm, isl, osl, requests)
        print(
            f"| {isl}/{osl} | {requests} | {found['output_tokens_per_s']:,.0f} | {found['total_tokens_per_s']:,.0f} | "
            f"{found['steps']} | {found['ttft_ms_p50']} | {found['inter_token_ms_p50']} |",
            flush=True,
        )
    llm.close()
    if not arguments.keep:
        shutil.rmtree(arguments.work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
