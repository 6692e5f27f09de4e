"""Compilers: rewritten graph -> engine files. One class a target, one dict of them.

base.py              the protocol, CompiledEngine, and what follows from the graph alone (ABI, sizes, memory)
onnxruntime.py       CPU engines: model.onnx and weights as recipes over the checkpoint's own files
tensorrt_rtx.py      TensorRT-RTX plans, built on any machine
tensorrt.py          datacenter TensorRT plans, built on the GPU itself
tensorrt_*.py        what the two share
cuda/                launch plans of our own kernels and cuBLASLt GEMMs, built on any machine
"""

from __future__ import annotations

from zoo.compilers.base import CompiledEngine, Compiler, abi_of, predict
from zoo.compilers.cuda import CudaCompiler
from zoo.compilers.onnxruntime import OnnxRuntimeCompiler
from zoo.compilers.tensorrt import TensorRtCompiler
from zoo.compilers.tensorrt_rtx import TensorRtRtxCompiler
from zoo.errors import CompileError

COMPILERS: dict[str, Compiler] = {
    "onnxruntime": OnnxRuntimeCompiler(),
    "tensorrt_rtx": TensorRtRtxCompiler(),
    "tensorrt": TensorRtCompiler(),
    "cuda": CudaCompiler(),
}

__all__ = ["COMPILERS", "CompiledEngine", "Compiler", "abi_of", "get_compiler", "predict"]


def get_compiler(name: str) -> Compiler:
    """The compiler of that name; CompileError that lists the existing ones."""
    if name not in COMPILERS:
        raise CompileError(f"compiler {name!r} does not exist here; pick one of {', '.join(COMPILERS)}")
    return COMPILERS[name]
