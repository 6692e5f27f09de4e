"""Build a fleet: ``python -m pipelines.build [OVERRIDES] [+ OVERRIDES ...]``; comma lists are swept. The same as
``zoo engines -m``, with the demo fleet when nothing is said. Prints JSON rows for the next step of a pipeline."""

from __future__ import annotations

import sys

from zoo.cli import main

PLAIN = ["models=zoo-demo", "quant=none", "hardware=cpu,a100-80g"]
FP8 = ["models=zoo-demo", "quant=fp8", "hardware=l40s,rtx-4090,rtx-5090"]
FLEET = [*PLAIN, "+", *FP8]

if __name__ == "__main__":
    sys.exit(main(["engines", "-m", "--json", *(sys.argv[1:] or FLEET)]))
