"""Reading a config.json through the family that covers its architecture. The mapping is YAML (conf/models/families/*.yaml).

A family says, for each key of a ModelSpec, which key of config.json fills it: a name, a product or quotient
(``4 * n_embd``, ``hidden_size / num_attention_heads``), or a list of these, tried in order. What config.json leaves out means
what the architecture's ``defaults`` say, as in transformers.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from zoo.checkpoints.folder import Checkpoint
from zoo.errors import CheckpointError, ConfigError
from zoo.modelspec import ROPE_KINDS
from zoo.spec import LARGEST, ModelSpec
from zoo.weights.reader import Tensors

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
PRODUCT = re.compile(r"(?:(\d+) \* )?(\w+)(?: / (\w+))?")
ABSENT = object()
# Numbers that change no shape: a model YAML may set them apart from its checkpoint's config.json (``rope.*`` too).
TUNABLE = ("norm_eps", "softcap", "attention_scale", "window", "window_layers")
log = logging.getLogger("zoo")


def recognise(config: dict[str, Any], where: str, tensors: Tensors | None = None) -> tuple[str, str]:
    """The (family, architecture) of a config.json. CheckpointError with the supported ones and the nearest family."""
    from zoo.config import families

    known = {name: (family, data) for family, data in families().items() for name, data in data.get("architectures", {}).items()}
    named = config.get("architectures")
    if isinstance(named, list) and named:
        architecture = str(named[0])
        if architecture in known:
            return known[architecture][0], architecture
    else:
        architecture = f"model_type {config.get('model_type')!r}"
        for name, (family, data) in known.items():
            if data["model_type"] == config.get("model_type"):
                return family, name
    raise CheckpointError(
        f"{where}: architecture {architecture} is not supported; supported are {', '.join(known)}. {_nearest(config, tensors)}"
    )


def read(config: dict[str, Any], family: str, architecture: str, where: str) -> dict[str, Any]:
    """ModelSpec keys and values from a config.json. CheckpointError lists everything that is not understood."""
    from zoo.config import families

    data = families()[family]
    about = data["architectures"][architecture]
    defaults = about.get("defaults", {})
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, source in {**data.get("config", {}), **about.get("config", {})}.items():
        found = _first(source, config, defaults)
        if found is ABSENT:
            problems.append(f"{key}: none of {source} is there")
        else:
            values[key] = found
    values |= about.get("options", {})
    for key, wanted in about.get("must", {}).items():
        if config.get(key, wanted) != wanted:
            problems.append(f"{key} is {config[key]!r}; only {wanted!r} is supported")
    if config.get("quantization_config"):
        problems.append("quantization_config: the checkpoint is quantized; use the original and build with quant=fp8")
    if "activation" in values:
        activation = ACTIVATIONS.get(str(values["activation"]))
        if activation is None:
            problems.append(f"activation {values['activation']!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
        values["activation"] = activation
    if data.get("position", "rope") == "rope":
        values["rope"] = _rope(config, defaults, problems)
    values |= _window(config, defaults, about.get("window", "none"), values.get("num_layers"), problems)
    problems += _wrong_types(values)
    if problems:
        raise CheckpointError(f"{where}: {architecture} with settings that are not understood:\n  " + "\n  ".join(problems))
    return values


def check_config(model: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError that lists every size and option in which a model and a checkpoint's config.json differ.

    A model may stop at fewer positions than its checkpoint was trained for when its positions are rotary. Numbers that
    change no shape (``TUNABLE``: an epsilon, a rotary base) may be set apart from the checkpoint on purpose: the YAML
    decides, and the difference is logged as a warning.
    """
    where = str(checkpoint.folder / "config.json")
    family, architecture = recognise(checkpoint.config, where, checkpoint.tensors)
    if family != model.family:
        raise CheckpointError(
            f"{where}: {architecture} is of family {family}, but model {model.name!r} is of family {model.family}"
        )
    values = read(checkpoint.config, family, architecture, where)
    different: list[str] = []
    tuned: list[str] = []
    for key, theirs in values.items():
        if key == "rope":
            tuned += [
                f"rope.{part}: {getattr(model.rope, part)!r}, config.json means {number!r}"
                for part, number in theirs.items()
                if getattr(model.rope, part) != number
            ]
            continue
        ours = getattr(model, key)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        fewer = key == "max_positions" and model.position == "rope" and ours < theirs
        # The stored head counts, whatever config.json calls it; check_tensors says when there is none.
        untied = key == "tie_embeddings" and not ours
        if ours != theirs and not fewer and not untied:
            (tuned if key in TUNABLE else different).append(f"{key}: {ours!r}, config.json means {theirs!r}")
    for difference in tuned:
        log.warning("model %r differs from its checkpoint config.json in %s", model.name, difference)
    if different:
        raise CheckpointError(f"{where} disagrees with model {model.name!r}:\n  " + "\n  ".join(different))


