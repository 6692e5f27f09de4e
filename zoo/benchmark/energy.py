"""What a run took from its GPU: joules, and the most memory, as NVIDIA's management library (NVML) tells. Of the whole GPU.

The energy counter is the GPU's own and is read twice. Where there is none (before Volta, some virtual GPUs), power is sampled
by a thread and added up. Memory is sampled by the same thread, a few times a second: its calls leave the interpreter to others.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

PERIOD = 0.2  # seconds between two samples
COUNTER, SAMPLES = "energy counter", "power samples"


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """One GPU by its UUID. Every reading is None where the library or the GPU does not give it."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def open(cls, uuid: str, library: Any = None) -> Nvml | str:
        """The GPU, or why there is none."""
        try:
            nvml = library if library is not None else ctypes.CDLL("libnvidia-ml.so.1")
            handle = ctypes.c_void_p()
            if code := nvml.nvmlInit_v2():
                return f"NVML does not start (error {code})"
            if code := nvml.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(uuid.encode()), ctypes.byref(handle)):
                nvml.nvmlShutdown()
                return f"NVML does not know the GPU {uuid} (error {code})"
        except (OSError, AttributeError) as error:
            return f"there is no NVML here ({error})"
        return cls(nvml, handle)

    def millijoules(self) -> int | None:
        """Since the driver was loaded."""
        return self._read("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())

    def milliwatts(self) -> int | None:
        return self._read("nvmlDeviceGetPowerUsage", ctypes.c_uint())

    def memory_used(self) -> int | None:
        """Bytes, of all processes."""
        memory = _Memory()
        return None if self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)) else int(memory.used)

    def close(self) -> None:
        self._library.nvmlShutdown()

    def _read(self, function: str, value: Any) -> int | None:
        try:
            return None if getattr(self._library, function)(self._handle, ctypes.byref(value)) else int(value.value)
        except AttributeError:  # a library that is too old
            return None


@dataclass
class Taken:
    """``joules`` is None for the reason given. ``how``: by what it was measured. ``memory``: bytes, at most."""

    joules: float | None = None
    how: str | None = None
    reason: str | None = None
    memory: int | None = None

    def to_json(self, seconds: float, tokens: int) -> dict[str, Any]:
        """With joules for each output token and mean watts."""
        given = self.joules is not None
        return {
            "joules": round(self.joules, 1) if self.joules is not None else None,
            "joules_per_output_token": round((self.joules or 0) / tokens, 5) if given else None,
            "watts": round((self.joules or 0) / seconds, 1) if given else None,
            "measured_by": self.how,
            "reason": self.reason,
        }


class Meter:
    """Measures while a ``with`` block runs. ``nvml`` may be the reason why there is none."""

    def __init__(self, nvml: Nvml | str, period: float = PERIOD) -> None:
        self.taken = Taken(reason=nvml if isinstance(nvml, str) else None)
        self._nvml, self._period = nvml, period
        self._stop = threading.Event()
        self._samples: list[tuple[float, int | None]] = []  # (time, milliwatts)
        self._memory: list[int] = []
        self._counted = False

    def __enter__(self) -> Meter:
        if isinstance(self._nvml, Nvml):
            self._before = self._nvml.millijoules()
            self._counted = self._before is not None
            self._sample(self._nvml)
            self._thread = threading.Thread(target=self._watch, args=(self._nvml,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(self._nvml, Nvml):
            return
        after = self._nvml.millijoules()
        self._stop.set()
        self._thread.join()
        self._sample(self._nvml)
        taken = self.taken
        taken.memory = max(self._memory, default=None)
        if self._before is not None and after is not None:
            taken.joules, taken.how = (after - self._before) / 1e3, COUNTER
            return
        power = [(when, watts) for when, watts in self._samples if watts is not None]
        if len(power) < 2:
            taken.reason = "the GPU tells neither its energy nor its power"
            return
        pairs = itertools.pairwise(power)
        taken.joules = sum((t1 - t0) * (p0 + p1) / 2e3 for (t0, p0), (t1, p1) in pairs)
        taken.how = SAMPLES

    def _watch(self, nvml: Nvml) -> None:
        while not self._stop.wait(self._period):
            self._sample(nvml)

    def _sample(self, nvml: Nvml) -> None:
        if not self._counted:
            self._samples.append((time.perf_counter(), nvml.milliwatts()))
        if (used := nvml.memory_used()) is not None:
            self._memory.append(used)
