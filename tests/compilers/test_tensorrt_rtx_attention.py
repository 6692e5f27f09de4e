"""TensorRT-RTX builds layers with sinks and with linear biases, in half precision, without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attention_graphs import attention_graph, attention_spec, random_arrays
from safetensors.numpy import save_file
from tensorrt_graphs import hardware, rtx

from zoo.compilers.tensorrt_rtx import TensorRtRtxCompiler
from zoo.passes import run_passes
from zoo.spec import BuildSpec, Limits, ModelSpec, ParallelSpec, QuantSpec
from zoo.targets import TARGETS
from zoo.weights.reader import Tensors

LAYERS = {
    "window-sinks": attention_spec(4, 2, 16, window=5, sinks=True),
    "slopes": attention_spec(4, 2, 16, alibi=True),
}


@pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS)
def test_plans_are_built(tmp_path: Path, spec: ModelSpec) -> None:
    rtx()
    limits = Limits(max_tokens=16, max_sequences=2, block_size=4, max_context=16).resolve(spec)
    build = BuildSpec(spec, QuantSpec("none"), hardware(), ParallelSpec(), limits, "tensorrt_rtx", "float16")
    graph = attention_graph(spec, "float16")
    save_file({name: array.astype(np.float16) for name, array in random_arrays(graph).items()}, tmp_path / "model.safetensors")
    (tmp_path / "work").mkdir()
    with Tensors.open(tmp_path) as tensors:
        engine = TensorRtRtxCompiler().compile(
            run_passes(graph, build, TARGETS["tensorrt_rtx"]), build, tensors, {}, tmp_path / "work"
        )
    assert engine.files["engine.plan"].stat().st_size > 10_000 and engine.scratch > 0
