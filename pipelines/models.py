"""Write docs/models.md: every family, what it is made of, and how each check of it went.

    python -m pipelines.models            runs the checks (some minutes) and writes the page
    python -m pipelines.models --only-text    writes the page with the checks' last results, for a change of YAML alone

The checks are the tests in CHECKS, run by pytest in a process of its own; their results come from its JUnit report, in
which each test says which family and architecture it was about. Nothing on the page is written by hand but its frame.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from zoo.config import compose, families, list_models
from zoo.spec import ModelSpec

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
# column of the page -> the test that fills it
CHECKS = {
    "graph": "test_plain_graph_equals_transformers",
    "engine": "test_engine_continues_as_transformers",
    "RTX": "test_compiles_for_rtx",
    "cuda": "test_compiles_for_cuda",
    "full size": "test_full_size_rewrites",
}
FILES = ("tests/end_to_end/test_zoo.py", "tests/end_to_end/test_zoo_targets.py", "tests/end_to_end/test_encoders.py")
# Fields of a ModelSpec that are numbers or names of one model, not options of its family.
NUMBERS = {
    *("name", "family", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
    *("max_positions", "norm_eps", "dtype", "tensors", "checkpoint", "license", "base_model", "template", "config"),
}
FRAME = """\
# Models

{counts} This page is written by `python -m pipelines.models`.

Each architecture is YAML over a template and has no Python of its own. The columns are tests passed of tests run, with random
small checkpoints that transformers made (of pretrained weights only zoo-demo's were at hand):

- graph: logits, or an encoder's hidden states, of the plain ONNX graph are within 1e-4 of transformers in float32
- engine: a mixed batch in the ONNX Runtime engine goes on with transformers' 32 greedy tokens; encoders: embeddings within 1e-4
- RTX, cuda: a small engine compiles for an L40S (TensorRT-RTX) and an H200 (our kernels), on a machine without a GPU
- full size: the graph of a published model's shape is expanded and rewritten for every target, without weights
- a dash: not run when this page was written, or not there: latent attention (DeepSeek) has no cuda kernels
"""
Results = dict[str, dict[str, list[int]]]  # architecture -> column -> [passed, run]


def run_checks() -> Results:
    """Run the tests and count, for each architecture and column, how many passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [name for name in FILES if (ROOT / name).exists()]
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files], cwd=ROOT, check=False)
        return read_report(report)


def read_report(report: Path) -> Results:
    found: Results = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    columns = {test: column for column, test in CHECKS.items()}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 (our own pytest wrote it)
        column = columns.get(case.attrib["name"].partition("[")[0])
        passed = all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
        for each in case.iter("property"):
            if column is not None and each.attrib["name"] == "architecture":
                counts = found[each.attrib["value"]][column]
                counts[0] += passed
                counts[1] += 1
    return {name: dict(row) for name, row in found.items()}


def read_reports(reports: list[Path]) -> Results:
    """Several reports as one; they have different tests."""
    found: Results = defaultdict(dict)
    for report in reports:
        for name, row in read_report(report).items():
            found[name] |= row
    return dict(found)


def options_of(data: dict[str, Any]) -> list[str]:
    """The options that a family's YAML sets, spelled as they stand there."""
    defaults = {field.name: field.default for field in fields(ModelSpec)}
    shown = []
    for key, value in data.items():
        if key in NUMBERS or key == "architectures" or value == defaults.get(key):
            continue
        if isinstance(value, dict):
            shown += [f"{key}.{inner}: {json.dumps(one)}" for inner, one in value.items()]
        else:
            shown.append(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return shown


def yaml_lines(family: str) -> int:
    """Lines of a family's file that say something."""
    text = (ROOT / "conf" / "models" / "families" / f"{family}.yaml").read_text()
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())


def page(results: Results) -> str:
    known = families()
    models: dict[str, list[str]] = defaultdict(list)
    for name in list_models():
        models[compose([f"models={name}"]).model.family].append(name)
    architectures = sum(len(data.get("architectures", {})) for data in known.values())
    counts = f"{len(known)} families, {architectures} architectures, {len(list_models())} models."
    lines = [*FRAME.format(counts=counts).splitlines(), ""]
    lines += [f"| family | architectures | {' | '.join(CHECKS)} |", f"| --- | --- |{' --- |' * len(CHECKS)}"]
    for family, data in sorted(known.items()):
        for architecture in data.get("architectures", {}):
            row = results.get(architecture, {})
            cells = [f"{row[column][0]}/{row[column][1]}" if column in row else "-" for column in CHECKS]
            lines.append(f"| {family} | {architecture} | {' | '.join(cells)} |")
    lines += ["", "What each family is made of, beside the numbers of a model:", ""]
    lines += ["| family | lines of YAML | options | models |", "| --- | --- | --- | --- |"]
    for family, data in sorted(known.items()):
        options = ", ".join(f"`{one}`" for one in options_of(data)) or "the template's own"
        lines.append(f"| {family} | {yaml_lines(family)} | {options} | {', '.join(sorted(models[family])) or '-'} |")
    return "\n".join(lines) + "\n"


def last_results() -> Results:
    """The results that the page holds."""
    results: Results = {}
    for line in PAGE.read_text().splitlines() if PAGE.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 2 + len(CHECKS) and "/" in "".join(cells[2:]):
            row = {
                column: [int(n) for n in cell.split("/")] for column, cell in zip(CHECKS, cells[2:], strict=True) if "/" in cell
            }
            results[cells[1]] = row
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="take the checks from JUnit reports of runs that were"
    )
    parser.add_argument("--only-text", action="store_true", help="keep the results that the page holds")
    arguments = parser.parse_args()
    results = last_results() if arguments.only_text else read_reports(arguments.report) if arguments.report else run_checks()
    PAGE.write_text(page(results))
    failed = [
        f"{name}: {column} {passed}/{run}"
        for name, row in results.items()
        for column, (passed, run) in row.items()
        if passed < run
    ]
    print("\n".join(failed) or f"{PAGE.relative_to(ROOT)}: {len(results)} architectures, no check failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
