"""The plain graph against transformers, and against what ONNX says of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import families
import numpy as np
import onnx
import pytest
import torch

from zoo.errors import GraphError
from zoo.graph import ONNX_TYPES
from zoo.graph_templates import TEMPLATES, expand
from zoo.spec import DTYPES, ModelSpec, RopeSpec
from zoo.weights.reader import Tensors

TINY = ModelSpec("tiny", "llama", 40, 16, 2, 2, 1, 8, 24, 32, tensors=families.LLAMA_NAMES)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("checkpoints")

    def make(case: str) -> Path:
        family, overrides = families.CASES[case]
        return families.make_checkpoint(root, family, **overrides)

    return make


@pytest.fixture(params=families.CASES)
def folder(request: pytest.FixtureRequest, folder_of) -> Path:
    return folder_of(request.param)


def test_logits_and_greedy_tokens_equal_transformers(folder: Path) -> None:
    model = families.spec(folder)
    with Tensors.open(folder) as tensors:
        plain = families.Plain(expand(model, "float32"), tensors)
        for length in (1, 2, 13, 40):
            ids = families.prompt(folder, length, seed=length)
            got = plain.logits([ids])[0]
            np.testing.assert_allclose(got, families.reference_logits(folder, ids), atol=1e-4, rtol=0)
        start = families.prompt(folder, 5, seed=99)
        assert plain.greedy(start, 32) == families.reference_greedy(folder, start, 32)


def test_rows_of_a_batch_equal_sequences_alone(folder: Path) -> None:
    """Rows of several lengths, padded on the right; what is in the padding does not matter."""
    lengths = (3, 17, 9)
    rows = [families.prompt(folder, n, seed=n) for n in lengths]
    with Tensors.open(folder) as tensors:
        plain = families.Plain(expand(families.spec(folder), "float32"), tensors)
        padded = [row + families.prompt(folder, max(lengths) - len(row), seed=7) for row in rows]
        batch = plain.logits(padded)
        for got, row in zip(batch, rows, strict=True):
            np.testing.assert_allclose(got[: len(row)], families.reference_logits(folder, row), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["mistral-window", "qwen2-window-layers"])
def test_the_window_matters_in_these_cases(folder_of, case: str) -> None:
    folder = folder_of(case)
    model = families.spec(folder)
    assert model.window
    full = dataclasses.replace(model, window=0, window_layers=())
    ids = families.prompt(folder, 20)
    with Tensors.open(folder) as tensors:
        logits = families.Plain(expand(full, "float32"), tensors).logits([ids])[0]
    difference = np.abs(logits - families.reference_logits(folder, ids)).max(axis=1)
    assert difference[: model.window].max() < 1e-4
    assert difference[model.window :].max() > 1e-2


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_partial_rotary_equals_gpt_neox_layout(tmp_path: Path, fraction: float) -> None:
    """Of a head, only the first ``fraction`` turns: transformers' own rotary function on that part is the judge."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = dataclasses.replace(TINY, head_dim=16, rope=RopeSpec(fraction=fraction))
    graph = expand(model, "float32")
    node = next(node for node in graph.graph.nodes if node.name == "layer.0.q.rope")
    rotary = int(16 * fraction)
    assert node.attrs["rotary_embedding_dim"] == rotary
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((1, 5, 2 * 16)).astype(np.float32), np.array([[3, 0, 7, 8, 30]])
    from zoo.weights.bind import materialize

    cos, sin = (materialize(graph.weights[name], None, {}) for name in ("rope.cos", "rope.sin"))
    assert cos.shape == sin.shape == (32, rotary // 2)
    one = onnx.helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "p"], ["y"], **node.attrs)
    got = ReferenceEvaluator(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                [one],
                "g",
                [onnx.helper.make_tensor_value_info(n, t, None) for n, t in (("x", 1), ("cos", 1), ("sin", 1), ("p", 7))],
                [onnx.helper.make_tensor_value_info("y", 1, None)],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 24)],
        )
    ).run(None, {"x": x, "cos": cos, "sin": sin, "p": positions})[0]
    heads = torch.tensor(x.reshape(1, 5, 2, 16).transpose(0, 2, 1, 3))
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    angles = torch.cat([torch.outer(torch.tensor(positions[0]).float(), frequencies)] * 2, -1)[None]
    turned, _ = apply_rotary_pos_emb(heads[..., :rotary], heads[..., :rotary], angles.cos(), angles.sin())
    wanted = torch.cat([turned, heads[..., rotary:]], -1).numpy().transpose(0, 2, 1, 3).reshape(1, 5, 32)
    np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_softcap_and_scale_reach_the_attention(folder_of) -> None:
    """Against attention written out in torch, on the tensors that the graph itself gives to the node."""
    folder = folder_of("mistral-window")
    model = dataclasses.replace(families.spec(folder), softcap=2.0, attention_scale=0.7, window=4)
    graph = expand(model, "float32")
    node = next(node for node in graph.graph.nodes if node.name == "layer.1.attention")
    graph.graph.outputs += [*node.inputs[:3], node.outputs[0]]
    ids = np.asarray([families.prompt(folder, 11)])
    with Tensors.open(folder) as tensors:
        plain = families.Plain(graph, tensors)
        feeds = {"token_ids": families.ort_value(ids), "positions": families.ort_value(np.arange(11)[None])}
        outs = [v.name for v in graph.graph.outputs[1:]]
        q, k, v, y = (torch.tensor(x.numpy()) for x in plain.session.run_with_ort_values(outs, plain.weights | feeds))
    q, k, v = (x.reshape(1, 11, -1, model.head_dim).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(model.num_heads // model.num_kv_heads, dim=1) for x in (k, v))
    scores = 2.0 * torch.tanh(q @ k.transpose(-1, -2) * 0.7 / 2.0)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    seen = (distance >= 0) & (distance < 4)
    wanted = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(1, 11, -1)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=0)
    assert graph.layers[1].softcap == 2.0 and graph.layers[1].window == 4 and graph.layers[1].scale == 0.7


OPTIONS = {
    "gated": {},
    "plain": {"mlp": "plain", "activation": "relu"},
    "gelu": {"activation": "gelu", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "window": {"window": 5, "window_layers": (1,)},
    "norms": {"qk_norm": "head"},
    "softcap": {"softcap": 30.0},
    "partial": {"rope": RopeSpec(fraction=0.5)},
    "tied": {"tie_embeddings": True},
    "layer-norm": {"norm": "layer", "position": "learned", "mlp": "plain", "activation": "gelu_tanh", "tie_embeddings": True},
}
NAMES = dataclasses.replace(
    families.LLAMA_NAMES,
    model=families.LLAMA_NAMES.model | {"pos_embed": "p", "final_norm.bias": "fb"},
    layer=families.LLAMA_NAMES.layer | {"norm1.bias": "{layer}.b1", "norm2.bias": "{layer}.b2"},
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_is_valid_onnx_in_every_dtype(options: str, dtype: str) -> None:
    graph = expand(dataclasses.replace(TINY, **OPTIONS[options], tensors=NAMES), dtype)
    model = graph.to_onnx()
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (12, [("", 24)])
    assert {node.domain for node in model.graph.node} == {""}
    # Declared types and shapes agree with inference, node by node.
    bare = onnx.ModelProto.FromString(model.SerializeToString())
    del bare.graph.value_info[:]
    inferred = {v.name: v.type.tensor_type for v in onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph.value_info}
    for declared in model.graph.value_info:
        found = inferred[declared.name]
        assert found.elem_type == declared.type.tensor_type.elem_type, declared.name
        assert len(found.shape.dim) == len(declared.type.tensor_type.shape.dim), declared.name
        for one, other in zip(found.shape.dim, declared.type.tensor_type.shape.dim, strict=True):
            assert one.dim_value == other.dim_value or not one.dim_value, declared.name
    logits = model.graph.output[0].type.tensor_type
    assert logits.elem_type == ONNX_TYPES["float32"] and [d.dim_param or d.dim_value for d in logits.shape.dim] == [
        "batch",
        "sequence",
        40,
    ]


def test_only_dtype_differs_between_compute_types() -> None:
    one, other = (expand(TINY, dtype).graph.nodes for dtype in ("float32", "float16"))
    assert [(n.op, n.name) for n in one] == [(n.op, n.name) for n in other if n.name != "logits"]
    assert (other[-1].op, other[-1].name) == ("Cast", "logits")


def test_names_are_unique_and_readable() -> None:
    graph = expand(dataclasses.replace(TINY, qkv_bias=True, qk_norm="head"), "float32")
    names = [node.name for node in graph.graph.nodes]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("layer.1.")] == [
        "layer.1.norm1",
        *("layer.1.q", "layer.1.q.bias", "layer.1.k", "layer.1.k.bias", "layer.1.v", "layer.1.v.bias"),
        *(f"layer.1.{role}.{part}" for role in "qk" for part in ("heads", "norm", "merge", "rope")),
        *("layer.1.attention", "layer.1.o", "layer.1.residual1", "layer.1.norm2"),
        *("layer.1.gate", "layer.1.up", "layer.1.act.sigmoid", "layer.1.act", "layer.1.mlp", "layer.1.down", "layer.1.residual2"),
    ]
    assert [variable.name for variable in graph.data_inputs] == ["token_ids", "positions"]
    assert list(graph.weights)[:4] == ["embed", "layer.0.norm1", "layer.0.q", "layer.0.q.bias"]
    assert not [
        tensor
        for tensor in graph.graph.tensors().values()
        if getattr(tensor, "values", None) is not None and tensor.values.size > 4
    ]


def test_max_context_bounds_the_position_tables() -> None:
    assert expand(TINY, "float32", 8).weights["rope.cos"].shape == (8, 4)
    learned = dataclasses.replace(TINY, position="learned", tensors=NAMES)
    weight = expand(learned, "float32", 8).weights["pos_embed"]
    assert weight.shape == (8, 16) and next(weight.recipe.leaves()).shape == (32, 16)
    assert expand(learned, "float32").weights["pos_embed"].recipe.op == "tensor"


def test_wrong_requests_say_what_is_allowed() -> None:
    with pytest.raises(GraphError, match="positions for 1 to 32"):
        expand(TINY, "float32", 33)
    with pytest.raises(GraphError, match="pick one of float32, float16, bfloat16"):
        expand(TINY, "float8")
    assert list(TEMPLATES) == ["decoder", "encoder"]


EXPAND_70B = r"""
import json, re, sys, time
from pathlib import Path
from zoo.graph_templates import expand
from zoo.spec import ModelSpec, TensorNames
names = TensorNames(**json.loads(sys.argv[1]))
model = ModelSpec("llama-3.1-70b", "llama", 128256, 8192, 80, 64, 8, 128, 28672, 131072, tensors=names)
start = time.process_time()
graph = expand(model, "bfloat16")
seconds = time.process_time() - start
peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss survives exec
print(json.dumps([seconds, peak, len(graph.graph.nodes), len(graph.weights)]))
"""


def test_seventy_billion_parameters_expand_in_a_moment() -> None:
    """A process of its own, for the peak. The times allowed are a generous multiple of what is measured, for busy machines."""
    names = json.dumps({"model": families.LLAMA_NAMES.model, "layer": families.LLAMA_NAMES.layer})
    done = subprocess.run([sys.executable, "-c", EXPAND_70B, names], capture_output=True, text=True, check=True)
    seconds, peak, nodes, weights = json.loads(done.stdout)
    assert (nodes, weights) == (1 + 80 * 17 + 3, 1 + 2 + 80 * 9 + 2)
    assert seconds < 0.5 and peak < 250e6
