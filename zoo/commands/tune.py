"""``zoo tune``: times the variants of an engine's kernels on this GPU, and writes the choices into a hardware profile.

Needs the builder beside what serving needs, since variants are compiled as for an engine. The weights of the engine are not read:
operands are random. An engine takes up the section when it is built again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo.commands.output import open_registry, print_json, print_table, stderr
from zoo.errors import RequestError, ResourceError

COLUMNS = ("WHAT", "LOAD", "TRIED", "BEST", "US", "DEFAULT US", "CUBLAS US", "TB/S", "TFLOP/S")


def tune(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    from zoo.tuning import run, section

    if arguments.seconds <= 0:
        raise RequestError(f"--seconds is {arguments.seconds}; give more than 0")
    target = Path(arguments.write) if arguments.write else None
    if target is not None:
        _check_writable(target)
        section.read(target)  # a section of another form is said before minutes are spent
    registry = open_registry(arguments)
    entry = registry.resolve(arguments.ref)
    run.check(entry.manifest)
    with registry.open(entry) as opened:
        made = run.tune(
            opened.folder,
            opened.manifest,
            entry.ref,
            arguments.seconds,
            lambda what: stderr.print(f"tuning {what}", highlight=False),
        )
    written = section.write(target, made.section) if target is not None and made.section.data else None
    data: dict[str, Any] = {
        "ref": entry.ref,
        "gpu": made.gpu,
        "tuning": made.section.data,
        "rows": made.rows,
        "left_out": made.left_out,
        "wrong": made.failed,
        "written": str(target) if written is not None else None,
    }
    if arguments.json:
        print_json(data)
    else:
        _print(data, made.section.text())
    known = opened.manifest.spec.get("hardware", {}).get("tuning", {})
    _say_what_follows(data, section.differs(made.section.data, known))
    return 0


def _print(data: dict[str, Any], text: str) -> None:
    rows = []
    for row in data["rows"]:
        numbers = (row["us"], row["default_us"], row["cublas_us"], row["tb_per_s"], row["tflop_per_s"])
        rows.append((row["what"], row["load"], row["tried"], row["best"], *("-" if one is None else one for one in numbers)))
    print(f"{data['ref']} on {data['gpu']}\n")
    print_table(COLUMNS, rows, COLUMNS[4:])
    print(f"\n{text}", end="")


def _say_what_follows(data: dict[str, Any], changed: bool) -> None:
    lines = [f"no time for {', '.join(data['left_out'])}; raise --seconds"] if data["left_out"] else []
    lines += (
        [f"{len(data['wrong'])} variants gave other results than the default, or none, and were left out"]
        if data["wrong"]
        else []
    )
    if not data["tuning"]:
        lines.append("the defaults are the best there is")
    elif data["written"]:
        lines.append(f"wrote {data['written']}")
    if changed:
        lines.append("build the engine again to use it: tuning is part of what an engine is made from")
    for line in lines:
        stderr.print(line, highlight=False, markup=False, soft_wrap=True)


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ResourceError(f"--write {path}: {'a folder' if path.is_dir() else 'its folder is not there'}; name a file to write")
