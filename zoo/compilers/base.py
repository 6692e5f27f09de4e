"""What every compiler offers, what it hands back, and what follows from a rewritten graph alone: ABI, sizes, memory.

A compiler turns a rewritten, ragged ``ModelGraph`` into engine files. It never reads YAML, never picks passes and never
stores anything: ``zoo.build`` does the first and the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zoo.artifacts.manifest import Abi, CacheAbi, TensorAbi
from zoo.errors import CompileError
from zoo.graph import ONNX_TYPES, LayerInfo, ModelGraph
from zoo.ropetables import tables
from zoo.spec import BuildSpec, HardwareSpec

if TYPE_CHECKING:
    from zoo.weights.reader import Tensors

Progress = Callable[[str, int, int], None]  # stage, done, total; in units of the compiler's own choosing, total 0: unknown

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8e4m3": 1, "int32": 4, "int64": 8, "bool": 1}
DTYPE_NAMES = {code: name for name, code in ONNX_TYPES.items()}

# Peak memory of a build as a multiple of the weights in the engine's dtype. TensorRT holds the weights it was given, its
# own copy and the plan at once (measured: 3.0 at 1.5 G float16 weights); the others are stored as recipes.
BUILD_WEIGHTS = {"onnxruntime": 0.0, "tensorrt_rtx": 3.0, "tensorrt": 3.0, "cuda": 0.0}
# Memory of a running engine as a multiple of its weights, and what its runtime takes beside weights and pools (bytes).
RUN_WEIGHTS = {"onnxruntime": 1.0, "tensorrt_rtx": 1.0, "tensorrt": 1.0, "cuda": 1.0}
PROCESS = 500_000_000  # interpreter, libraries, activations of one step: an allowance


@dataclass
class CompiledEngine:
    """What a compiler leaves in its work folder.

    files     name in the artifact -> path now
    abi       how the engine is called
    weights   {"table": file of recipes or ""}. With a table the engine holds no weights: whoever stores it adds the
              checkpoint's own files ("checkpoint/model.safetensors") and their digests, and a session carries the recipes out
    scratch   peak scratch bytes that the compiler reports; 0: unknown
    needs     what a machine must have to run it: {"kind", "sm", "memory" (bytes), "packages": {name: version}}
    """

    files: dict[str, Path]
    abi: Abi
    weights: dict[str, Any]
    scratch: int = 0
    needs: dict[str, Any] = field(default_factory=dict)


class Compiler(Protocol):
    """One way from a rewritten graph to engine files. Stateless; making one imports nothing heavy.

    Implementations may derive from it: ``predict`` below then works as it is.
    """

    name: str

    def version(self) -> str:
        """The version that decides the output, as it goes into the build digest. UnavailableError when it is not installed."""
        ...

    def available(self) -> str:
        """Empty when this machine can compile with it, else one line: what is missing and how to install it."""
        ...

    def supports(self, hardware: HardwareSpec) -> str:
        """Empty when engines for ``hardware`` can be compiled, else one line with the reason and what is possible."""
        ...

    def compile(
        self,
        graph: ModelGraph,
        build: BuildSpec,
        tensors: Tensors | None,
        scales: Mapping[str, float],
        workdir: Path,
        progress: Progress | None = None,
    ) -> CompiledEngine:
        """Write the engine's files into ``workdir`` (which exists, is empty and is the caller's to delete).

        ``tensors`` is the checkpoint (None: shapes only, where a compiler can do without), ``scales`` the calibrated
        activation scales by name. Raises CompileError, UnavailableError or ResourceError.
        """
        ...

    def predict(self, graph: ModelGraph, build: BuildSpec) -> dict[str, int]:
        """What building and running will take; see the function ``predict``."""
        return predict(graph, build)


def cached_layers(graph: ModelGraph, build: BuildSpec) -> list[LayerInfo]:
    """The layers that have a KV pool; an encoder has none."""
    return [] if build.model.template == "encoder" else graph.layers


def abi_of(graph: ModelGraph, build: BuildSpec) -> Abi:
    """How a ragged graph is called: data inputs, caches and index inputs apart, outputs without the caches.

    Raises CompileError for a graph that neither paged nor packed attention has been inserted into.
    """
    if not graph.ragged:
        raise CompileError("the graph has no KV cache (phase 'paged attention' has not run): only ragged graphs become engines")
    limits = build.limits.resolve(build.model)
    caches = tuple(
        CacheAbi(
            f"kv.{layer.index}",
            build.cache_dtype,
            (limits.max_blocks, 2, limits.block_size, layer.kv_heads, layer.head_dim),
            layer.group,
        )
        for layer in cached_layers(graph, build)
    )
    apart = {cache.name for cache in caches} | {extra.name for extra in graph.index_inputs}
    inputs = tuple(_tensor_abi(v) for v in graph.data_inputs if v.name not in apart)
    outputs = tuple(_tensor_abi(v) for v in graph.graph.outputs if not v.name.startswith("kv_out."))
    index_inputs = tuple(TensorAbi(extra.name, extra.dtype, tuple(extra.shape)) for extra in graph.index_inputs)
    return Abi(inputs, outputs, caches, index_inputs, rope_tables(build))


def rope_tables(build: BuildSpec) -> tuple[tuple[int, int], ...]:
    """(length, first row) of the engine's rotary tables, if there are several among which a sequence's length decides."""
    model, context = build.model, build.limits.resolve(build.model).max_context
    if model.position != "rope":
        return ()
    made = tables(model.rope, model.max_positions, context)
    return tuple((table.length, table.first_row) for table in made) if len(made) > 1 else ()


def onnx_code(dtype: Any) -> int:
    """ONNX type code of an onnx-graphsurgeon dtype, which is a code or a numpy dtype."""
    if isinstance(dtype, int):
        return dtype
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _tensor_abi(variable: Any) -> TensorAbi:
    assert variable.dtype is not None and variable.shape is not None, f"{variable.name} has no dtype or shape"
    shape = tuple(size if isinstance(size, int) else str(size) for size in variable.shape)
    return TensorAbi(variable.name, DTYPE_NAMES[onnx_code(variable.dtype)], shape)


def weight_bytes(graph: ModelGraph) -> int:
    """Bytes of all weights in the dtypes the engine holds them in; equal weights count once."""
    distinct = {(weight.dtype, weight.recipe) for weight in graph.weights.values()}
    return sum(ITEM_SIZES[dtype] * prod(recipe.shape) for dtype, recipe in distinct)


def pool_bytes(graph: ModelGraph, build: BuildSpec) -> int:
    """Bytes of all KV pools at the build's limits."""
    limits = build.limits.resolve(build.model)
    slots, item = limits.max_blocks * limits.block_size, ITEM_SIZES[build.cache_dtype]
    return sum(slots * 2 * layer.kv_heads * layer.head_dim * item for layer in cached_layers(graph, build))


def context_bytes(graph: ModelGraph, build: BuildSpec) -> int:
    """Bytes of the least KV pools, where a session gives them what memory is left: one whole context and the reserved block."""
    limits = build.limits.resolve(build.model)
    return pool_bytes(graph, build) * (1 + limits.blocks_per_sequence) // max(limits.max_blocks, 1)


def predict(graph: ModelGraph, build: BuildSpec) -> dict[str, int]:
    """What a build and a run will take, in bytes, known before anything is read.

    build_ram   peak memory of the compiling process
    run_ram     memory of the running engine: weights, pools and an allowance for the process; on the device if it has one
    disk        what the compiler writes, the checkpoint's own files apart
    """
    weights, pools = weight_bytes(graph), pool_bytes(graph, build)
    return {
        "build_ram": PROCESS + int(weights * BUILD_WEIGHTS[build.compiler]),
        "run_ram": PROCESS + int(weights * RUN_WEIGHTS[build.compiler]) + pools,
        "disk": 10_000_000 + (0 if BUILD_WEIGHTS[build.compiler] == 0 else weights),
    }
