"""Graph rewriting: ``PASSES`` is the one ordered list, ``run_passes`` runs it. See docs/adding-a-pass.md."""

from __future__ import annotations

from pathlib import Path

from zoo.graph import ModelGraph
from zoo.passes.clean import Clean
from zoo.passes.cuda_fp8 import CudaFp8
from zoo.passes.frame import Pass, PassContext, run
from zoo.passes.fuse_activation import FuseActivation
from zoo.passes.fuse_linears import FuseLinears
from zoo.passes.fuse_norm import FuseNorm
from zoo.passes.fuse_rotary_cache import FuseRotaryCache
from zoo.passes.insert_experts import InsertExperts
from zoo.passes.join_heads import JoinHeads
from zoo.passes.lower_attention import LowerAttention
from zoo.passes.lower_experts import LowerExperts
from zoo.passes.lower_matmul import LowerMatMul
from zoo.passes.narrow_lookups import NarrowLookups
from zoo.passes.packed_attention import InsertPackedAttention
from zoo.passes.paged_attention import InsertPagedAttention
from zoo.passes.quantize_cache import QuantizeCache
from zoo.passes.quantize_fp8 import QuantizeFp8
from zoo.spec import BuildSpec
from zoo.targets import Target

__all__ = ["PASSES", "Pass", "PassContext", "run_passes"]

PASSES: tuple[Pass, ...] = (
    # clean: what does nothing goes first, so that later patterns need not look past it
    Clean(),
    # parallelism: none yet; a pass here would split weights over ranks before anything is fused
    # paged attention: the plain graph becomes the engine's, one ragged batch; of an encoder packed attention, without a cache
    InsertPagedAttention(),
    InsertPackedAttention(),
    # fusion: before quantization, so that a fused linear layer is quantized once, with one activation scale, and no router is
    InsertExperts(),
    FuseLinears(),
    # quantization
    QuantizeFp8(),
    # lowering: zoo ops and linear layers in the form that the target runs best
    LowerAttention(),
    LowerExperts(),
    # for kernels of our own: operands become float8 once, then each norm, activation and cache write is one node with it
    CudaFp8(),
    FuseNorm(),
    FuseActivation(),
    JoinHeads(),
    FuseRotaryCache(),
    QuantizeCache(),
    NarrowLookups(),  # before LowerMatMul, which would let a tied head share the embedding's float32 form
    LowerMatMul(),
)


def run_passes(
    graph: ModelGraph, build: BuildSpec, target: Target, dump_dir: Path | None = None, *, check: bool = False
) -> ModelGraph:
    """Rewrite a template's graph for a target, in place; the parameters are those of ``zoo.passes.frame.run``."""
    return run(PASSES, graph, build, target, dump_dir, check)
