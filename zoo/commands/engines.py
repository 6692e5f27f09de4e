"""The commands of the build wing: engines, graph, plan, add."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from zoo.commands.output import open_registry, print_json, print_table, progress_bars, stderr
from zoo.errors import ConfigError
from zoo.resources import size_text
from zoo.spec import BuildSpec, digest_of, to_json


def _sets(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides split at each lone ``+``: several sets for one command."""
    sets: list[list[str]] = [[]]
    for override in overrides:
        if override == "+":
            sets.append([])
        else:
            sets[-1].append(override)
    return sets


def compose_all(overrides: Sequence[str], multirun: bool) -> list[BuildSpec]:
    """Every BuildSpec that the command line asks for, in order, each once."""
    from zoo.config import compose, compose_sweep

    specs: list[BuildSpec] = []
    for chosen in _sets(overrides):
        specs += compose_sweep(chosen) if multirun else [compose(chosen)]
    return list({digest_of(to_json(dataclasses.replace(spec, overrides=()))): spec for spec in specs}.values())


def engines(arguments: argparse.Namespace) -> int:
    """Build every engine asked for. All specs are composed before the first is built, so a typing error costs nothing."""
    from zoo.build import build

    specs = compose_all(arguments.overrides, arguments.multirun)
    registry = open_registry(arguments) if arguments.registry else None  # else the one that each spec names
    dump = Path(arguments.dump) if arguments.dump else None
    results = []
    started = time.perf_counter()
    with progress_bars() as progress:
        for number, spec in enumerate(specs, 1):
            progress.start(f"[{number}/{len(specs)}] {spec.model.name} {spec.profile}")
            result = build(spec, registry, progress, dump / spec.profile if dump else None)
            results.append(result)
            said = f"built in {result.seconds:.1f} s" if result.built else "already stored"
            progress.finish(f"[{number}/{len(specs)}] {result.entry.ref}  {said}")
    rows = [result.entry.row() | {"built": result.built, "seconds": round(result.seconds, 3)} for result in results]
    if arguments.json:
        print_json(rows)
        return 0
    print_table(
        ("MODEL", "PROFILE", "COMPILER", "VERSION", "SIZE", "BUILD S"),
        [
            (
                row["model"],
                row["profile"],
                f"{result.entry.manifest.compiler['name']} {result.entry.manifest.compiler['version']}",
                row["version"],
                size_text(row["size"]),
                f"{result.seconds:.1f}" if result.built else "stored",
            )
            for row, result in zip(rows, results, strict=True)
        ],
        right=("SIZE", "BUILD S"),
    )
    stderr.print(f"{len(rows)} engines in {time.perf_counter() - started:.1f} s. Next:", highlight=False)
    here = [result.entry for result in results if result.entry.manifest.needs["kind"] == "cpu"]
    ref = here[0].manifest.model if here else results[0].entry.ref
    use = f"zoo embed {ref} 'a text' 'another'" if here and here[0].manifest.pooling else f"zoo generate {ref} 'def '"
    stderr.print(f"  {use}" if here else f"  zoo show {ref}", highlight=False, markup=False)
    return 0


def graph(arguments: argparse.Namespace) -> int:
    """Write the graph of one spec, weightless."""
    from zoo.build import rewrite
    from zoo.config import compose
    from zoo.graph_templates import expand

    spec = compose(arguments.overrides)
    made = (
        expand(spec.model, spec.dtype, spec.limits.max_context)
        if arguments.plain
        else rewrite(spec, Path(arguments.dump) if arguments.dump else None)
    )
    output = Path(arguments.output)
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: the folder {output.parent} does not exist; make it or write elsewhere")
    if output.exists() and not output.is_file():
        raise ConfigError(f"--output {output}: is not a file; name one that ends in .onnx")
    made.save(output)
    summary = {
        "file": str(output),
        "nodes": len(made.graph.nodes),
        "weights": len(made.weights),
        "passes": [{"name": report.name, "counts": report.counts} for report in made.reports],
    }
    if arguments.json:
        print_json(summary)
    else:
        print(f"{output}: {summary['nodes']} nodes, {summary['weights']} weights (none stored)")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """What one spec's engine needs, from shapes alone."""
    from zoo.config import compose
    from zoo.planning import plan_engine

    data = plan_engine(compose(arguments.overrides))
    if arguments.json:
        print_json(data)
        return 0
    rows = [(key.replace("_", " "), size_text(value) if key.endswith("_bytes") else value) for key, value in data.items()]
    print_table(("WHAT", "HOW MUCH"), rows)
    return 0


def add(arguments: argparse.Namespace) -> int:
    """Write conf/models/NAME.yaml for a checkpoint folder."""
    from zoo.checkpoints.adopt import add_model

    path = add_model(Path(arguments.folder), arguments.name, force=arguments.force)
    if arguments.json:
        print_json({"model": path.stem, "file": str(path)})
    else:
        print(f"wrote {path}\nnext: zoo engines models={path.stem}")
    return 0
