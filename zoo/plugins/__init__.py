"""Zoo ops, one folder each. ``PLUGINS`` is the list, by op type."""

from __future__ import annotations

from zoo.plugins.contract import Plugin

PLUGINS: dict[str, Plugin] = {}
