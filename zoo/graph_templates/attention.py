"""Attention of one layer, [B, S, E] -> [B, S, E], and what all layers share: rotary tables and masks.

Causality is the Attention node's own. Windows are bool masks beside it. Linear biases and sinks are float masks, [1, H, S, S] or,
with the sinks' column, [1, H, S, S + 1]: a sink is one more position whose key and value are zeros and whose score is the mask's.

B batch, S sequence, E hidden, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from zoo.graph import ONNX_TYPES
from zoo.graph_templates.builder import BATCH, Builder

SQUARE = ("sequence", "sequence")


@dataclass
class Shared:
    """What attention of all layers reads: positions, rotary tables by kind (local or not), masks by what decides them."""

    positions: gs.Variable
    token_ids: gs.Variable
    tables: dict[bool, list[gs.Variable]] = field(default_factory=dict)
    masks: dict[Any, gs.Variable] = field(default_factory=dict)


def shared_inputs(b: Builder, token_ids: gs.Variable, positions: gs.Variable) -> Shared:
    """The tables and masks of a graph, made when a layer first asks for them."""
    return Shared(positions, token_ids)


def attention(b: Builder, i: int, x: gs.Variable, shared: Shared) -> gs.Variable:
    """x [B, S, E] -> [B, S, E]; grouped heads (Ainslie et al. 2023) when K < H."""
    m = b.model
    q, k, v = (b.linear(role, x, i, bias=m.qkv_bias) for role in ("q", "k", "v"))
    rope = rotary(b, i, shared)
    q, k = query_or_key(b, i, "q", q, rope, m.num_heads), query_or_key(b, i, "k", k, rope, m.num_kv_heads)
    y = attend(b, i, q, k, clipped(b, f"layer.{i}.v.clip", v), shared)
    return b.linear("o", y, i, bias=m.out_bias)


def attend(b: Builder, i: int, q: gs.Variable, k: gs.Variable, v: gs.Variable, shared: Shared) -> gs.Variable:
    """Queries [B, S, H * D], keys and values [B, S, K * D] -> [B, S, H * D], as the layer table has it."""
    m, layer = b.model, b.out.layers[i]
    attrs: dict[str, Any] = {"q_num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale}
    attrs["is_causal"] = int(m.template == "decoder" and not m.sinks)
    if m.softcap:
        attrs["softcap"] = m.softcap
    if m.sinks:
        k, v = with_sink(b, i, "k", k), with_sink(b, i, "v", v)
    mask = mask_of(b, i, shared)
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    return b.node("Attention", f"layer.{i}.attention", inputs, [*BATCH, layer.heads * layer.head_dim], **attrs)


def clipped(b: Builder, name: str, x: gs.Variable) -> gs.Variable:
    """``x`` within +- clip_qkv, where the model has that."""
    limit = b.model.clip_qkv
    return b.like("Clip", name, x, b.number("clip.least", -limit), b.number("clip.most", limit)) if limit else x


def rotary(b: Builder, i: int, shared: Shared) -> list[gs.Variable]:
    """Cosines, sines and positions for a layer; nothing for one that does not rotate."""
    rope = b.model.rope_of(i)
    if rope is None:
        return []
    local = rope is not b.model.rope
    if local not in shared.tables:
        name = "rope_local" if local else "rope"
        shared.tables[local] = [b.weight(f"{name}.cos"), b.weight(f"{name}.sin")]
    return [*shared.tables[local], shared.positions]


def rotated(b: Builder, name: str, x: gs.Variable, rope: list[gs.Variable], heads: int, size: int) -> gs.Variable:
    """x [B, S, heads * size] with the first ``rotary_dim`` numbers of each head rotated."""
    attrs: dict[str, Any] = {"num_heads": heads, "interleaved": int(b.model.rope.interleaved)}
    if b.model.rotary_dim != size:
        attrs["rotary_embedding_dim"] = b.model.rotary_dim
    return b.like("RotaryEmbedding", name, x, *rope, **attrs)


def query_or_key(b: Builder, i: int, role: str, x: gs.Variable, rope: list[gs.Variable], heads: int) -> gs.Variable:
    """Norm, clip, rotary embedding of x [B, S, heads * D], in this order; each only if the model has it."""
    m, name = b.model, f"layer.{i}.{role}"
    if m.qk_norm == "all":
        x = b.norm(f"{role}_norm", x, i, name=f"{name}.norm", bias=False)
    elif m.qk_norm != "none":
        merged = list(x.shape)
        x = b.reshape(f"{name}.heads", x, [0, 0, heads, m.head_dim], [*BATCH, heads, m.head_dim])
        if m.qk_norm == "heads":  # a weight for each head: norm without one, then multiply
            x = b.norm(f"{role}_norm.unit", x, i, name=f"{name}.norm", bias=False)
            x = b.like("Mul", f"{name}.norm.weight", x, b.weight(f"{role}_norm", i))
        else:
            x = b.norm(f"{role}_norm", x, i, name=f"{name}.norm", bias=False)
        x = b.reshape(f"{name}.merge", x, [0, 0, heads * m.head_dim], merged)
    x = clipped(b, f"{name}.clip", x)
    return rotated(b, f"{name}.rope", x, rope, heads, m.head_dim) if rope else x


def with_sink(b: Builder, i: int, role: str, x: gs.Variable) -> gs.Variable:
    """x [B, S, K * D] with one more position of zeros at its end."""
    name = f"layer.{i}.{role}.sink"
    first = b.node(
        "Slice", f"{name}.first", [x, *(b.constant(f"{name}.{key}", [n]) for key, n in SLICE)], ["batch", 1, x.shape[2]]
    )
    zeros = b.like("Mul", f"{name}.zeros", first, b.number("zero", 0.0))
    return b.node("Concat", name, [x, zeros], ["batch", "sequence+1", x.shape[2]], axis=1)


SLICE = (("start", 0), ("stop", 1), ("axis", 1))


def mask_of(b: Builder, i: int, shared: Shared) -> gs.Variable | None:
    """The mask of a layer; None where causality says it all. Layers with the same mask share it."""
    m, window = b.model, b.model.window_of(i)
    if m.sinks:
        return sink_mask(b, i, window, shared)
    key = ("alibi", window) if m.position == "alibi" else window
    if not key:
        return None
    if key not in shared.masks:
        shared.masks[key] = alibi_mask(b, window, shared) if m.position == "alibi" else window_mask(b, window, shared)
    return shared.masks[key]


def distance(b: Builder, shared: Shared) -> gs.Variable:
    """How far key j lies behind query i, [S, S] int64."""
    if "distance" not in shared.masks:
        size = b.node("Shape", "window.size", [shared.token_ids], [1], "int64", start=1, end=2)
        size = b.node("Squeeze", "window.length", [size], [], "int64")
        index = [b.constant("window.zero", 0), size, b.constant("window.one", 1)]
        keys = b.node("Range", "window.keys", index, ["sequence"], "int64")
        rows = b.node("Unsqueeze", "window.queries", [keys, b.constant("window.axis", [1])], ["sequence", 1], "int64")
        shared.masks["distance"] = b.node("Sub", "window.distance", [rows, keys], SQUARE, "int64")
    return shared.masks["distance"]


def window_mask(b: Builder, window: int, shared: Shared) -> gs.Variable:
    """bool [S, S]: query i may see key j when i - j < window; of an encoder, when abs(i - j) <= window / 2."""
    back, name = distance(b, shared), f"window.{window}"
    if b.model.template == "encoder":
        both = b.node("Abs", f"{name}.abs", [back], SQUARE, "int64")
        return b.node("LessOrEqual", name, [both, b.constant(f"{name}.size", window // 2)], SQUARE, "bool")
    return b.node("Less", name, [back, b.constant(f"{name}.size", window)], SQUARE, "bool")


def minus_infinity(b: Builder, name: str, seen: gs.Variable, inside: gs.Variable, shape: list[Any]) -> gs.Variable:
    """``inside`` where ``seen``, else minus infinity."""
    return b.node("Where", name, [seen, inside, b.number("minus_infinity", float("-inf"))], shape)


def alibi_mask(b: Builder, window: int, shared: Shared) -> gs.Variable:
    """[1, H, S, S]: minus slope times distance (Press et al. 2022), made in float32; minus infinity outside of a window."""
    shape, name = [1, b.model.num_heads, *SQUARE], f"alibi.{window}"
    back = b.node("Cast", f"{name}.distance", [distance(b, shared)], SQUARE, "float32", to=1)
    slopes = b.node(
        "Unsqueeze",
        f"{name}.slopes",
        [b.weight("alibi.slopes"), b.constant(f"{name}.axes", [0, 2, 3])],
        [1, shape[1], 1, 1],
        "float32",
    )
    fall = b.node("Mul", f"{name}.fall", [slopes, back], shape, "float32")
    bias = b.node("Neg", f"{name}.float32", [fall], shape, "float32")
    mask = bias if b.dtype == "float32" else b.node("Cast", name, [bias], shape, to=int(ONNX_TYPES[b.dtype]))
    return minus_infinity(b, f"{name}.window", window_mask(b, window, shared), mask, shape) if window else mask


def sink_mask(b: Builder, i: int, window: int, shared: Shared) -> gs.Variable:
    """[1, H, S, S + 1]: 0 where a query sees a key, minus infinity elsewhere, and in the last column each head's sink."""
    heads, key = b.model.num_heads, ("sinks", window)
    if key not in shared.masks:
        name = f"sinks.{window}"
        seen = b.node("GreaterOrEqual", f"{name}.causal", [distance(b, shared), b.constant(f"{name}.zero", 0)], SQUARE, "bool")
        if window:
            seen = b.node("And", f"{name}.seen", [seen, window_mask(b, window, shared)], SQUARE, "bool")
        square = minus_infinity(b, f"{name}.square", seen, b.number("zero", 0.0), list(SQUARE))
        size = b.node("Shape", f"{name}.shape", [square], [2], "int64")
        wide = b.node("Concat", f"{name}.wide", [b.constant(f"{name}.heads", [1, heads]), size], [4], "int64", axis=0)
        shared.masks[key] = b.node("Expand", f"{name}.mask", [square, wide], [1, heads, *SQUARE])
    name = f"layer.{i}.sinks"
    column = b.node(
        "Unsqueeze", f"{name}.column", [b.weight("sinks", i), b.constant(f"{name}.axes", [0, 2, 3])], [1, heads, 1, 1]
    )
    rows = shared.masks.get("sink_rows")
    if rows is None:
        length = b.node("Shape", "sinks.length", [shared.token_ids], [1], "int64", start=1, end=2)
        parts = [b.constant("sinks.head", [1, heads]), length, b.constant("sinks.tail", [1])]
        rows = shared.masks["sink_rows"] = b.node("Concat", "sinks.rows", parts, [4], "int64", axis=0)
    column = b.node("Expand", f"{name}.rows", [column, rows], [1, heads, "sequence", 1])
    return b.node("Concat", f"{name}.mask", [shared.masks[key], column], [1, heads, "sequence", "sequence+1"], axis=3)
