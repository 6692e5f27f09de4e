"""The commands over stored artifacts: list, show, diff, verify, rm, gc, push, pull."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from zoo.commands.output import open_registry, print_json, print_table, stderr, transfer_bars
from zoo.resources import size_text


def list_engines(arguments: argparse.Namespace) -> int:
    """A row per stored engine."""
    rows = open_registry(arguments).rows()
    if arguments.json:
        print_json(rows)
    elif not rows:
        stderr.print("No engines yet. Build some: zoo engines models=zoo-demo hardware=cpu", highlight=False, markup=False)
    else:
        columns = ("REF", "COMPILER", "SIZE", "CREATED")
        print_table(columns, [(row["ref"], row["compiler"], size_text(row["size"]), row["created"]) for row in rows], ("SIZE",))
    return 0


def show(arguments: argparse.Namespace) -> int:
    """The manifest of one engine."""
    entry = open_registry(arguments).resolve(arguments.ref)
    data: dict[str, Any] = entry.row() | {"manifest": entry.manifest.to_json()}
    if arguments.json:
        print_json(data)
        return 0
    manifest = entry.manifest
    rows = [(key, value if key != "size" else size_text(value)) for key, value in entry.row().items()]
    rows += [("build", manifest.build), ("dtype", manifest.spec["dtype"]), ("limits", _inline(manifest.limits))]
    rows += [("pooling", manifest.pooling)] if manifest.pooling else []  # of an encoder
    rows += [("needs", _inline(manifest.needs)), ("plugins", _inline(manifest.plugins))]
    rows += [(f"pass {one['name']}", _inline(one["counts"]) or "nothing to do") for one in manifest.passes]
    rows += [(f"file {name}", f"{size_text(one['size'])} {one['digest'][:19]}") for name, one in manifest.files.items()]
    print_table(("WHAT", "VALUE"), rows)
    return 0


def _inline(data: dict[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value) if isinstance(value, dict) else value}" for key, value in data.items())


def diff(arguments: argparse.Namespace) -> int:
    """The ingredients in which two engines differ."""
    from zoo.artifacts.diff import diff as compare

    registry = open_registry(arguments)
    changes = compare(registry.resolve(arguments.ref), registry.resolve(arguments.other))
    if arguments.json:
        print_json([change.to_json() for change in changes])
    elif not changes:
        print("the same engine")
    else:
        print_table(("WHAT", "FIRST", "SECOND"), [(one.path, one.before, one.after) for one in changes])
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Check digests; exit code 1 when any blob is bad."""
    problems = open_registry(arguments).verify(arguments.ref)
    if arguments.json:
        print_json([str(problem) for problem in problems])
    else:
        for problem in problems:
            print(f"zoo: {problem}", file=sys.stderr)
        if not problems:
            print("every blob matches its digest")
    return 1 if problems else 0


def remove(arguments: argparse.Namespace) -> int:
    """Take engines out of the index."""
    removed = open_registry(arguments).remove(arguments.ref)
    if arguments.json:
        print_json(removed)
    else:
        print("\n".join(f"removed {ref}" for ref in removed))
        stderr.print("Their blobs stay until `zoo gc`.", highlight=False)
    return 0


def collect(arguments: argparse.Namespace) -> int:
    """Delete unreferenced blobs and leftovers."""
    freed = open_registry(arguments).gc()
    if arguments.json:
        print_json({"freed": freed})
    else:
        print(f"freed {size_text(freed)}")
    return 0


def push(arguments: argparse.Namespace) -> int:
    """Copy to a remote registry."""
    from zoo.artifacts.remote import push as send

    with transfer_bars() as report:
        pushed = send(open_registry(arguments), arguments.ref, arguments.to, arguments.plain_http, report)
    if arguments.json:
        print_json(pushed)
    else:
        print("\n".join(f"pushed {ref}" for ref in pushed))
    return 0


def pull(arguments: argparse.Namespace) -> int:
    """Copy from a remote registry."""
    from zoo.artifacts.remote import pull as fetch

    with transfer_bars() as report:
        entries = fetch(open_registry(arguments), arguments.ref, arguments.plain_http, everything=arguments.all, progress=report)
    if arguments.json:
        print_json([entry.row() for entry in entries])
    else:
        print("\n".join(f"pulled {entry.ref}" for entry in entries))
    return 0
