"""The products of a plan by cuBLASLt, for any number of rows, and what the plan's own kernels for few rows ask of a session.

Rows are rounded up to few numbers, so that few algorithms are asked for; buffers have the rows.

An FP8 product has a scale for x and one for each row of w. Where its step is ``deferred``, whoever reads y multiplies by w's, and
cuBLASLt is given x's alone, a scalar: on Hopper it does such products a quarter faster at a few hundred rows. Otherwise both are
multiplied into one vector when the engine is loaded, which cuBLASLt then reads as w's scale, and ones as x's.

N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zoo.errors import ArtifactError, IncompatibleError
from zoo.runtime.abi import EngineLimits
from zoo.runtime.cuda.cublaslt import CublasLt, Gemm, Plan, Pointers, m_bucket
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.program import Function, Symbols

SCALINGS = ("alpha", "outer")  # ways to scale an FP8 product by a vector, best first
COUNTERS = "gemm.counters"  # the zeros that kernels for few rows share, as ``zoo.plugins.skinny_gemm`` names them


class GemmMaker:
    """Makes the runner of each GEMM step."""

    def __init__(
        self,
        device: Device,
        cublas: CublasLt,
        stream: int,
        limits: EngineLimits,
        functions: Mapping[str, Function],
        symbols: Symbols,
        addresses: dict[str, Any],
    ) -> None:
        self._device, self._cublas, self._stream = device, cublas, stream
        self._most = {"T": limits.max_tokens, "R": limits.max_rows, "B": limits.max_sequences}
        self._functions, self._symbols, self._addresses = functions, symbols, addresses
        self._ones = 0
        self._counters = 0
        self._scaling = ""

    def make(self, step: Mapping[str, Any], address: Callable[[Any], int]) -> Callable[[int, int], None]:
        """The runner of one step: (rows, stream) -> queued."""
        try:
            n, k, x, y = int(step["n"]), int(step["k"]), str(step["dtype"]), str(step["out"])
            most = -(-self._most[step["rows"][0]] * step["rows"][1] // step["rows"][2])
            at_x, at_w, at_y = (address(step[name]) for name in ("x", "w", "y"))
        except KeyError as error:
            raise ArtifactError(f"plan.json: a GEMM has no {error}; rebuild the engine") from None
        self._count(int(step.get("counters", 0)))
        scaling, x_scale, w_scale = "none", 0, 0
        if x == "float8e4m3" and step.get("deferred"):
            scaling, x_scale, w_scale = "tensor", address(step["x_scale"]), self._one_each()
        elif x == "float8e4m3":
            scaling = self._fp8(n, k, y)
            w_scale = self._combined(address(step["w_scale"]), address(step["x_scale"]), n)
            x_scale = self._one_each()
        pointers = Pointers(at_x, at_w, at_y, x_scale, w_scale)
        turned = step["stored"] == "in_out"
        plans: dict[int, Plan] = {}
        cublas = self._cublas

        def run(rows: int, stream: int) -> None:
            m = min(m_bucket(rows), most)
            plan = plans.get(m)
            if plan is None:
                plan = plans[m] = cublas.plan(Gemm(m, n, k, x, y, scaling, turned=turned, fast=x == "float8e4m3"))
            cublas.run(plan, pointers, stream)

        return run

    def _count(self, counters: int) -> None:
        """Let there be so many zeros under the name ``COUNTERS``; launches that are made later use them."""
        if counters > self._counters:
            self._counters = counters
            place = self._device.allocate(4 * counters, "counters")
            self._device.fill(place, 0, 4 * counters, self._stream)
            self._addresses[COUNTERS] = place

    def _fp8(self, n: int, k: int, y: str) -> str:
        """How cuBLASLt scales FP8 products here: asked once."""
        for scaling in SCALINGS if not self._scaling else ():
            if self._cublas.choices(Gemm(16, n, k, "float8e4m3", y, scaling, fast=True), 1):
                self._scaling = scaling
                break
        if not self._scaling:
            raise IncompatibleError(
                f"cuBLASLt {self._cublas.version} does no FP8 product with a scale for each output channel on "
                f"{self._device.name}; use a newer nvidia-cublas, or an engine built with quant=none"
            )
        return self._scaling

    def _combined(self, w_scale: int, x_scale: int, n: int) -> int:
        """A vector of w_scale * x_scale on the GPU."""
        scales: np.ndarray[Any, Any] = np.empty(n, np.float32)
        one: np.ndarray[Any, Any] = np.empty(1, np.float32)
        self._device.fetch(scales, w_scale, self._stream)
        self._device.fetch(one, x_scale, self._stream)
        self._device.wait(self._stream)
        place = self._device.allocate(4 * n, "scales")
        self._device.send(place, scales * one, self._stream)
        self._device.wait(self._stream)
        return place

    def _one_each(self) -> int:
        """Ones, as many as a step has tokens."""
        if not self._ones:
            count = max(self._most.values())
            self._ones = self._device.allocate(4 * count, "scales")
            self._device.fill_float(self._ones, 1.0, count, self._stream)
        return self._ones
