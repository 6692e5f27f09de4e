"""Which layers: the named rules by which a config.json says which layers have a window, rotate, or have a plain MLP.

A rule gives the numbers of layers as ModelSpec has them: an empty list of windowed or rotating layers means all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from zoo.checkpoints.config_language import ABSENT, shown
from zoo.modelspec import LARGEST

if TYPE_CHECKING:
    from zoo.checkpoints.settings import Settings

# key of an architecture -> its rules, the first of which holds when it names none
RULES: dict[str, tuple[str, ...]] = {
    "window": ("none", "all", "layers", "layer_types", "attention_layers"),
    "rope_layers": ("all", "no_rope_layers", "window"),
    "dense_layers": ("none", "mlp_only_layers", "first_k_dense_replace"),
}
# rule -> the keys of config.json that it reads
RULE_KEYS: dict[str, tuple[str, ...]] = {
    "all": ("sliding_window",),
    "layers": ("use_sliding_window", "sliding_window", "layer_types", "max_window_layers"),
    "layer_types": ("sliding_window", "layer_types", "sliding_window_pattern"),
    "attention_layers": ("attention_layers", "attention_types", "window_size"),
    "no_rope_layers": ("no_rope_layers", "no_rope_layer_interval"),
    "mlp_only_layers": ("mlp_only_layers", "decoder_sparse_step"),
    "first_k_dense_replace": ("first_k_dense_replace", "moe_layer_freq"),
}
SLIDING, FULL = "sliding_attention", "full_attention"
FULL_EVERYWHERE: dict[str, Any] = {"window": 0, "window_layers": []}


def window(settings: Settings, rule: str, size: Any, layers: Any, problems: list[str]) -> dict[str, Any]:
    """``window`` and ``window_layers``. ``size``: what the family's ``config`` says, ``ABSENT`` if it says nothing."""
    if rule == "attention_layers":
        types: Any = _attention_types(settings, problems)
    else:
        types = settings.config.get("layer_types")
        if types is not None and (not isinstance(types, list) or any(one not in (FULL, SLIDING) for one in types)):
            problems.append(f"layer_types: only {FULL} and {SLIDING} are supported, found {str(types)[:80]}")
            return FULL_EVERYWHERE
    if size is ABSENT:
        size = settings.look("sliding_window")
    if rule in ("none", "all") and types:
        # transformers does not read the list here; one that means what it does anyway is no harm
        meant = SLIDING if rule == "all" and size is not ABSENT else FULL
        if any(one != meant for one in types):
            problems.append(
                f"layer_types: this architecture has {meant} on every layer, found {str(types)[:80]}; "
                "if its layers do differ, its architecture has another name"
            )
    if rule == "none":
        return FULL_EVERYWHERE
    if rule == "layers" and not settings.get("use_sliding_window"):
        if types and SLIDING in types:
            problems.append(f"layer_types has {SLIDING}, but use_sliding_window is off")
        return FULL_EVERYWHERE
    if size is ABSENT:
        return FULL_EVERYWHERE
    if not is_count(size) or size == 0:
        problems.append(f"sliding_window is {shown(size)}; it must be a whole number over 0")
        return FULL_EVERYWHERE
    if rule == "all" or not is_count(layers) or layers > LARGEST["num_layers"]:
        return {"window": size, "window_layers": []}
    if types is None:
        types = _derived(settings, rule, layers, problems)
    if types is None:
        return FULL_EVERYWHERE
    if len(types) != layers:
        problems.append(f"layer_types names {len(types)} layers of {layers}")
    windowed = [layer for layer, one in enumerate(types) if one == SLIDING]
    if not windowed:
        return FULL_EVERYWHERE
    return {"window": size, "window_layers": [] if len(windowed) == layers else windowed}


def _derived(settings: Settings, rule: str, layers: int, problems: list[str]) -> list[str] | None:
    """The kinds of layers where config.json has no list of them."""
    if rule == "layers":
        start = settings.get("max_window_layers")
        if not is_count(start):
            problems.append(f"max_window_layers is {shown(start)}; it must be a whole number")
            return None
        return [SLIDING if layer >= start else FULL for layer in range(layers)]
    for key, offset in (("sliding_window_pattern", 1), ("global_attn_every_n_layers", 0)):
        every = settings.look(key)
        if every is ABSENT:
            continue
        if not is_count(every) or every == 0:
            problems.append(f"{key} is {shown(every)}; it must be a whole number over 0")
            return None
        return [SLIDING if (layer + offset) % every else FULL for layer in range(layers)]
    problems.append("layer_types, sliding_window_pattern: neither is there, so nothing says which layers have the window")
    return None


