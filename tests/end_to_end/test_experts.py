"""A whole mixture of experts in each engine that runs here, against transformers: prompts, and decoding beside a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import families
import numpy as np
import pytest
import ragged
import torch
import zoo_cases
from cuda_engines import Traffic, compile_engine
from cuda_on_cpu import gpu_on_cpu

from zoo.graph_templates import expand
from zoo.modelspec import ModelSpec, MoeSpec, RopeSpec
from zoo.passes import run_passes
from zoo.plugins.moe import cuda
from zoo.runtime.sessions.cuda import CudaSession
from zoo.targets import TARGETS
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors

CASE = zoo_cases.Case(
    "qwen2_moe",
    {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "max_position_embeddings": 128, "tie_word_embeddings": False, "mlp_only_layers": [1],
        "moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48,
    },
)  # fmt: skip
PARTS = ("gate", "up", "down")
NAMES = families.LLAMA_NAMES.layer | {
    "router": "model.layers.{layer}.mlp.gate.weight",
    "shared_gate": "model.layers.{layer}.mlp.shared_expert_gate.weight",
    **{f"experts.{part}": f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight" for part in PARTS},
    **{f"shared.{part}": f"model.layers.{{layer}}.mlp.shared_expert.{part}_proj.weight" for part in PARTS},
}
MODEL = ModelSpec(
    "experts", "moe", 262, 64, 2, 4, 2, 16, 96, 128, norm_eps=1e-6, qkv_bias=True, dtype="float32", rope=RopeSpec(theta=10000.0),
    moe=MoeSpec(6, 2, 40, normalize=False, shared=48, shared_gate=True, dense_layers=(1,)),
    tensors=dataclasses.replace(families.LLAMA_NAMES, layer=NAMES),
)  # fmt: skip

Step = Callable[[Mapping[str, Sequence[int]]], np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_cases.make_folder(tmp_path_factory.mktemp("experts"), CASE)


def compare(step: Step) -> None:
    """Two prompts in one step, then a token of one beside a prompt of a third, then a token of each."""
    model = zoo_cases.random_model(CASE)
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, 256, 14).tolist() for name in "abc"}
    with torch.no_grad():
        wanted = {name: model(torch.tensor([one])).logits[0].numpy() for name, one in ids.items()}
    assert np.abs(wanted["a"]).max() > 0.5
    done = dict.fromkeys(ids, 0)
    for counts in ({"a": 12, "b": 3}, {"a": 1, "c": 13}, {"a": 1, "b": 1, "c": 1}):
        found = step({name: ids[name][done[name] : done[name] + count] for name, count in counts.items()})
        rows = [wanted[name][done[name] : done[name] + count] for name, count in counts.items()]
        np.testing.assert_allclose(found, np.concatenate(rows), rtol=0, atol=1e-4)
        for name, count in counts.items():
            done[name] += count


def test_onnx_runtime(folder: Path) -> None:
    build = ragged.build_spec(MODEL)
    graph = run_passes(expand(MODEL, "float32", 64), build, TARGETS["onnxruntime"], check=True)
    with Tensors.open(folder) as tensors:
        weights = {name: materialize(weight, tensors, {}) for name, weight in graph.weights.items()}
    traffic = ragged.Traffic(ragged.Ragged(graph, weights, ragged.engine_limits(build.limits)))
    compare(lambda new: traffic.step(new, rows=range(sum(map(len, new.values())))))


def test_cuda(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own plan and kernels, on a stand-in for the GPU whose memory is full of NaN."""
    monkeypatch.setattr(families, "spec", lambda _: MODEL)
    monkeypatch.setattr(cuda, "MULTIPROCESSORS", 1)
    manifest = compile_engine(tmp_path / "engine", folder, dtype="float32")
    with gpu_on_cpu() as gpu:
        session = CudaSession(tmp_path / "engine", manifest, blocks=48, fill=0xFF)
        try:
            compare(Traffic(session).step)
        finally:
            session.close()
    for kernel in ("router_logits", "route", "count_experts", "place_pairs", "gate_up", "down", "combine", "shared_gate"):
        assert gpu.ran[kernel] == 3, kernel  # one layer has experts
