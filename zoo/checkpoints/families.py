"""Reading a config.json through the family that covers its architecture. The mapping is YAML (conf/models/families/*.yaml).

    config_language.py  expressions over keys of config.json
    settings.py         config.json with an architecture's defaults, and the variants that it chooses
    layers_config.py    rules that say which layers have a window, rotate, or have no experts
    rope_config.py      rotary settings of all releases
    nearest.py          which family comes closest to what is not covered

What config.json leaves out means what the architecture's ``defaults`` say, as in transformers. docs/adding-a-model.md has the
language.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.config_language import ABSENT, Unfit, first, fits, keys_of, listed, shown
from zoo.checkpoints.folder import Checkpoint
from zoo.checkpoints.layers_config import dense_layers, is_count, rope_layers, window
from zoo.checkpoints.nearest import nearest, other_family
from zoo.checkpoints.rope_config import rope
from zoo.checkpoints.settings import Path, Settings, check_family, chosen, leaves, merged, put
from zoo.errors import CheckpointError
from zoo.modelspec import LARGEST, ModelSpec
from zoo.weights.reader import Tensors

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
# Numbers that change no shape: a model YAML may set them apart from its checkpoint's config.json, and all of ``rope`` but what
# it rotates too.
TUNABLE = ("norm_eps", "softcap", "logit_softcap", "attention_scale", "window", "window_layers")
FIXED_ROPE = ("fraction", "interleaved")
log = logging.getLogger("zoo")


def recognise(config: dict[str, Any], where: str, tensors: Tensors | None = None) -> tuple[str, str]:
    """The (family, architecture) of a config.json.

    CheckpointError with the supported ones and the nearest family, or with the family whose tensors these are in truth.
    """
    from zoo.config import families

    all_families = families()
    known = {
        name: (family, data) for family, data in all_families.items() for name, data in data.get("architectures", {}).items()
    }
    named = config.get("architectures")
    found = None
    if isinstance(named, list) and named:
        architecture = str(named[0])
        found = architecture if architecture in known else None
    else:
        architecture = f"model_type {config.get('model_type')!r}"
        found = next((name for name, (_, data) in known.items() if data["model_type"] == config.get("model_type")), None)
    if found is None:
        raise CheckpointError(
            f"{where}: architecture {architecture} is not supported; supported are {', '.join(known)}. "
            f"{nearest(all_families, config, tensors)}"
        )
    family = known[found][0]
    if tensors is not None and (other := other_family(all_families, family, tensors)):
        raise CheckpointError(f"{where}: architecture {architecture} is of family {family}, but {other}")
    return family, found


def read(config: dict[str, Any], family: str, architecture: str, where: str) -> dict[str, Any]:
    """ModelSpec keys and values from a config.json, nested as in ModelSpec.

    CheckpointError lists everything that is not understood.
    """
    from zoo.config import families

    data = families()[family]
    check_family(family, data)
    about, problems = chosen(data["architectures"][architecture], config)
    settings = Settings(config, about)
    sources = dict(leaves(merged(data.get("config", {}), about.get("config", {}))))
    fixed = dict(leaves(about.get("options", {})))
    values: dict[str, Any] = {}
    for path, (source, kind) in sources.items():
        _fill(values, path, source, kind, settings, problems)
    for path, (value, _) in fixed.items():
        put(values, path, value)
    for key, wanted in about.get("must", {}).items():
        _must(settings, key, wanted, problems)
    if config.get("quantization_config"):
        problems.append("quantization_config: the checkpoint is quantized; use one in bfloat16 and build with quant=fp8")
    if ("window",) not in fixed:
        size = values.pop("window", ABSENT)  # from the family's `config`
        values |= window(settings, about.get("window", "none"), size, values.get("num_layers"), problems)
    if values.get("position", data.get("position", "rope")) == "rope":
        _rotate(settings, about, sources, values, problems)
    if values.get("moe", {}).get("experts"):
        dense = dense_layers(settings, about.get("dense_layers", "none"), values.get("num_layers"), problems)
        if dense:
            put(values, ("moe", "dense_layers"), dense)
    problems += _wrong_types(values)
    if problems:
        raise CheckpointError(f"{where}: {architecture} with settings that are not understood:\n  " + "\n  ".join(problems))
    return values


def _fill(values: dict[str, Any], path: Path, source: Any, kind: Any, settings: Settings, problems: list[str]) -> None:
    """One key of the model from its sources."""
    key = ".".join(path)
    try:
        found = first(source, settings.look, whole=kind is int)
    except Unfit as error:
        problems.append(f"{key}: {error}")
        return
    if found is ABSENT:
        problems.append(f"{key}: none of {', '.join(map(str, listed(source)))} is there")
        return
    if key == "activation":
        given, found = found, ACTIVATIONS.get(str(found))
        if found is None:
            problems.append(f"activation {shown(given)} is not supported; supported are {', '.join(ACTIVATIONS)}")
            return
    put(values, path, float(found) if kind is float and type(found) is int and abs(found) < 1 << 60 else found)


def _must(settings: Settings, key: str, wanted: Any, problems: list[str]) -> None:
    """A key of config.json with one supported value, or several; it may be absent."""
    inside = settings.given(key)
    if inside is ABSENT or fits(inside, wanted):
        return
    allowed = ["null" if one is None else shown(one) for one in listed(wanted)]
    problems.append(f"{key} is {shown(inside)}; only {' or '.join(allowed)} is supported")


def _rotate(
    settings: Settings,
    about: Mapping[str, Any],
    sources: Mapping[Path, tuple[Any, Any]],
    values: dict[str, Any],
    problems: list[str],
) -> None:
    """Rotary settings: read from config.json, and where the family says otherwise, as it says."""
    said = {part: values.pop(part, {}) for part in ("rope", "local_rope")}
    read_keys = [*about.get("must", {}), *(key for source, _ in sources.values() for key in keys_of(source))]
    own = {path[1] for path in sources if path[0] == "rope"} | {key.removeprefix("rope_parameters.") for key in read_keys}
    rope(settings, values, own, problems)
    for part, keys in said.items():
        if keys:
            values[part] = values.get(part, {}) | keys
    if rotating := rope_layers(settings, about.get("rope_layers", "all"), values, problems):
        values["rope_layers"] = rotating


def check_config(model: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError that lists every size and option in which a model and a checkpoint's config.json differ.

    A model may stop at fewer positions than its checkpoint was trained for unless its positions are learned. Numbers that
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
    for path, (theirs, _) in leaves(values):
        if path[0] == "tensors" and path[1] in ("model", "layer", "prefixes", "ignored"):
            continue  # names are compared with the files themselves
        key, ours = ".".join(path), _of(model, path)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        fewer = key == "max_positions" and model.position != "learned" and ours < theirs
        # The stored head counts, whatever config.json calls it; check_tensors says when there is none.
        untied = key == "tie_embeddings" and not ours
        if ours != theirs and not fewer and not untied:
            free = key in TUNABLE or (path[0] in ("rope", "local_rope") and path[1] not in FIXED_ROPE)
            (tuned if free else different).append(f"{key}: {ours!r}, config.json means {theirs!r}")
    for difference in tuned:
        log.warning("model %r differs from its checkpoint config.json in %s", model.name, difference)
    if different:
        raise CheckpointError(f"{where} disagrees with model {model.name!r}:\n  " + "\n  ".join(different))


def _of(model: ModelSpec, path: Path) -> Any:
    value: Any = model
    for part in path:
        value = getattr(value, part)
    return value


def _wrong_types(values: dict[str, Any]) -> list[str]:
    """Sizes that are no sizes; anything subtler is refused when the spec is composed."""
    wrong = []
    for path, (value, wanted) in leaves(values):
        key = ".".join(path)
        if wanted is int and not is_count(value):
            wrong.append(f"{key} is {shown(value)}; it must be a whole number")
        elif wanted is int and value > LARGEST.get(key, value):
            wrong.append(f"{key} is {value}; it must be at most {LARGEST[key]}")
        if wanted is bool and not isinstance(value, bool):
            wrong.append(f"{key} is {shown(value)}; it must be true or false")
        if wanted is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            wrong.append(f"{key} is {shown(value)}; it must be a number")
        if wanted is str and not isinstance(value, str):
            wrong.append(f"{key} is {shown(value)}; it must be a text")
    return wrong
