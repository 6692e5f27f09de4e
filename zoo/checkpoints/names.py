"""Which checkpoint tensor stands behind which weight of the graph, and whether a checkpoint has what a model needs.

Weight roles are those of ``zoo/graph.py``. Linear weights come out as [in, out]; checkpoints mostly store [out, in].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from zoo.errors import CheckpointError, ConfigError
from zoo.spec import ModelSpec
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Recipe, computed, slice_, tensor, transpose

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
FLOATS = ("bfloat16", "float16", "float32", "float64")
PIECE = 4 << 20  # numbers compared at a time
LISTED = 200  # problems of one kind that an error lists


def shape_of(model: ModelSpec, role: str) -> tuple[int, ...]:
    """Shape of a weight as the graph has it: linear weights [in, out], biases [out]."""
    hidden, heads, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    linear = {
        "q": (hidden, heads),
        "k": (hidden, kv),
        "v": (hidden, kv),
        "qkv": (hidden, heads + 2 * kv),
        "o": (heads, hidden),
        "gate": (hidden, model.intermediate_size),
        "up": (hidden, model.intermediate_size),
        "down": (model.intermediate_size, hidden),
        "lm_head": (hidden, model.vocab_size),
    }
    base, _, part = role.partition(".")
    if base in linear:
        return linear[base][1:] if part == "bias" else linear[base]
    other = {
        "embed": (model.vocab_size, hidden),
        "pos_embed": (model.max_positions, hidden),
        "final_norm": (hidden,),
        "norm1": (hidden,),
        "norm2": (hidden,),
        "q_norm": (model.head_dim,),
        "k_norm": (model.head_dim,),
    }
    if base not in other:
        raise ConfigError(f"model {model.name!r}: no weight has the role {role!r}")
    return other[base]


def roles(model: ModelSpec) -> Iterator[tuple[str, int | None]]:
    """Every weight that the model's options call for, as (role, layer); layer is None outside the layers."""
    norm = ("", ".bias") if model.norm == "layer" else ("",)
    yield "embed", None
    if model.position == "learned":
        yield "pos_embed", None
    for layer in range(model.num_layers):
        for name in ("norm1", "norm2"):
            yield from ((name + part, layer) for part in norm)
        for name in LINEARS:
            if name == "gate" and model.mlp != "gated":
                continue
            yield name, layer
            if (name in "qkv" and model.qkv_bias) or (name == "o" and model.out_bias) or (name in LINEARS[4:] and model.mlp_bias):
                yield f"{name}.bias", layer
        if model.qk_norm == "head":
            yield "q_norm", layer
            yield "k_norm", layer
    yield from (("final_norm" + part, None) for part in norm)
    yield "lm_head", None


def recipe_for(model: ModelSpec, role: str, layer: int | None = None) -> Recipe:
    """How a weight is made from the checkpoint: linear weights [in, out], biases [out], tied heads from the embedding.

    Raises ConfigError when the model's tensor names have no entry for the role.
    """
    base, _, part = role.partition(".")
    if base == "lm_head" and model.tie_embeddings:
        return transpose(recipe_for(model, "embed"), (1, 0))
    names = model.tensors
    if base in ("q", "k", "v") and names.fused_qkv == "concat":
        whole = _stored(model, "qkv" + role[1:], layer)
        heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        start, stop = {"q": (0, heads), "k": (heads, heads + kv), "v": (heads + kv, heads + 2 * kv)}[base]
        if part or names.conv1d:
            return slice_(whole, len(whole.shape) - 1, start, stop)
        return transpose(slice_(whole, 0, start, stop), (1, 0))
    stored = _stored(model, role, layer)
    return transpose(stored, (1, 0)) if _is_transposed(model, role) else stored


