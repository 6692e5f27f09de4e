"""Mixture of experts."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zoo.graph_templates.builder import Builder


def moe(b: Builder, i: int, x: gs.Variable) -> gs.Variable:
    """x [B, S, E] -> [B, S, E]."""
    raise NotImplementedError
