"""What is built, as frozen data: ``ModelSpec`` (zoo/modelspec.py), ``QuantSpec``, ``HardwareSpec``, ``ParallelSpec``,
``Limits``, ``BuildSpec``.

Nothing here reads a file or imports a builder. ``zoo.config`` makes these objects from YAML; every other room reads them.
Every spec checks itself when it is made (``__post_init__``) and names the key that is wrong. ``to_json`` gives plain
data with sorted keys; digests are taken over exactly that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import ConfigError
from zoo.modelspec import (
    DTYPES,
    LARGEST,
    AlibiSpec,
    LatentSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    TensorNames,
    at_least,
    between,
    pick,
)

__all__ = [
    "COMPILERS",
    "DTYPES",
    "KV_CACHES",
    "LARGEST",
    "QUANT_METHODS",
    "AlibiSpec",
    "BuildSpec",
    "HardwareSpec",
    "LatentSpec",
    "Limits",
    "ModelSpec",
    "MoeSpec",
    "ParallelSpec",
    "QuantSpec",
    "RopeSpec",
    "TensorNames",
    "canonical",
    "digest_of",
    "to_json",
]

QUANT_METHODS = ("none", "fp8")
KV_CACHES = ("none", "fp8")
COMPILERS = ("onnxruntime", "tensorrt_rtx", "tensorrt", "cuda")


LABEL = re.compile(r"[a-z0-9][a-z0-9.-]*")  # names that become part of a profile, and with it of file names


def to_json(spec: Any) -> dict[str, Any]:
    """A spec as plain JSON data (dicts, lists, numbers, strings)."""
    data: dict[str, Any] = dataclasses.asdict(spec)
    return data


def canonical(data: Any) -> bytes:
    """The one byte form of JSON data that digests are taken over: sorted keys, no spaces, UTF-8."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(data: Any) -> str:
    """``sha256:<hex>`` of JSON data in canonical form."""
    return "sha256:" + hashlib.sha256(canonical(data)).hexdigest()


def _label(where: str, name: str) -> None:
    if not LABEL.fullmatch(name) or len(name) > 100:
        raise ConfigError(
            f"{where}: name is {name!r}; names are lower case letters and digits, with dots and dashes after the first"
        )


@dataclass(frozen=True)
class QuantSpec:
    """How linear layers are quantized. ``fp8``: weights float8e4m3 per output channel, activations per tensor, static.

    ``kv_cache`` fp8: keys and values are kept as float8e4m3, each layer with one static scale for keys and one for values.
    """

    name: str
    method: str = "none"
    skip: tuple[str, ...] = ("lm_head",)  # linear roles left in the compute type
    calibration_tokens: int = 4096
    kv_cache: str = "none"

    def __post_init__(self) -> None:
        _label("quant", self.name)
        pick(f"quant {self.name!r}", "method", self.method, QUANT_METHODS)
        pick(f"quant {self.name!r}", "kv_cache", self.kv_cache, KV_CACHES)
        between(f"quant {self.name!r}", "calibration_tokens", self.calibration_tokens, 1, 1 << 24)


@dataclass(frozen=True)
class HardwareSpec:
    """One kind of machine. Sizes in bytes, bandwidth in bytes/s, FLOP/s by dtype, power in W, price in USD an hour."""

    name: str
    kind: str  # cpu | gpu
    sm: int = 0  # 80 for SM 8.0; 0 on a CPU
    memory: int = 0  # 0: whatever the machine has
    bandwidth: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)  # compute types, best first
    quants: tuple[str, ...] = ("none",)  # quantization methods it runs
    compilers: tuple[str, ...] = ("onnxruntime",)  # best first
    power: float = 0.0
    price: float = 0.0
    price_date: str = ""
    tuning: dict[str, Any] = field(default_factory=dict)  # choices of kernels, measured by `zoo tune`; docs/cuda.md
    limits: dict[str, int] = field(default_factory=dict)  # of an engine of our own kernels, where the config says nothing

    def __post_init__(self) -> None:
        where = f"hardware {self.name!r}"
        _label("hardware", self.name)
        pick(where, "kind", self.kind, ("cpu", "gpu"))
        for compiler in self.compilers:
            pick(where, "compilers", compiler, COMPILERS)
        for dtype in self.dtypes:
            pick(where, "dtypes", dtype, DTYPES)
        for key in self.limits:
            pick(where, "limits", key, tuple(one.name for one in dataclasses.fields(Limits)))
        if self.kind == "gpu":
            at_least(where, "sm", self.sm, 70)
            at_least(where, "memory", self.memory, 1)

    def build_fields(self) -> dict[str, Any]:
        """The part that an engine depends on. Price, power and rates can change without a rebuild."""
        data = to_json(self)
        return {key: data[key] for key in ("name", "kind", "sm", "memory", "dtypes", "quants", "tuning")}


