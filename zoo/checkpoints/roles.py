"""The weights that a model's options call for: their roles and their shapes as the graph has them.

Linear weights are [in, out], biases [out]; experts' matrices are stacked, [X, in, out]. docs/adding-a-model.md lists the roles.

E hidden, H query heads, K key/value heads, D head size, F intermediate, X experts, R rank of latent attention.
"""

from __future__ import annotations

from collections.abc import Iterator

from zoo.errors import ConfigError
from zoo.modelspec import ModelSpec

# Linear layers with a weight [in, out] and perhaps a bias [out], by the option that gives them one.
QKV, OUT, MLP = ("q", "k", "v"), ("o",), ("gate", "up", "down")
LATENT = ("q_a", "q_b", "kv_a", "kv_b")
SHARED = ("shared.gate", "shared.up", "shared.down", "shared_gate")
LINEARS = (*QKV, *OUT, *MLP, *LATENT, *SHARED, "router", "qkv", "gate_up", "shared.gate_up")
EXPERTS = ("experts.gate", "experts.up", "experts.down")


def split_role(role: str) -> tuple[str, str]:
    """A role as (base, part): ("q", "bias"), ("experts.gate", "")."""
    return (role.removesuffix(".bias"), "bias") if role.endswith(".bias") else (role, "")


def shape_of(model: ModelSpec, role: str) -> tuple[int, ...]:
    """Shape of a weight as the graph has it. Raises ConfigError for a role that does not exist."""
    base, part = split_role(role)
    shapes = _linears(model) | _experts(model)
    if base in shapes:
        shape = shapes[base]
        return (*shape[:-2], shape[-1]) if part else shape
    others = _others(model)
    if base not in others:
        raise ConfigError(f"model {model.name!r}: no weight has the role {role!r}")
    return others[base]


def _linears(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, wide, moe, latent = model.hidden_size, model.intermediate_size, model.moe, model.latent
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    values = model.num_heads * latent.value_dim if latent.kv_rank else heads
    return {
        "q": (hidden, heads),
        "k": (hidden, kv),
        "v": (hidden, kv),
        "qkv": (hidden, heads + 2 * kv),
        "o": (values, hidden),
        "gate": (hidden, wide),
        "up": (hidden, wide),
        "gate_up": (hidden, 2 * wide),
        "down": (wide, hidden),
        "lm_head": (hidden, model.vocab_size),
        "q_a": (hidden, latent.q_rank),
        "q_b": (latent.q_rank, heads),
        "kv_a": (hidden, latent.kv_rank + latent.rope_dim),
        "kv_b": (latent.kv_rank, model.num_heads * (model.head_dim - latent.rope_dim + latent.value_dim)),
        "router": (hidden, moe.experts),
        "shared.gate": (hidden, moe.shared),
        "shared.up": (hidden, moe.shared),
        "shared.gate_up": (hidden, 2 * moe.shared),
        "shared.down": (moe.shared, hidden),
        "shared_gate": (hidden, 1),
    }


def _experts(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    count, hidden, wide = model.moe.experts, model.hidden_size, model.expert_size
    return {
        "experts.gate": (count, hidden, wide),
        "experts.up": (count, hidden, wide),
        "experts.gate_up": (count, hidden, 2 * wide),
        "experts.down": (count, wide, hidden),
    }


def _others(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, size, latent = model.hidden_size, model.head_dim, model.latent
    of_heads = {
        "none": ((size,), (size,)),
        "head": ((size,), (size,)),
        "heads": ((model.num_heads, size), (model.num_kv_heads, size)),
        "all": ((model.num_heads * size,), (model.num_kv_heads * size,)),
    }[model.qk_norm]
    plain = size - latent.rope_dim  # numbers of a latent head that are not rotated
    return {
        "embed": (model.vocab_size, hidden),
        "pos_embed": (model.max_positions, hidden),
        "type_embed": (hidden,),
        **dict.fromkeys(("embed_norm", "final_norm", "norm1", "norm2", "post1", "post2"), (hidden,)),
        "q_norm": of_heads[0],
        "k_norm": of_heads[1],
        "q_a_norm": (latent.q_rank,),
        "kv_a_norm": (latent.kv_rank,),
        "k_absorb": (model.num_heads, plain, latent.kv_rank),
        "v_absorb": (model.num_heads, latent.kv_rank, latent.value_dim),
        "sinks": (model.num_heads,),
        "select_bias": (model.moe.experts,),
    }


def roles(model: ModelSpec) -> Iterator[tuple[str, int | None]]:
    """Every weight that a checkpoint must give, as (role, layer); layer is None outside the layers."""
    yield "embed", None
    if model.position == "learned":
        yield "pos_embed", None
    if model.token_types:
        yield "type_embed", None
    yield from ((role, None) for role in _norm(model, "embed_norm") if model.embed_norm)
    for layer in range(model.num_layers):
        yield from ((role, layer) for role in _attention(model))
        yield from ((role, layer) for role in _mlp(model, layer))
        yield from ((role, layer) for name in norms_of(model, layer) for role in _norm(model, name))
    yield from ((role, None) for role in _norm(model, "final_norm") if has_final_norm(model))
    if model.template == "decoder":
        yield "lm_head", None
        if model.head_bias:
            yield "lm_head.bias", None


def has_final_norm(model: ModelSpec) -> bool:
    """Whether a norm stands behind the last layer; where norms stand on the residual stream, none is left to do."""
    return model.norm_place != "residual"


def norms_of(model: ModelSpec, layer: int) -> tuple[str, ...]:
    """The norms of a layer, by role."""
    first = ("norm1",) if model.first_norm or layer else ()
    if model.norm_place == "after":
        return "post1", "post2"
    if model.block == "parallel":
        return first
    return (*first, "norm2", *(("post1", "post2") if model.norm_place == "both" else ()))


def _norm(model: ModelSpec, name: str) -> tuple[str, ...]:
    return (name, f"{name}.bias") if model.norm == "layer" and model.norm_bias else (name,)


def _attention(model: ModelSpec) -> Iterator[str]:
    if model.latent.kv_rank:
        yield from ("q_a", "q_a_norm", "q_b") if model.latent.q_rank else ("q",)
        yield from ("kv_a", "kv_a_norm", "k_absorb", "v_absorb", "o")
    else:
        for names, biased in ((QKV, model.qkv_bias), (OUT, model.out_bias)):
            for name in names:
                yield name
                if biased:
                    yield f"{name}.bias"
        if model.qk_norm != "none":
            yield from ("q_norm", "k_norm")
    if model.sinks:
        yield "sinks"


def _mlp(model: ModelSpec, layer: int) -> Iterator[str]:
    moe = model.moe
    if not model.has_experts(layer):
        for name in MLP[model.mlp != "gated" :]:
            yield name
            if model.mlp_bias:
                yield f"{name}.bias"
        return
    yield "router"
    if moe.router_bias:
        yield "router.bias"
    if moe.select_bias:
        yield "select_bias"
    for name in EXPERTS:
        yield name
        if moe.expert_bias:
            yield f"{name}.bias"
    if moe.shared:
        yield from SHARED[: 3 + moe.shared_gate]
