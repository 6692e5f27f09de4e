"""Which checkpoint tensor stands behind which weight of the graph, and whether a checkpoint has what a model needs.

Roles and shapes are those of ``zoo.checkpoints.roles``: linear weights come out as [in, out]; checkpoints mostly store [out, in].
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from zoo.checkpoints.roles import EXPERTS, LINEARS, roles, shape_of, split_role
from zoo.errors import CheckpointError, ConfigError
from zoo.modelspec import ModelSpec
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Recipe, computed, concat, every, reshape, shift, slice_, tensor, transpose

__all__ = ["check_tensors", "constant_recipe", "fit_names", "has_own_head", "recipe_for", "roles", "rope_recipe", "shape_of"]

FLOATS = ("bfloat16", "float16", "float32", "float64")
NORMS = ("norm1", "norm2", "post1", "post2", "final_norm", "embed_norm", "q_norm", "k_norm", "q_a_norm", "kv_a_norm")
LEGACY = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # transformers reads both, too
PIECE = 4 << 20  # numbers compared at a time
LISTED = 200  # problems of one kind that an error lists


def recipe_for(model: ModelSpec, role: str, layer: int | None = None) -> Recipe:
    """How a weight is made from the checkpoint, in the shape of ``shape_of``; a tied head from the embedding.

    Raises ConfigError when the model's tensor names have no entry for the role.
    """
    base, part = split_role(role)
    names = model.tensors
    if base == "lm_head" and model.tie_embeddings and not part:
        return transpose(recipe_for(model, "embed"), (1, 0))
    if base in ("q", "k", "v") and names.fused_qkv != "none":
        return _of_qkv(model, base, part, layer)
    if base in ("gate", "up", "shared.gate", "shared.up") and names.fused_gate_up:
        shared, _, half = base.rpartition(".")
        fused = f"{shared}.gate_up" if shared else "gate_up"
        whole, wide = _stored(model, fused + (part and ".bias"), layer), shape_of(model, base)[1]
        return _half(model, whole, part, 0 if half == "gate" else wide, wide)
    if base in EXPERTS:
        return _of_experts(model, base, part, layer)
    if base in ("k_absorb", "v_absorb"):
        return _of_latent(model, base, layer)
    if base == "pos_embed":
        rows, hidden = shape_of(model, role)
        start = model.position_offset
        whole = tensor(_name(model, role, layer), (rows + start, hidden))
        return slice_(whole, 0, start, start + rows) if start else whole
    if base == "type_embed":
        whole = tensor(_name(model, role, layer), (model.token_types, model.hidden_size))
        return reshape(slice_(whole, 0, 0, 1), (model.hidden_size,))
    stored = _stored(model, role, layer)
    if base in NORMS and not part and model.norm_offset:
        return shift(stored, model.norm_offset)
    return transpose(stored, (1, 0)) if _is_transposed(model, role) else stored


def _of_qkv(model: ModelSpec, base: str, part: str, layer: int | None) -> Recipe:
    """Queries, keys or values out of a tensor that holds them all: rows of heads, all of a kind together or by group."""
    whole = _stored(model, "qkv" + (part and ".bias"), layer)
    axis = len(whole.shape) - 1 if part or model.tensors.conv1d else 0
    size, kv = model.head_dim, model.num_kv_heads
    group = model.num_heads // kv
    first, count = {"q": (0, group), "k": (group, 1), "v": (group + 1, 1)}[base]
    if model.tensors.fused_qkv == "concat":
        cuts = [(first * kv * size, count * kv * size)]
    elif model.tensors.fused_qkv == "quarters":
        wide, place = kv * size // 4, ("q", "v", "k").index(base)
        cuts = [((3 * quarter + place) * wide, wide) for quarter in range(4)]
    else:
        cuts = [((number * (group + 2) + first) * size, count * size) for number in range(kv)]
    pieces = [slice_(whole, axis, start, start + length) for start, length in cuts]
    joined = pieces[0] if len(pieces) == 1 else concat(pieces, axis)
    return joined if part or model.tensors.conv1d else transpose(joined, (1, 0))


def _half(model: ModelSpec, whole: Recipe, part: str, start: int, size: int) -> Recipe:
    if part or model.tensors.conv1d:
        return slice_(whole, len(whole.shape) - 1, start, start + size)
    return transpose(slice_(whole, 0, start, start + size), (1, 0))


def _of_experts(model: ModelSpec, base: str, part: str, layer: int | None) -> Recipe:
    """One matrix [in, out], or bias [out], of all experts, stacked on axis 0."""
    names, suffix = model.tensors, part and ".bias"
    fused = names.fused_experts != "none" and base != "experts.down"
    stored_role = ("experts.gate_up" if fused else base) + suffix
    shape = shape_of(model, stored_role)
    if not part and not names.conv1d_experts:
        shape = (shape[0], shape[2], shape[1])
    if names.stacked_experts:
        whole = tensor(_name(model, stored_role, layer), shape)
    else:
        each = [tensor(_name(model, stored_role, layer, number), shape[1:]) for number in range(model.moe.experts)]
        whole = concat([reshape(one, (1, *one.shape)) for one in each], 0)
    if fused:
        axis = len(shape) - 1 if part or names.conv1d_experts else 1
        second = int(base == "experts.up")
        if names.fused_experts == "interleaved":
            whole = every(whole, axis, second, 2)
        else:
            whole = slice_(whole, axis, second * model.expert_size, (second + 1) * model.expert_size)
    return whole if part or names.conv1d_experts else transpose(whole, (0, 2, 1))


def _of_latent(model: ModelSpec, base: str, layer: int | None) -> Recipe:
    """What takes a head's query into the latent space, or its result out of it: parts of one tensor [H * (plain + value), R]."""
    latent = model.latent
    plain, rows = model.head_dim - latent.rope_dim, model.head_dim - latent.rope_dim + latent.value_dim
    stored = _stored(model, "kv_b", layer)
    by_head = reshape(stored, (model.num_heads, rows, latent.kv_rank))
    if base == "k_absorb":
        return slice_(by_head, 1, 0, plain)
    return transpose(slice_(by_head, 1, plain, rows), (0, 2, 1))


