"""What YAML files and overrides may say, taken from the specs themselves, and checks that name file and key.

Every group has an unfrozen twin of its spec (OmegaConf cannot compose into frozen ones): required fields become ``???``,
tuples become lists. ``check`` is stricter than OmegaConf: it converts nothing, and suggests near names.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from typing import Any

from zoo.errors import ConfigError
from zoo.spec import HardwareSpec, Limits, ModelSpec, ParallelSpec, QuantSpec

MISSING = "???"
LARGEST = 10**18  # of any number: FLOP/s and bytes fit, typing errors with too many digits do not
GROUPS = {"models": "model", "quant": "quant", "hardware": "hardware", "parallel": "parallel", "registry": "registry"}
REFERENCE = re.compile(r"\$\{[\w.\-\[\]]+\}")


@dataclasses.dataclass
class ArchitectureNode:
    """How a family reads one architecture's config.json; see docs/adding-a-model.md."""

    model_type: str = MISSING
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    must: dict[str, Any] = dataclasses.field(default_factory=dict)
    window: str = "none"
    rope_layers: str = "all"
    dense_layers: str = "none"
    variants: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RegistryNode:
    name: str = "local"
    path: str = ""


def unfrozen(spec: type, extra: dict[str, Any] | None = None) -> type:
    """An unfrozen dataclass with a spec's fields: tuples as lists, required fields missing, nested specs unfrozen too."""
    hints = typing.get_type_hints(spec)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(spec):
        kind = hints[field.name]
        default: Any = MISSING
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(kind):
            kind = unfrozen(typing.cast(type, kind))
            made = dataclasses.field(default_factory=functools.partial(_node, kind, default))
        elif typing.get_origin(kind) is tuple:
            kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
            made = dataclasses.field(default_factory=functools.partial(list, () if default is MISSING else default))
        elif typing.get_origin(kind) is dict:
            made = dataclasses.field(default_factory=functools.partial(dict, {} if default is MISSING else default))
        else:
            made = dataclasses.field(default=default)
        fields.append((field.name, kind, made))
    for name, kind in (extra or {}).items():
        fields.append((name, kind, dataclasses.field(default_factory=dict)))
    return dataclasses.make_dataclass(spec.__name__.replace("Spec", "") + "Node", fields)


def _node(kind: Any, default: Any) -> Any:
    """A node with the values of a frozen spec, tuples as lists; its own defaults when there is none."""
    values = {} if default is MISSING else dataclasses.asdict(default)
    return kind(**{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()})


# `config` and `architectures` are a family's way of reading config.json; they never reach a ModelSpec.
ModelNode = unfrozen(ModelSpec, {"config": dict[str, Any], "architectures": dict[str, ArchitectureNode]})
QuantNode, HardwareNode, ParallelNode = unfrozen(QuantSpec), unfrozen(HardwareSpec), unfrozen(ParallelSpec)
LimitsNode = unfrozen(Limits)
Root: type = dataclasses.make_dataclass(
    "Root",
    [
        ("model", ModelNode, dataclasses.field(default_factory=ModelNode)),
        ("quant", QuantNode, dataclasses.field(default_factory=QuantNode)),
        ("hardware", HardwareNode, dataclasses.field(default_factory=HardwareNode)),
        ("parallel", ParallelNode, dataclasses.field(default_factory=ParallelNode)),
        ("registry", RegistryNode, dataclasses.field(default_factory=RegistryNode)),
        ("limits", LimitsNode, dataclasses.field(default_factory=LimitsNode)),
        ("compiler", str | None, None),
        ("dtype", str | None, None),
        ("threads", int, 0),
    ],
)


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Field name -> type of a dataclass."""
    return typing.get_type_hints(kind)


@functools.cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key of a composed config, for near names."""

    def walk(kind: type, path: str) -> typing.Iterator[str]:
        for name, inner in hints_of(kind).items():
            yield path + name
            if dataclasses.is_dataclass(inner):
                yield from walk(typing.cast(type, inner), f"{path}{name}.")

    return tuple(walk(Root, ""))


