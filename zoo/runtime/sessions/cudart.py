"""The few calls of the CUDA runtime that a session needs, through cuda-python. Not yet run on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from zoo.errors import IncompatibleError, ResourceError
from zoo.resources import size_text


class Cuda:
    """The few calls of the CUDA runtime that a session needs: one device, one stream, memory that ``close`` frees.

    ``cudart`` is cuda-python's ``cuda.bindings.runtime``: every call gives a tuple that begins with an error code.
    """

    def __init__(self, cudart: Any, sm: int) -> None:
        self._rt = cudart
        self._taken: list[int] = []
        self.device = self._find(sm)
        self.use()
        self.stream = int(self._do("create a stream", cudart.cudaStreamCreate()))

    def _find(self, sm: int) -> int:
        rt = self._rt
        major, minor = rt.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, rt.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor
        for device in range(self._do("count GPUs", rt.cudaGetDeviceCount())):
            found = [self._do("ask a GPU", rt.cudaDeviceGetAttribute(what, device)) for what in (major, minor)]
            if found[0] * 10 + found[1] == sm:
                return device
        raise IncompatibleError(
            f"no visible GPU has SM {sm // 10}.{sm % 10}; set CUDA_VISIBLE_DEVICES, or choose another profile"
        )

    def use(self) -> None:
        """Make the GPU the calling thread's."""
        self._do("select the GPU", self._rt.cudaSetDevice(self.device))

    def allocate(self, size: int) -> int:
        """An address of ``size`` bytes on the GPU; ResourceError when there is no room."""
        place = int(self._do(f"give {size_text(size)}", self._rt.cudaMalloc(max(size, 1))))
        self._taken.append(place)
        return place

    def send(self, place: int, array: np.ndarray[Any, Any]) -> None:
        assert array.flags.c_contiguous
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("copy to the GPU", self._rt.cudaMemcpyAsync(place, array.ctypes.data, array.nbytes, kind, self.stream))

    def fetch(self, array: np.ndarray[Any, Any], place: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("copy from the GPU", self._rt.cudaMemcpyAsync(array.ctypes.data, place, array.nbytes, kind, self.stream))

    def wait(self) -> None:
        self._do("finish", self._rt.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Free everything, whatever state the GPU is in."""
        for place in self._taken:
            self._rt.cudaFree(place)
        self._taken.clear()
        self._rt.cudaStreamDestroy(self.stream)

    def _do(self, what: str, result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            _, text = self._rt.cudaGetErrorString(result[0])
            raise ResourceError(f"the GPU cannot {what}: {text.decode() if isinstance(text, bytes) else text}")
        return result[1] if len(result) > 1 else None
