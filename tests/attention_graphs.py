"""One attention layer as a ModelGraph, made by hand: everything around it is a lookup, so errors are attention's own.

H heads, K key/value heads, D head size, S sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zoo.graph import ONNX_TYPES, LayerInfo, ModelGraph, new_graph
from zoo.spec import ModelSpec
from zoo.weights.recipe import Weight, tensor

VOCAB, POSITIONS = 50, 256


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads of an attention op, as its attributes name them."""

    heads: int
    kv_heads: int
    size: int
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "num_heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.size,
            "block_size": self.block_size,
            "scale": self.size**-0.5,
            "window": self.window,
            "softcap": self.softcap,
        }


def attention_spec(heads: int = 4, kv_heads: int = 2, head_dim: int = 8, window: int = 0, softcap: float = 0.0) -> ModelSpec:
    """The numbers of ``attention_graph``; the head's width is H * D."""
    return ModelSpec(
        name="attention",
        family="test",
        vocab_size=VOCAB,
        hidden_size=heads * head_dim,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=8,
        max_positions=POSITIONS,
        position="learned",
        window=window,
        softcap=softcap,
    )


def attention_graph(spec: ModelSpec, dtype: str = "float32") -> ModelGraph:
    """q, k, v = lookups of token and position; Attention; final norm; head: the plain graph that passes start from."""
    kind, int64 = ONNX_TYPES[dtype], ONNX_TYPES["int64"]
    layer = LayerInfo(0, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.scale, spec.window_of(0), spec.softcap)
    graph = ModelGraph(new_graph("attention"), {}, [layer], dtype)
    ids, positions = (gs.Variable(name, int64, ["batch", "sequence"]) for name in ("token_ids", "positions"))
    graph.graph.inputs += [ids, positions]

    def weight(name: str, *shape: int) -> gs.Variable:
        return graph.add_weight(Weight(name, dtype, tensor(name, shape)))

    def node(op: str, name: str, inputs: list[gs.Tensor], width: int | None, out: int = kind, **attrs: object) -> gs.Variable:
        output = gs.Variable(f"{name}.out", out, ["batch", "sequence", width] if width else None)
        graph.graph.nodes.append(gs.Node(op, name, dict(attrs), inputs, [output]))
        return output

    qkv = []
    for role, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
        width = heads * spec.head_dim
        token = node("Gather", f"{role}.token", [weight(f"embed.{role}", VOCAB, width), ids], width)
        place = node("Gather", f"{role}.place", [weight(f"place.{role}", POSITIONS, width), positions], width)
        qkv.append(node("Add", f"layer.0.{role}", [token, place], width))
    if layer.window:
        zero, one, axis = (gs.Constant(f"c.{name}", np.array(v, np.int64)) for name, v in (("0", 0), ("1", 1), ("axis", [1])))
        size = node("Squeeze", "size", [node("Shape", "shape", [ids], None, int64, start=1, end=2)], None, int64)
        keys = node("Range", "keys", [zero, size, one], None, int64)
        rows = node("Unsqueeze", "rows", [keys, axis], None, int64)
        back = node("Sub", "back", [rows, keys], None, int64)
        limit = gs.Constant("c.window", np.array(layer.window, np.int64))
        qkv.append(node("Less", "mask", [back, limit], None, ONNX_TYPES["bool"]))
    attrs = {"q_num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale, "is_causal": 1}
    if layer.softcap:
        attrs["softcap"] = layer.softcap
    hidden = spec.hidden_size
    x = node("Attention", "layer.0.attention", qkv, hidden, **attrs)
    x = node("RMSNormalization", "final_norm", [x, weight("final_norm", hidden)], hidden, axis=-1)
    logits = node("MatMul", "lm_head", [x, weight("lm_head", hidden, VOCAB)], VOCAB)
    logits.name = "logits"
    if dtype != "float32":
        logits.name = "lm_head.out"
        logits = node("Cast", "logits", [logits], VOCAB, ONNX_TYPES["float32"], to=int(ONNX_TYPES["float32"]))
        logits.name = "logits"
    graph.graph.outputs.append(logits)
    return graph


def random_arrays(graph: ModelGraph, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 values for every weight whose recipe is one tensor; norm weights near 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(w.shape) + (2.0 if name == "final_norm" else 0.0)).astype(np.float32)
        for name, w in graph.weights.items()
    }


def logits_of(arrays: dict[str, np.ndarray], spec: ModelSpec, token_ids: list[int]) -> np.ndarray:
    """What the graph means, in float64 numpy, written down without ONNX: logits [S, V]."""
    h, k_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    place = np.arange(len(token_ids))
    q, k, v = (w[f"embed.{role}"][token_ids] + w[f"place.{role}"][place] for role in "qkv")
    q = q.reshape(-1, h, d)
    k, v = (np.repeat(x.reshape(-1, k_heads, d), h // k_heads, axis=1) for x in (k, v))
    score = np.einsum("qhd,khd->hqk", q, k) * spec.scale
    if spec.softcap:
        score = spec.softcap * np.tanh(score / spec.softcap)
    seen = place[:, None] >= place
    if spec.window:
        seen &= place[:, None] - place < spec.window
    score = np.where(seen, score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    x = np.einsum("hqk,khd->qhd", weight, v).reshape(-1, h * d)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w["final_norm"]
    return x @ w["lm_head"]
