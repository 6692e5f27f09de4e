"""The ``tuning:`` section of a hardware profile, as ``zoo tune`` writes it and reads it again.

    tuning:
      # when, on which GPU, for which engine

      attention:
        # what was measured
        "128x4.float8e4m3": {"decode_block_n": 64, "decode_warps": 4, "decode_stages": 3}
      skinny:
        "6144x4096.float8e4m3": {"16": [16, 64, 128, 4, 4, 4], "32": [32, 64, 128, 4, 4, 4]}
      rotary_elements: 2048

A name at two spaces has a table or a value, a key at four spaces a value; values are JSON, which is YAML too. Comments belong to
the line below them, and above an empty line to the section. A file of another form is not touched: tables are merged key by key,
so that several engines can be tuned in turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError

HEAD = "tuning:"
NAME = re.compile(r"  ([a-z_0-9]+):(.*)")
KEY = re.compile(r'    ("[^"]+"): (.*)')
TABLES = ("attention", "skinny")  # names whose values stand at four spaces


@dataclass
class Section:
    """tables: name -> key -> value; values: name -> value; comments by path, those of the whole section under ()."""

    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[tuple[str, ...], list[str]] = field(default_factory=dict)

    def add(self, path: tuple[str, ...], value: Any, *comments: str) -> None:
        """Say something; what was said there before is gone."""
        if len(path) == 2:
            self.tables.setdefault(path[0], {})[path[1]] = value
        else:
            self.values[path[0]] = value
        self.comments[path] = list(comments)

    def merge(self, other: Section) -> None:
        """Let another section have the last word."""
        for name, table in other.tables.items():
            self.tables.setdefault(name, {}).update(table)
        self.values |= other.values
        self.comments[()] = [*self.comments.get((), []), *other.comments.get((), [])]
        self.comments |= {path: lines for path, lines in other.comments.items() if path}

    @property
    def data(self) -> dict[str, Any]:
        """What a hardware profile's ``tuning`` is, with this section."""
        return {**self.tables, **self.values}

    def text(self) -> str:
        """The section as YAML."""
        lines = [HEAD] if self.tables or self.values else [f"{HEAD} {{}}"]
        lines += [f"  # {one}" for one in self.comments.get((), [])] + [""] * bool(self.comments.get(()))
        for name, table in sorted(self.tables.items()):
            lines.append(f"  {name}:")
            for key, value in sorted(table.items()):
                lines += [f"    # {one}" for one in self.comments.get((name, key), [])]
                lines.append(f"    {json.dumps(key)}: {json.dumps(value)}")
        for name, value in sorted(self.values.items()):
            lines += [f"  # {one}" for one in self.comments.get((name,), [])]
            lines.append(f"  {name}: {json.dumps(value)}")
        return "\n".join(lines) + "\n"


def parse(lines: list[str], where: str) -> Section:
    """The section in these lines, of which the first is ``tuning:``. ConfigError for one of another form."""
    found, table = Section(), ""
    comments: list[str] = []
    if lines[0].removeprefix(HEAD).partition("#")[0].strip() not in ("", "{}"):
        raise _strange(where, lines[0])
    for line in lines[1:]:
        key, name = KEY.fullmatch(line), NAME.fullmatch(line)
        if line.strip().startswith("#"):
            comments.append(line.strip()[1:].strip())
            continue
        if not line.strip():
            found.comments[()] = [*found.comments.get((), []), *comments]
        elif key and table:
            found.add((table, json.loads(key[1])), _value(key[2], where, line), *comments)
        elif name and name[1] in TABLES and not name[2].strip():
            table = name[1]
            continue
        elif name and name[1] not in TABLES:
            table = ""
            found.add((name[1],), _value(name[2], where, line), *comments)
        else:
            raise _strange(where, line)
        comments = []
    return found


def _value(text: str, where: str, line: str) -> Any:
    try:
        return json.loads(text.partition("  #")[0])
    except ValueError:
        raise _strange(where, line) from None


def _strange(where: str, line: str) -> ConfigError:
    return ConfigError(
        f"{where}: {line.strip()[:60]!r} in its tuning section is not as `zoo tune` writes it; write to another file, and merge "
        "the two by hand"
    )


def read(path: Path) -> tuple[list[str], Section, list[str]]:
    """The lines before a file's section, the section, and the lines behind it. A file that is not there is empty."""
    if not path.exists():
        return [], Section(), []
    lines = path.read_text().splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith(HEAD)]
    if not starts:
        return lines, Section(), []
    start = starts[0]
    inside = (place for place in range(start + 1, len(lines)) if lines[place] and not lines[place].startswith(" "))
    end = next(inside, len(lines))
    return lines[:start], parse(lines[start:end], str(path)), lines[end:]


def write(path: Path, found: Section) -> Section:
    """Merge a section into a file's own, and write it. Gives what the file says now."""
    before, section, behind = read(path)
    section.merge(found)
    parts = ["\n".join(before) + "\n" if before else "", section.text(), "\n".join(behind) + "\n" if behind else ""]
    path.write_text("".join(parts))
    return section


def differs(found: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether a section would change an engine that was built with ``known``."""
    return any(known.get(name) != value for name, value in found.items())
