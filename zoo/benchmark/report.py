"""One case, measured: run, and everything that follows from the run, as JSON and as a column for people."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.artifacts.machine import describe_machine
from zoo.artifacts.manifest import EngineManifest
from zoo.benchmark.configuration import gpu_of
from zoo.benchmark.energy import Meter, Nvml
from zoo.benchmark.latency import Latencies, latencies, summary
from zoo.benchmark.loop import Progress, Recording, run
from zoo.benchmark.roofline import roofline
from zoo.benchmark.workload import Case
from zoo.errors import RequestError
from zoo.runtime.engine import Engine
from zoo.runtime.request import SamplingParams

WARM_UP = 2  # output tokens of one request: a prompt's step and a step of one token have run


@dataclass(frozen=True)
class Measured:
    """``data`` is the case as JSON; the latencies behind its percentiles are for a plot."""

    data: dict[str, Any]
    latencies: Latencies


def measure_case(
    engine: Engine,
    case: Case,
    manifest: EngineManifest | None = None,
    report: Progress | None = None,
    nvml: Nvml | str | None = None,
) -> Measured:
    """Run a case once, after a warm-up of one request. The engine must have nothing else to do.

    manifest   without one there is neither a roofline nor a cost
    nvml       what to measure energy by, or why not; None: as the manifest's GPU gives it

    Raises RequestError for a case that does not fit the engine, or a request that fails.
    """
    length, room = case.input_tokens + case.output_tokens, engine.scheduler.max_length
    if length > room:
        raise RequestError(
            f"case {case}: a request of {length} tokens, and this engine holds {room} tokens of one sequence; ask for fewer, or "
            "build the engine with a larger limits.max_context"
        )
    prompts = case.prompts(engine.session.vocab_size)
    for prompt in prompts[:1]:
        run(engine, [prompt], _params(min(WARM_UP, case.output_tokens)), case.arrivals()[:1])
    opened = nvml if nvml is not None else _nvml(manifest)
    try:
        with Meter(opened) as meter:
            recording = run(engine, prompts, _params(case.output_tokens), case.arrivals(), report)
    finally:
        if nvml is None and isinstance(opened, Nvml):
            opened.close()
    found = latencies(recording)
    return Measured(_data(case, recording, found, meter, manifest), found)


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def _nvml(manifest: EngineManifest | None) -> Nvml | str:
    gpu = gpu_of(describe_machine(), manifest) if manifest else None
    if gpu is None:
        return "the engine runs on no GPU, and NVML measures GPUs"
    return Nvml.open(gpu.uuid) if gpu.uuid else f"{gpu.name} tells no UUID to find it by in NVML"


def _data(case: Case, recording: Recording, found: Latencies, meter: Meter, manifest: EngineManifest | None) -> dict[str, Any]:
    seconds, tokens, memory = recording.seconds, recording.tokens, meter.taken.memory
    spec = manifest.spec if manifest else {}
    prefilled = case.requests * case.input_tokens
    return {
        "case": str(case),
        "requests": case.requests,
        "input_tokens": case.input_tokens,
        "output_tokens": case.output_tokens,
        "rate": case.rate or None,
        "seed": case.seed,
        "seconds": round(seconds, 4),
        "output_tokens_per_s": round(tokens / seconds, 1),
        "total_tokens_per_s": round((tokens + prefilled) / seconds, 1),
        "requests_per_s": round(case.requests / seconds, 3),
        **summary("ttft_ms", found.ttft),
        **summary("inter_token_ms", found.inter_token),
        **summary("end_to_end_ms", found.end_to_end),
        "steps": len(recording.steps),
        "preemptions": recording.preemptions,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "peak_gpu_memory_mb": round(memory / 1e6) if memory is not None else None,
        "queueing_s": round(recording.queueing, 4),
        "measuring_us_per_step": round(recording.noting / len(recording.steps) * 1e6, 1),
        "energy": meter.taken.to_json(seconds, tokens),
        "cost": cost(spec.get("hardware", {}), seconds, tokens),
        "roofline": roofline(spec, recording.steps, seconds, tokens),
    }


def cost(hardware: dict[str, Any], seconds: float, tokens: int) -> dict[str, Any]:
    """USD for a million output tokens at the profile's price an hour, everything else a service costs left out."""
    price, date = hardware.get("price"), hardware.get("price_date") or None
    if not isinstance(price, int | float) or not price:
        name = hardware.get("name", "(unknown)")
        reason = f"the hardware profile {name} states no price"
        return {"usd_per_million_output_tokens": None, "usd_an_hour": None, "price_date": date, "reason": reason}
    each = price / 3600 * seconds / tokens * 1e6
    return {"usd_per_million_output_tokens": round(each, 4), "usd_an_hour": price, "price_date": date, "reason": None}


def table(cases: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row for each figure, a column for each case."""
    rows = []
    for label, value in FIGURES:
        cells = [value(case) for case in cases]
        if any(cell is not None for cell in cells):
            rows.append([label, *("-" if cell is None else cell for cell in cells)])
    return ["CASE", *(case["case"] for case in cases)], rows


def reasons(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Why figures are missing."""
    found = [
        f"no {part}: {case[part]['reason']}" for case in cases for part in ("energy", "cost", "roofline") if case[part]["reason"]
    ]
    return list(dict.fromkeys(found))


def _number(value: float | None, form: str = ",.1f") -> str | None:
    return None if value is None else format(value, form)


def _spread(name: str) -> Any:
    def text(case: dict[str, Any]) -> str | None:
        if case[f"{name}_mean"] is None:
            return None
        return " / ".join(format(case[f"{name}_{one}"], ",.2f") for one in ("mean", "p50", "p90", "p99"))

    return text


FIGURES: list[tuple[str, Any]] = [
    ("output tokens/s", lambda case: _number(case["output_tokens_per_s"])),
    ("total tokens/s", lambda case: _number(case["total_tokens_per_s"])),
    ("requests/s", lambda case: _number(case["requests_per_s"], ",.2f")),
    ("requests/s offered", lambda case: _number(case["rate"], ",.2f")),
    ("seconds", lambda case: _number(case["seconds"], ",.3f")),
    ("steps", lambda case: _number(case["steps"], ",d")),
    ("preemptions", lambda case: _number(case["preemptions"], ",d")),
    ("TTFT ms: mean / p50 / p90 / p99", _spread("ttft_ms")),
    ("inter-token ms: mean / p50 / p90 / p99", _spread("inter_token_ms")),
    ("end to end ms: mean / p50 / p90 / p99", _spread("end_to_end_ms")),
    ("of the roofline", lambda case: _number(case["roofline"]["fraction"], ".1%")),
    ("output tokens/s at the roofline", lambda case: _number(case["roofline"]["output_tokens_per_s"])),
    ("J per output token", lambda case: _number(case["energy"]["joules_per_output_token"], ".4f")),
    ("mean W", lambda case: _number(case["energy"]["watts"], ",.0f")),
    ("USD per million output tokens", lambda case: _number(case["cost"]["usd_per_million_output_tokens"], ".4f")),
    ("peak memory of the process, MB", lambda case: _number(case["peak_rss_mb"], ",d")),
    ("peak memory of the GPU, MB", lambda case: _number(case["peak_gpu_memory_mb"], ",d")),
    ("measuring, us a step", lambda case: _number(case["measuring_us_per_step"])),
]