@dataclass(frozen=True)
class ParallelSpec:
    """How a model is spread over GPUs: tensor parallel and pipeline parallel ranks."""

    name: str = "tp1"
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        _label("parallel", self.name)
        at_least(f"parallel {self.name!r}", "tp", self.tp, 1)
        at_least(f"parallel {self.name!r}", "pp", self.pp, 1)


@dataclass(frozen=True)
class Limits:
    """What one engine can hold. 0 for ``max_context`` means the model's own limit; for ``max_blocks``, derived.

    max_tokens      tokens in one step (all sequences together)
    max_sequences   sequences in one step
    max_rows        rows of logits in one step; 0: max_sequences
    max_context     tokens of one sequence, prompt and continuation together
    max_blocks      blocks of a KV pool, block 0 (reserved) included
    block_size      tokens in a block

    An encoder has no cache and no logits: its ``max_rows`` and ``max_blocks`` are 0, and a text is one step.
    """

    max_tokens: int = 512
    max_sequences: int = 16
    max_rows: int = 0
    max_context: int = 0
    max_blocks: int = 0
    block_size: int = 16

    def __post_init__(self) -> None:
        for key in ("max_tokens", "max_sequences", "block_size"):
            between("limits", key, getattr(self, key), 1, LARGEST["max_positions"])
        for key in ("max_rows", "max_context"):
            between("limits", key, getattr(self, key), 0, LARGEST["max_positions"])
        between("limits", "max_blocks", self.max_blocks, 0, (1 << 31) - 1)  # block numbers are int32
        if self.max_context == 1:
            raise ConfigError(
                "limits: max_context is 1; it must be at least 2 (a prompt and what follows), or 0 for the model's own"
            )

    def resolve(self, model: ModelSpec) -> Limits:
        """Fill every 0 in: the context from the model, rows from sequences, blocks for a full house of contexts.

        Without an explicit number the pool holds ``max_sequences`` contexts, but at most 65,536 tokens or one context,
        whichever is more. Of an encoder, the context is at most a step. Raises ConfigError when the context does not fit the
        model, the pool or the step.
        """
        encoder = model.template == "encoder"
        context = self.max_context or (min(model.max_positions, self.max_tokens) if encoder else model.max_positions)
        if context > model.max_positions:
            raise ConfigError(
                f"limits.max_context is {context}, but model {model.name!r} has positions for {model.max_positions}; "
                "lower it or leave it out"
            )
        if encoder:
            self._check_encoder(model.name, context)
            return dataclasses.replace(self, max_context=context)
        per_sequence = -(-context // self.block_size)
        wanted = min(self.max_sequences * context, max(65536, context))
        blocks = self.max_blocks or 1 + max(per_sequence, -(-wanted // self.block_size))
        if blocks < 1 + per_sequence:
            raise ConfigError(
                f"limits.max_blocks is {blocks}: one context of {context} tokens needs {per_sequence} blocks of "
                f"{self.block_size} and the reserved block; raise max_blocks to {1 + per_sequence} or lower max_context"
            )
        return dataclasses.replace(self, max_rows=self.max_rows or self.max_sequences, max_context=context, max_blocks=blocks)

    def _check_encoder(self, name: str, context: int) -> None:
        for key in ("max_rows", "max_blocks"):
            if getattr(self, key):
                raise ConfigError(
                    f"limits.{key} is {getattr(self, key)}, but model {name!r} is an encoder, which has no KV cache and no rows "
                    "of logits; leave it out"
                )
        if context > self.max_tokens:
            raise ConfigError(
                f"limits.max_context is {context} and limits.max_tokens {self.max_tokens}: a text of an encoder is one step; "
                f"raise max_tokens to {context} or lower max_context"
            )

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks one full context takes: the width of the block table."""
        return -(-self.max_context // self.block_size)


@dataclass(frozen=True)
class BuildSpec:
    """Everything that decides what an engine is. ``limits`` are resolved. ``overrides`` are kept for messages only."""

    model: ModelSpec
    quant: QuantSpec
    hardware: HardwareSpec
    parallel: ParallelSpec
    limits: Limits
    compiler: str
    dtype: str  # compute type of the engine
    threads: int = 0  # of a CPU engine; 0: as many as the machine has when it runs
    registry: str = ""  # folder of the local registry; empty: the user's own
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pick("build", "compiler", self.compiler, COMPILERS)
        pick("build", "dtype", self.dtype, DTYPES)
        between("build", "threads", self.threads, 0, 1024)

    @property
    def calibrated(self) -> bool:
        """Whether the engine has scales that a run over text decides."""
        return self.quant.method != "none" or self.quant.kv_cache != "none"

    @property
    def cache_dtype(self) -> str:
        """What the KV pools hold."""
        return "float8e4m3" if self.quant.kv_cache == "fp8" else self.dtype

    @property
    def profile(self) -> str:
        """The name under which the engine stands in its version's index."""
        return f"{self.quant.name}-{self.hardware.name}-{self.compiler}-tp{self.parallel.tp}"
