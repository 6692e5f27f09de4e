"""``Settings``: a config.json as one architecture means it, and an architecture with its variants chosen by that."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.checkpoints.config_language import ABSENT, check_source, fits, shown
from zoo.checkpoints.layers_config import RULES
from zoo.errors import ConfigError
from zoo.modelspec import ModelSpec

Path = tuple[str, ...]  # of a key of ModelSpec: ("moe", "experts")
MERGED = ("options", "config", "must")  # of a variant, over the architecture's


class Settings:
    """Keys of a config.json by their dotted names: what stands there, else the architecture's default.

    ``aliases`` are other names for keys. Rotary settings are found under ``rope_parameters``, wherever a release put them.
    """

    def __init__(self, config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.config = dict(config)
        for other, key in about.get("aliases", {}).items():
            if other in self.config:
                self.config.setdefault(key, self.config.pop(other))
        if self.config.get("rope_scaling"):
            self.config["rope_parameters"] = self.config["rope_scaling"]
        self.defaults: Mapping[str, Any] = about.get("defaults", {})

    def given(self, key: str) -> Any:
        """What config.json itself has for a key, null too, or ``ABSENT``."""
        return _inside(self.config, key)

    def look(self, key: str) -> Any:
        """The value of a key, or ``ABSENT``: not there, or null, which hides the default."""
        value = self.given(key)
        if value is ABSENT:
            value = _inside(self.defaults, key)
        return ABSENT if value is None else value

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or ``default`` where it is absent."""
        value = self.look(key)
        return default if value is ABSENT else value

    def first(self, *keys: str) -> Any:
        """The value of the first key that config.json has, else of the first that has a default; or ``ABSENT``."""
        given = [key for key in keys if self.given(key) is not ABSENT]
        known = [key for key in keys if _inside(self.defaults, key) is not ABSENT]
        return self.look((given or known or keys)[0])

    def reads(self, *keys: str) -> bool:
        """Whether the architecture has a default for one of these keys, which says that it reads them."""
        return any(_inside(self.defaults, key) is not ABSENT for key in keys)


def _inside(data: Any, key: str) -> Any:
    if isinstance(data, Mapping) and key in data:
        return data[key]
    for part in key.split("."):
        if not isinstance(data, Mapping) or part not in data:
            return ABSENT
        data = data[part]
    return data


def chosen(about: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An architecture with the variants merged that fit a config.json, and why it is not supported (a list, mostly empty)."""
    settings, made, reasons = Settings(config, about), dict(about), []
    for choice in choices(about):
        variant = next((one for one in choice if _applies(one["when"], settings)), None)
        if variant is None:
            continue
        if "unsupported" in variant:
            found = ", ".join(f"{key} {shown(settings.get(key))}" for key in variant["when"])
            reasons.append(f"{found + ': ' if found else ''}{variant['unsupported']}")
        made |= {key: variant[key] for key in RULES if key in variant}
        made["must"] = {**made.get("must", {}), **variant.get("must", {})}
        for part in ("options", "config"):
            made[part] = merged(made.get(part, {}), variant.get(part, {}))
    return made, reasons


def _applies(when: Mapping[str, Any], settings: Settings) -> bool:
    return all(fits(settings.look(key), wanted) for key, wanted in when.items())


def choices(about: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """An architecture's variants as choices: of each list, the first that fits."""
    variants = about.get("variants", [])
    single = [one for one in variants if not isinstance(one, list)]
    return ([single] if single else []) + [one for one in variants if isinstance(one, list)]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings of model keys as one, flat; what ``above`` says wins, however either is nested."""
    return {".".join(path): value for path, (value, _) in (dict(leaves(below)) | dict(leaves(above))).items()}


def leaves(data: Mapping[str, Any], kind: Any = ModelSpec, path: Path = ()) -> Iterator[tuple[Path, tuple[Any, Any]]]:
    """Each value of a mapping of model keys, nested or with dots, as (path, (value, its type in ModelSpec)).

    ConfigError with near names for a key that ModelSpec does not have.
    """
    for key, value in data.items():
        if not isinstance(key, str) or not key:
            raise ConfigError(f"family: {'.'.join((*path, str(key)))} is no key of a model; put it into quotes if it is a text")
        where, inner, rest = path, kind, key
        while rest:
            if typing.get_origin(inner) is dict:  # roles of tensors have dots of their own
                part, rest = rest, ""
                inner = typing.get_args(inner)[1]
            else:
                part, _, rest = rest.partition(".")
                inner = _field(inner, part, (*where, part))
            where = (*where, part)
        nested = dataclasses.is_dataclass(inner) or typing.get_origin(inner) is dict
        if nested and isinstance(value, Mapping):
            yield from leaves(value, inner, where)
        elif nested:
            raise ConfigError(f"family: {'.'.join(where)} is {shown(value)}; it must be a mapping of keys to values")
        else:
            yield where, (value, inner)


def _field(kind: Any, name: str, path: Path) -> Any:
    from zoo.config.schema import did_you_mean

    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    if name not in hints:
        otherwise = f"; there are {', '.join(hints)}" if hints else f"; {'.'.join(path[:-1])} has no keys inside"
        raise ConfigError(f"family: {'.'.join(path)} is no key of a model{did_you_mean(name, hints, otherwise)}")
    return hints[name]


def put(values: dict[str, Any], path: Path, value: Any) -> None:
    """Set a nested value."""
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def check_family(name: str, data: Mapping[str, Any]) -> None:
    """ConfigError for a family whose ``config`` or ``architectures`` could not be used, whatever config.json comes."""
    try:
        _check_part(data)
        for architecture, about in data.get("architectures", {}).items():
            for variant in [about, *(one for choice in choices(about) for one in choice)]:
                if variant is not about:
                    _check_variant(variant, architecture)
                _check_part(variant)
    except ConfigError as error:
        raise ConfigError(f"conf/models/families/{name}.yaml: {error}") from None


def _check_part(part: Mapping[str, Any]) -> None:
    for path, (source, _) in leaves(part.get("config", {})):
        check_source(source, ".".join(path))
    for _ in leaves(part.get("options", {})):
        pass
    for key, rules in RULES.items():
        if key in part and part[key] not in rules:
            raise ConfigError(f"{key} is {part[key]!r}; pick one of {', '.join(rules)}")


def _check_variant(variant: Any, architecture: str) -> None:
    allowed = ("when", "unsupported", *MERGED, *RULES)
    if not isinstance(variant, Mapping) or not isinstance(variant.get("when"), Mapping):
        raise ConfigError(f"{architecture}: a variant is {shown(variant)}; it must be a mapping with 'when' among its keys")
    if unknown := [key for key in variant if key not in allowed]:
        raise ConfigError(f"{architecture}: a variant has {', '.join(map(str, unknown))}; allowed are {', '.join(allowed)}")
    for key in MERGED:
        if not isinstance(variant.get(key, {}), Mapping):
            raise ConfigError(f"{architecture}: {key} of a variant is {shown(variant[key])}; it must be a mapping")
