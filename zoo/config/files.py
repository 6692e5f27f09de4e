"""Where conf lies, what is in it, and reading one of its files alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import typing
from pathlib import Path
from typing import Any

from zoo.config.schema import GROUPS, HardwareNode, ModelNode, check, check_references
from zoo.errors import ConfigError
from zoo.spec import HardwareSpec

MOST_BYTES, MOST_NODES, MOST_DEPTH = 1 << 20, 20_000, 64  # of a YAML file
PACKAGE = Path(__file__).parent.parent


def conf_dir() -> Path:
    """The conf folder beside the ``zoo`` package in a checkout, else the one inside an installed wheel."""
    for candidate in (PACKAGE.parent / "conf", PACKAGE / "_data" / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(f"no conf folder beside {PACKAGE} or inside it; reinstall engine-zoo, or work in a checkout of it")


def user_dir() -> Path | None:
    """The user's own conf folder (``ZOO_CONF``), whose models/, quant/, ... come before the project's; None when not set."""
    named = os.environ.get("ZOO_CONF")
    if not named:
        return None
    folder = expand(named).absolute()
    if not folder.is_dir():
        raise ConfigError(
            f"ZOO_CONF is {named!r}, which is not a folder; make it, with a folder models/ inside, or unset ZOO_CONF"
        )
    return folder


def conf_dirs(conf: Path | None = None) -> list[Path]:
    """All conf folders, the first that has a file wins."""
    if conf is not None and not (conf / "config.yaml").is_file():
        raise ConfigError(f"{conf}: no config.yaml here, so this is no conf folder")
    mine = user_dir()
    return ([mine] if mine else []) + [(conf or conf_dir()).absolute()]


def options(group: str, folders: list[Path]) -> list[str]:
    """Names of a group in some conf folders: ``options("hardware", conf_dirs())``."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def list_models() -> list[str]:
    """Names of all models that can be composed."""
    return options("models", conf_dirs())


def expand(path: str | Path) -> Path:
    """A path with ``~`` as the user's home. ConfigError when there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no user of this name; write ./~... for a folder whose name begins with ~") from None


def shown(path: Path) -> str:
    """A file as messages name it: relative to the project where it is inside."""
    path = Path(path)
    for base in (PACKAGE.parent, Path.cwd()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return str(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML file as plain data, interpolations unresolved and checked. Parsed once as long as the file stays the same."""
    return copy.deepcopy(_read_yaml(path, *guard(path)))


def guard(path: Path) -> tuple[int, int]:
    """Refuse a YAML file that would take long or grow large before anything builds data from it.

    Gives its modification time and size, by which a reading of it can be remembered.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise yaml_error(path, error) from None
    _guard(path, status.st_mtime_ns, status.st_size)
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=256)
def _guard(path: Path, _changed: int, size: int) -> None:
    """Go through the parser's events, which take no more memory than the text; aliases, which multiply it, are refused."""
    import yaml  # type: ignore[import-untyped]

    if size > MOST_BYTES:
        raise ConfigError(f"{shown(path)}: {size:,} bytes; a config has at most {MOST_BYTES:,}")
    depth = nodes = 0
    try:
        for event in yaml.parse(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            at = f"{shown(path)}, line {event.start_mark.line + 1}"
            nodes += isinstance(event, yaml.NodeEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{at}: the alias *{event.anchor} is not allowed; write ${{key}} to refer to another key")
            if depth > MOST_DEPTH:
                raise ConfigError(f"{at}: nested more than {MOST_DEPTH} deep")
            if nodes > MOST_NODES:
                raise ConfigError(f"{at}: more than {MOST_NODES:,} values; no config needs that many")
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise yaml_error(path, error) from None


@functools.lru_cache(maxsize=64)
def _read_yaml(path: Path, _changed: int, _size: int) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise yaml_error(path, error) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{shown(path)}: expected a mapping of keys to values")
    check_references(data, "", shown(path))
    return {str(key): value for key, value in data.items()}


def yaml_error(path: Path, error: Exception) -> ConfigError:
    """What is wrong with a YAML file, in one line."""
    mark = getattr(error, "problem_mark", None)
    at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0] if str(error) else type(error).__name__
    if "nesting depth" in problem:  # the scanner of newer libyaml looks ahead, and finds it before its events are counted
        return ConfigError(f"{shown(path)}{at}: nested more than {MOST_DEPTH} deep")
    return ConfigError(f"{shown(path)}{at}: not readable YAML: {problem}")


def hardware_specs(conf: Path | None = None) -> list[HardwareSpec]:
    """Every hardware of the conf folders."""
    specs = []
    for name in options("hardware", conf_dirs(conf)):
        path = find("hardware", name, conf)
        data = read_yaml(path)
        check(data, HardwareNode, "hardware", shown(path))
        specs.append(to_spec(HardwareSpec, data, shown(path)))
    return specs


def families(conf: Path | None = None) -> dict[str, dict[str, Any]]:
    """Family name -> its YAML, as plain data."""
    found = {}
    for name in options("models/families", conf_dirs(conf)):
        path = find("models/families", name, conf)
        data = read_yaml(path)
        check(data, ModelNode, "model", shown(path))
        found[name] = data
    return found


def find(group: str, name: str, conf: Path | None = None) -> Path:
    """The file of an option. ConfigError that lists the options when there is none."""
    for folder in conf_dirs(conf):
        if (folder / group / f"{name}.yaml").is_file():
            return folder / group / f"{name}.yaml"
    assert group.split("/")[0] in GROUPS
    raise ConfigError(f"{group} {name!r}: pick one of {', '.join(options(group, conf_dirs(conf)))}")


def to_spec(kind: Any, data: dict[str, Any], where: str) -> Any:
    """A frozen spec from checked data: lists become tuples, nested mappings their specs. ConfigError for missing keys."""
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name not in data or data[field.name] == "???":
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{where}.{field.name} is missing")
            continue
        values[field.name] = _freeze(hints[field.name], data[field.name], f"{where}.{field.name}")
    return kind(**values)


def _freeze(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return to_spec(kind, value, where)
    if isinstance(value, list):
        return tuple(value)
    if kind is float and isinstance(value, int):
        return float(value)
    if isinstance(value, dict) and kind == dict[str, float]:
        return {key: float(number) for key, number in value.items()}
    return value
