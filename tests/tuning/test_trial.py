"""Variants against the default: who wins, who is left out, and why."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import CompileError
from zoo.plugins.kernels import Kernel
from zoo.runtime.abi import EngineLimits
from zoo.runtime.cuda.driver import Device
from zoo.tuning import elementwise, trial
from zoo.tuning.bench import Bench, copies, step_json
from zoo.tuning.shapes import PlanKernel, Shapes
from zoo.tuning.trial import Load, Outcome, Timing, Variant, compete, difference

Seconds = dict[str, float]


@pytest.fixture
def bench(engine: tuple[Path, EngineManifest], tmp_path: Path) -> Iterator[Bench]:
    with cuda_on_cpu.gpu_on_cpu() as gpu:
        device = Device(90)
        made = Bench(device, EngineLimits(**engine[1].limits), tmp_path, cuda_on_cpu.compile_kernels)
        yield made
        made.close()
        device.close()
    assert gpu.live() == []


@pytest.fixture
def norm(plan: dict[str, Any]) -> PlanKernel:
    found = Shapes(plan).norm
    assert found is not None
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seconds], None]:
    """Let variants take so many seconds, by label."""

    def take(seconds: Seconds) -> None:
        monkeypatch.setattr(trial._Trial, "seconds", lambda self: [seconds[self.timing.variant.label]] * len(self._loads))

    return take


def compared(bench: Bench, norm: PlanKernel, variants: Sequence[Variant], deadline: float = float("inf")) -> Outcome | None:
    with bench.memory():
        return compete(bench, "rows", variants, elementwise.norm_loads(bench, norm, [8]), deadline)


def with_epsilon(variant: Variant, epsilon: float, label: str) -> Variant:
    """A variant that gives something else."""
    launch = variant.launches[0]
    args = tuple(epsilon if isinstance(arg, float) else arg for arg in launch.args)
    changed = dataclasses.replace(launch, args=args)
    return Variant({"row_warps": 99}, [step_json(changed)], [changed], label)


def test_the_fastest_wins(bench: Bench, norm: PlanKernel, clock: Callable[[Seconds], None]) -> None:
    clock({"default": 3.0, "2 warps": 1.0})
    found = compared(bench, norm, elementwise.norm_variants(norm))
    assert found is not None and found.better and found.best.variant.tuning == {"row_warps": 2}
    assert found.best.ratio(found.default) == pytest.approx(1 / 3) and found.complete


def test_noise_does_not_win(bench: Bench, norm: PlanKernel, clock: Callable[[Seconds], None]) -> None:
    clock({"default": 1.0, "2 warps": 0.99})
    found = compared(bench, norm, elementwise.norm_variants(norm))
    assert found is not None and not found.better and found.best.variant.label == "default"


def test_what_gives_something_else_does_not_win(bench: Bench, norm: PlanKernel, clock: Callable[[Seconds], None]) -> None:
    clock({"default": 3.0, "2 warps": 2.0, "wrong": 0.1, "poison": 0.1})
    variants = elementwise.norm_variants(norm)
    variants += [with_epsilon(variants[0], 5.0, "wrong"), with_epsilon(variants[0], float("nan"), "poison")]
    found = compared(bench, norm, variants)
    assert found is not None and found.best.variant.label == "2 warps"
    reasons = {one.variant.label: one.wrong for one in found.timings if one.wrong}
    assert set(reasons) == {"wrong", "poison"} and "y is off by" in reasons["wrong"] and "no finite" in reasons["poison"]


def test_what_does_not_compile_or_load_is_left_out(
    bench: Bench, norm: PlanKernel, clock: Callable[[Seconds], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock({"default": 3.0, "2 warps": 2.0, "16 warps": 0.1, "32 warps": 0.1})
    monkeypatch.setattr(elementwise, "WARPS", (2, 16, 32))
    variants = elementwise.norm_variants(norm)
    known = {one.label: one.kernels[0].name for one in variants}

    def compile_kernels(kernels: Sequence[Kernel], sm: int, folder: Path) -> dict[str, dict[str, Any]]:
        if any(one.name == known["16 warps"] for one in kernels):
            raise CompileError("not with 16")
        made = cuda_on_cpu.compile_kernels(kernels, sm, folder)
        return {name: data | ({"shared": 1 << 30} if name == known["32 warps"] else {}) for name, data in made.items()}

    bench._compile = compile_kernels
    found = compared(bench, norm, variants)
    assert found is not None and found.best.variant.label == "2 warps"
    reasons = {one.variant.label: one.wrong for one in found.timings if one.wrong}
    assert reasons["16 warps"] == "not with 16" and "shared memory" in reasons["32 warps"] and len(reasons) == 2


def test_without_a_default_there_is_nothing_to_compare(bench: Bench, norm: PlanKernel) -> None:
    variants = elementwise.norm_variants(norm)
    assert compared(bench, norm, [with_epsilon(variants[0], float("nan"), "default"), *variants[1:]]) is None


def test_after_the_deadline_no_variant_is_begun(bench: Bench, norm: PlanKernel) -> None:
    found = compared(bench, norm, elementwise.norm_variants(norm), time.perf_counter() - 1)
    assert found is not None and not found.complete and [one.variant.label for one in found.timings] == ["default"]


def test_differences() -> None:
    load = Load("x", {}, [], {"y": ("bfloat16", 1000)})
    want = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert difference({"y": want * 1.001}, {"y": want}, load) == ""
    assert "root mean square" in difference({"y": want * 1.01}, {"y": want}, load)
    one = want.copy()
    one[7] += 0.1
    assert "largest" in difference({"y": one}, {"y": want}, load), "one wrong value of a thousand"
    one[7] = np.inf
    assert "1 values" in difference({"y": one}, {"y": want}, load)
    nothing = np.zeros(1000, np.float32)
    assert difference({"y": nothing}, {"y": nothing}, load) == ""


def test_operands_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.tuning.bench.COLD", 1000)
    assert (copies(1), copies(300), copies(5000)) == (64, 4, 1)


def test_random_operands_repeat_a_pattern(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.tuning.bench.PATTERN", 37)
    with bench.memory():
        values = bench.fetch(bench.random("bfloat16", 1000, 2.0, seed=1), "bfloat16", 1000)
    assert (values[37:] == values[:-37]).all() and len(set(values[:37].tolist())) > 30


def test_ratio_is_a_geometric_mean() -> None:
    variant = Variant({}, [], [], "")
    assert Timing(variant, [2.0, 8.0]).ratio(Timing(variant, [1.0, 1.0])) == pytest.approx(4.0)