def _first(source: Any, config: dict[str, Any], defaults: dict[str, Any]) -> Any:
    """The first of several sources that is there; ``null`` in config.json counts as not there, and hides the default."""
    for one in source if isinstance(source, list) else [source]:
        match = PRODUCT.fullmatch(str(one))
        if not match:
            raise ConfigError(f"family config: {one!r} is neither a key nor '2 * key' nor 'key / key'")
        factor, key, divisor = match.groups()
        value = _look(key, config, defaults)
        if value is ABSENT:
            continue
        if factor or divisor:
            below = _look(divisor, config, defaults) if divisor else 1
            if not _is_count(value) or not _is_count(below) or below == 0:
                continue
            value = int(factor or 1) * value // below
        return value
    return ABSENT


def _look(key: str, config: dict[str, Any], defaults: dict[str, Any]) -> Any:
    if key in config:
        return ABSENT if config[key] is None else config[key]
    return defaults.get(key, ABSENT)


def _rope(config: dict[str, Any], defaults: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Rotary settings: ``rope_parameters`` (transformers 5), or ``rope_scaling`` beside ``rope_theta`` (before)."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        problems.append("rope_scaling / rope_parameters: expected an object")
        return {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", config.get("rope_theta") or defaults.get("rope_theta", 10000.0))
    fraction = given.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if kind not in ROPE_KINDS:
        problems.append(f"rotary kind {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
        return {}
    if fraction != 1:
        problems.append(f"partial_rotary_factor is {fraction!r}; only 1 is supported")
    rope: dict[str, Any] = {"kind": kind, "theta": theta}
    if kind != "default":
        rope["factor"] = given.get("factor")
    if kind == "llama3":
        rope["low_freq_factor"] = given.get("low_freq_factor")
        rope["high_freq_factor"] = given.get("high_freq_factor")
        trained = given.get("original_max_position_embeddings")
        rope["original_max_positions"] = trained or {**defaults, **config}.get("max_position_embeddings")
    for key, value in rope.items():
        if key != "kind" and not (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
            problems.append(f"rotary {key} is {value!r}; it must be a number over 0")
        elif key not in ("kind", "original_max_positions"):
            rope[key] = float(value)
    return rope


def _window(config: dict[str, Any], defaults: dict[str, Any], rule: str, layers: Any, problems: list[str]) -> dict[str, Any]:
    """The attention window. ``all``: ``sliding_window`` on every layer (Mistral); ``layers``: from ``layer_types`` or
    ``max_window_layers`` on, when ``use_sliding_window`` says so (Qwen)."""
    full: dict[str, Any] = {"window": 0, "window_layers": []}
    types = config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if types is not None and (not isinstance(types, list) or any(one not in known for one in types)):
        problems.append(f"layer_types: only full_attention and sliding_attention are supported, found {str(types)[:80]}")
        return full
    window = {**defaults, **config}.get("sliding_window")
    if rule != "layers" and types:
        # transformers does not read the list here; one that means what it does anyway is no harm
        meant = "sliding_attention" if rule == "all" and window is not None else "full_attention"
        if any(one != meant for one in types):
            problems.append(
                f"layer_types: this architecture has {meant} on every layer, found {str(types)[:80]}; "
                "if its layers do differ, its architecture has another name"
            )
    if rule == "none":
        return full
    if rule == "layers" and not {**defaults, **config}.get("use_sliding_window"):
        if types and "sliding_attention" in types:
            problems.append("layer_types has sliding_attention, but use_sliding_window is off")
        return full
    if window is None:
        return full
    if not _is_count(window) or window == 0:
        problems.append(f"sliding_window is {window!r}; it must be a whole number over 0")
        return full
    if rule == "all" or not _is_count(layers) or layers > LARGEST["num_layers"]:
        return {"window": window, "window_layers": []}
    if types is None:
        start: Any = {**defaults, **config}.get("max_window_layers")
        if not _is_count(start):
            problems.append(f"max_window_layers is {start!r}; it must be a whole number")
            return full
        types = ["sliding_attention" if layer >= start else "full_attention" for layer in range(layers)]
    if len(types) != layers:
        problems.append(f"layer_types names {len(types)} layers of {layers}")
    chosen = [layer for layer, one in enumerate(types) if one == "sliding_attention"]
    if not chosen:
        return full
    return {"window": window, "window_layers": [] if len(chosen) == layers else chosen}


def _wrong_types(values: dict[str, Any]) -> list[str]:
    """Sizes that are no sizes; anything subtler is refused when the spec is composed."""
    from zoo.config import MODEL_TYPES

    wrong = []
    for key, value in values.items():
        wanted = MODEL_TYPES.get(key)
        if wanted is int and not _is_count(value):
            wrong.append(f"{key} is {repr(value)[:60]}; it must be a whole number")
        elif wanted is int and value > LARGEST.get(key, value):
            wrong.append(f"{key} is {value}; it must be at most {LARGEST[key]}")
        if wanted is bool and not isinstance(value, bool):
            wrong.append(f"{key} is {value!r}; it must be true or false")
        if wanted is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            wrong.append(f"{key} is {value!r}; it must be a number")
    return wrong


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _nearest(config: dict[str, Any], tensors: Tensors | None) -> str:
    """Which family comes closest, and in what it differs."""
    from zoo.config import families

    best: tuple[float, str] = (-1.0, "")
    for name, data in families().items():
        keys = {
            part
            for source in data.get("config", {}).values()
            for one in _listed(source)
            for part in re.findall(r"[a-z_]{2,}", one)
        }
        shared = len(keys & set(config))
        text = f"The nearest family is {name}: config.json has {shared} of the {len(keys)} keys that it reads"
        score = shared / max(len(keys), 1)
        if tensors is not None:
            maps = data.get("tensors", {})
            named = [t.replace("{layer}", "0") for group in ("model", "layer") for t in maps.get(group, {}).values()]
            prefixes = maps.get("prefixes", [""])
            mapped = {prefix + t for prefix in prefixes for t in named}
            first = [t for t in tensors.names if not re.search(r"\.[1-9]\d*\.", t)]
            strange = [t for t in first if t not in mapped]
            score += 1 - len(strange) / max(len(first), 1)
            text += f", and {len(first) - len(strange)} of {len(first)} tensor names of the first layer are its own"
            text += f" (not {', '.join(strange[:4])}{' ...' if len(strange) > 4 else ''})" if strange else ""
        best = max(best, (score, text))
    return f"{best[1]}; if only names differ, write a family YAML (docs/adding-a-model.md)" if best[1] else ""


def _listed(source: Any) -> list[str]:
    return [str(one) for one in (source if isinstance(source, list) else [source])]
