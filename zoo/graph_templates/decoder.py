"""Decoder-only transformers as a plain ONNX graph: the whole sequence at once, no cache, standard operators only.

Every option of ``zoo.modelspec.ModelSpec`` is a branch in this package and nowhere else: here how parts stand to each other,
in ``attention``, ``latent``, ``mlp`` and ``moe`` what is inside them. A Llama (Touvron et al. 2023) is RMS norms, rotary
positions and a gated MLP; a GPT-2 (Radford et al. 2019) is layer norms, learned positions, a plain MLP and biases.
If a model needs Python, these files lack an option.

Inputs   token_ids, positions  [B, S] int64, and the weights
Output   logits                [B, S, V] float32

B batch, S sequence, V vocabulary, E hidden, F intermediate, H heads, K key/value heads, D head size.
Linear weights are [in, out]. Attention is causal by index, so rows of a batch are padded on the right.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zoo.checkpoints.roles import has_final_norm
from zoo.graph import ModelGraph
from zoo.graph_templates.attention import attention, shared_inputs
from zoo.graph_templates.builder import BATCH, Builder
from zoo.graph_templates.latent import latent_attention
from zoo.graph_templates.mlp import mlp
from zoo.graph_templates.moe import moe
from zoo.modelspec import ModelSpec


def decoder(model: ModelSpec, dtype: str, max_context: int = 0) -> ModelGraph:
    """The plain graph of one model; reads no checkpoint. See the module for inputs and output."""
    b = Builder(model, dtype, max_context)
    token_ids, positions = b.input("token_ids", "int64"), b.input("positions", "int64")
    logits(b, layers(b, embed(b, token_ids, positions), token_ids, positions))
    return b.out


def embed(b: Builder, token_ids: gs.Variable, positions: gs.Variable) -> gs.Variable:
    """Token ids [B, S] -> [B, S, E], with learned positions, types and a norm where the model has them."""
    m, shape = b.model, [*BATCH, b.model.hidden_size]
    x = b.node("Gather", "embed", [b.weight("embed"), token_ids], shape, axis=0)
    x = b.scaled("embed.scale", x, m.embed_scale)
    if m.token_types:
        x = b.like("Add", "embed.types", x, b.weight("type_embed"))
    if m.position == "learned":
        learned = b.node("Gather", "pos_embed", [b.weight("pos_embed"), positions], shape, axis=0)
        x = b.like("Add", "embed.positions", x, learned)
    return b.norm("embed_norm", x) if m.embed_norm else x


def layers(b: Builder, x: gs.Variable, token_ids: gs.Variable, positions: gs.Variable) -> gs.Variable:
    """All layers and the final norm, [B, S, E] -> [B, S, E]."""
    shared = shared_inputs(b, token_ids, positions)
    attend = latent_attention if b.model.latent.kv_rank else attention
    for i in range(b.model.num_layers):
        feed = moe if b.model.has_experts(i) else mlp
        first = b.norm("norm1", x, i) if has_norm1(b.model, i) else x
        branch = attend(b, i, first, shared)
        if b.model.block == "sequential":
            x = residual(b, i, 1, x, branch)
            second = b.norm("norm2", x, i) if b.model.norm_place in ("before", "both") else x
            x = residual(b, i, 2, x, feed(b, i, second))
        else:
            second = b.norm("norm2", x, i) if b.model.block == "parallel_norms" else first
            both = b.like("Add", f"layer.{i}.branches", branch, feed(b, i, second))
            x = residual(b, i, 1, x, both)
    return b.norm("final_norm", x) if has_final_norm(b.model) else x


def has_norm1(model: ModelSpec, layer: int) -> bool:
    """Whether attention reads a norm of the stream rather than the stream."""
    return model.norm_place in ("before", "both") and (model.first_norm or layer > 0)


def residual(b: Builder, i: int, number: int, x: gs.Variable, branch: gs.Variable) -> gs.Variable:
    """Add what a branch gives to the stream: normed first, scaled, or the sum normed, as the model has it."""
    m = b.model
    if m.norm_place in ("after", "both"):
        branch = b.norm(f"post{number}", branch, i)
    branch = b.scaled(f"layer.{i}.scale{number}", branch, m.residual_scale)
    x = b.like("Add", f"layer.{i}.residual{number}", x, branch)
    return b.norm(f"norm{number}", x, i) if m.norm_place == "residual" else x


def logits(b: Builder, x: gs.Variable) -> None:
    """The head, [B, S, E] -> the output ``logits`` [B, S, V] float32; scaled and bent where the model says so.

    In float32: there are close logits that a rounding to the compute type would make equal.
    """
    m = b.model
    y = b.cast("logits", b.linear("lm_head", x, bias=m.head_bias), "float32")
    y = b.scaled("logits.scale", y, m.logit_scale, "float32")
    if m.logit_softcap:
        cap = b.number("logits.cap", m.logit_softcap, "float32")
        ratio = b.like("Div", "logits.ratio", y, cap, dtype="float32")
        y = b.like("Mul", "logits.capped", b.like("Tanh", "logits.bent", ratio, dtype="float32"), cap, dtype="float32")
    b.output(y, "logits")
