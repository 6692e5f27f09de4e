"""One GPU through the CUDA driver: memory, streams, events, kernels from cubins, graphs.

It calls cuda-python's ``cuda.bindings.driver``; every call of that gives a tuple that begins with an error code. Handles and
addresses are plain integers here. A launch costs about half a microsecond of Python above the driver's own time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from zoo.errors import ArtifactError, EngineError, IncompatibleError, ResourceError, UnavailableError, ZooError
from zoo.resources import size_text
from zoo.runtime.cuda.arguments import Arguments

Array = np.ndarray[Any, Any]

PACKAGE = "install it with `pip install 'cuda-bindings>=13,<14'`"
OUT_OF_MEMORY = 2
LARGE_SHARED = 48 << 10  # bytes of shared memory that a kernel gets without asking
# Error codes of loading a cubin that is sound but not for this GPU or driver: INVALID_PTX, UNSUPPORTED_PTX_VERSION,
# NO_BINARY_FOR_GPU.
OTHER_GPU = (218, 222, 209)
# What cuInit says where there is a driver but no GPU to use: NO_DEVICE, STUB_LIBRARY, SYSTEM_DRIVER_MISMATCH, INVALID_DEVICE.
NO_GPU = (100, 34, 803, 101)


def bindings() -> Any:
    """cuda-python's driver module. UnavailableError when the package is missing."""
    try:
        from cuda.bindings import driver  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UnavailableError(f"the engine needs cuda-python ({error}); {PACKAGE}") from None
    return driver


