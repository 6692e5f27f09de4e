"""Decoder-only transformers as a plain ONNX graph: the whole sequence at once, no cache, standard operators only.

Every option of ``zoo.spec.ModelSpec`` is a branch here and nowhere else. A Llama (Touvron et al. 2023) is RMS norms,
rotary positions and a gated MLP; a GPT-2 (Radford et al. 2019) is layer norms, learned positions, a plain MLP and biases.
If a model needs Python, this file lacks an option.

Inputs   token_ids, positions  [B, S] int64, and the weights
Output   logits                [B, S, V] float32

B batch, S sequence, V vocabulary, E hidden, F intermediate, H heads, K key/value heads, D head size.
Linear weights are [in, out]. Attention is causal by index, so rows of a batch are padded on the right.
"""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from zoo.graph import ModelGraph
from zoo.graph_templates.builder import BATCH, Builder
from zoo.spec import ModelSpec


def decoder(model: ModelSpec, dtype: str, max_context: int = 0) -> ModelGraph:
    """The plain graph of one model; reads no checkpoint. See the module for inputs and output."""
    b = Builder(model, dtype, max_context)
    token_ids, positions = b.input("token_ids", "int64"), b.input("positions", "int64")
    embed_shape = [*BATCH, model.hidden_size]

    x = b.node("Gather", "embed", [b.weight("embed"), token_ids], embed_shape, axis=0)
    if model.position == "learned":
        learned = b.node("Gather", "pos_embed", [b.weight("pos_embed"), positions], embed_shape, axis=0)
        x = b.like("Add", "embed.positions", x, learned)
    rope = [b.weight("rope.cos"), b.weight("rope.sin"), positions] if model.position == "rope" else []
    masks = window_masks(b, token_ids)

    for i in range(model.num_layers):
        x = b.like("Add", f"layer.{i}.residual1", x, attention(b, i, b.norm("norm1", x, i), rope, masks.get(model.window_of(i))))
        x = b.like("Add", f"layer.{i}.residual2", x, mlp(b, i, b.norm("norm2", x, i)))

    logits = b.linear("lm_head", b.norm("final_norm", x))
    b.output(b.cast("logits", logits, "float32"), "logits")
    return b.out


def attention(b: Builder, i: int, x: gs.Variable, rope: list[gs.Variable], mask: gs.Variable | None) -> gs.Variable:
    """x [B, S, E] -> [B, S, E]; grouped heads (Ainslie et al. 2023) when K < H."""
    m = b.model
    q, k, v = (b.linear(role, x, i, bias=m.qkv_bias) for role in ("q", "k", "v"))
    q, k = query_or_key(b, i, "q", q, rope, m.num_heads), query_or_key(b, i, "k", k, rope, m.num_kv_heads)
    attrs: dict[str, Any] = {"q_num_heads": m.num_heads, "kv_num_heads": m.num_kv_heads, "scale": m.scale, "is_causal": 1}
    if m.softcap:
        attrs["softcap"] = m.softcap
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    y = b.node("Attention", f"layer.{i}.attention", inputs, [*BATCH, m.num_heads * m.head_dim], **attrs)
    return b.linear("o", y, i, bias=m.out_bias)


def query_or_key(b: Builder, i: int, role: str, x: gs.Variable, rope: list[gs.Variable], heads: int) -> gs.Variable:
    """Per-head norm, then rotary embedding, of x [B, S, heads * D]; each only if the model has it."""
    m, name = b.model, f"layer.{i}.{role}"
    if m.qk_norm == "head":
        merged = list(x.shape)
        x = b.node(
            "Reshape",
            f"{name}.heads",
            [x, b.constant(f"{name}.heads.shape", [0, 0, heads, m.head_dim])],
            [*BATCH, heads, m.head_dim],
        )
        x = b.norm(f"{role}_norm", x, i, name=f"{name}.norm", kind="rms")
        x = b.node("Reshape", f"{name}.merge", [x, b.constant(f"{name}.merge.shape", [0, 0, heads * m.head_dim])], merged)
    if rope:
        attrs: dict[str, Any] = {"num_heads": heads, "interleaved": 0}
        if m.rope.fraction != 1.0:
            attrs["rotary_embedding_dim"] = int(m.head_dim * m.rope.fraction)
        x = b.like("RotaryEmbedding", f"{name}.rope", x, *rope, **attrs)
    return x


def mlp(b: Builder, i: int, x: gs.Variable) -> gs.Variable:
    """x [B, S, E] -> [B, S, E]: ``down(act(gate(x)) * up(x))`` (Shazeer 2020), or ``down(act(up(x)))`` without a gate."""
    m = b.model
    if m.mlp == "gated":
        gate = activation(b, f"layer.{i}.act", b.linear("gate", x, i, bias=m.mlp_bias))
        y = b.like("Mul", f"layer.{i}.mlp", gate, b.linear("up", x, i, bias=m.mlp_bias))
    else:
        y = activation(b, f"layer.{i}.act", b.linear("up", x, i, bias=m.mlp_bias))
    return b.linear("down", y, i, bias=m.mlp_bias)


def activation(b: Builder, name: str, x: gs.Variable) -> gs.Variable:
    """Elementwise; SiLU is spelled x * sigmoid(x)."""
    kind = b.model.activation
    if kind == "silu":
        return b.like("Mul", name, x, b.like("Sigmoid", f"{name}.sigmoid", x))
    if kind == "relu":
        return b.like("Relu", name, x)
    return b.like("Gelu", name, x, approximate="tanh" if kind == "gelu_tanh" else "none")


def window_masks(b: Builder, token_ids: gs.Variable) -> dict[int, gs.Variable]:
    """For each window that some layer has, a bool mask [S, S]: query i may see key j when i - j < window.

    Causality is the Attention node's own; together they leave ``window`` positions, the token itself included.
    """
    windows = sorted({layer.window for layer in b.out.layers} - {0})
    if not windows:
        return {}
    size = b.node("Shape", "window.size", [token_ids], [1], "int64", start=1, end=2)
    size = b.node("Squeeze", "window.length", [size], [], "int64")
    index = [b.constant("window.zero", 0), size, b.constant("window.one", 1)]
    keys = b.node("Range", "window.keys", index, ["sequence"], "int64")
    rows = b.node("Unsqueeze", "window.queries", [keys, b.constant("window.axis", [1])], ["sequence", 1], "int64")
    back = b.node("Sub", "window.distance", [rows, keys], ["sequence", "sequence"], "int64")
    return {w: b.node("Less", f"window.{w}", [back, b.constant(f"window.{w}.size", w)], back.shape, "bool") for w in windows}
