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


def attention_spec(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    alibi: bool = False,
) -> ModelSpec:
    """The numbers of ``attention_graph``; the head's width is H * D. With ``alibi`` nothing else knows positions."""
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
        position="alibi" if alibi else "learned",
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


class _Grower:
    """Appends nodes and weights to a graph of [batch, sequence]."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph, self.kind = graph, ONNX_TYPES[graph.dtype]

    def weight(self, name: str, *shape: int, dtype: str = "") -> gs.Variable:
        return self.graph.add_weight(Weight(name, dtype or self.graph.dtype, tensor(name, shape)))

    def node(
        self, op: str, name: str, inputs: list[gs.Tensor], width: int | None, out: int | None = None, **attrs: object
    ) -> gs.Variable:
        output = gs.Variable(f"{name}.out", out or self.kind, ["batch", "sequence", width] if width else None)
        self.graph.graph.nodes.append(gs.Node(op, name, dict(attrs), inputs, [output]))
        return output

    def number(self, name: str, value: object) -> gs.Constant:
        """int64, or the compute type for a float."""
        kind = np.float32 if self.graph.dtype == "float32" else np.float16
        return gs.Constant(f"c.{name}", np.array(value, kind if isinstance(value, float) else np.int64))

    def mask(self, layer: LayerInfo, ids: gs.Variable) -> gs.Variable:
        """bool [S, S] for a window; float [H, S, S] for slopes; float [H, S, S + 1] with sinks in the last column."""
        int64, flag = ONNX_TYPES["int64"], ONNX_TYPES["bool"]
        zero, one = self.number("0", 0), self.number("1", 1)
        length = self.node("Shape", "shape", [ids], None, int64, start=1, end=2)
        keys = self.node("Range", "keys", [zero, self.node("Squeeze", "size", [length], None, int64), one], None, int64)
        rows = self.node("Unsqueeze", "rows", [keys, self.number("axis", [1])], None, int64)
        back = self.node("Sub", "back", [rows, keys], None, int64)
        near = self.node("Less", "mask", [back, self.number("window", layer.window or POSITIONS)], None, flag)
        if not (layer.sinks or layer.alibi):
            return near
        nought, minus = self.number("nought", 0.0), self.number("minus", float("-inf"))
        axes = self.number("axes", [1, 2])
        if layer.alibi:
            slopes = self.node("Unsqueeze", "slopes", [self.weight("alibi.slopes", layer.heads, dtype="float32"), axes], None, 1)
            fall = self.node("Mul", "fall", [slopes, self.node("Cast", "back.float", [back], None, 1, to=1)], None, 1)
            bias = self.node("Cast", "bias", [self.node("Neg", "bias.float", [fall], None, 1)], None, to=int(self.kind))
            return self.node("Where", "bias.mask", [near, bias, minus], None)
        ahead = self.node("GreaterOrEqual", "causal", [back, zero], None, flag)
        seen = self.node("And", "seen", [near, ahead], None, flag)
        square = self.node("Where", "square", [seen, nought, minus], None)
        heads, single = self.number("heads", [layer.heads]), self.number("single", [1])
        wide = self.node("Concat", "wide", [heads, length, length], None, int64, axis=0)
        tall = self.node("Concat", "tall", [heads, length, single], None, int64, axis=0)
        sinks = self.node("Unsqueeze", "sinks", [self.weight("layer.0.sinks", layer.heads), axes], None)
        parts = [self.node("Expand", "squares", [square, wide], None), self.node("Expand", "column", [sinks, tall], None)]
        return self.node("Concat", "sink.mask", parts, None, axis=2)

    def with_sink(self, role: str, x: gs.Variable, ids: gs.Variable) -> gs.Variable:
        """x [B, S, K * D] with one more position of zeros at its end."""
        name, width, int64 = f"layer.0.{role}.sink", x.shape[2], ONNX_TYPES["int64"]
        rows = self.node("Shape", f"{name}.rows", [ids], None, int64, start=0, end=1)
        sides = [rows, self.number(f"{role}.one", [1]), self.number(f"{role}.width", [width])]
        shape = self.node("Concat", f"{name}.shape", sides, None, int64, axis=0)
        zeros = self.node("Expand", f"{name}.zeros", [self.number(f"{role}.zero", 0.0), shape], None)
        return self.node("Concat", name, [x, zeros], None, axis=1)


def attention_graph(spec: ModelSpec, dtype: str = "float32", positions: bool = True) -> ModelGraph:
    """q, k, v = lookups of token and position; Attention; final norm; head: the plain graph that passes start from.

    positions  whether they are an input of a graph that does not look them up
    """
    int64, alibi = ONNX_TYPES["int64"], spec.position == "alibi"
    layer = LayerInfo(
        0, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.scale, spec.window, spec.softcap, sinks=spec.sinks, alibi=alibi
    )
    graph = ModelGraph(new_graph("attention"), {}, [layer], dtype)
    ids, place = (gs.Variable(name, int64, ["batch", "sequence"]) for name in ("token_ids", "positions"))
    graph.graph.inputs += [ids, place] if positions or not alibi else [ids]
    grow = _Grower(graph)
    node, weight = grow.node, grow.weight

    qkv = []
    for role, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
        width = heads * spec.head_dim
        name = f"{role}.token" if not alibi else f"layer.0.{role}"
        x = node("Gather", name, [weight(f"embed.{role}", VOCAB, width), ids], width)
        if not alibi:
            known = node("Gather", f"{role}.place", [weight(f"place.{role}", POSITIONS, width), place], width)
            x = node("Add", f"layer.0.{role}", [x, known], width)
        qkv.append(x)
    if layer.sinks:
        qkv[1:] = [grow.with_sink(role, x, ids) for role, x in zip("kv", qkv[1:], strict=True)]
    if layer.window or layer.sinks or layer.alibi:
        qkv.append(grow.mask(layer, ids))
    attrs = {"q_num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale, "is_causal": int(not layer.sinks)}
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
    """Random float32 values for every weight whose recipe is one tensor; norm weights near 1.

    Sinks are as large as scores are, slopes between 1 / 16 and 1.
    """
    rng = np.random.default_rng(seed)
    arrays = {
        name: (rng.standard_normal(w.shape) + (2.0 if name == "final_norm" else 0.0)).astype(np.float32)
        for name, w in graph.weights.items()
    }
    for name in arrays.keys() & {"alibi.slopes", "layer.0.sinks"}:
        size = arrays[name].shape
        made = np.exp2(-rng.uniform(0, 4, size)) if name == "alibi.slopes" else rng.uniform(-2, 4, size)
        arrays[name] = made.astype(np.float32)
    return arrays


def logits_of(arrays: dict[str, np.ndarray], spec: ModelSpec, token_ids: list[int]) -> np.ndarray:
    """What the graph means, in float64 numpy, written down without ONNX: logits [S, V]."""
    h, k_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    place = np.arange(len(token_ids))
    alibi = spec.position == "alibi"
    q, k, v = (w[f"embed.{role}"][token_ids] + (0 if alibi else w[f"place.{role}"][place]) for role in "qkv")
    q = q.reshape(-1, h, d)
    k, v = (np.repeat(x.reshape(-1, k_heads, d), h // k_heads, axis=1) for x in (k, v))
    score = np.einsum("qhd,khd->hqk", q, k) * spec.scale
    if spec.softcap:
        score = spec.softcap * np.tanh(score / spec.softcap)
    if alibi:
        score -= w["alibi.slopes"][:, None, None] * np.abs(place[:, None] - place)
    seen = place[:, None] >= place
    if spec.window:
        seen &= place[:, None] - place < spec.window
    score = np.where(seen, score, -np.inf)
    sink = w["layer.0.sinks"][:, None, None] if spec.sinks else -np.inf
    largest = np.maximum(score.max(-1, keepdims=True), sink)
    weight = np.exp(score - largest)
    weight /= weight.sum(-1, keepdims=True) + np.exp(sink - largest)
    x = np.einsum("hqk,khd->qhd", weight, v).reshape(-1, h * d)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w["final_norm"]
    return x @ w["lm_head"]
