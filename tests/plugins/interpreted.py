"""Carries out the launches of a node in Triton's interpreter, over torch tensors on a CPU, rounding as a GPU rounds.

The interpreter of Triton 3.6 truncates float32 to bfloat16, rounds to float8 without carry or saturation, rounds the product of
an fma, and multiplies matrices of bfloat16 by their bits. None of that is the kernel's doing, so ``launch`` puts the arithmetic
of SM 9.0 in their place.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from zoo.plugins.kernels import CudaNode, Launch, Scratch, Size, TensorRef

FLOATS = {
    tl.float32: np.float32,
    tl.float16: np.float16,
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
}
TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8e4m3": torch.float8_e4m3fn,
    "int32": torch.int32,
    "int64": torch.int64,
}
ROUNDING = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # half a unit in the last place, of a number near 1


def _convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """To nearest even; beyond float8's range to its largest value; NaN stays NaN. Bits in, bits out."""
    exact = np.ascontiguousarray(values).view(FLOATS[source]).astype(np.float32)
    if target == tl.float8e4nv:
        exact = np.clip(exact, -448, 448)
    return exact.astype(FLOATS[target]).view(f"uint{target.primitive_bitwidth}")


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """The product of two float32 is exact in float64; its sum is rounded twice, which 29 spare bits make harmless."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _dot(builder: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
    """Values are multiplied and added exactly, and rounded once before ``total`` is added."""
    x, y = (np.ascontiguousarray(part.data).view(FLOATS[part.dtype.scalar]).astype(np.float64) for part in (a, b))
    return interpreter.TensorHandle((x @ y).astype(np.float32) + total.data, total.dtype.scalar)


@contextlib.contextmanager
def gpu_arithmetic() -> Iterator[None]:
    with (
        mock.patch.object(interpreter, "_convert_float", _convert),
        mock.patch.object(interpreter.InterpreterBuilder, "create_fma", _fma),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
        np.errstate(all="ignore"),
    ):
        yield


def launch(launches: Sequence[Launch], tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
    """Run launches in order. ``tensors`` by name are read and written in place; ``sizes`` gives T, B, R ..."""
    for one in launches:
        module, _, function = one.kernel.source.partition(":")
        kernel = getattr(importlib.import_module(module), function)
        names = [name for name, _ in one.kernel.args]
        assert kernel.arg_names == [*names, *dict(one.kernel.constants)], f"{function}: its parameters are not its launch's"
        args = []
        for arg in one.args:
            assert not isinstance(arg, Scratch)
            args.append(tensors[arg] if isinstance(arg, str) else arg.at(sizes) if isinstance(arg, Size) else arg)
        with gpu_arithmetic():
            kernel[tuple(size.at(sizes) for size in one.grid)](*args, **dict(one.kernel.constants))


def ref(name: str, dtype: str, *shape: int | str) -> TensorRef:
    return TensorRef(name, dtype, shape)


def column_scales(width: int, seed: int = 0) -> torch.Tensor:
    """Scales of a float8 weight's rows [width]: small, and some far from the others."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 ** torch.randint(-14, -4, (width,), generator=generator) * (1 + torch.rand(width, generator=generator))


def node(op: str, inputs: Sequence[TensorRef | None], outputs: Sequence[TensorRef], **attrs: Any) -> CudaNode:
    """A node as the compiler hands it to a lowering, for SM 9.0."""
    return CudaNode(op, f"the.{op}", attrs, tuple(inputs), tuple(outputs), 90, {})


def poisoned(tensor: TensorRef, sizes: Mapping[str, int]) -> torch.Tensor:
    """An output before its kernel runs: full of NaN, or of the largest number, so that a place left out is seen."""
    shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
    kind = TORCH[tensor.dtype]
    if not kind.is_floating_point:
        return torch.full(shape, torch.iinfo(kind).max, dtype=kind)
    return torch.full(shape, float("nan"), dtype=torch.float32).to(kind)


def exact(tensor: torch.Tensor) -> np.ndarray:
    """Any tensor as float64."""
    return tensor.to(torch.float32).numpy().astype(np.float64)


def round8(values: np.ndarray, scale: float) -> np.ndarray:
    """float8e4m3 of values / scale, as float64: divided in float32 as QuantizeLinear does."""
    quotient = values.astype(np.float32) / np.float32(scale)
    return np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def from_bits8(bits: np.ndarray) -> np.ndarray:
    """What ONNX Runtime gives for a float8 output, bytes, as float64."""
    return bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def assert_rounds_to8(found: np.ndarray, values: np.ndarray, scale: float, noise: float = 3e-6, floor: float = 0.0) -> None:
    """float8 of ``values`` / scale, where ``values`` are exact: each is the rounding of a number near enough to its value.

    Near is a part ``noise`` of it and ``floor``: what stands that near to the middle of two float8 values may fall to either.
    """
    margin = np.abs(values) * noise + floor
    low, high = round8(values - margin, scale), round8(values + margin, scale)
    assert ((found == low) | (found == high)).all()
    assert (low == high).mean() > 0.99
