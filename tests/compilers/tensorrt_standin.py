"""A stand-in for TensorRT's runtime and for the CUDA runtime: it executes the parser's model in ONNX Runtime, on host memory.

It is as strict as the documentation: shapes outside the profile are refused, contexts need memory of the engine's size and
a profile before they run, inputs and outputs need addresses, and freshly given memory is full of NaN.
"""

from __future__ import annotations

import ctypes
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
SCRATCH = 4096


class Cudart:
    """``cuda.bindings.runtime`` with host memory: one GPU of one SM, with ``room`` bytes."""

    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, sm: int = 89, room: int = 1 << 30) -> None:
        self.sm, self.room, self.memory, self.streams = sm, room, {}, 0

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaDeviceGetAttribute(self, what: int, device: int) -> tuple[int, int]:
        return 0, divmod(self.sm, 10)[what - 75]

    def cudaSetDevice(self, device: int) -> tuple[int]:
        assert device == 0
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        self.streams += 1
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams -= 1
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        if sum(block.nbytes for block in self.memory.values()) + size > self.room:
            return 2, None
        block = np.full(size, 255, np.uint8)
        self.memory[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cudaFree(self, place: int) -> tuple[int]:
        del self.memory[place]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        device = to if kind == 1 else source
        assert size <= self.memory[device].nbytes and stream == 7
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory"}[error]

    def view(self, place: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The memory at an address as an array, which shares it."""
        return self.memory[place][: prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile, self.shapes, self.places, self.memory = engine, -1, {}, {}, 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == 7

    def set_device_memory(self, place: int, size: int) -> None:
        self.memory = place if size >= self.engine.device_memory_size_v2 else 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profiles[self.profile][name]
        fits = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, place: int) -> bool:
        self.places[name] = place
        return name in self.engine.names

    def execute_async_v3(self, stream: int) -> bool:
        engine, cuda = self.engine, self.engine.cuda
        assert stream == 7 and self.memory in cuda.memory and self.profile >= 0
        assert set(self.places) == set(engine.names), "every input and output has an address"
        feeds = {}
        for node in engine.session.get_inputs():
            shape = self.shapes.get(node.name) or tuple(node.shape)
            feeds[node.name] = cuda.view(self.places[node.name], DTYPES[node.type], shape).copy()
        results = engine.session.run(None, feeds)
        for node, array in zip(engine.session.get_outputs(), results, strict=True):
            if node.name.startswith("kv_out."):
                assert self.places[node.name] != self.places[node.name.replace("kv_out.", "kv.")], "in place is unproven"
            cuda.view(self.places[node.name], array.dtype, array.shape)[...] = array
        engine.calls.append((self.profile, len(feeds["kv_lengths"]), len(feeds["token_ids"]), feeds["block_table.full"].shape[1]))
        return True


class Engine:
    """``ICudaEngine`` over a session of ONNX Runtime. ``calls``: (profile, B, T, P) of every execution."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, session: onnxruntime.InferenceSession, profiles: list[dict[str, Any]], cuda: Cudart) -> None:
        self.session, self.profiles, self.cuda, self.calls = session, profiles, cuda, []
        self.names = [node.name for node in (*session.get_inputs(), *session.get_outputs())]
        self.cache = SimpleNamespace(filled=b"", serialize=lambda: b"kernels", deserialize=self._fill)

    def _fill(self, data: bytes) -> bool:
        self.cache.filled = data
        return True

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return list(self.profiles[profile][name])

    def create_runtime_config(self) -> Any:
        self.config = SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: setattr(self, "strategy", strategy),
            create_runtime_cache=lambda: self.cache,
            set_runtime_cache=lambda cache: setattr(self, "used_cache", cache) or True,
        )
        return self.config

    def create_execution_context(self, config: Any) -> Context:
        assert config is self.config and self.strategy == "user"
        return Context(self)


class Library:
    """The ``tensorrt_rtx`` module for one engine, whose plan is ``plan``. ``validity``: what it says of the plan's head."""

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    EngineValidity = SimpleNamespace(VALID=0, INVALID=2)
    EngineInvalidityDiagnostics = SimpleNamespace(
        **{
            name: SimpleNamespace(name=name, value=1 << place)
            for place, name in enumerate(
                ("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY",
                 "MALFORMED_ENGINE", "CUDA_ERROR")
            )
        }
    )  # fmt: skip

    class ILogger:
        def __init__(self) -> None:
            pass

    def __init__(self, engine: Engine, plan: bytes, validity: tuple[int, int] = (0, 0)) -> None:
        def deserialize(data: Any) -> Engine | None:
            return engine if bytes(data) == plan else self.logger.log(SimpleNamespace(name="ERROR"), "Magic tag does not match")

        def runtime(logger: Any) -> Any:
            self.logger = logger
            return SimpleNamespace(get_engine_validity=lambda data: validity, deserialize_cuda_engine=deserialize)

        self.Runtime = runtime