class Device:
    """The first visible GPU of an SM (90 stands for 9.0), through its primary context, which torch and others share.

        sm, name              of the GPU
        driver_version        the newest CUDA that its driver knows: 13000 for 13.0
        multiprocessors       how many it has
        max_shared            bytes of shared memory that one block may ask for
        overlap               whether launches that may overlap the one before them do; may be set

    Everything it hands out is freed by ``close``; ``free`` gives one thing back earlier. Methods make the context the calling
    thread's; ``launch``, ``replay``, ``record`` and ``copy`` leave that out, so a thread that runs steps calls ``use`` first.
    One thread at a time may use a stream.

    Raises UnavailableError without the package, the driver or a GPU, IncompatibleError when no visible GPU has that SM,
    ResourceError when memory is short, EngineError when a call on the GPU fails.
    """

    def __init__(self, sm: int, driver: Any = None) -> None:
        self._driver = cu = driver if driver is not None else bindings()
        self._owned: dict[int, Callable[[], Any]] = {}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open = False
        self.sm = sm
        self.overlap = True
        self._configs: dict[int, Any] = {}  # of launches that overlap, by stream
        try:
            code = int(cu.cuInit(0)[0])
        except (RuntimeError, OSError) as error:  # cuda-python finds no libcuda, or one that is too old
            raise UnavailableError(f"the engine needs NVIDIA's driver, which does not load here: {error}") from None
        if code:
            what = "this machine has no GPU that may be used" if code in NO_GPU else "the CUDA driver does not start"
            raise UnavailableError(f"{what}: {self._text(code)}; choose a profile for the CPU, or a machine with such a GPU")
        self.driver_version = int(self._do("tell the driver's version", cu.cuDriverGetVersion()))
        self._device = self._find(sm)
        name = self._do("tell a GPU's name", cu.cuDeviceGetName(256, self._device))
        self.name = bytes(name).split(b"\0")[0].decode() if isinstance(name, bytes | bytearray) else str(name)
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        self.max_shared = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self._context = self._do("start a context", cu.cuDevicePrimaryCtxRetain(self._device))
        self._open = True
        self.use()
        self._cu_launch, self._cu_launch_ex, self._cu_graph = cu.cuLaunchKernel, cu.cuLaunchKernelEx, cu.cuGraphLaunch
        self._cu_record, self._cu_copy = cu.cuEventRecord, cu.cuMemcpyDtoDAsync

    def _find(self, sm: int) -> Any:
        cu, found = self._driver, []
        for index in range(int(self._do("count GPUs", cu.cuDeviceGetCount()))):
            self._device = self._do("find a GPU", cu.cuDeviceGet(index))
            major, minor = (self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
            if major * 10 + minor == sm:
                return self._device
            found.append(f"{major}.{minor}")
        if not found:
            raise UnavailableError(f"no GPU is visible, and one of SM {sm // 10}.{sm % 10} is needed; see CUDA_VISIBLE_DEVICES")
        raise IncompatibleError(
            f"no visible GPU has SM {sm // 10}.{sm % 10}, only {', '.join(sorted(set(found)))}; set CUDA_VISIBLE_DEVICES, or "
            "choose another profile"
        )

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._do("describe a GPU", self._driver.cuDeviceGetAttribute(attribute, self._device)))

    def use(self) -> None:
        """Make the GPU's context the calling thread's; cheap when it is already."""
        if getattr(self._local, "current", False):
            return
        assert self._open, "the device is closed"
        self._do("be selected", self._driver.cuCtxSetCurrent(self._context))
        self._local.current = True

    # memory

    def memory(self) -> tuple[int, int]:
        """Bytes of GPU memory that are free, and all of them."""
        self.use()
        free, total = self._do("tell its memory", self._driver.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, size: int, what: str = "") -> int:
        """An address of ``size`` bytes on the GPU, aligned to 256; ResourceError with sizes when there is no room."""
        self.use()
        result = self._driver.cuMemAlloc(max(size, 1))
        if int(result[0]) == OUT_OF_MEMORY:
            free, total = self.memory()
            raise ResourceError(
                f"the GPU cannot give {size_text(size)}{f' for {what}' if what else ''}: {size_text(free)} of its "
                f"{size_text(total)} is free; stop what else runs on it, lower the limits, or use a GPU with more memory"
            )
        place = int(self._do(f"give {size_text(size)}", result))
        return self._own(place, lambda: self._driver.cuMemFree(place))

    def pinned(self, size: int) -> Array:
        """Host memory that the GPU copies from and to at full speed, [size] uint8. Gone after ``free(array.ctypes.data)``."""
        self.use()
        result = self._driver.cuMemHostAlloc(max(size, 1), 0)
        if int(result[0]) == OUT_OF_MEMORY:
            raise ResourceError(f"this machine cannot give {size_text(size)} of pinned memory; free some, or raise its limit")
        place = int(self._do(f"pin {size_text(size)}", result))
        self._own(place, lambda: self._driver.cuMemFreeHost(place))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(place))

    def send(self, place: int, array: Array, stream: int) -> None:
        """Host to GPU. With pinned memory it returns at once, and the array must stay as it is until the copy is done."""
        assert array.flags.c_contiguous
        self.use()
        if array.nbytes:
            self._do("copy to the GPU", self._driver.cuMemcpyHtoDAsync(place, array.ctypes.data, array.nbytes, stream))

    def fetch(self, array: Array, place: int, stream: int) -> None:
        """GPU to host; ``wait`` before the array is read."""
        assert array.flags.c_contiguous
        self.use()
        if array.nbytes:
            self._do("copy from the GPU", self._driver.cuMemcpyDtoHAsync(array.ctypes.data, place, array.nbytes, stream))

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Within the GPU."""
        self._do("copy within its memory", self._cu_copy(to, source, size, stream))

    def fill(self, place: int, byte: int, size: int, stream: int) -> None:
        """Set ``size`` bytes to one value."""
        self.use()
        self._do("fill its memory", self._driver.cuMemsetD8Async(place, byte, size, stream))

    def fill_float(self, place: int, value: float, count: int, stream: int) -> None:
        """Set ``count`` float32 to one value: a scale for each row from one for the tensor."""
        self.use()
        bits = int(np.float32(value).view(np.uint32))
        self._do("fill its memory", self._driver.cuMemsetD32Async(place, bits, count, stream))

    # streams and events

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""
        self.use()
        flag = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        made = int(self._do("make a stream", self._driver.cuStreamCreate(int(flag))))
        return self._own(made, lambda: self._driver.cuStreamDestroy(made))

    def wait(self, stream: int) -> None:
        """Until all that was queued on a stream is done. EngineError when something of it failed."""
        self.use()
        self._do("finish", self._driver.cuStreamSynchronize(stream))

    def event(self, timing: bool = False, blocking: bool = False) -> int:
        """A new event. ``timing`` for ``elapsed``; ``blocking``: who waits for it sleeps rather than spins."""
        self.use()
        flags = self._driver.CUevent_flags
        chosen = 0 if timing else int(flags.CU_EVENT_DISABLE_TIMING)
        chosen |= int(flags.CU_EVENT_BLOCKING_SYNC) if blocking else 0
        made = int(self._do("make an event", self._driver.cuEventCreate(chosen)))
        return self._own(made, lambda: self._driver.cuEventDestroy(made))

    def record(self, event: int, stream: int) -> None:
        """Let the event come when all that is queued on the stream so far is done."""
        self._do("record an event", self._cu_record(event, stream))

    def wait_event(self, event: int) -> None:
        """Until an event has come; at once for one that was never recorded."""
        self.use()
        self._do("reach an event", self._driver.cuEventSynchronize(event))

    def stream_wait(self, stream: int, event: int) -> None:
        """Let what is queued on a stream from now on wait for an event of another stream."""
        self.use()
        self._do("wait for an event", self._driver.cuStreamWaitEvent(stream, event, 0))

    def elapsed(self, start: int, stop: int) -> float:
        """Milliseconds between two events made with ``timing``, which have come."""
        self.use()
        return float(self._do("tell a time", self._driver.cuEventElapsedTime(start, stop)))

    # kernels

    def load(self, cubin: bytes, name: str = "") -> int:
        """A module from a cubin. IncompatibleError when it is for another GPU, ArtifactError when it is none."""
        self.use()
        result = self._driver.cuModuleLoadData(cubin)
        code = int(result[0])
        if code in OTHER_GPU:
            raise IncompatibleError(
                f"kernel {name}: the cubin is not for {self.name} or needs a newer driver ({self._text(code)}); choose another "
                "profile, or update the driver"
            )
        if code and code != OUT_OF_MEMORY:
            raise ArtifactError(f"kernel {name}: the cubin cannot be loaded ({self._text(code)}); pull or rebuild the engine")
        made = int(self._do(f"load kernel {name}", result))
        return self._own(made, lambda: self._driver.cuModuleUnload(made))

    def function(self, module: int, name: str, shared: int = 0) -> int:
        """A kernel of a module by its name, allowed to use ``shared`` bytes of dynamic shared memory a block."""
        self.use()
        cu = self._driver
        if shared > self.max_shared:
            raise IncompatibleError(
                f"kernel {name} needs {shared:,} bytes of shared memory a block, {self.name} has {self.max_shared:,}; choose "
                "another profile"
            )
        result = cu.cuModuleGetFunction(module, name.encode())
        if int(result[0]):
            raise ArtifactError(f"kernel {name} is not in its cubin ({self._text(int(result[0]))}); pull or rebuild the engine")
        found = int(self._do(f"find kernel {name}", result))
        if shared:
            # The carve-out lets as many blocks share a multiprocessor as its memory holds, not as few as the driver guesses.
            attributes = cu.CUfunction_attribute
            wanted = [(attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)]
            if shared > LARGE_SHARED:
                wanted.append((attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
            for attribute, value in wanted:
                self._do(f"set up kernel {name}", cu.cuFuncSetAttribute(found, attribute, value))
        return found

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        num_warps: int,
        shared: int,
        params: Arguments,
        stream: int,
        overlap: bool = False,
    ) -> None:
        """Queue a kernel. Nothing of a grid may be 0. ``overlap``: it may start while the kernel before it still runs, for
        whose end it waits by itself (programmatic dependent launch).
        """
        x, y, z = grid
        if overlap and self.overlap:
            config = self._configs.get(stream) or self._overlapping(stream)
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.blockDimX, config.sharedMemBytes = 32 * num_warps, shared
            result = self._cu_launch_ex(config, function, params.address, 0)
        else:
            result = self._cu_launch(function, x, y, z, 32 * num_warps, 1, 1, shared, stream, params.address, 0)
        if result[0]:
            self._fail(f"launch a kernel over {grid}", int(result[0]))

    def _overlapping(self, stream: int) -> Any:
        """What launches on a stream that overlap have in common."""
        cu = self._driver
        attribute = cu.CUlaunchAttribute()
        attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = self._configs[stream] = cu.CUlaunchConfig()
        config.blockDimY = config.blockDimZ = 1
        config.hStream, config.attrs, config.numAttrs = cu.CUstream(stream), [attribute], 1
        return config

    # graphs

    def capture(self, stream: int, record: Callable[[], None]) -> int:
        """What ``record`` queues on the stream, as a graph that ``replay`` queues again at once; nothing runs now.

        Run the same work once before: kernels of cuBLASLt are loaded on first use. Addresses and arguments are those of now.
        """
        self.use()
        cu = self._driver
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._do("begin a capture", cu.cuStreamBeginCapture(stream, mode))
        try:
            record()
        except BaseException:
            result = cu.cuStreamEndCapture(stream)
            if not int(result[0]) and int(result[1]):
                cu.cuGraphDestroy(result[1])
            raise
        graph = self._do("end a capture", cu.cuStreamEndCapture(stream))
        try:
            made = int(self._do("make a graph", cu.cuGraphInstantiate(graph, 0)))
        finally:
            cu.cuGraphDestroy(graph)
        return self._own(made, lambda: cu.cuGraphExecDestroy(made))

    def replay(self, graph: int, stream: int) -> None:
        """Queue a captured graph."""
        result = self._cu_graph(graph, stream)
        if result[0]:
            self._fail("launch a graph", int(result[0]))

    # the end

    def free(self, handle: int) -> None:
        """Give back what one of this device's methods made: memory, a stream, an event, a module or a graph."""
        self.use()
        with self._lock:
            give_back = self._owned.pop(handle)
        self._do("free something", give_back())

    def close(self) -> None:
        """Free everything, whatever state the GPU is in. Calling it twice is allowed."""
        if not self._open:
            return
        self._open = False
        cu = self._driver
        cu.cuCtxSetCurrent(self._context)
        cu.cuCtxSynchronize()
        for give_back in reversed(self._owned.values()):
            give_back()
        self._owned.clear()
        self._local = threading.local()
        cu.cuDevicePrimaryCtxRelease(self._device)

    def _own(self, handle: int, give_back: Callable[[], Any]) -> int:
        with self._lock:
            self._owned[handle] = give_back
        return handle

    def _do(self, what: str, result: tuple[Any, ...]) -> Any:
        if result[0]:
            self._fail(what, int(result[0]))
        return result[1] if len(result) == 2 else result[1:]

    def _fail(self, what: str, code: int) -> NoReturn:
        kind: type[ZooError] = ResourceError if code == OUT_OF_MEMORY else EngineError
        name = getattr(self, "name", "the driver")
        raise kind(f"the GPU ({name}) cannot {what}: {self._text(code)}; if it goes on, start the process anew")

    def _text(self, code: int) -> str:
        cu = self._driver
        _, text = cu.cuGetErrorString(cu.CUresult(code))
        return text.decode() if isinstance(text, bytes) else str(text or f"error {code}")
