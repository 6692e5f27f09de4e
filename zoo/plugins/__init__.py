"""Zoo ops, one folder each. ``PLUGINS`` is the list, by op type."""

from __future__ import annotations

from zoo.plugins import fp8_linear, paged_attention
from zoo.plugins.contract import Plugin

PLUGINS: dict[str, Plugin] = {
    "ZooPagedAttention": paged_attention.PLUGIN,
    "ZooFp8Linear": fp8_linear.PLUGIN,
}
