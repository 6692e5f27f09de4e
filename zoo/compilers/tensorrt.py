"""TensorRT for datacenter GPUs: plans built on the GPU that they are for.

A zoo op whose plugin is used stays a node that names it; any other is replaced by its function of standard ops, so that graph
and builder are those of TensorRT-RTX. Plugins are ours (``zoo.plugins.tensorrt``). ``IMPLEMENTATIONS`` says which are used; a
hardware profile's tuning may say otherwise: ``tensorrt_plugins: {ZooPagedAttention: jit, ZooFp8Linear: aot}``.

Not run here: no machine of this project has the library. Its names are checked against NVIDIA's own 11.4 bindings
(tests/compilers/test_tensorrt_names.py), and plugins are registered with those (tests/plugins/test_tensorrt_plugins.py);
nothing else about this target is proven.

    engine.plan             the serialized engine; it fits this TensorRT version and the GPU model it was built on
    plugins/plugins.json    only with plugins: {"implementations": {op: "aot" or "jit"}, "kernels": {name: what a launch needs}}
    plugins/*.cubin         kernels of "jit" plugins for the GPU's SM; those of "aot" plugins are in the plan
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
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
# How zoo ops are carried out by plugins, where a graph has them: "aot" or "jit". ZooFp8Linear is left out: its body is the
# quantizers and the product that TensorRT makes an FP8 product of its own from, which a plugin would hide.
IMPLEMENTATIONS = {"ZooPagedAttention": "aot"}


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
        implementations = implementations_of(graph, build)
        files = register_plugins(trt, graph, build, implementations, workdir / "plugins") if implementations else {}

        def configure(trt: Any, config: Any) -> None:
            if implementations:  # a plugin may update a KV pool in place
                config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)

        scratch = build_plan(trt, graph, build, tensors, scales, plan, progress, configure, implementations)
        needs = {
            "kind": "gpu",
            "sm": build.hardware.sm,
            "memory": device_bytes(weight_bytes(graph), pool_bytes(graph, build), scratch),
            "packages": {self.name: self.version()},
        }
        return CompiledEngine({PLAN_FILE: plan} | files, abi, {"table": ""}, scratch, needs)


def implementations_of(graph: ModelGraph, build: BuildSpec) -> dict[str, str]:
    """The zoo ops of a graph that plugins are to carry out, with the implementation. CompileError for a choice that is none."""
    from zoo.plugins.tensorrt import bindings

    chosen = build.hardware.tuning.get("tensorrt_plugins", IMPLEMENTATIONS)
    for op, how in dict(chosen).items():
        if op not in bindings() or how not in ("aot", "jit"):
            raise CompileError(
                f"hardware {build.hardware.name!r}: tuning tensorrt_plugins {op}: {how}; plugins exist for "
                f"{', '.join(bindings())}, each as aot or jit"
            )
    ops = {node.op for node in graph.graph.nodes}
    return {op: how for op, how in dict(chosen).items() if op in ops}


def register_plugins(
    trt: Any, graph: ModelGraph, build: BuildSpec, implementations: Mapping[str, str], folder: Path
) -> dict[str, Path]:
    """Compile a graph's plugin kernels into ``folder`` and register the plugins; the files that go into the engine for them.

    Needs Triton, and neither a GPU nor torch.
    """
    from zoo.compilers.tensorrt_kernels import compile_plugins, kernels_of
    from zoo.plugins.tensorrt import register
    from zoo.plugins.tensorrt_kernels import INDEX, read_code

    if not importlib.util.find_spec("triton"):
        raise UnavailableError("plugins are compiled by Triton, which is not installed: `pip install 'engine-zoo[cuda-build]'`")
    folder.mkdir()
    compile_plugins(kernels_of(graph, implementations), build.hardware.sm, folder)
    register(trt, list(implementations), read_code(folder))
    jit = kernels_of(graph, {op: how for op, how in implementations.items() if how == "jit"})
    index = json.loads((folder / INDEX).read_text())
    kernels = {name: index["kernels"][name] for name in jit}
    (folder / INDEX).write_text(json.dumps({"implementations": dict(implementations), "kernels": kernels}, sort_keys=True))
    return {f"plugins/{name}": folder / name for name in (INDEX, *(f"{name}.cubin" for name in jit))}


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