def rope_recipe(model: ModelSpec, part: str, max_context: int = 0) -> Recipe:
    """The table of rotary cosines or sines, [max_context, rotary_dim / 2] float32. ``part`` is ``cos`` or ``sin``."""
    rope = model.rope
    rotary = int(model.head_dim * rope.fraction)
    numbers = dataclasses.asdict(rope)
    del numbers["fraction"]
    return computed(f"rope_{part}", (max_context or model.max_positions, rotary // 2), rotary_dim=rotary, **numbers)


def fit_names(model: ModelSpec, tensors: Tensors) -> ModelSpec:
    """The same model with the tensor names that this checkpoint has: chooses among ``tensors.prefixes``.

    A family lists prefixes because exports differ (``transformer.wte.weight`` or ``wte.weight``). Call it before the graph
    is expanded for a checkpoint; a model with a single prefix comes back as it is.
    """
    names = model.tensors
    if len(names.prefixes) < 2:
        return model

    def pick(name: str) -> str:
        candidates = [prefix + name for prefix in names.prefixes]
        return next((c for c in candidates if c.replace("{layer}", "0") in tensors), candidates[0])

    fitted = dataclasses.replace(
        names,
        model={role: pick(name) for role, name in names.model.items()},
        layer={role: pick(name) for role, name in names.layer.items()},
        prefixes=("",),
    )
    return dataclasses.replace(model, tensors=fitted)


def has_own_head(model: ModelSpec, tensors: Tensors) -> bool:
    """Whether the checkpoint holds an output head whose numbers are not those of its embedding.

    config.json may call such a pair tied all the same; transformers then uses the stored head.
    """
    model = fit_names(model, tensors)
    names = [_name(model, role, None) for role in ("embed", "lm_head") if role in model.tensors.model]
    if len(names) < 2 or any(name not in tensors for name in names):
        return False
    embed, head = names
    if tensors.shape(embed) != tensors.shape(head):
        return True
    same = tensors.dtype(embed) == tensors.dtype(head)
    known = {tensors.dtype(embed), tensors.dtype(head)} <= set(FLOATS)
    if not same and not known:
        return True
    left, right = tensors.array(embed).reshape(-1), tensors.array(head).reshape(-1)
    for start in range(0, left.size, PIECE):
        one, other = left[start : start + PIECE], right[start : start + PIECE]
        if same:
            equal = bool(np.array_equal(one.view(np.uint8), other.view(np.uint8)))
        else:
            equal = bool(np.array_equal(one.astype(np.float64), other.astype(np.float64)))
        if not equal:
            return True
    tensors.release(embed)
    tensors.release(head)
    return False


def check_tensors(model: ModelSpec, tensors: Tensors) -> None:
    """Raise one CheckpointError that lists every missing, extra and misshapen tensor, and one for a head that is not tied."""
    model = fit_names(model, tensors)
    wanted: dict[str, tuple[int, ...]] = {}
    for role, layer in roles(model):
        for leaf in recipe_for(model, role, layer).leaves():
            wanted[leaf["name"]] = leaf.shape
    present = set(tensors.names)
    missing = [f"{name} {list(wanted[name])}" for name in wanted if name not in present]
    misshapen = [
        f"{name}: {list(tensors.shape(name))}, the model says {list(shape)}"
        for name, shape in wanted.items()
        if name in present and tensors.shape(name) != shape
    ]
    known = _known(model)
    extra = []
    for name in sorted(present - set(wanted)):
        known_role = known.get(name)
        if known_role == "lm_head" and model.tie_embeddings:
            continue  # a copy of the embedding, which the tied head reads
        if not any(re.fullmatch(pattern, name) for pattern in _ignored(model)):
            why = f" (it would be {known_role}, which the model's options leave out)" if known_role else ""
            extra.append(f"{name} {list(tensors.shape(name))}{why}")
    floats = [
        f"{name}: {tensors.dtype(name)}; expected bfloat16, float16 or float32"
        for name in wanted
        if name in present and tensors.dtype(name) not in FLOATS
    ]
    parts = [("missing", missing), ("extra", extra), ("misshapen", misshapen), ("of a dtype that is not read", floats)]
    if any(lines for _, lines in parts):
        where = tensors.files[0].parent
        text = [f"{where}: the checkpoint does not fit model {model.name!r} (family {model.family}):"]
        for kind, lines in parts:
            if lines:
                text.append(f"{len(lines)} tensors {kind}:")
                text += [f"  {line}" for line in lines[:LISTED]]
                text += [f"  ... and {len(lines) - LISTED} more"] * (len(lines) > LISTED)
        raise CheckpointError("\n".join(text))
    if model.tie_embeddings and has_own_head(model, tensors):
        raise CheckpointError(
            f"{tensors.files[0].parent}: model {model.name!r} ties its head to the embedding, but the checkpoint holds a "
            f"{_name(model, 'lm_head', None)} with other numbers than {_name(model, 'embed', None)}; "
            "set model.tie_embeddings=false to use it"
        )


def _stored(model: ModelSpec, role: str, layer: int | None) -> Recipe:
    """The checkpoint tensor of a role, in the shape that the checkpoint stores."""
    shape = shape_of(model, role)
    if _is_transposed(model, role):
        shape = shape[::-1]
    return tensor(_name(model, role, layer), shape)


def _is_transposed(model: ModelSpec, role: str) -> bool:
    if role == "lm_head":
        return True
    return role in (*LINEARS, "qkv") and not model.tensors.conv1d


def _name(model: ModelSpec, role: str, layer: int | None) -> str:
    group, names = ("model", model.tensors.model) if layer is None else ("layer", model.tensors.layer)
    if role not in names:
        have = ", ".join(names) or "nothing"
        raise ConfigError(f"model {model.name!r}: tensors.{group} has no name for {role!r}; it names {have}")
    return (model.tensors.prefixes[0] if model.tensors.prefixes else "") + names[role].replace("{layer}", str(layer))


def _known(model: ModelSpec) -> dict[str, str]:
    """Every tensor name that the maps can give -> its role, used by the options or not."""
    names = {template: role for role, template in model.tensors.model.items()}
    for role, template in model.tensors.layer.items():
        names |= {template.replace("{layer}", str(layer)): f"layer.{layer}.{role}" for layer in range(model.num_layers)}
    return {prefix + name: role for prefix in model.tensors.prefixes or ("",) for name, role in names.items()}


def _ignored(model: ModelSpec) -> tuple[str, ...]:
    return model.tensors.ignored
