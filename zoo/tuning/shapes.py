"""What an engine's plan launches, as far as a hardware profile can tune it.

T tokens, N outputs and K inputs of a product.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.errors import ArtifactError
from zoo.plugins.kernels import TRITON_TYPES, CudaNode, TensorRef

DTYPES = {kind: dtype for dtype, kind in TRITON_TYPES.items()}
ATTENTION = "zoo.plugins.cached_attention.kernels"
ROTARY = "zoo.plugins.rotary_cache.kernels:rotary_cache"
NORMS = ("zoo.plugins.rms_norm.kernels", "zoo.plugins.standard.kernels:layer_norm")


@dataclass(frozen=True)
class Product:
    """y [M, N] = x [M, K] · w [N, K]ᵀ. ``rows`` is what M is a number of: T or R. ``deferred``: y's reader scales its columns."""

    n: int
    k: int
    dtype: str
    out: str
    rows: str
    deferred: bool = False

    @property
    def key(self) -> str:
        """Its name in ``tuning.skinny``."""
        return f"{self.n}x{self.k}.{self.dtype}"


@dataclass(frozen=True)
class PlanKernel:
    """A kernel of a plan with its constants, and how often a step launches it."""

    name: str
    data: Mapping[str, Any]
    count: int

    @property
    def constants(self) -> dict[str, Any]:
        return {str(key): value for key, value in self.data["constants"]}

    def dtype(self, arg: str) -> str:
        """Of the tensor that a pointer argument points to."""
        return DTYPES[dict(self.data["args"])[arg].removeprefix("*")]


class Shapes:
    """Reads a ``plan.json``. ArtifactError when it is malformed."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        try:
            self._steps, self._kernels = list(plan["steps"]), dict(plan["kernels"])
            self._counts = collections.Counter(step["kernel"] for step in self._steps if step["op"] == "launch")
            self.products = tuple(self._products())
            self.prefill, self.decode = (self._most(f"{ATTENTION}:{name}") for name in ("prefill", "decode"))
            self.rotary = self._most(ROTARY)
            self.norm = self._most(*NORMS)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"plan.json is malformed ({error!r}); rebuild the engine") from None

    def _products(self) -> Iterator[Product]:
        """Those whose weights lie as [N, K], each once, in the order of the plan."""
        seen = set()
        for step in self._steps:
            if step["op"] != "gemm" or step["stored"] != "out_in":
                continue
            sizes = int(step["n"]), int(step["k"])
            dtypes = str(step["dtype"]), str(step["out"])
            one = Product(*sizes, *dtypes, str(step["rows"][0]), bool(step.get("deferred", False)))
            if one.key not in seen:
                seen.add(one.key)
                yield one

    def _most(self, *sources: str) -> PlanKernel | None:
        """The kernel of these sources (modules, or functions) that a step launches most often."""
        found = [
            PlanKernel(name, data, self._counts[name])
            for name, data in self._kernels.items()
            if self._counts[name] and any(data["source"] == one or data["source"].startswith(f"{one}:") for one in sources)
        ]
        return max(found, key=lambda kernel: (kernel.count, kernel.name), default=None)


def attention_node(kernel: PlanKernel, limits: Mapping[str, int], sm: int, tuning: Mapping[str, Any]) -> CudaNode:
    """The node that a prefill or decode kernel was made from, with other tuning."""
    constants = kernel.constants
    heads, size = constants["H"], constants["D"]
    pool, out = kernel.dtype("kv"), kernel.dtype("out")
    fp8, out8, extra = pool == "float8e4m3", out == "float8e4m3", str(constants.get("EXTRA", ""))
    inputs = [
        TensorRef("q", kernel.dtype("q"), (1, "T", heads * size)),
        TensorRef("kv", pool, ("blocks", 2, constants["BLOCK_SIZE"], constants["K"], size)),
        TensorRef("block_table.full", "int32", ("B", "P")),
        TensorRef("query_starts", "int32", ("B+1",)),
        TensorRef("kv_lengths", "int32", ("B",)),
        TensorRef("prefill_tiles", "int32", ("W", 4)),
        *([TensorRef(extra, kernel.dtype("extra"), (heads,))] if extra else []),
        *([TensorRef("kv_scale", "float32", (2,))] if fp8 else []),
        *([TensorRef("out_scale", "float32", ())] if out8 else []),
    ]
    attrs = {
        "num_heads": heads,
        "kv_heads": constants["K"],
        "head_dim": size,
        "block_size": constants["BLOCK_SIZE"],
        "scale": constants["SCALE"],
        "window": constants["WINDOW"],
        "softcap": constants["SOFTCAP"],
    }
    op = "ZooCachedAttention" + extra.title() + "Fp8" * fp8 + "Out8" * out8
    outputs = (TensorRef("out", out, (1, "T", heads * size)),)
    return CudaNode(op, "attention", attrs, tuple(inputs), outputs, sm, dict(limits), dict(tuning))


def rotary_node(kernel: PlanKernel, limits: Mapping[str, int], sm: int, tuning: Mapping[str, Any]) -> CudaNode:
    """The node that a rotary kernel was made from, with other tuning."""
    from zoo.plugins.rotary_cache.cuda import INPUTS

    constants = kernel.constants
    heads, kv_heads, size, rotary = (int(constants[name]) for name in ("H", "K", "D", "R"))
    kind = "ZooRotaryCacheNorm" if constants["NORM"] else "ZooRotaryCache" if rotary else "ZooCacheWrite"
    fp8 = kernel.dtype("kv") == "float8e4m3"
    dtype, width = kernel.dtype("qkv"), (heads + 2 * kv_heads) * size
    pool = TensorRef("kv", kernel.dtype("kv"), ("blocks", 2, int(constants["BLOCK_SIZE"]), kv_heads, size))
    table = ("positions", rotary // 2)
    refs = {
        "qkv": TensorRef("qkv", dtype, (1, "T", width)),
        "cos": TensorRef("cos", kernel.dtype("cos"), table),
        "sin": TensorRef("sin", kernel.dtype("sin"), table),
        "positions": TensorRef("positions", "int32", ("T",)),
        "q_norm": TensorRef("q_norm", kernel.dtype("q_norm"), (size,)),
        "k_norm": TensorRef("k_norm", kernel.dtype("k_norm"), (size,)),
        "kv": pool,
        "token_slots": TensorRef("token_slots", "int32", ("T",)),
    }
    inputs = [refs[name] for name in INPUTS[kind]] + ([TensorRef("kv_scale", "float32", (2,))] if fp8 else [])
    attrs = {
        "num_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": size,
        "block_size": int(constants["BLOCK_SIZE"]),
        "rotary_dim": rotary,
        "interleaved": int(constants["LACED"]),
        "epsilon": float(constants["EPSILON"]),
    }
    outputs = (TensorRef("q", kernel.dtype("q"), (1, "T", heads * size)), pool)
    scales = {0: TensorRef("qkv_scale", "float32", (width,))} if constants.get("SCALED") else {}
    op = kind + "Fp8" * fp8
    return CudaNode(op, "rotary", attrs, tuple(inputs), outputs, sm, dict(limits), dict(tuning), scales)