def rope_recipe(model: ModelSpec, part: str, max_context: int = 0, *, local: bool = False) -> Recipe:
    """The table of rotary cosines or sines, [rows, rotary_dim / 2] float32. ``part`` is ``cos`` or ``sin``.

    max_context   positions that are asked for; 0: all that the model has
    local         the table of layers with a window, where they have their own
    """
    from zoo.ropetables import params

    rope = model.local_rope if local else model.rope
    context = max_context or model.max_positions
    rows, numbers = params(rope, model.rotary_dim, model.max_positions, context)
    return computed(f"rope_{part}", (rows, model.rotary_dim // 2), **numbers)


def constant_recipe(value: float) -> Recipe:
    """A number of the spec as a weight, so that it has the compute type wherever it is used."""
    return computed("constant", (), value=value)


def fit_names(model: ModelSpec, tensors: Tensors) -> ModelSpec:
    """The same model with the tensor names that this checkpoint has: chooses among ``tensors.prefixes``.

    A family lists prefixes because exports differ (``transformer.wte.weight`` or ``wte.weight``). A name may also be spelled as
    the first BERT exports have it (``LEGACY``). Call it before the graph is expanded for a checkpoint; a model with a single
    prefix comes back as it is.
    """
    names = model.tensors
    if len(names.prefixes) < 2:
        return model

    def pick(name: str) -> str:
        spelled = [name, *(name.removesuffix(ours) + theirs for ours, theirs in LEGACY.items() if name.endswith(ours))]
        candidates = [prefix + one for prefix in names.prefixes for one in spelled]
        layers = ("0", str(model.num_layers - 1))  # the first layer may lack what the last one has
        return next(
            (c for c in candidates for layer in layers if c.replace("{layer}", layer).replace("{expert}", "0") in tensors),
            candidates[0],
        )

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
    """The checkpoint tensor of a role, in the shape that the checkpoint stores; one for each head becomes one for all."""
    shape = shape_of(model, role)
    if _is_transposed(model, role):
        shape = shape[::-1]
    name = _name(model, role, layer)
    if "{head}" not in name:
        return tensor(name, shape)
    rows = [tensor(name.replace("{head}", str(head)), shape[1:]) for head in range(shape[0])]
    return concat([reshape(row, (1, *shape[1:])) for row in rows], 0)


def _is_transposed(model: ModelSpec, role: str) -> bool:
    return role == "lm_head" or (role in LINEARS and not model.tensors.conv1d)


def _name(model: ModelSpec, role: str, layer: int | None, expert: int = 0) -> str:
    group, names = ("model", model.tensors.model) if layer is None else ("layer", model.tensors.layer)
    if role not in names:
        have = ", ".join(names) or "nothing"
        raise ConfigError(f"model {model.name!r}: tensors.{group} has no name for {role!r}; it names {have}")
    name = names[role].replace("{layer}", str(layer)).replace("{expert}", str(expert))
    return (model.tensors.prefixes[0] if model.tensors.prefixes else "") + name


def _known(model: ModelSpec) -> dict[str, str]:
    """Every tensor name that the maps can give -> its role, used by the options or not."""
    names = {template: role for role, template in model.tensors.model.items()}
    for role, template in model.tensors.layer.items():
        for layer in range(model.num_layers):
            name = template.replace("{layer}", str(layer))
            count = model.moe.experts if "{expert}" in name else model.num_heads if "{head}" in name else 1
            names |= {re.sub(r"\{(expert|head)\}", str(number), name): f"layer.{layer}.{role}" for number in range(count)}
    return {prefix + name: role for prefix in model.tensors.prefixes or ("",) for name, role in names.items()}


def _ignored(model: ModelSpec) -> tuple[str, ...]:
    return tuple(pattern.replace("{num_layers}", str(model.num_layers)) for pattern in model.tensors.ignored)
