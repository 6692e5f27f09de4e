"""Printing for people and for programs: tables on stdout, progress on stderr, JSON alone when it is asked for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from zoo.artifacts.registry import Registry, default_root

stderr = Console(stderr=True)


def open_registry(arguments: argparse.Namespace) -> Registry:
    """The registry that ``--registry`` names, else the user's own."""
    return Registry(Path(arguments.registry) if arguments.registry else default_root())


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()) -> None:
    """A plain table on stdout. A terminal folds long cells; elsewhere each row is one line."""
    terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=not terminal, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    Console(file=sys.stdout, width=None if terminal else 10_000, markup=False, highlight=False).print(table)


class StageProgress:
    """A progress bar per engine whose text follows the stages of a build."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None, stage="")

    def start(self, name: str) -> None:
        """Go on to the next engine."""
        self.progress.update(self.task, description=name, stage="", total=None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.progress.update(self.task, stage=stage, completed=done, total=total or None)

    def finish(self, line: str) -> None:
        """Leave a line behind for an engine that is done."""
        self.progress.console.print(line, highlight=False)


@contextmanager
def progress_bars() -> Iterator[StageProgress]:
    """Progress on stderr; on something that is not a terminal only the finished lines are written."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield StageProgress(progress)


@contextmanager
def transfer_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each file that is sent or fetched; call it with name, bytes done, bytes in all."""
    columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name)
            progress.update(tasks[name], completed=done, total=total)

        yield report
