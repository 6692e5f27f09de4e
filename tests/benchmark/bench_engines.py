"""Engines without a model, and the ``spec`` of a manifest, for tests of the benchmark."""

from __future__ import annotations

from typing import Any

from fake_session import FakeSampler, FakeSession, limits

from zoo.runtime.engine import Engine

H200 = {
    "name": "h200-sxm",
    "kind": "gpu",
    "sm": 90,
    "memory": 150_754_820_096,
    "bandwidth": 4.8e12,
    "flops": {"bfloat16": 989.4e12, "float8e4m3": 1978.9e12},
    "price": 3.59,
    "price_date": "2026-03",
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "mlp": "gated",
    "window": 0,
    "window_layers": [],
}


def spec_of(
    model: dict[str, Any], quant: str = "fp8", kv: str = "none", hardware: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The ``spec`` of a manifest, as far as a benchmark reads it."""
    quantized = {"name": quant, "method": quant, "skip": ["lm_head"], "kv_cache": kv}
    return {"model": model, "quant": quantized, "hardware": H200 if hardware is None else hardware, "dtype": "bfloat16"}


def engine_of(samples: bool, **changes: int) -> Engine:
    """An engine over a fake session, that samples or gives logits."""
    return Engine((FakeSampler if samples else FakeSession)(limits(**changes)))
