"""Variants of one kernel under some loads: each is compared with the default and timed; the fastest wins if it wins by enough."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

import numpy as np

from zoo.plugins.kernels import Kernel, Launch
from zoo.tuning.bench import Array, Bench, scratch_of

GAIN = 0.98  # of the default's time that a variant must stay under; less is noise
FINALISTS = 3
ROUNDS = 3
# How far a variant's outputs may be from the default's, by what they are rounded to: root mean square, relative to that of the
# default's, and the largest, relative to the default's largest. Sums in another order end in another rounding now and then.
TOLERANCES = {
    "float32": (1e-4, 1e-3),
    "float16": (2e-3, 2**-9),
    "bfloat16": (5e-3, 2**-6),
    "float8e4m3": (3e-2, 2**-3),
}


@dataclass(frozen=True)
class Variant:
    """One candidate: what the hardware profile would say, and the steps of a plan that follow from it."""

    tuning: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    launches: Sequence[Launch]
    label: str

    @property
    def kernels(self) -> list[Kernel]:
        return [one.kernel for one in self.launches]


@dataclass
class Load:
    """Sizes of a step, and operands for them.

    sets      addresses by tensor: what a rotation goes through
    outputs   tensor -> dtype and how many values, which are compared
    moved     bytes that must be moved at least, 0 if that says nothing; flops likewise
    tolerance as in ``TOLERANCES``, where what an output is rounded to is not what most of the difference comes from
    """

    name: str
    sizes: Mapping[str, int]
    sets: Sequence[Mapping[str, int]]
    outputs: Mapping[str, tuple[str, int]]
    moved: int = 0
    flops: int = 0
    tolerance: tuple[float, float] | None = None


@dataclass
class Timing:
    """Seconds of a variant under each load, or why it has none."""

    variant: Variant
    seconds: list[float] = field(default_factory=list)
    wrong: str = ""

    def ratio(self, other: Timing) -> float:
        """Geometric mean, over loads, of this one's time by the other's."""
        return exp(sum(log(mine / theirs) for mine, theirs in zip(self.seconds, other.seconds, strict=True)) / len(self.seconds))


@dataclass
class Outcome:
    """``best`` is ``default`` unless another one won. ``complete``: there was time for every variant."""

    name: str
    loads: Sequence[Load]
    timings: list[Timing]
    default: Timing
    best: Timing
    complete: bool = True

    @property
    def better(self) -> bool:
        return self.best is not self.default


def compete(bench: Bench, name: str, variants: Sequence[Variant], loads: Sequence[Load], deadline: float) -> Outcome | None:
    """The first variant is the default. None when not even that one runs."""
    bench.prepare(kernel for variant in variants for kernel in variant.kernels)
    sizes = [scratch_of((one for variant in variants for one in variant.launches), load.sizes) for load in loads]
    scratch = {key: bench.allocate(max(one.get(key, 0) for one in sizes)) for key in {key for one in sizes for key in one}}
    trials: list[_Trial] = []
    complete = True
    for variant in variants:
        if trials and time.perf_counter() > deadline:
            complete = False
            break
        trial = _Trial(bench, variant, loads, scratch)
        if not trial.timing.wrong:
            trial.compare(trials[0].made if trials else trial.made)
        if not trial.timing.wrong:
            trial.timing.seconds = trial.seconds()
        trials.append(trial)
        if trials[0].timing.wrong:
            return None
    timings = [one.timing for one in trials]
    return Outcome(name, loads, timings, timings[0], _finals([one for one in trials if not one.timing.wrong]), complete)


class _Trial:
    """One variant with addresses in it, and what it gives."""

    def __init__(self, bench: Bench, variant: Variant, loads: Sequence[Load], scratch: Mapping[str, int]) -> None:
        self.timing = Timing(
            variant, wrong=next((bench.failed[one.name] for one in variant.kernels if one.name in bench.failed), "")
        )
        self._bench, self._loads = bench, loads
        self.made: list[dict[str, Array]] = []
        self._calls = [
            [bench.program(variant.steps, {**one, **scratch}, load.sizes) for one in load.sets]
            for load in (loads if not self.timing.wrong else ())
        ]
        for load, calls in zip(loads, self._calls, strict=False):
            for tensor, (dtype, count) in load.outputs.items():
                bench.poison(load.sets[0][tensor], dtype, count)
            bench.now(calls[:1])
            self.made.append({name: bench.fetch(load.sets[0][name], *one) for name, one in load.outputs.items()})

    def compare(self, wanted: Sequence[Mapping[str, Array]]) -> None:
        """Say in ``timing.wrong`` what is not as wanted, and forget what was made unless it is what others are compared with."""
        for load, made, want in zip(self._loads, self.made, wanted, strict=True):
            if reason := difference(made, want, load):
                self.timing.wrong = f"{load.name}: {reason}"
                break
        if wanted is not self.made:
            self.made = []

    def seconds(self) -> list[float]:
        return [self._bench.seconds(calls) for calls in self._calls]


def _finals(trials: list[_Trial]) -> Timing:
    """The best few against the default once more, in turns, so that a clock that drifts favours nobody."""
    first, *rest = trials
    default = first.timing
    finalists = [first, *sorted(rest, key=lambda one: one.timing.ratio(default))[:FINALISTS]]
    rounds = [[one.seconds() for one in finalists] for _ in range(ROUNDS)]
    for place, one in enumerate(finalists):
        one.timing.seconds = [float(value) for value in np.median([turn[place] for turn in rounds], axis=0)]
    best = min((one.timing for one in finalists), key=lambda one: one.ratio(default))
    return best if best.ratio(default) < GAIN else default


def difference(made: Mapping[str, Array], wanted: Mapping[str, Array], load: Load) -> str:
    """Why outputs are not those of the default; empty if they are."""
    for tensor, (dtype, _) in load.outputs.items():
        got, want = made[tensor], wanted[tensor]
        if not np.isfinite(got).all():
            return f"{tensor} has {int((~np.isfinite(got)).sum())} values that are no finite numbers"
        mean, largest = load.tolerance or TOLERANCES[dtype]
        size = float(np.sqrt(np.square(want, dtype=np.float64).mean())) or 1.0
        off = got.astype(np.float64) - want
        error, worst = float(np.sqrt(np.square(off).mean())) / size, float(np.abs(off).max()) / (float(np.abs(want).max()) or 1.0)
        if error > mean or worst > largest:
            return f"{tensor} is off by {error:.1e} (root mean square) and {worst:.1e} (largest)"
    return ""
