"""What a model would need on every GPU in conf/hardware: ``python -m pipelines.plan models=llama-3.1-70b [OVERRIDES]``."""

from __future__ import annotations

import sys

from zoo.commands.output import print_table
from zoo.config import compose, hardware_specs
from zoo.errors import ZooError
from zoo.planning import plan_engine
from zoo.resources import size_text


def rows(overrides: list[str]) -> list[tuple[str, ...]]:
    """A row per hardware profile; one that cannot be composed says why."""
    table = []
    for hardware in hardware_specs():
        try:
            plan = plan_engine(compose([*overrides, f"hardware={hardware.name}"]))
        except ZooError as error:
            table.append((hardware.name, "-", "-", "-", str(error).splitlines()[0]))
            continue
        fits = {True: "yes", False: "no", None: "depends on the machine"}[plan.get("fits")]
        sizes = [size_text(plan[key]) for key in ("weights_bytes", "kv_pools_bytes", "run_memory_bytes")]
        table.append((hardware.name, *sizes, fits))
    return table


if __name__ == "__main__":
    try:
        print_table(("HARDWARE", "WEIGHTS", "KV POOLS", "MEMORY", "FITS"), rows(sys.argv[1:]))
    except ZooError as error:
        sys.exit(f"plan: {error}")
