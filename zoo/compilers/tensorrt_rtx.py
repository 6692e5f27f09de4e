"""TensorRT-RTX: plans for consumer and workstation GPUs (and the A100), built on any machine, with or without a GPU.

The library has no plugins from Python, so zoo ops reach it as inlined standard ops. A plan holds its weights; kernels are
compiled when it is first loaded. It builds for the SMs in ``TARGETS``, Hopper (SM 9.0) not among them.

    engine.plan    the serialized engine; two builds of one graph differ in their bytes
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.compilers.base import CompiledEngine, Compiler, Progress, abi_of, pool_bytes, predict, weight_bytes
from zoo.compilers.tensorrt_common import PLAN_FILE, build_plan
from zoo.compilers.tensorrt_fit import device_bytes, supports
from zoo.errors import CompileError, UnavailableError
from zoo.graph import ModelGraph
from zoo.spec import BuildSpec, HardwareSpec

if TYPE_CHECKING:
    from zoo.weights.reader import Tensors

PACKAGE = "tensorrt-rtx-cu13"
INSTALL = "install it with `pip install 'engine-zoo[rtx]'`"


class TensorRtRtxCompiler(Compiler):
    """Plans for GPUs of SM 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1."""

    name = "tensorrt_rtx"

    def version(self) -> str:
        try:
            return importlib.metadata.version(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            raise UnavailableError(f"TensorRT-RTX is not installed; {INSTALL}") from None

    def available(self) -> str:
        return "" if importlib.util.find_spec("tensorrt_rtx") else f"TensorRT-RTX is not installed; {INSTALL}"

    def supports(self, hardware: HardwareSpec) -> str:
        return supports(self.name, hardware)

    def predict(self, graph: ModelGraph, build: BuildSpec) -> dict[str, int]:
        """As for every compiler, with both copies of the KV pools."""
        return predict(graph, build) | {"run_ram": device_bytes(weight_bytes(graph), pool_bytes(graph, build), 0)}

    def compile(
        self,
        graph: ModelGraph,
        build: BuildSpec,
        tensors: Tensors | None,
        scales: Mapping[str, float],
        workdir: Path,
        progress: Progress | None = None,
    ) -> CompiledEngine:
        if reason := self.supports(build.hardware):
            raise CompileError(f"tensorrt_rtx does not build for hardware {build.hardware.name!r}: {reason}")
        abi = abi_of(graph, build)
        trt = load()
        plan = workdir / PLAN_FILE

        def configure(trt: Any, config: Any) -> None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{build.hardware.sm}"), 0)

        scratch = build_plan(trt, graph, build, tensors, scales, plan, progress, configure)
        needs = {
            "kind": "gpu",
            "sm": build.hardware.sm,
            "memory": device_bytes(weight_bytes(graph), pool_bytes(graph, build), scratch),
            "packages": {self.name: self.version()},
        }
        return CompiledEngine({PLAN_FILE: plan}, abi, {"table": ""}, scratch, needs)


def load() -> Any:
    """The library; UnavailableError with what to install."""
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as error:
        raise UnavailableError(f"TensorRT-RTX cannot be imported ({error}); {INSTALL}") from None
    return tensorrt_rtx
