"""TensorRT for datacenter GPUs: plans built on the GPU that they are for.

A zoo op whose plugin is registered stays a node that names it; any other is replaced by its function of standard ops. No
plugin is shipped yet, so graph and builder are those of TensorRT-RTX.

Not run here: no machine of this project has the library. Its names are checked against NVIDIA's own 11.4 bindings
(tests/compilers/test_tensorrt_names.py); nothing else about this target is proven.

    engine.plan    the serialized engine; it fits this TensorRT version and the GPU model it was built on
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.artifacts.machine import describe_machine
from zoo.compilers.base import CompiledEngine, Compiler, Progress, abi_of, pool_bytes, predict, weight_bytes
from zoo.compilers.tensorrt_common import PLAN_FILE, build_plan
from zoo.compilers.tensorrt_fit import device_bytes, sm_text, supports
from zoo.errors import CompileError, UnavailableError
from zoo.graph import ModelGraph
from zoo.spec import BuildSpec, HardwareSpec

if TYPE_CHECKING:
    from zoo.weights.reader import Tensors

PACKAGE = "tensorrt-cu13"
INSTALL = "install it with `pip install 'engine-zoo[trt]'` (its libraries come from NVIDIA's own package index)"


class TensorRtCompiler(Compiler):
    """Plans for the GPU of this machine: SM 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0."""

    name = "tensorrt"

    def version(self) -> str:
        try:
            return importlib.metadata.version(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            raise UnavailableError(f"TensorRT is not installed; {INSTALL}") from None

    def available(self) -> str:
        if not importlib.util.find_spec("tensorrt"):
            return f"TensorRT is not installed; {INSTALL}"
        if not describe_machine().gpus:
            return "TensorRT builds on the GPU that an engine is for, and this machine has no NVIDIA GPU, or no driver for it"
        return ""

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
            raise CompileError(f"tensorrt does not build for hardware {build.hardware.name!r}: {reason}")
        if reason := self.available():
            raise UnavailableError(reason)
        trt = load()
        check_gpu(build)
        abi = abi_of(graph, build)
        plan = workdir / PLAN_FILE
        scratch = build_plan(trt, graph, build, tensors, scales, plan, progress, lambda trt, config: None)
        needs = {
            "kind": "gpu",
            "sm": build.hardware.sm,
            "memory": device_bytes(weight_bytes(graph), pool_bytes(graph, build), scratch),
            "packages": {self.name: self.version()},
        }
        return CompiledEngine({PLAN_FILE: plan}, abi, {"table": ""}, scratch, needs)


def check_gpu(build: BuildSpec) -> None:
    """Raise UnavailableError unless the first visible GPU, on which TensorRT builds, has the SM that is asked for."""
    gpu = describe_machine().gpus[0]
    if gpu.sm != build.hardware.sm:
        raise UnavailableError(
            f"TensorRT builds for the GPU it runs on: {gpu.name} has SM {sm_text(gpu.sm)}, hardware {build.hardware.name!r} has "
            f"SM {sm_text(build.hardware.sm)}; build on such a GPU, or put one first in CUDA_VISIBLE_DEVICES"
        )


def load() -> Any:
    """The library; UnavailableError with what to install. The bindings import only where the library's own files are."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise UnavailableError(f"TensorRT cannot be imported ({error}); {INSTALL}") from None
    return tensorrt
