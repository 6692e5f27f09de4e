"""Which family comes closest to a checkpoint that no family covers, and whose tensors a checkpoint's really are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.checkpoints.config_language import keys_of
from zoo.checkpoints.layers_config import RULE_KEYS, RULES
from zoo.checkpoints.rope_config import BASES, FRACTIONS, KEYS, LOCAL_BASES
from zoo.checkpoints.settings import choices, leaves
from zoo.weights.reader import Tensors

LISTED = 5  # keys or names that a message lists
# Keys that tell nothing about how a model computes: training, text, and how transformers runs it.
SILENT = re.compile(
    r"architectures|model_type|auto_map|transformers_version|(torch_)?dtype|_.*|id2label|label2id|initializer_\w+|use_cache|"
    r"\w*(dropout|pdrop|_drop)\w*|\w*token_ids?|pretraining_tp|chunk_size_feed_forward|is_\w+|output_\w+|return_\w+|problem_type|"
    r"task_specific_params|tokenizer_class|summary_\w+|\w*aux_loss\w*|attn_implementation|use_return_dict|layer_types"
)
CLEARLY = 0.25  # by how much more of its names another family must know


def nearest(families: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], tensors: Tensors | None) -> str:
    """Which family comes closest, and in what it differs."""
    best: tuple[float, str] = (-1.0, "")
    for name, data in families.items():
        needed, known = _read_keys(data)
        shared = needed & set(config)
        text = f"The nearest family is {name}: config.json has {len(shared)} of the {len(needed)} keys that it reads"
        if missing := sorted(needed - shared):
            text += f" (not {_some(missing)})"
        score = len(shared) / max(len(needed), 1)
        if strange := sorted(key for key in config if key not in known and not SILENT.fullmatch(key)):
            text += f"; it does not know {_some(strange)}"
        if tensors is not None:
            ours, others = _fit(data, tensors)
            score += ours / max(ours + len(others), 1)
            text += f"; {ours} of {ours + len(others)} tensor names of the first layer are its own"
            text += f" (not {_some(others)})" if others else ""
        best = max(best, (score, text))
    return f"{best[1]}. If only names differ, write a family YAML (docs/adding-a-model.md)" if best[1] else ""


def other_family(families: Mapping[str, Mapping[str, Any]], family: str, tensors: Tensors) -> str:
    """The family whose tensor names a checkpoint has, if that is clearly another one than config.json says; else ""."""
    ours, strange = _fit(families[family], tensors)
    if not strange:
        return ""
    own = ours / (ours + len(strange))
    rest = {name: _fit(data, tensors)[0] / (ours + len(strange)) for name, data in families.items() if name != family}
    best = max(rest, key=lambda name: rest[name], default="")
    if not best or rest[best] < own + CLEARLY:
        return ""
    names = ", ".join(families[best].get("architectures", {}))
    return (
        f"its tensors are those of family {best} ({names}): {rest[best]:.0%} of their names are known there, {own:.0%} in "
        f"{family} (not {_some(strange)}); put the config.json of this checkpoint beside it"
    )


def _read_keys(data: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Keys of config.json that the numbers of every model of a family come from, and all keys that it knows."""
    needed = {key.partition(".")[0] for key in _source_keys(data)}
    known = set(needed) | set(KEYS) | set(BASES) | set(LOCAL_BASES) | set(FRACTIONS) | {"original_max_position_embeddings"}
    for about in data.get("architectures", {}).values():
        for part in (about, *(one for choice in choices(about) for one in choice)):
            named = [*_source_keys(part), *part.get("must", {}), *part.get("when", {}), *part.get("defaults", {})]
            rules = [key for rule in RULES for key in RULE_KEYS.get(part.get(rule, ""), ())]
            known |= {key.partition(".")[0] for key in [*named, *rules, *part.get("aliases", {})]}
    return needed, known


def _source_keys(part: Mapping[str, Any]) -> Iterator[str]:
    for _, (source, _) in leaves(part.get("config", {})):
        yield from keys_of(source)


def _fit(data: Mapping[str, Any], tensors: Tensors) -> tuple[int, list[str]]:
    """How many names a family knows among a checkpoint's, numbers apart, and the others as they stand in the first layer."""
    maps = [data.get("tensors", {})]
    for about in data.get("architectures", {}).values():
        for part in (about, *(one for choice in choices(about) for one in choice)):
            options: dict[str, Any] = {"model": {}, "layer": {}}
            for path, (value, _) in leaves(part.get("options", {})):
                if path[0] == "tensors" and len(path) == 3:
                    options[path[1]][path[2]] = value
                elif path[0] == "tensors" and path[1] in ("prefixes", "ignored"):
                    options[path[1]] = value
            maps.append(options)
    prefixes = {prefix for one in maps for prefix in one.get("prefixes", ())} or {""}
    named = {name for one in maps for group in ("model", "layer") for name in one.get(group, {}).values()}
    known = {_plain(prefix + re.sub(r"\{(layer|expert|head)\}", "0", name)) for prefix in prefixes for name in named}
    ignored = [re.compile(pattern) for one in maps for pattern in one.get("ignored", ())]
    first: dict[str, str] = {}
    for name in tensors.names:
        if not any(pattern.fullmatch(name) for pattern in ignored):
            first.setdefault(_plain(name), name)
    strange = [name for plain, name in first.items() if plain not in known]
    return len(first) - len(strange), strange


def _plain(name: str) -> str:
    """A tensor's name without its numbers of layer and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (" ..." if len(names) > LISTED else "")
