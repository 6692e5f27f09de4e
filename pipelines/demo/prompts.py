"""The fixed held-out prompts: 50 first lines of functions and 50 of classes, cut from held-out files.

    python -m pipelines.demo.prompts             # writes prompts.json (made once, kept in the repository)

A prompt is an unbroken piece of source that begins at the first column with `def` or `class` and ends with the line end
of a function's signature: its own, or that of the class's first method.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.demo import corpus

PROMPTS = Path(__file__).with_name("prompts.json")
EACH_KIND = 50
MOST_A_FILE = 6
MOST_LINES = 12
LEAST_BODY_LINES = 3


def starts(document: corpus.Document) -> Iterator[dict[str, str]]:
    """Every prompt that one file can give."""
    lines = document.text.splitlines(keepends=True)
    for node in ast.parse(document.text).body:
        if isinstance(node, ast.FunctionDef):
            kind, function = "function", node
        elif isinstance(node, ast.ClassDef) and (methods := [n for n in node.body if isinstance(n, ast.FunctionDef)]):
            kind, function = "class", methods[0]
        else:
            continue
        end = function.body[0].lineno - 1  # the signature ends on the line before the body
        prompt = "".join(lines[node.lineno - 1 : end])
        whole = prompt.rstrip(" \n").endswith(":") and (function.end_lineno or 0) - end >= LEAST_BODY_LINES
        if whole and prompt.isascii() and end - node.lineno < MOST_LINES:
            yield {"file": document.path, "name": node.name, "kind": kind, "prompt": prompt}


def choose(documents: Sequence[corpus.Document]) -> list[dict[str, str]]:
    """Prompts in the order of a hash of file and name, at most six a file and fifty of a kind."""
    found = [start for document in documents for start in starts(document)]
    found.sort(key=lambda start: hashlib.sha256(f"{start['file']}:{start['name']}".encode()).hexdigest())
    kinds: Counter[str] = Counter()
    files: Counter[tuple[str, str]] = Counter()
    chosen = []
    for start in found:
        kind, file = start["kind"], (start["kind"], start["file"])
        if kinds[kind] < EACH_KIND and files[file] < MOST_A_FILE:
            kinds[kind] += 1
            files[file] += 1
            chosen.append(start)
    return chosen


def main() -> int:
    """Write prompts.json."""
    chosen = choose(corpus.load()["heldout"])
    PROMPTS.write_text(json.dumps(chosen, indent=1) + "\n")
    print(f"{len(chosen)} prompts from {len({start['file'] for start in chosen})} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