def kind_of(key: str) -> Any:
    """The type that stands at a dotted key. ConfigError with near names for a key that does not exist."""
    kind: Any = Root
    for part in key.split("."):
        if dataclasses.is_dataclass(kind) and part in hints_of(typing.cast(type, kind)):
            kind = hints_of(typing.cast(type, kind))[part]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is not Any:
            raise ConfigError(f"unknown key {key!r}{did_you_mean(key, [*all_keys(), *GROUPS])}")
    return kind


def did_you_mean(found: str, allowed: typing.Iterable[str], otherwise: str = "") -> str:
    """``; did you mean 'a' or 'b'?`` for near names, else what is given."""
    near = difflib.get_close_matches(found, list(allowed), n=3, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, found, name).ratio() for name in near]
    near = [name for name, ratio in zip(near, ratios, strict=True) if ratio > ratios[0] - 0.1]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else otherwise


def check(data: Any, kind: Any, key: str, where: str) -> None:
    """Raise ConfigError unless ``data`` has the shape of ``kind``. ``key`` is the dotted key, ``where`` the file."""
    if isinstance(data, str) and (data == MISSING or "${" in data):
        return  # checked again once it is resolved
    if kind is Any:
        return
    if dataclasses.is_dataclass(kind):
        _mapping(data, key, where)
        hints = hints_of(typing.cast(type, kind))
        for name, value in data.items():
            full = f"{key}.{name}" if key else name
            if name not in hints:
                otherwise = f"; allowed here: {', '.join(hints)}"
                raise ConfigError(f"{where}: unknown key {full!r}{did_you_mean(name, hints, otherwise)}")
            check(value, hints[name], full, where)
        return
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        _mapping(data, key, where)
        for name, value in data.items():
            check(value, arguments[1], f"{key}.{name}", where)
    elif origin is list:
        if not isinstance(data, list):
            raise ConfigError(f"{where}: {key} is {say(data)}; it must be a list, such as [a, b]")
        for number, value in enumerate(data):
            check(value, arguments[0], f"{key}[{number}]", where)
    elif origin in (typing.Union, types.UnionType):
        if data is not None:
            check(data, arguments[0], key, where)
    elif not _fits(data, kind):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        if kind in (int, float) and isinstance(data, int | float) and not isinstance(data, bool):
            wanted += f" of at most {LARGEST:,}" if kind is float or isinstance(data, int) else ""
        hint = "; put it into quotes" if kind is str and isinstance(data, int | float | bool) else ""
        raise ConfigError(f"{where}: {key} is {say(data)}; it must be {wanted}{hint}")


def check_references(data: Any, key: str, where: str) -> None:
    """Refuse everything in ``${...}`` but plain references to config keys, and every ``_target_``, before anything is resolved.

    A resolver such as oc.env would publish what it finds with the resolved spec; an import path would run code.
    """
    if isinstance(data, dict):
        for name, value in data.items():
            full = f"{key}.{name}" if key else str(name)
            check_references(str(name), full, where)
            if str(name).startswith("_") and str(name).endswith("_"):
                raise ConfigError(f"{where}: {full}: {name} is not allowed; configs are data and name no Python")
            check_references(value, full, where)
    elif isinstance(data, list):
        for number, value in enumerate(data):
            check_references(value, f"{key}[{number}]", where)
    elif isinstance(data, str) and "${" in REFERENCE.sub("", data):
        raise ConfigError(
            f"{where}: {key or 'defaults'} is {data!r}; it may refer to config keys only, such as ${{limits.max_tokens}}; "
            "no environment variables and no resolvers, since the resolved spec is published with the engine"
        )


def say(value: Any) -> str:
    """A value and what it is, for messages."""
    names: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({names.get(type(value), type(value).__name__)})"


def _mapping(data: Any, key: str, where: str) -> None:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: {key or 'the file'} is {say(data)}; it must be a mapping of keys to values")
    for name in data:
        if not isinstance(name, str):
            raise ConfigError(f"{where}: key {name!r} of {key or 'the file'} must be a text; put it into quotes")


def _fits(data: Any, kind: Any) -> bool:
    if kind is bool or isinstance(data, bool):
        return kind is bool and isinstance(data, bool)
    if kind is float:
        return isinstance(data, int | float) and math.isfinite(data) and abs(data) <= LARGEST
    return isinstance(data, kind) and (kind is not int or abs(data) <= LARGEST)
