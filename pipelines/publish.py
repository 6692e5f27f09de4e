"""Build a fleet and push it: ``python -m pipelines.publish HOST/PATH [OVERRIDES] [+ OVERRIDES ...]``.

Engines that are stored already are pushed as they are; blobs that the remote registry has are not sent again.
"""

from __future__ import annotations

import sys

from pipelines.build import FLEET
from zoo.artifacts.registry import Registry, default_root
from zoo.artifacts.remote import push
from zoo.build import build
from zoo.commands.engines import compose_all
from zoo.errors import ZooError


def publish(to: str, overrides: list[str]) -> None:
    """Build what is missing, then push every engine; prints a REF a line."""
    registry = Registry(default_root())
    for spec in compose_all(overrides, multirun=True):
        entry = build(spec, registry).entry
        for ref in push(registry, entry.ref, to):
            print(ref, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m pipelines.publish HOST/PATH [OVERRIDES] [+ OVERRIDES ...]")
    try:
        publish(sys.argv[1], sys.argv[2:] or FLEET)
    except ZooError as error:
        sys.exit(f"publish: {error}")
