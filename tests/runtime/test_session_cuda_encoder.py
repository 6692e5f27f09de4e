"""Encoder sessions of the ``cuda`` target: the shipped engine, its kernels in Triton's interpreter, against transformers.

Errors are root mean squares relative to the hidden states': 3e-3 in float16, 2.5e-2 in bfloat16, 8e-2 with FP8 linear layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_on_cpu
import encoders
import numpy as np
import pytest
import torch
from cuda_engines import HOPPER, build_spec, rewritten
from cuda_on_cpu import gpu_on_cpu
from plugins.interpreted import launch

from zoo.artifacts.manifest import EngineManifest
from zoo.build import _limits
from zoo.calibration import calibrate
from zoo.compilers.cuda import CudaCompiler
from zoo.errors import ArtifactError, CompileError, IncompatibleError
from zoo.plugins.kernels import CudaNode, TensorRef
from zoo.plugins.packed_attention import cuda as lowering
from zoo.runtime.embedding import batch_of
from zoo.runtime.sessions import open_encoder
from zoo.runtime.sessions.cuda_encoder import CudaEncoder
from zoo.spec import Limits
from zoo.tuning import run as tuning
from zoo.weights.reader import Tensors

LIMITS = Limits(max_tokens=96, max_sequences=6, max_context=40)
TEXTS = [5, 33, 1, 17]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda-encoders")


def compiled(root: Path, name: str, dtype: str, quant: str = "none") -> tuple[Path, EngineManifest]:
    """An engine of a case, its cubins standing for Triton functions."""
    checkpoint, folder = root / name, root / f"{name}-{dtype}-{quant}"
    checkpoint = checkpoint if checkpoint.is_dir() else encoders.folder(root, name)
    build = build_spec(encoders.spec(checkpoint), quant, LIMITS, dtype=dtype)
    folder.mkdir()
    scales = {}
    with Tensors.open(checkpoint) as tensors:
        if quant != "none":
            scales = calibrate(build.model, tensors, encoders.texts([200])[0])
            (folder / "scales.json").write_text(json.dumps(scales))
        with mock.patch("zoo.compilers.cuda.engine.compile_kernels", cuda_on_cpu.compile_kernels):
            made = CudaCompiler().compile(rewritten(build), build, tensors, scales, folder)
        (folder / "checkpoint").mkdir()
        for file in tensors.files:
            os.link(file, folder / "checkpoint" / file.name)
    return folder, EngineManifest(
        model=name,
        version="0" * 12,
        profile=build.profile,
        build="sha256:" + "0" * 64,
        made={},
        compiler={"name": "cuda", "version": "1"},
        spec={},
        needs=made.needs,
        limits=_limits(build),
        abi=made.abi,
        weights=made.weights,
        scratch=made.scratch,
        pooling="first",
    )


@pytest.mark.parametrize(
    ("name", "dtype", "quant", "tolerance"),
    [
        ("bert", "float16", "none", 3e-3),
        ("roberta", "bfloat16", "none", 2.5e-2),
        ("modernbert", "float16", "none", 3e-3),
        ("modernbert-masked-odd", "float16", "none", 3e-3),
        ("bert", "bfloat16", "fp8", 8e-2),
    ],
)
def test_hidden_states(root: Path, name: str, dtype: str, quant: str, tolerance: float) -> None:
    folder, manifest = compiled(root, name, dtype, quant)
    texts = encoders.texts(TEXTS)
    want = np.concatenate([encoders.reference(name, text) for text in texts])
    with gpu_on_cpu() as gpu:
        session = CudaEncoder(folder, manifest, fill=0xFF)
        assert (session.vocab_size, session.pooling, session.limits.max_tokens) == (262, "first", 96)
        found = [session.encode(batch_of(texts)), session.encode(batch_of(texts[1:2]))]
        assert gpu.ran["packed"] == 2 * encoders.spec(root / name).num_layers and gpu.ran["layer_norm"] > 0
        session.close()
        session.close()
    assert found[0].shape == want.shape and found[0].dtype == np.float32
    for hidden, wanted in zip(found, (want, want[5:38]), strict=True):
        assert np.sqrt(((hidden - wanted) ** 2).mean() / (wanted**2).mean()) <= tolerance


def test_what_a_session_refuses(root: Path) -> None:
    folder, manifest = compiled(root, "bert-masked-odd", "float16")
    with gpu_on_cpu():
        session = open_encoder(folder, manifest)
        for wrong, words in (([[300]], "outside the vocabulary"), ([[1]] * 7, "7 texts in a step"), ([[1] * 41], "beyond")):
            with pytest.raises(AssertionError, match=words):
                session.encode(batch_of(wrong))
        session.close()
        for changes, words in (
            ({"needs": {}}, "needs has no sm"),
            ({"limits": {"max_tokens": 3}}, "limits are malformed"),
            ({"abi": dataclasses.replace(manifest.abi, outputs=())}, r"no output hidden \[T, hidden\]"),
            (
                {"abi": dataclasses.replace(manifest.abi, inputs=manifest.abi.inputs[:2])},
                "expected token_ids, positions, query_starts",
            ),
        ):
            with pytest.raises(ArtifactError, match=words):
                open_encoder(folder, dataclasses.replace(manifest, **changes))  # type: ignore[arg-type]


def test_an_engine_samples_nothing(root: Path) -> None:
    folder, manifest = compiled(root, "xlm-roberta", "float16")
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["sampling"] == {"greedy": [], "sample": [], "resolve": []} and plan["sampling_scratch"] == {}
    assert not manifest.abi.caches and manifest.limits.keys() == {"max_tokens", "max_sequences", "max_context"}
    with pytest.raises(IncompatibleError, match="is an encoder's, whose kernels have nothing to choose from yet"):
        tuning.check(manifest)
    assert HOPPER.sm == plan["sm"] and plan["inputs"] == ["positions", "query_starts", "token_ids"]


def rotary(tables: tuple[Any, ...], heads: int, size: int, **attrs: int) -> CudaNode:
    refs = [TensorRef(name, "float32", shape) for name, shape in zip(("x", "cos", "sin"), tables, strict=True)]
    refs.append(TensorRef("positions", "int32", (1, "T")))
    out = TensorRef("y", "float32", (1, "T", heads * size))
    return CudaNode("RotaryEmbedding", "n", {"num_heads": heads, **attrs}, tuple(refs), (out,), 90, {})


@pytest.mark.parametrize(("size", "half", "interleaved"), [(16, 8, 0), (20, 10, 0), (20, 6, 0), (16, 8, 1), (12, 4, 1)])
def test_rotation(size: int, half: int, interleaved: int) -> None:
    """Against complex numbers: pairs are multiplied by cos + i sin, the rest of a head is copied."""
    rng, heads, tokens = np.random.default_rng(0), 3, 37
    x = rng.standard_normal((tokens, heads, size), np.float32)
    angles = rng.uniform(0, 6, (50, half)).astype(np.float32)
    positions = rng.integers(0, 50, tokens).astype(np.int32)
    pairs = x[:, :, : 2 * half].reshape(tokens, heads, *((half, 2) if interleaved else (2, half)))
    a, b = (pairs[..., 0], pairs[..., 1]) if interleaved else (pairs[:, :, 0], pairs[:, :, 1])
    turned = (a + 1j * b) * np.exp(1j * angles[positions])[:, None]
    both = (turned.real, turned.imag)
    rotated = np.stack(both, -1) if interleaved else np.stack(both, 2)
    want = np.concatenate([rotated.reshape(tokens, heads, 2 * half), x[:, :, 2 * half :]], axis=-1)
    node = rotary(((1, "T", heads * size), (50, half), (50, half)), heads, size, interleaved=interleaved)
    tensors = {
        "x": torch.from_numpy(x),
        "cos": torch.from_numpy(np.cos(angles)),
        "sin": torch.from_numpy(np.sin(angles)),
        "positions": torch.from_numpy(positions),
        "y": torch.full((tokens + 1, heads, size), float("nan")),
    }
    launch(lowering.rotate(node), tensors, {"T": tokens})
    np.testing.assert_allclose(tensors["y"][:tokens].numpy(), want, rtol=0, atol=1e-5)
    assert tensors["y"][tokens].isnan().all(), "rows behind the step are written"


def test_rotations_that_no_kernel_can_run() -> None:
    node = rotary(((1, "T", 48), (50, 8), (50, 8)), 3, 16)
    for wrong in (
        dataclasses.replace(node, inputs=node.inputs[:3]),
        dataclasses.replace(node, attrs={}),
    ):
        with pytest.raises(CompileError, match="n: the cuda target rotates"):
            lowering.rotate(wrong)
