"""Energy through a stand-in for NVML: the counter, power where there is none, and every reason why there is neither."""

from __future__ import annotations

import time
from typing import Any

import pytest

from zoo.benchmark.energy import Meter, Nvml, Taken


class Library:
    """libnvidia-ml: ``joules`` and ``watts`` None for what the GPU does not tell."""

    def __init__(self, joules: list[int] | None = None, watts: int | None = 300_000) -> None:
        self.joules, self.watts = joules, watts
        self.started = self.shut = 0
        self.used = [5 << 30, 9 << 30, 7 << 30]

    def nvmlInit_v2(self) -> int:
        self.started += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.shut += 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
        if uuid.value != b"GPU-1":
            return 6
        handle._obj.value = 42
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, out: Any) -> int:
        assert handle.value == 42
        if self.joules is None:
            return 3
        out._obj.value = self.joules.pop(0) * 1000
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: Any, out: Any) -> int:
        if self.watts is None:
            return 3
        out._obj.value = self.watts
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, out: Any) -> int:
        out._obj.used = self.used[0] if len(self.used) == 1 else self.used.pop(0)
        return 0


def opened(library: Library) -> Nvml:
    found = Nvml.open("GPU-1", library)
    assert isinstance(found, Nvml)
    return found


def test_the_counter_is_read_twice() -> None:
    with Meter(opened(Library([1000, 1600])), period=0.01) as meter:
        time.sleep(0.05)
    taken = meter.taken
    assert (taken.joules, taken.how, taken.reason, taken.memory) == (600.0, "energy counter", None, 9 << 30)
    assert taken.to_json(seconds=2.0, tokens=1200) == {
        "joules": 600.0,
        "joules_per_output_token": 0.5,
        "watts": 300.0,
        "measured_by": "energy counter",
        "reason": None,
    }


def test_power_is_added_up_where_there_is_no_counter() -> None:
    began = time.perf_counter()
    with Meter(opened(Library()), period=0.01) as meter:
        time.sleep(0.1)
    longest = time.perf_counter() - began
    assert meter.taken.how == "power samples" and meter.taken.joules is not None
    assert 300 * 0.1 <= meter.taken.joules <= 300 * longest, "300 W all the time"


def test_a_gpu_that_tells_nothing() -> None:
    with Meter(opened(Library(watts=None)), period=0.01) as meter:
        pass
    assert meter.taken.joules is None and meter.taken.reason == "the GPU tells neither its energy nor its power"


def test_reasons_why_there_is_no_gpu_to_ask() -> None:
    class Silent(Library):
        def nvmlInit_v2(self) -> int:
            return 9

    assert Nvml.open("GPU-1", Silent()) == "NVML does not start (error 9)"
    library = Library()
    assert Nvml.open("GPU-2", library) == "NVML does not know the GPU GPU-2 (error 6)" and library.shut == library.started
    assert "there is no NVML here" in str(Nvml.open("GPU-1", object()))
    with Meter("no GPU") as meter:
        pass
    assert meter.taken == Taken(reason="no GPU")
    assert meter.taken.to_json(1.0, 1)["joules_per_output_token"] is None


def test_an_old_library_without_the_counter() -> None:
    class Old:
        nvmlInit_v2 = nvmlShutdown = nvmlDeviceGetHandleByUUID = nvmlDeviceGetMemoryInfo = lambda self, *_: 0

    assert opened_any(Old()).millijoules() is None


def opened_any(library: Any) -> Nvml:
    found = Nvml.open("any", library)
    assert isinstance(found, Nvml)
    return found


def test_an_error_goes_through_and_the_thread_ends() -> None:
    meter = Meter(opened(Library([1, 2])), period=0.01)
    with pytest.raises(ZeroDivisionError), meter:
        _ = 1 / 0
    assert not meter._thread.is_alive()
