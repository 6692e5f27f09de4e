"""Hydra's composition, used as a library: no global state, every file and override checked before Hydra sees its values.

Hydra's loader asks a repository for each file of the defaults list. ``_Checked`` is that repository: it hands a file on
only after its keys, types and references were checked, so that messages name the file, and nothing is ever resolved
that should not be.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from zoo.config import files
from zoo.config.schema import GROUPS, Root, check, check_references, did_you_mean, hints_of, kind_of
from zoo.errors import ConfigError

SCHEMA = "zoo_schema"
OPTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class Loaded:
    """A file that a composition used: its name for Hydra, the conf folder it is in, and the key its content stands at."""

    name: str
    folder: Path
    path: Path
    package: str
    data: dict[str, Any]


@dataclass
class Composed:
    """Composed data with references resolved, and the files that gave it."""

    data: dict[str, Any]
    overrides: list[str]
    loaded: list[Loaded]  # in the order in which they were merged: later ones win

    def origin(self, key: str) -> str:
        """The override or file that set a dotted key, for messages."""
        for override in reversed(self.overrides):
            if override.split("=")[0].lstrip("+") == key:
                return f"override {override!r}"
        file = self.file_of(key)
        return files.shown(file.path) if file else "config"

    def source(self, part: str) -> str:
        """The file that a part (``model``, ``quant``, ...) was chosen from, and the overrides that change it."""
        file = next((file for file in reversed(self.loaded) if part in (file.package, *file.data)), None)
        changes = [override for override in self.overrides if override.lstrip("+").startswith(f"{part}.")]
        return (files.shown(file.path) if file else "config") + (f" with {' '.join(changes)}" if changes else "")

    def file_of(self, key: str) -> Loaded | None:
        """The file whose value for a dotted key won."""
        for file in reversed(self.loaded):
            inner: Any = {file.package: file.data} if file.package else file.data
            for part in key.split("."):
                inner = inner.get(part) if isinstance(inner, dict) else None
            if inner is not None:
                return file
        return None


def load(overrides: Sequence[str], folders: list[Path]) -> Composed:
    """Compose ``config.yaml`` with overrides. ConfigError, one line, for whatever is wrong."""
    for override in overrides:
        key, _, value = override.partition("=")
        for text in (key, value):
            check_references(text, key, f"override {override!r}")
    repository, loader = _loader(folders)
    for parsed in _parse(overrides, loader):
        _check_override(parsed, folders)
    try:
        config = loader.load_configuration("config", [*overrides, "hydra.job.name=zoo"], RunMode.RUN, from_shell=False)
        with open_dict(config):
            del config["hydra"]
        data = OmegaConf.to_container(config, resolve=True)
    except MissingConfigException as error:
        raise ConfigError(_first_line(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_translate(error, overrides)) from None
    assert isinstance(data, dict)
    order = {name: place for place, name in enumerate(loader.order)}
    merged = sorted((file for file in repository.loaded if file.name in order), key=lambda file: order[file.name])
    composed = Composed({str(key): value for key, value in data.items()}, list(overrides), merged)
    for name, value in composed.data.items():
        check(value, hints_of(Root)[name], name, composed.origin(name))
    return composed


def expand_sweep(overrides: Sequence[str], folders: list[Path]) -> list[list[str]]:
    """Comma lists, ranges and globs expanded into plain override lists, in order, the last one turning fastest."""
    for override in overrides:
        key, _, value = override.partition("=")
        for text in (key, value):
            check_references(text, key, f"override {override!r}")
    _, loader = _loader(folders)
    choices = []
    for parsed in _parse(overrides, loader):
        if parsed.is_sweep_override():
            try:
                key = parsed.get_key_element()
                choices.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])
            except (HydraException, ValueError) as error:
                raise ConfigError(f"override {parsed.input_line!r}: {_first_line(error)}") from None
            if not choices[-1]:
                raise ConfigError(f"override {parsed.input_line!r}: nothing matches")
        else:
            choices.append([str(parsed.input_line)])
    return [list(chosen) for chosen in itertools.product(*choices)]


class _Checked(ConfigRepository):  # type: ignore[misc]
    """A repository that checks a file when Hydra loads it, and remembers it."""

    def __init__(self, search_path: Any, folders: list[Path]) -> None:
        self.folders = folders
        self.loaded: list[Loaded] = []
        super().__init__(search_path)

    def __deepcopy__(self, memo: Any) -> _Checked:
        """Hydra copies a repository before it changes the search path; nothing here lets it, and ``loaded`` is to be shared."""
        return self

    def load_config(self, config_path: str) -> ConfigResult | None:
        folder = next((folder for folder in self.folders if (folder / f"{config_path}.yaml").is_file()), None)
        if folder is None or config_path.startswith("hydra/"):
            return super().load_config(config_path)
        path = folder / f"{config_path}.yaml"
        try:
            result = super().load_config(config_path)
        except (YAMLError, OmegaConfBaseException, HydraException, ValueError) as error:
            raise files.yaml_error(path, error) from None
        assert result is not None
        where, group = files.shown(path), config_path.split("/")[0]
        package = GROUPS.get(group, "")
        data = OmegaConf.to_container(result.config, resolve=False)
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected a mapping of keys to values")
        for default in result.defaults_list or ():
            for value in vars(default).values():
                if isinstance(value, str | list):
                    check_references(value, "defaults", where)
            named = getattr(default, "path", None)
            if group == "models" and named not in (None, "_self_") and default.package != "":
                raise ConfigError(f"{where}: write '{named}@_here_' in the defaults list, so that its keys stand beside these")
        check_references(data, package, where)
        family = config_path.startswith("models/families/")
        if package and not family and result.header.get("package") != package:
            raise ConfigError(f"{where}: the first line must be '# @package {package}', so that its keys stand at {package}.*")
        check(data, hints_of(Root)[package] if package else Root, package, where)
        self.loaded.append(Loaded(config_path, folder, path, package, {str(key): value for key, value in data.items()}))
        return result


class _Loader(ConfigLoaderImpl):  # type: ignore[misc]
    """Hydra's loader, which remembers the order in which files are merged."""

    order: list[str]

    def _compose_config_from_defaults_list(self, defaults: list[Any], repo: Any) -> Any:
        self.order = [default.config_path for default in defaults]
        return super()._compose_config_from_defaults_list(defaults, repo)


