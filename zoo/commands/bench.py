"""``zoo bench``: throughput, latency, energy and cost of one engine, and how near it comes to what its hardware allows.

Prompts are random token ids; decoding is greedy and ignores end tokens, so every request gets exactly what the case says. Each
case runs once after a short warm-up. ``zoo.benchmark`` says how each figure is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from zoo.artifacts.manifest import EngineManifest
from zoo.benchmark import plot, report
from zoo.benchmark.configuration import configuration, notes
from zoo.benchmark.loop import Progress as Report
from zoo.benchmark.workload import SIZES, Case, parse_cases
from zoo.commands.output import open_registry, print_json, print_table, stderr
from zoo.errors import RequestError, ResourceError

DEFAULT = Case(input_tokens=128, output_tokens=64, requests=32)


def bench(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from zoo.llm import LLM

    cases = cases_of(arguments)
    if arguments.plot:
        _check_writable(Path(arguments.plot))
    started = time.perf_counter()
    with LLM(arguments.ref, registry=arguments.registry, threads=arguments.threads, checkpoint=arguments.checkpoint) as llm:
        loaded = round(time.perf_counter() - started, 3)
        manifest = open_registry(arguments).resolve(llm.ref).manifest
        configured = configuration(llm.ref, manifest, llm.limits, ["zoo", *sys.argv[1:]], arguments.threads)
        measured = []
        with _progress(cases) as begin:
            for case in cases:
                measured.append(report.measure_case(llm.engine, case, manifest, begin(case)))
    rows = [one.data for one in measured]
    data = {
        "ref": llm.ref,
        "load_s": loaded,
        "configuration": configured,
        "notes": notes(configured, manifest.spec),
        "cases": rows,
    }
    if arguments.plot:
        Path(arguments.plot).write_text(plot.svg(data, [one.latencies for one in measured]))
    if arguments.json:
        print_json(data)
    else:
        _print(data)
    return 0


def measure(llm: Any, arguments: argparse.Namespace, manifest: EngineManifest | None = None) -> dict[str, Any]:
    """One case on an LLM that is open already: ``requests``, ``input_tokens``, ``output_tokens``, and ``rate`` and ``seed`` if
    they are there. The manifest is what roofline, energy and cost need."""
    [case] = cases_of(arguments)
    return report.measure_case(llm.engine, case, manifest).data


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """What the command line asks for. RequestError for lengths that are given twice."""
    given = {name: value for name in SIZES if (value := getattr(arguments, name, None)) is not None}
    rate, seed = float(getattr(arguments, "rate", None) or 0), int(getattr(arguments, "seed", None) or 0)
    if text := getattr(arguments, "cases", None):
        if given:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise RequestError(f"--cases says what {named} would say; give one of them")
        return [case.with_load(rate, seed) for case in parse_cases(text)]
    sizes = {name: getattr(DEFAULT, name) for name in SIZES} | given
    return [Case(**sizes).with_load(rate, seed)]


def _print(data: dict[str, Any]) -> None:
    configured = data["configuration"]
    machine, limits = configured["machine"], configured["limits"]
    cpu = f"{machine['cpu']}, {machine.get('threads')} threads"
    where = f"{machine['gpu']}, driver {machine['driver']}" if "gpu" in machine else cpu
    packages = ", ".join(f"{name} {version}" for name, version in configured["packages"].items())
    print(f"{data['ref']}, {configured['dtype']}, loaded in {data['load_s']} s")
    print(f"on {where}; {packages}; {configured['date']}")
    print(f"limits: {', '.join(f'{key} {value}' for key, value in limits.items())}\n")
    columns, rows = report.table(data["cases"])
    print_table(columns, rows, columns[1:])
    for line in (*data["notes"], *report.reasons(data["cases"])):
        stderr.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _progress(cases: list[Case]) -> Iterator[Any]:
    """A bar on stderr for each case, drawn once a second by the loop itself: no thread takes the interpreter from it."""
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    shown = stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, auto_refresh=False, disable=not shown) as progress:

        def begin(case: Case) -> Report | None:
            if not shown:
                return None
            task = progress.add_task(f"{case}: output tokens", total=case.requests * case.output_tokens)
            progress.refresh()

            def draw(tokens: int) -> None:
                progress.update(task, completed=tokens, refresh=True)

            return draw

        yield begin


def _check_writable(path: Path) -> None:
    """Before minutes are spent on what could not be written."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ResourceError(f"--plot {path}: {'a folder' if path.is_dir() else 'its folder is not there'}; name a file to write")
