"""A stand-in for ``cuda.bindings.driver``: one or more GPUs of given SMs on host memory. Kernels are Python functions.

It is as strict as the documentation: what is freed twice, used after, or used by a thread without the context is an error;
copies stay inside what was allocated; fresh memory is full of 0xff, which is NaN in every float. A stream does what is queued
on it as late as it may: when somebody waits for it, or for an event that was recorded behind it. Copies from and to memory that
is not pinned are waited for, as the driver does.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

OK, INVALID, NO_MEMORY, NO_DEVICE, BAD_IMAGE, NO_BINARY, NOT_FOUND = 0, 1, 2, 100, 200, 209, 500
TEXTS = {
    INVALID: b"invalid argument",
    NO_MEMORY: b"out of memory",
    NO_DEVICE: b"no CUDA-capable device is detected",
    BAD_IMAGE: b"device kernel image is invalid",
    NO_BINARY: b"no kernel image is available for execution on the device",
    NOT_FOUND: b"named symbol not found",
    700: b"an illegal memory access was encountered",
}


@dataclass
class Kernel:
    """A kernel: C types of its arguments, and what it does with the grid and their values."""

    types: tuple[Any, ...]
    run: Callable[..., None]


class Driver:
    """``kernels`` by name are what every cubin holds; a cubin is ELF, and one that ends in "other" is for another GPU."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=97,
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0, CU_EVENT_BLOCKING_SYNC=1, CU_EVENT_DISABLE_TIMING=2)
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUresult = int
    CUstream = int

    class CUlaunchAttribute:
        def __init__(self) -> None:
            self.id, self.value = 0, SimpleNamespace()

    class CUlaunchConfig:
        gridDimX = gridDimY = gridDimZ = blockDimX = blockDimY = blockDimZ = sharedMemBytes = hStream = numAttrs = 0
        attrs: list[Any] = []  # noqa: RUF012

    def __init__(self, sms: tuple[int, ...] = (90,), room: int = 1 << 30, kernels: dict[str, Kernel] | None = None) -> None:
        self.sms, self.room, self.kernels = sms, room, kernels or {}
        self.memory: dict[int, np.ndarray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.handles: dict[int, Any] = {}
        self.attributes: dict[tuple[int, int], int] = {}
        self.captured: dict[int, list[Callable[[], None]]] = {}
        self.queued: dict[int, deque[Callable[[], None] | int]] = {}  # by stream: what is to be done, and events
        self.lock = threading.RLock()
        self.contexts, self.counted, self.fails = 0, 0x1000, {}
        self.current = threading.local()
        self.calls: list[str] = []
        self.overlapped = 0  # launches that may have started early

    def __getattribute__(self, name: str) -> Any:
        """``fails[name] = code`` lets a call fail."""
        if name.startswith("cu") and name in object.__getattribute__(self, "fails"):
            code = self.fails[name]
            return lambda *_: (code, None)
        return object.__getattribute__(self, name)

    def live(self) -> list[Any]:
        """What was made and not given back."""
        return [*self.memory, *self.host, *self.handles.values(), *["context"] * self.contexts]

    def cuInit(self, flags: int) -> tuple[int]:
        return (OK if self.sms else NO_DEVICE,)

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return OK, 13000

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return OK, len(self.sms)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return OK, index

    def cuDeviceGetName(self, length: int, device: int) -> tuple[int, bytes]:
        return OK, b"NVIDIA Standin\0\0\0"

    def cuDeviceGetAttribute(self, what: int, device: int) -> tuple[int, int]:
        major, minor = divmod(self.sms[device], 10)
        return OK, {75: major, 76: minor, 16: 132, 97: 232448}[what]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        self.contexts += 1
        return OK, 77

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[int]:
        self.contexts -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        assert context == 77
        self.current.is_set = True
        return (OK,)

    def cuCtxSynchronize(self) -> tuple[int]:
        for stream in list(self.queued):
            self._drain(stream, None)
        return (OK,)

    def cuMemGetInfo(self) -> tuple[int, int, int]:
        return OK, self.room - sum(block.nbytes for block in self.memory.values()), self.room

    def cuMemAlloc(self, size: int) -> tuple[int, int | None]:
        self._ready()
        assert size > 0
        if size > self.cuMemGetInfo()[1]:
            return NO_MEMORY, None
        block = np.full(size + 256, 255, np.uint8)
        start = -block.ctypes.data % 256
        block = block[start : start + size]
        self.memory[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cuMemFree(self, place: int) -> tuple[int]:
        self.cuCtxSynchronize()
        del self.memory[place]
        return (OK,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        self._ready()
        block = np.full(size, 255, np.uint8)
        self.host[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cuMemFreeHost(self, place: int) -> tuple[int]:
        self.cuCtxSynchronize()
        del self.host[place]
        return (OK,)

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        self._inside(to, size)
        self._queue(stream, lambda: ctypes.memmove(to, source, size))
        return self._drain(stream, None) if not self._pinned(source, size) else (OK,)

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        self._inside(source, size)
        self._queue(stream, lambda: ctypes.memmove(to, source, size))
        return self._drain(stream, None) if not self._pinned(to, size) else (OK,)

    def cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        self._inside(source, size)
        self._inside(to, size)
        return self._queue(stream, lambda: ctypes.memmove(to, source, size))

    def cuMemsetD8Async(self, place: int, value: int, count: int, stream: int) -> tuple[int]:
        if count:
            self._inside(place, count)
        return self._queue(stream, lambda: ctypes.memset(place, value, count))

    def cuMemsetD32Async(self, place: int, value: int, count: int, stream: int) -> tuple[int]:
        self._inside(place, 4 * count)
        return self._queue(stream, lambda: self.view(place, np.uint32, count).__setitem__(slice(None), value))

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        assert flags == 1
        return OK, self._handle("stream")

    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        return self._gone(stream, "stream")

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        self._ready()
        assert self.handles[stream] == "stream" and stream not in self.captured
        return self._drain(stream, None)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        assert self.handles[stream] == "stream" and self.handles[event][0] == "event"
        return self._queue(stream, lambda: self.cuEventSynchronize(event))

    def cuEventCreate(self, flags: int) -> tuple[int, int]:
        return OK, self._handle(("event", flags))

    def cuEventDestroy(self, event: int) -> tuple[int]:
        assert self.handles.pop(event)[0] == "event"
        return (OK,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:
        self._ready()
        assert self.handles[event][0] == "event" and self.handles[stream] == "stream"
        with self.lock:
            self.queued.setdefault(stream, deque()).append(event)
        return (OK,)

    def cuEventSynchronize(self, event: int) -> tuple[int]:
        self._ready()
        assert self.handles[event][0] == "event"
        for stream in list(self.queued):
            self._drain(stream, event)
        return (OK,)

    def cuEventElapsedTime(self, start: int, stop: int) -> tuple[int, float]:
        assert all(self.handles[event] == ("event", 0) for event in (start, stop)), "made with timing"
        return OK, 1.5

    def cuModuleLoadData(self, cubin: bytes) -> tuple[int, int | None]:
        if not cubin.startswith(b"\x7fELF"):
            return BAD_IMAGE, None
        return (NO_BINARY, None) if cubin.endswith(b"other") else (OK, self._handle("module"))

    def cuModuleUnload(self, module: int) -> tuple[int]:
        return self._gone(module, "module")

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, int | None]:
        assert self.handles[module] == "module"
        names = list(self.kernels)
        return (OK, 1 + names.index(name.decode())) if name.decode() in names else (NOT_FOUND, None)

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[int]:
        self.attributes[function, attribute] = value
        return (OK,)

    def cuLaunchKernel(self, function: int, *rest: int) -> tuple[int]:
        self._ready()
        x, y, z, threads, ty, tz, shared, stream, params, extra = rest
        if min(x, y, z) < 1 or shared > self.attributes.get((function, 8), 48 << 10):
            return (INVALID,)
        assert ty == tz == 1 and extra == 0 and threads % 32 == 0
        kernel = list(self.kernels.values())[function - 1]
        # the driver copies the arguments when it launches; behind them are those that Triton hides
        cells = (ctypes.c_uint64 * (len(kernel.types) + 2)).from_address(params)
        values = [kind.from_address(cell).value for kind, cell in zip(kernel.types, cells, strict=False)]
        assert [ctypes.c_uint64.from_address(cell).value for cell in cells[-2:]] == [0, 0]
        return self._queue(stream, lambda: kernel.run((x, y, z), *values))

    def cuLaunchKernelEx(self, config: Any, function: int, params: int, extra: int) -> tuple[int]:
        (attribute,) = config.attrs
        assert (config.numAttrs, attribute.id, vars(attribute.value)) == (1, 6, {"programmaticStreamSerializationAllowed": 1})
        self.overlapped += 1
        sides = (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.blockDimY, config.blockDimZ)
        return self.cuLaunchKernel(function, *sides, config.sharedMemBytes, config.hStream, params, extra)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert mode == 2 and self.handles[stream] == "stream"
        self.captured[stream] = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, int]:
        return OK, self._handle(("graph", self.captured.pop(stream)))

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        return OK, self._handle(("exec", self.handles[graph][1]))

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        kind, todo = self.handles[graph]
        assert kind == "exec" and self.handles[stream] == "stream"
        for action in todo:
            self._queue(stream, action)
        return (OK,)

    def cuGraphDestroy(self, graph: int) -> tuple[int]:
        assert self.handles.pop(graph)[0] == "graph"
        return (OK,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[int]:
        assert self.handles.pop(graph)[0] == "exec"
        return (OK,)

    def cuGetErrorString(self, code: int) -> tuple[int, bytes]:
        return OK, TEXTS[code]

    def view(self, place: int, dtype: Any, count: int) -> np.ndarray:
        """Values at an address of the GPU, shared."""
        nbytes = count * np.dtype(dtype).itemsize
        start, block = self._inside(place, nbytes)
        return block[start : start + nbytes].view(dtype)

    def _inside(self, place: int, size: int) -> tuple[int, np.ndarray]:
        self._ready()
        for at, block in self.memory.items():
            if at <= place and place + size <= at + block.nbytes:
                return place - at, block
        raise AssertionError(f"{size} bytes at {place:#x} are not inside one allocation")

    def _queue(self, stream: int, action: Callable[[], Any]) -> tuple[int]:
        assert self.handles[stream] == "stream"
        if stream in self.captured:
            self.captured[stream].append(action)
        else:
            with self.lock:
                self.queued.setdefault(stream, deque()).append(action)
        return (OK,)

    def _drain(self, stream: int, event: int | None) -> tuple[int]:
        """Do what is queued on a stream, up to the last record of an event, or all of it."""
        with self.lock:
            todo = self.queued.get(stream, deque())
            if event is not None:
                count = max((place + 1 for place, one in enumerate(todo) if one == event), default=0)
            else:
                count = len(todo)
            for _ in range(count):
                action = todo.popleft()
                if not isinstance(action, int):
                    action()
        return (OK,)

    def _pinned(self, place: int, size: int) -> bool:
        return any(at <= place and place + size <= at + block.nbytes for at, block in self.host.items())

    def _ready(self) -> None:
        assert getattr(self.current, "is_set", False), "this thread has no current context"

    def _handle(self, what: Any) -> int:
        self.counted += 16
        self.handles[self.counted] = what
        return self.counted

    def _gone(self, handle: int, what: str) -> tuple[int]:
        assert self.handles.pop(handle) == what
        return (OK,)