def _loader(folders: list[Path]) -> tuple[_Checked, _Loader]:
    if version.getbase() is None:
        version.setbase("1.3")
    ConfigStore.instance().store(name=SCHEMA, node=Root)
    search_path = create_config_search_path(str(folders[-1]))
    for folder in reversed(folders[:-1]):
        search_path.prepend("user", f"file://{folder}")
    loader = _Loader(config_search_path=search_path)
    repository = _Checked(search_path, folders)
    loader.repository = repository
    return repository, loader


def _parse(overrides: Sequence[str], loader: _Loader) -> list[Override]:
    parser, parsed = OverridesParser.create(config_loader=loader), []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except HydraException as error:
            hint = "" if "=" in override else "; overrides look like key=value"
            raise ConfigError(f"override {override!r}: {_first_line(error.__cause__ or error)}{hint}") from None
    return parsed


def _check_override(parsed: Override, folders: list[Path]) -> None:
    line, key = parsed.input_line, parsed.key_or_group
    where = f"override {line!r}"
    if parsed.is_hydra_override() or key.split("/")[0] == "hydra":
        raise ConfigError(f"{where}: Hydra's own settings are not used here; a folder of your own configs is named by ZOO_CONF")
    if parsed.type not in (OverrideType.CHANGE, OverrideType.ADD, OverrideType.FORCE_ADD) or parsed.package:
        raise ConfigError(f"{where}: only key=value is allowed")
    if parsed.is_sweep_override():
        raise ConfigError(f"{where}: several values need -m (--multirun); a list is written [a,b], a text with commas in quotes")
    value = parsed.value()
    if key in GROUPS:
        allowed = files.options(key, folders)
        name = str(value)
        if not isinstance(value, str | int | float) or not OPTION.fullmatch(name) or name not in allowed:
            otherwise = f"pick one of {', '.join(allowed)}"
            raise ConfigError(f"{key} {name!r} (conf/{key}): {otherwise}{did_you_mean(name, allowed)}")
        return
    if any(part.startswith("_") and part.endswith("_") for part in key.split(".")):
        raise ConfigError(f"{where}: {key} is not allowed; configs are data and name no Python")
    if key in GROUPS.values():
        group = next(group for group, package in GROUPS.items() if package == key)
        raise ConfigError(f"{where}: choose with {group}=NAME, or set one key, such as {key}.name=...")
    try:
        kind = kind_of(key)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    value = _plain(value)
    check_references(value, key, where)
    check(value, kind, key, where)


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    return value


def _translate(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's or OmegaConf's message as one line; the cause is what tells the reason."""
    cause = error.__cause__ or error
    text = _first_line(cause)
    key = getattr(cause, "full_key", None)
    if key and key not in text:
        text = f"{key}: {text}"
    return f"{text} (overrides: {' '.join(overrides) or 'none'})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
