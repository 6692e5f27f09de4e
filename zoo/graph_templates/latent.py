"""Multi-head latent attention (DeepSeek-V2, 2024) of one layer, [B, S, E] -> [B, S, E], in its absorbed form.

A token's keys and values are one row: its latent vector c [R] and one rotated key [r] that all heads share. The matrices that
would make each head's key and value of c are applied to the query, and to what attention gives, instead:

    score(h) = q_plain(h) · (k_absorb(h) c) + q_rope(h) · k_rope = [q_plain(h) k_absorb(h), q_rope(h)] · [c, k_rope]
    out(h)   = v_absorb(h) Σ weight c

So to the Attention node it is one key/value head of R + r numbers, whose values are its keys; the first R of what it gives
count. A cache keeps that row for each token instead of H keys and values.

B batch, S sequence, E hidden, H heads, R rank of the latent space, r rotated numbers, P plain numbers of a head, V value size.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zoo.graph_templates.attention import Shared, attend, rotary, rotated
from zoo.graph_templates.builder import BATCH, Builder


def latent_attention(b: Builder, i: int, x: gs.Variable, shared: Shared) -> gs.Variable:
    """x [B, S, E] -> [B, S, E]."""
    m, name = b.model, f"layer.{i}"
    heads, rank, turned = m.num_heads, m.latent.kv_rank, m.latent.rope_dim
    plain, values, row = m.head_dim - turned, m.latent.value_dim, m.cache_dim
    rope = rotary(b, i, shared)

    q = queries(b, i, x)
    by_head = b.reshape(f"{name}.q.heads", q, [0, 0, heads, m.head_dim], [*BATCH, heads, m.head_dim])
    q_plain, q_rope = b.split(f"{name}.q.parts", by_head, [plain, turned], axis=3)
    q_latent = per_head(b, f"{name}.k_absorb", q_plain, b.weight("k_absorb", i), [heads, rank])
    q_rope = b.reshape(f"{name}.q.rope.flat", q_rope, [0, 0, heads * turned], [*BATCH, heads * turned])
    q_rope = rotated(b, f"{name}.q.rope", q_rope, rope, heads, turned)
    q_rope = b.reshape(f"{name}.q.rope.heads", q_rope, [0, 0, heads, turned], [*BATCH, heads, turned])
    q = b.node("Concat", f"{name}.q.row", [q_latent, q_rope], [*BATCH, heads, row], axis=3)
    q = b.reshape(f"{name}.q.merge", q, [0, 0, heads * row], [*BATCH, heads * row])

    latent, k_rope = b.split(f"{name}.kv.parts", b.linear("kv_a", x, i), [rank, turned], axis=2)
    latent = b.norm("kv_a_norm", latent, i, eps=m.latent.norm_eps)
    k_rope = rotated(b, f"{name}.k.rope", k_rope, rope, 1, turned)
    k = b.node("Concat", f"{name}.k.row", [latent, k_rope], [*BATCH, row], axis=2)

    y = attend(b, i, q, k, k, shared)
    y = b.reshape(f"{name}.mixed.heads", y, [0, 0, heads, row], [*BATCH, heads, row])
    y, _ = b.split(f"{name}.mixed.parts", y, [rank, turned], axis=3)
    y = per_head(b, f"{name}.v_absorb", y, b.weight("v_absorb", i), [heads, values])
    y = b.reshape(f"{name}.mixed.merge", y, [0, 0, heads * values], [*BATCH, heads * values])
    return b.linear("o", y, i, bias=m.out_bias)


def queries(b: Builder, i: int, x: gs.Variable) -> gs.Variable:
    """All heads' queries [B, S, H * D], through a space of rank ``q_rank`` where the model has one."""
    latent = b.model.latent
    if not latent.q_rank:
        return b.linear("q", x, i)
    return b.linear("q_b", b.norm("q_a_norm", b.linear("q_a", x, i), i, eps=latent.norm_eps), i)


def per_head(b: Builder, name: str, x: gs.Variable, weight: gs.Variable, shape: list[int]) -> gs.Variable:
    """x [B, S, H, in] times each head's own matrix [H, in, out] -> [B, S, H, out]."""
    heads, out = shape
    x = b.node("Transpose", f"{name}.heads_first", [x], ["batch", heads, "sequence", x.shape[3]], perm=[0, 2, 1, 3])
    y = b.node("MatMul", name, [x, weight], ["batch", heads, "sequence", out])
    return b.node("Transpose", f"{name}.tokens_first", [y], [*BATCH, heads, out], perm=[0, 2, 1, 3])
