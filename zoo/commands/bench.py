"""``zoo bench``: throughput and latency of one engine under a queue of requests of fixed lengths.

All requests are queued at once; prompts are random token ids; decoding is greedy and ignores end tokens. Time to first token
counts from the start, so it includes waiting in the queue; inter-token latency is the time between two tokens of a request.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np

from zoo.commands.output import print_json, print_table
from zoo.errors import RequestError
from zoo.runtime.request import SamplingParams


def bench(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from zoo.llm import LLM

    for name in ("requests", "input_tokens", "output_tokens"):
        if getattr(arguments, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give at least 1")
    started = time.perf_counter()
    with LLM(arguments.ref, registry=arguments.registry, threads=arguments.threads, checkpoint=arguments.checkpoint) as llm:
        loaded = time.perf_counter() - started
        data = {"ref": llm.ref, "load_s": round(loaded, 3), **measure(llm, arguments)}
    if arguments.json:
        print_json(data)
    else:
        print_table(("WHAT", "VALUE"), [(key.replace("_", " "), value) for key, value in data.items()])
    return 0


def measure(llm: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the queue once, after a short warm-up, and say what it took."""
    rng = np.random.default_rng(0)
    engine, count = llm.engine, arguments.requests
    prompts = rng.integers(0, engine.session.vocab_size, (count, arguments.input_tokens)).tolist()
    params = SamplingParams(max_tokens=arguments.output_tokens, temperature=0.0, ignore_eos=True)
    llm.generate(prompts[:1], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    for index, prompt in enumerate(prompts):
        engine.add_request(f"bench-{index}", prompt, params)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    gaps: list[float] = []
    steps = tokens = 0
    start = time.perf_counter()
    while engine.has_work:
        pieces = engine.step()
        now, steps = time.perf_counter(), steps + 1
        for piece in pieces:
            if piece.error:
                raise RequestError(piece.error)
            tokens += len(piece.token_ids)
            if piece.request_id in last:
                gaps.append(now - last[piece.request_id])
            first.setdefault(piece.request_id, now - start)
            last[piece.request_id] = now
    seconds = time.perf_counter() - start
    return {
        "requests": count,
        "input_tokens": arguments.input_tokens,
        "output_tokens": arguments.output_tokens,
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(tokens / seconds, 1),
        "total_tokens_per_s": round((tokens + count * arguments.input_tokens) / seconds, 1),
        "steps": steps,
        **_percentiles("ttft_ms", list(first.values())),
        **_percentiles("inter_token_ms", gaps),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def _percentiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    if not seconds:
        return {f"{name}_p50": None, f"{name}_p99": None}
    return {f"{name}_p{p}": round(float(np.percentile(seconds, p)) * 1e3, 2) for p in (50, 99)}
