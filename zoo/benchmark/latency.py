"""Latencies of a run: of first tokens, between tokens, of whole requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.benchmark.loop import Recording
from zoo.benchmark.workload import Floats

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Latencies:
    """Seconds.

    ttft          from when a request was due to its first token: waiting in the queue included [requests]
    inter_token   between two tokens of one request [output tokens - requests]
    end_to_end    from when a request was due to its last token [requests]
    """

    ttft: Floats
    inter_token: Floats
    end_to_end: Floats


def latencies(recording: Recording) -> Latencies:
    """Every request has got at least one token."""
    counts = [len(step) for step in recording.receivers]
    who = np.concatenate([np.array(step, np.int64) for step in recording.receivers])
    when = np.repeat(np.array(recording.times), counts)
    order = np.argsort(who, kind="stable")  # requests in turn, the tokens of each in the order in which they came
    who, when = who[order], when[order]
    first = np.flatnonzero(np.diff(who, prepend=-1))
    last = np.append(first[1:], len(who)) - 1
    assert len(first) == len(recording.due), "a request without a token"
    gaps = np.diff(when)[np.diff(who) == 0]
    return Latencies(when[first] - recording.due, gaps, when[last] - recording.due)


def summary(name: str, seconds: Floats) -> dict[str, float | None]:
    """``{name}_mean``, ``_p50``, ``_p90``, ``_p99`` in milliseconds; None where there is nothing to count."""
    if not len(seconds):
        return {f"{name}_{one}": None for one in ("mean", *(f"p{p}" for p in PERCENTILES))}
    found = {f"{name}_mean": seconds.mean()} | {f"{name}_p{p}": np.percentile(seconds, p) for p in PERCENTILES}
    return {key: round(float(value) * 1e3, 3) for key, value in found.items()}
