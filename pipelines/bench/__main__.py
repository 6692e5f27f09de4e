"""Measure an engine: ``python -m pipelines.bench [REF [OPTIONS]]``. The same as ``zoo bench``, with the demo model when nothing
is said, and JSON for the next step of a pipeline."""

from __future__ import annotations

import sys

from zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--json", *(sys.argv[1:] or ["zoo-demo"])]))