def _attention_types(settings: Settings, problems: list[str]) -> list[str] | None:
    """GPT-Neo's list of ``global`` and ``local`` layers, or its shorter form [[[kind, ...], times], ...], in our words."""
    given, spelled = settings.get("attention_layers"), settings.get("attention_types")
    if given is None and isinstance(spelled, list):
        given = []
        for group in spelled:
            match group:
                case [list(kinds), int(times)] if 0 <= times * len(kinds) <= LARGEST["num_layers"]:
                    given += kinds * times
                case _:
                    given = None
                    break
    names = {"global": FULL, "local": SLIDING}
    if not isinstance(given, list) or any(not isinstance(one, str) or one not in names for one in given):
        problems.append(f"attention_layers: expected a list of global and local, found {shown(given if given else spelled)}")
        return None
    return [names[one] for one in given]


def rope_layers(settings: Settings, rule: str, values: dict[str, Any], problems: list[str]) -> list[int]:
    """The layers that rotate. ``values`` has the number of layers and the window by now."""
    layers = values.get("num_layers")
    if rule == "all" or not is_count(layers) or layers > LARGEST["num_layers"]:
        return []
    if rule == "window":
        if not values.get("window") and settings.get("sliding_window") is None:
            return []
        chosen = values.get("window_layers") or (list(range(layers)) if values.get("window") else [])
    else:
        flags = settings.get("no_rope_layers")
        if flags is None:
            every = settings.get("no_rope_layer_interval")
            if not is_count(every) or every == 0:
                problems.append(f"no_rope_layer_interval is {shown(every)}; it must be a whole number over 0")
                return []
            flags = [int((layer + 1) % every != 0) for layer in range(layers)]
        if not isinstance(flags, list) or len(flags) != layers or any(flag not in (0, 1) for flag in flags):
            problems.append(f"no_rope_layers: expected 0 or 1 for each of {layers} layers, found {shown(flags)}")
            return []
        chosen = [layer for layer, flag in enumerate(flags) if flag]
    if not chosen:
        problems.append(f"no layer rotates by the rule {rule!r}; a variant of the family with position none would cover this")
    return [] if len(chosen) == layers else chosen


def dense_layers(settings: Settings, rule: str, layers: Any, problems: list[str]) -> list[int]:
    """The layers of a mixture of experts that have a plain MLP."""
    if rule == "none" or not is_count(layers) or layers > LARGEST["num_layers"]:
        return []
    types = settings.get("mlp_layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or any(one not in ("dense", "sparse") for one in types):
            problems.append(f"mlp_layer_types: expected dense or sparse for each of {layers} layers, found {shown(types)}")
            return []
        return [layer for layer, one in enumerate(types) if one == "dense"]
    if rule == "mlp_only_layers":
        named, step = settings.get("mlp_only_layers") or [], settings.get("decoder_sparse_step", 1)
        if not isinstance(named, list) or not all(is_count(layer) for layer in named) or not is_count(step) or step == 0:
            problems.append(
                f"mlp_only_layers is {shown(named)} and decoder_sparse_step {shown(step)}; expected layer numbers, and a number "
                "over 0"
            )
            return []
        return [layer for layer in range(layers) if layer in named or (layer + 1) % step]
    first, frequency = settings.get("first_k_dense_replace", 0), settings.get("moe_layer_freq", 1)
    listed = isinstance(frequency, list) and len(frequency) == layers and all(flag in (0, 1) for flag in frequency)
    if not is_count(first) or not (listed or (is_count(frequency) and frequency > 0)):
        problems.append(
            f"first_k_dense_replace is {shown(first)} and moe_layer_freq {shown(frequency)}; expected a number of layers, and a "
            "number over 0 or a list of 0 and 1 for each layer"
        )
        return []
    sparse = [bool(frequency[layer]) if listed else layer % frequency == 0 for layer in range(layers)]
    return [layer for layer in range(layers) if layer < first or not sparse[layer]]


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40
