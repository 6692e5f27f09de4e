"""Hydra's composition, used as a library: no global state, every file and override checked before Hydra sees its values.

Hydra's loader asks a repository for each file of the defaults list. ``_Checked`` is that repository: it hands a file on
only after its keys, types and references were checked, so that messages name the file, and nothing is ever resolved
that should not be.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import unicodedata
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
from omegaconf import OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from zoo.config import files
from zoo.config.schema import GROUPS, Root, check, check_references, did_you_mean, hints_of, kind_of
from zoo.errors import ConfigError

SCHEMA = "zoo_schema"
OPTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


LONGEST = 8192  # characters of an override: Hydra's parser takes time that grows with the square
MOST_VALUES = 10_000  # of a sweep
MOST_REFERENCES = 16  # in a composed config: one that holds others twice doubles them, and 16 make at most some 300 copies


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
    given = _prepared(overrides)
    repository, loader = _loader(folders)
    for override, parsed in zip(overrides, _parse(given, loader), strict=True):
        _check_override(override, parsed, folders)
    try:
        config = loader.load_configuration("config", [*given, "hydra.job.name=zoo"], RunMode.RUN, from_shell=False)
        with open_dict(config):
            del config["hydra"]
        found = _references(OmegaConf.to_container(config, resolve=False))
        if found > MOST_REFERENCES:
            raise ConfigError(
                f"{found} references to other keys (${{...}}); at most {MOST_REFERENCES} are resolved, since they can multiply. "
                "Write the values out"
            )
        data = OmegaConf.to_container(config, resolve=True)
    except MissingConfigException as error:
        raise ConfigError(_missing(error, folders)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_translate(error, overrides)) from None
    except RecursionError:
        raise ConfigError(
            f"nested too deeply, or keys that refer to each other (overrides: {' '.join(overrides)[:200]})"
        ) from None
    assert isinstance(data, dict)
    order = {name: place for place, name in enumerate(loader.order)}
    merged = sorted((file for file in repository.loaded if file.name in order), key=lambda file: order[file.name])
    composed = Composed({str(key): value for key, value in data.items()}, list(overrides), merged)
    for name, value in composed.data.items():
        check(value, hints_of(Root)[name], name, composed.origin(name))
    return composed


def expand_sweep(overrides: Sequence[str], folders: list[Path]) -> list[list[str]]:
    """Comma lists, ranges and globs expanded into plain override lists, in order, the last one turning fastest."""
    _, loader = _loader(folders)
    choices = []
    for given, parsed in zip(overrides, _parse(_prepared(overrides), loader), strict=True):
        if parsed.is_sweep_override():
            try:
                key = parsed.get_key_element()
                values = list(itertools.islice(parsed.sweep_string_iterator(), MOST_VALUES + 1))
            except (HydraException, ValueError) as error:
                raise ConfigError(f"override {given!r}: {_first_line(error)}") from None
            if not values:
                raise ConfigError(f"override {given!r}: nothing matches")
            if len(values) > MOST_VALUES:
                raise ConfigError(f"override {given!r}: more than {MOST_VALUES:,} values")
            if key in GROUPS:
                values = [value.strip("'") for value in values]
            choices.append([f"{key}={value}" for value in values])
        else:
            choices.append([given])
    if math.prod(map(len, choices)) > MOST_VALUES:
        raise ConfigError(f"{math.prod(map(len, choices)):,} combinations; at most {MOST_VALUES:,} are made at once")
    return [list(chosen) for chosen in itertools.product(*choices)]


# Files that were loaded and checked, by path and what tells one state of a file from another.
_CHECKED: dict[tuple[Path, int, int, int], tuple[ConfigResult, str, dict[str, Any]]] = {}


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
        files.guard(path)
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size, status.st_ino)
        if key not in _CHECKED:
            _CHECKED[key] = self._checked(config_path, path)
        result, package, keys = _CHECKED[key]
        self.loaded.append(Loaded(config_path, folder, path, package, keys))
        return copy.deepcopy(result)  # Hydra changes what it is given

    def _checked(self, config_path: str, path: Path) -> tuple[ConfigResult, str, dict[str, Any]]:
        """Load and check one file; of a family without its way of reading config.json, which is large and no part of a model."""
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
        if family:
            with read_write(result.config), open_dict(result.config):
                for name in ("config", "architectures"):
                    result.config.pop(name, None)
        return result, package, {str(key): value for key, value in data.items()}


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
        except (HydraException, RecursionError):
            raise ConfigError(f"override {_short(override)!r}: {_unreadable(override)}") from None
    return parsed


def _prepared(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra is to read them, checked as far as their text goes.

    The names of options go into quotes: ``models=1000``, ``models=null`` and ``models=1.10`` mean files of these names.
    """
    prepared = []
    for override in overrides:
        key, equals, value = override.partition("=")
        where = f"override {_short(override)!r}"
        if len(override) > LONGEST:
            raise ConfigError(f"{where}: {len(override):,} characters; at most {LONGEST:,}. Put long values into a YAML file")
        if any(
            unicodedata.category(letter) in ("Cc", "Cs") for letter in override
        ):  # half a surrogate pair too, which is what a byte outside UTF-8 becomes
            raise ConfigError(f"{where}: it has control characters or bytes outside UTF-8; write a plain text on one line")
        for text in (key, value):
            check_references(text, key, where)
        names = value.split(",")
        if equals and key in GROUPS and all(OPTION.fullmatch(name) for name in names):
            override = f"{key}={','.join(map(repr, names))}"
        prepared.append(override)
    return prepared


def _unreadable(override: str) -> str:
    """What to do about an override that Hydra's grammar has no reading for."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[\w.@/+~-]+", key):
        return "overrides look like key=value"
    quoted = value.strip("'\"").replace("'", "\\'")
    instead = _short(f"\"{key}='{quoted}'\"")
    return (
        "the value cannot be read; a list is written [a,b], and a text with spaces, commas, ~, quotes or other special "
        f"characters is put into quotes, with others around it for the shell: {instead}"
    )


def _references(data: Any) -> int:
    if isinstance(data, dict):
        return sum(map(_references, data.values()))
    if isinstance(data, list):
        return sum(map(_references, data))
    return data.count("${") if isinstance(data, str) else 0


def _missing(error: MissingConfigException, folders: list[Path]) -> str:
    """Which file a defaults list names that is not there, and what is."""
    missing = str(getattr(error, "missing_cfg_file", None) or "")
    group, _, name = missing.rpartition("/")
    allowed = files.options(group, folders) if group else []
    if not allowed:
        return _first_line(error)
    named = re.match(r"In '([^']+)'", str(error))
    where = f"conf/{named[1]}.yaml: " if named else ""
    return f"{where}defaults: there is no {missing}; pick one of {', '.join(allowed)}{did_you_mean(name, allowed)}"


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _check_override(override: str, parsed: Override, folders: list[Path]) -> None:
    key = parsed.key_or_group
    where = f"override {_short(override)!r}"
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
