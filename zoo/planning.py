"""``zoo plan``: what an engine would need, from shapes alone. Nothing is read, compiled or stored."""

from __future__ import annotations

import math
from typing import Any

from zoo.build import rewrite
from zoo.compilers import COMPILERS
from zoo.spec import BuildSpec

ROPE = ("rope.", "rope_local.")  # tables, not parameters
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8e4m3": 1, "int64": 8, "int32": 4, "int8": 1}


def plan_engine(spec: BuildSpec) -> dict[str, Any]:
    """Parameters, bytes and capacity of one engine.

    An encoder has no cache, and no row about one. ``fits`` compares weights, pools and what the compiler predicts with the
    hardware's memory; None when the profile states no memory (a CPU has whatever the machine has).
    """
    graph = rewrite(spec)
    model, limits = spec.model, spec.limits
    weights = sum(math.prod(w.shape) * BYTES[w.dtype] for w in graph.weights.values())
    token = sum(2 * layer.kv_heads * layer.head_dim * BYTES[spec.cache_dtype] for layer in graph.layers)
    cache = {
        "kv_per_token_bytes": token,
        "kv_pools_bytes": token * limits.block_size * limits.max_blocks,
        "kv_tokens": limits.block_size * (limits.max_blocks - 1),
    }
    predicted = COMPILERS[spec.compiler].predict(graph, spec)
    data: dict[str, Any] = {
        "model": model.name,
        "profile": spec.profile,
        "dtype": spec.dtype,
        "parameters": sum(math.prod(w.shape) for name, w in graph.weights.items() if not name.startswith(ROPE)),
        "weights_bytes": weights,
        **(cache if model.template == "decoder" else {}),
        "max_context": limits.max_context,
        "max_sequences": limits.max_sequences,
        "max_tokens": limits.max_tokens,
        "build_memory_bytes": predicted["build_ram"],
        "run_memory_bytes": predicted["run_ram"],
    }
    if spec.hardware.memory:
        data["hardware_memory_bytes"] = spec.hardware.memory
        data["fits"] = predicted["run_ram"] <= spec.hardware.memory
    return data
