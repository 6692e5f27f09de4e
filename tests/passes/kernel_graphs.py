"""Graphs for the passes of a target with kernels: what they start from, on real small models, and whether numbers stay.

Whole models run in ONNX Runtime through the bodies of their zoo ops, in ragged batches over pools full of NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import families
import numpy as np
import onnxruntime
from linear_graphs import from_text
from ragged import Ragged, Traffic, build_spec, engine_limits

from zoo.calibration import calibrate, unbound_scales
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes.clean import Clean
from zoo.passes.frame import Pass, run
from zoo.passes.fuse_linears import FuseLinears
from zoo.passes.paged_attention import InsertPagedAttention
from zoo.passes.quantize_fp8 import QuantizeFp8
from zoo.runtime.abi import Batch, EngineLimits
from zoo.runtime.cuda_indices import CUDA_INDEX_BUILDERS
from zoo.spec import BuildSpec, ModelSpec
from zoo.targets import Target
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight, scale

KERNELS = Target("kernels", "plugin", "plugin", ("float32", "float16", "bfloat16"), kernels=True)
PLAIN = Target("plain", "plugin", "plugin", ("float32", "float16", "bfloat16"))
STEPS: tuple[Pass, ...] = (Clean(), InsertPagedAttention(), FuseLinears(), QuantizeFp8())
TINY = ModelSpec("tiny", "llama", 40, 16, 2, 2, 1, 8, 24, 64, tensors=families.LLAMA_NAMES)
CASES = ["llama-grouped", "llama-biases", "qwen3-norms", "gpt2"]


class KernelRagged(Ragged):
    """A ragged graph whose index inputs are those of kernels."""

    def __init__(self, graph: ModelGraph, weights: Mapping[str, np.ndarray], limits: EngineLimits) -> None:
        super().__init__(graph, weights, limits)
        self.kernel_inputs, self.index_inputs = self.index_inputs, []

    def feeds(self, batch: Batch) -> dict[str, onnxruntime.OrtValue]:
        made = {extra.name: CUDA_INDEX_BUILDERS[extra.name](batch, self.limits) for extra in self.kernel_inputs}
        for extra in self.kernel_inputs:
            assert made[extra.name].dtype == extra.dtype and made[extra.name].ndim == len(extra.shape)
        return super().feeds(batch) | {name: families.ort_value(array) for name, array in made.items() if name in self.wanted}


@dataclass
class Small:
    """A small random model: its folder, its build, and a graph of it as the passes here find it."""

    folder: Path
    build: BuildSpec

    def graph(self, dtype: str = "float32") -> ModelGraph:
        plain = expand(self.build.model, dtype, self.build.limits.max_context)
        return run(STEPS, plain, self.build, KERNELS)

    def logits(self, graph: ModelGraph) -> np.ndarray:
        """Three ragged steps, prefill and decode mixed, the second padded: logits of every real token."""
        with Tensors.open(self.folder) as tensors:
            scales = dict.fromkeys(unbound_scales(graph), 0.02) | _scales(self.folder)
            weights = {name: materialize(weight, tensors, scales) for name, weight in graph.weights.items()}
        traffic = Traffic(KernelRagged(graph, weights, engine_limits(self.build.limits)))
        a, b, c = (families.prompt(self.folder, 14, seed) for seed in range(3))
        steps = [
            traffic.step({"a": a[:5], "b": b[:9]}, rows=range(14)),
            traffic.step({"a": a[5:6], "c": c[:6], "b": b[9:11]}, rows=range(9), padding=3),
            traffic.step({"a": a[6:7], "b": b[11:12], "c": c[6:7]}),
        ]
        return np.concatenate(steps)


def small(folder: Path, case: str, quant: str) -> Small:
    family, overrides = families.CASES[case]
    made = families.make_checkpoint(folder, family, **overrides)
    return Small(made, build_spec(families.spec(made), quant=quant))


def from_text8(text: str) -> ModelGraph:
    """``from_text``; inputs called ``*_scale`` are weights, too: calibrated scales, scalars."""
    graph = from_text(text)
    for variable in graph.graph.inputs:
        if variable.shape is None:  # what onnx-graphsurgeon reads for a scalar
            variable.shape = []
        if variable.name.endswith("_scale"):
            graph.weights[variable.name] = Weight(variable.name, "float32", scale(variable.name.removesuffix("_scale")))
    return graph


def rewritten(steps: Sequence[Pass], graph: ModelGraph, build: BuildSpec) -> ModelGraph:
    return run(steps, graph, build, KERNELS, check=True)


def ops_of(graph: ModelGraph) -> dict[str, int]:
    """How many nodes of each op type."""
    counts: dict[str, int] = {}
    for node in graph.graph.nodes:
        counts[node.op] = counts.get(node.op, 0) + 1
    return counts


@functools.cache
def _scales(folder: Path) -> dict[str, float]:
    with Tensors.open(folder) as tensors:
        return calibrate(families.spec(folder), tensors, families.prompt(folder, 64, seed=6))
