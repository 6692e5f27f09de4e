"""The ``cuda`` target: a launch plan of kernels compiled ahead of time and cuBLASLt GEMMs. Needs Triton, not torch, and no GPU.

    plan.json        steps in order, kernels and their launch needs, places of all tensors in one arena
    kernels/*.cubin  machine code for the profile's SM, one file a specialization
    weights.json     {"weights": [{"name", "dtype", "recipe"}]}: carried out on the GPU when the engine is opened

An engine holds no weights: it is small, and the checkpoint's own files travel beside it or are named when it is served.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.compilers.base import PROCESS, CompiledEngine, Compiler, Progress, context_bytes, predict, weight_bytes
from zoo.compilers.onnxruntime import check_sources
from zoo.errors import CompileError, UnavailableError
from zoo.graph import ModelGraph
from zoo.spec import BuildSpec, HardwareSpec
from zoo.targets import TARGETS

if TYPE_CHECKING:
    from zoo.weights.reader import Tensors

INSTALL = "install it with `pip install 'engine-zoo[cuda-build]'`"


class CudaCompiler(Compiler):
    """Engines for NVIDIA GPUs by our own kernels."""

    name = "cuda"

    def version(self) -> str:
        try:
            return "triton " + importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            raise UnavailableError(f"Triton, which compiles the kernels, is not installed; {INSTALL}") from None

    def available(self) -> str:
        return "" if importlib.util.find_spec("triton") else f"Triton, which compiles the kernels, is not installed; {INSTALL}"

    def supports(self, hardware: HardwareSpec) -> str:
        sms = TARGETS[self.name].sms
        if hardware.kind != "gpu" or hardware.sm not in sms:
            able = ", ".join(f"{sm // 10}.{sm % 10}" for sm in sms)
            return f"it builds for GPUs of SM {able}, and {hardware.name!r} is none; pick another compiler"
        return ""

    def predict(self, graph: ModelGraph, build: BuildSpec) -> dict[str, int]:
        """As for every compiler, with the least pools that a session opens with: it gives them what memory is left."""
        return predict(graph, build) | {"run_ram": weight_bytes(graph) + context_bytes(graph, build) + PROCESS}

    def compile(
        self,
        graph: ModelGraph,
        build: BuildSpec,
        tensors: Tensors | None,
        scales: Mapping[str, float],
        workdir: Path,
        progress: Progress | None = None,
    ) -> CompiledEngine:
        report = progress or (lambda stage, done, total: None)
        if reason := self.supports(build.hardware):
            raise CompileError(f"cuda does not build for hardware {build.hardware.name!r}: {reason}")
        check_sources(graph.weights.values(), tensors, scales)
        check_fp8(graph)
        from zoo.compilers.cuda.engine import write_engine  # the planner and every kernel's launches: only for this target

        return write_engine(graph, build, workdir, report)


def check_fp8(graph: ModelGraph) -> None:
    """Raise CompileError that lists the FP8 layers which tensor cores cannot multiply: their sizes go in sixteens."""
    wrong = []
    for node in graph.graph.nodes:
        if node.op == "ZooFp8Gemm" and any(size % 16 for size in node.inputs[1].shape):
            wrong.append(f"{node.name} {list(node.inputs[1].shape)}")
    if wrong:
        raise CompileError(
            f"cuda multiplies FP8 matrices whose sizes are multiples of 16, and {len(wrong)} are not: {', '.join(wrong[:8])}"
            f"{', ...' if len(wrong) > 8 else ''}; name their roles in quant.skip, or build with quant=none"
        )
