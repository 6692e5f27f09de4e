"""Rotary settings of a config.json, in the forms of all transformers releases.

``rope_parameters`` (transformers 5) hold everything, or one such object for each kind of layer; before, ``rope_scaling`` stood
beside ``rope_theta`` and ``partial_rotary_factor``, or beside other names for these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from zoo.checkpoints.config_language import ABSENT, shown
from zoo.checkpoints.settings import Settings
from zoo.modelspec import LARGEST, ROPE_KINDS

KEYS = ("rope_parameters", "rope_scaling", "rope_theta")  # that every architecture with rotary positions reads
BASES = ("rope_theta", "rotary_emb_base", "global_rope_theta")
LOCAL_BASES = ("rope_local_base_freq", "local_rope_theta")
FRACTIONS = ("partial_rotary_factor", "rotary_pct", "rotary_dim")
ALIASES = {"su": "longrope"}
NESTED = ("full_attention", "sliding_attention")
# our key -> theirs, for the numbers that each kind has to have, and for those that it may have
NEEDED: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "longrope": {"factor": "factor"},
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}
KNOWN = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "truncate"),
    *("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *OPTIONAL["yarn"],
}
MOST_FACTORS = 1 << 14


def rope(settings: Settings, values: dict[str, Any], given_by_family: Collection[str], problems: list[str]) -> None:
    """Fill ``rope``, and ``local_rope`` where windowed layers have their own, into a model's values.

    ``values`` has sizes and the window. ``given_by_family`` are keys of rope that the family's ``config`` fills, and keys of
    ``rope_parameters`` that it looks at. A dynamic kind raises ``max_positions``: config.json has the original context there.
    """
    given = settings.get("rope_parameters", {})
    if not isinstance(given, Mapping):
        problems.append("rope_scaling / rope_parameters: expected an object")
        return
    own_local = settings.reads(*LOCAL_BASES)
    layered = [key for key in NESTED if isinstance(given.get(key), Mapping)]
    full, sliding = ((given.get(key) or {}) if layered else given for key in NESTED)
    if layered:  # transformers looks for yarn's ``truncate`` beside the kinds of layers, not inside
        outside = {"truncate": given["truncate"]} if "truncate" in given else {}
        full, sliding = ({**{key: one[key] for key in one if key != "truncate"}, **outside} for one in (full, sliding))
    if layered and not own_local and full != sliding:
        problems.append(
            f"rope_parameters has {' and '.join(layered)}, but this architecture rotates all layers alike; "
            "if its layers do differ, its architecture has another name"
        )
        return
    known = KNOWN | set(given_by_family)
    made = _kind(settings, full, settings.first(*BASES), values, known, problems)
    if made is None:
        return
    if "fraction" not in given_by_family:
        fraction = _fraction(settings, full, values, problems)
        if fraction != 1:
            made["fraction"] = fraction
    if own_local and values.get("window"):
        if layered and sliding.get("partial_rotary_factor") != full.get("partial_rotary_factor"):
            problems.append("rope_parameters: partial_rotary_factor differs between layers; all rotate the same part of a head")
        local = _kind(settings, sliding if layered else {}, settings.first(*LOCAL_BASES), values, known, problems)
        if local is not None and local != {key: value for key, value in made.items() if key != "fraction"}:
            values["local_rope"] = local
    values["rope"] = made


def _kind(
    settings: Settings,
    given: Mapping[str, Any],
    base: Any,
    values: dict[str, Any],
    known: Collection[str],
    problems: list[str],
) -> dict[str, Any] | None:
    """Keys and values of one RopeSpec, its fraction apart; None if anything is wrong with them."""
    before = len(problems)
    kind = given.get("rope_type", given.get("type", "default"))
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "yarn" and given.get("short_factor"):
        kind = "longrope"  # as the first Phi-3 releases called it
    if kind not in ROPE_KINDS:
        allowed = ", ".join((*ROPE_KINDS, *ALIASES))
        problems.append(f"rope_parameters.rope_type: rotary kind {shown(kind)} is not supported; supported are {allowed}")
        return None
    if strange := [key for key in given if key not in known and given[key] is not None]:
        problems.append(f"rope_parameters: {', '.join(map(str, strange))} of kind {kind} is not understood")
    theta = given.get("rope_theta")
    made: dict[str, Any] = {"kind": kind, "theta": (10000.0 if base is ABSENT else base) if theta is None else theta}
    made |= {ours: given.get(theirs) for ours, theirs in NEEDED[kind].items()}
    original = _original(settings, given, kind, values)
    if original is not None:
        made["original_max_positions"] = original
    positions = values.get("max_positions")
    if kind in ("yarn", "longrope") and made["factor"] is None and _number(original) and _number(positions):
        made["factor"] = positions / original
    for key, value in made.items():
        if key != "kind" and not _number(value):
            problems.append(f"rotary {key} is {shown(value)}; it must be a number over 0")
        elif key not in ("kind", "original_max_positions"):
            made[key] = float(value)
    for key in OPTIONAL.get(kind, ()):
        if not given.get(key):
            continue
        if _number(given[key]):
            made[key] = float(given[key])
        else:
            problems.append(f"rotary {key} is {shown(given[key])}; it must be a number over 0")
    if kind == "yarn" and given.get("truncate") is not None:
        made["truncate"] = given["truncate"]
        if not isinstance(given["truncate"], bool):
            problems.append(f"rotary truncate is {shown(given['truncate'])}; it must be true or false")
    if kind == "longrope":
        made |= {key: _factors(given, key, problems) for key in ("short_factor", "long_factor")}
    if len(problems) > before:
        return None
    if kind == "dynamic" and _number(positions):
        values["max_positions"] = max(int(positions), min(int(positions * made["factor"]), LARGEST["max_positions"]))
    return made


def _original(settings: Settings, given: Mapping[str, Any], kind: str, values: Mapping[str, Any]) -> Any:
    """The context that the model was first trained for; None for a kind that does not ask."""
    if kind in ("default", "linear"):
        return None
    inside, key = given.get("original_max_position_embeddings"), "original_max_position_embeddings"
    if kind != "dynamic":
        if settings.reads(key) and settings.get(key):
            return settings.get(key)
        if inside:
            return inside
    return values.get("max_positions")


def _factors(given: Mapping[str, Any], key: str, problems: list[str]) -> list[float]:
    found = given.get(key)
    if not isinstance(found, list) or not 0 < len(found) <= MOST_FACTORS or not all(map(_number, found)):
        problems.append(f"rotary {key} is {shown(found)}; it must be a list of numbers over 0")
        return []
    return [float(number) for number in found]


def _fraction(settings: Settings, given: Mapping[str, Any], values: Mapping[str, Any], problems: list[str]) -> float:
    """The part of each head that is rotated."""
    inside, size = given.get("partial_rotary_factor"), values.get("head_dim")
    reads = settings.reads(*FRACTIONS)
    key, found = "partial_rotary_factor", inside
    if inside is None:
        key = next((key for key in FRACTIONS if settings.config.get(key) is not None), "")
        key = key or next((key for key in FRACTIONS if key not in settings.config and settings.reads(key)), "")
        found = settings.get(key) if key else None
    if found is None:
        return 1.0
    whole = size if key == "rotary_dim" else 1
    if not _number(found) or not _number(whole):
        problems.append(f"{key} is {shown(found)}; it must be a number over 0")
        return 1.0
    fraction = float(found / whole)
    if fraction != 1 and not reads:
        problems.append(f"{key} is {found!r}; this architecture rotates whole heads, so only 1 is supported")
        return 1.0
    return fraction


def _number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1 << 60
