"""A zoo op by itself: its reference body in ONNX Runtime, and its launches in Triton's interpreter, scratch included.

Both take arrays by the names of the contract's ports. Pools are full of NaN but for the tokens that a sequence has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from families import ort_value
from interpreted import TORCH, launch
from onnx import helper

from zoo.graph import IR_VERSION, ONNX_TYPES, OPSET
from zoo.plugins.contract import Plugin
from zoo.plugins.kernels import CudaNode, Launch, Lower, Scratch, TensorRef
from zoo.runtime.abi import Batch, EngineLimits

FLOAT8 = ml_dtypes.float8_e4m3fn


def body_session(plugin: Plugin, **attributes: Any) -> onnxruntime.InferenceSession:
    """One node with its body, in float32; the pool of an ``Fp8`` op has the compute type, as its contract says."""
    body_types = {"T": "float32", "int32": "int32", "float32": "float32", "float8e4m3": "float8e4m3"}
    pools = ("kv", "kv_out")

    def info(port: Any) -> onnx.ValueInfoProto:
        dtype = "float32" if port.name in pools else body_types[port.dtype]
        shape = [size if isinstance(size, int) else f"{port.name}.{place}" for place, size in enumerate(port.shape)]
        return helper.make_tensor_value_info(port.name, ONNX_TYPES[dtype], shape)

    names = [[port.name for port in ports] for ports in (plugin.inputs, plugin.outputs)]
    node = helper.make_node(plugin.op, *names, domain="zoo", **plugin.attrs("n", attributes))
    graph = helper.make_graph([node], "one", [info(port) for port in plugin.inputs], [info(port) for port in plugin.outputs])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("zoo", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[plugin.body])
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_body(session: onnxruntime.InferenceSession, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name; float8 ones as the numbers they stand for."""
    names = [output.name for output in session.get_outputs()]
    feeds = {given.name: ort_value(np.ascontiguousarray(arrays[given.name])) for given in session.get_inputs()}
    found = [value.numpy() for value in session.run_with_ort_values(names, feeds)]
    kinds = [output.type for output in session.get_outputs()]
    return {
        name: array.view(FLOAT8).astype(np.float32) if "float8" in kind else array
        for name, array, kind in zip(names, found, kinds, strict=True)
    }


def cuda_node(
    plugin: Plugin, dtype: str, shapes: Mapping[str, tuple[int | str, ...]], tuning: Mapping[str, Any], **attributes: Any
) -> CudaNode:
    """The node as the cuda compiler hands it over, tensors named as ports; kv_out is kv."""
    refs = [
        [
            TensorRef(port.alias or port.name, dtype if port.dtype == "T" else port.dtype, shapes[port.alias or port.name])
            for port in ports
        ]
        for ports in (plugin.inputs, plugin.outputs)
    ]
    attrs = plugin.attrs("n", attributes)
    return CudaNode(plugin.op, "n", attrs, tuple(refs[0]), tuple(refs[1]), 90, {}, tuning)


def run_kernels(lower: Lower, node: CudaNode, tensors: dict[str, torch.Tensor], sizes: Mapping[str, int]) -> list[Launch]:
    """Carry out a node's launches on ``tensors``, in place. Scratch is as large as it is said to be, and full of NaN."""
    launches = lower(node)
    scratch: dict[str, torch.Tensor] = {}
    named = []
    for one in launches:
        args = []
        for arg in one.args:
            if isinstance(arg, Scratch):
                scratch[arg.name] = torch.full((arg.size.at(sizes) // 4,), float("nan"))
            args.append(arg.name if isinstance(arg, Scratch) else arg)
        if all(side.at(sizes) for side in one.grid):
            named.append(dataclasses.replace(one, args=tuple(args)))
    with _repaired():
        launch(named, tensors | scratch, sizes)
    return launches


@contextmanager
def _repaired() -> Iterator[None]:
    """Triton 3.6's interpreter multiplies bfloat16 by its bits, and knows no loop bounds that were loaded with numpy 2.4.

    It also patches Triton's language anew for every call of a function within a kernel, half of its time; once a module will do.
    """

    def values(handle: Any) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return handle.data.view(ml_dtypes.bfloat16).astype(np.float32)
        return handle.data.astype(np.float32)

    def dot(builder: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(values(a), values(b)) + d.data, d.dtype.scalar)

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
        mock.patch.object(interpreter, "_patch_lang_tensor", patch),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", call),
    ):
        yield


def ragged(counts: Sequence[int], lengths: Sequence[int], block_size: int, seed: int, padding: int = 0) -> Batch:
    """A batch of sequences that have so many new tokens and are so long after the step; blocks in random order.

    ``padding`` tokens of one more, last sequence, as a captured step has it.
    """
    counts, lengths = [*counts, *([padding] if padding else [])], [*lengths, *([1] if padding else [])]
    positions = np.concatenate([np.maximum(np.arange(n - c, n), 0) for n, c in zip(lengths, counts, strict=True)])
    used = [-(-n // block_size) for n in lengths]
    if padding:
        positions[-padding:] = 0
        used[-1] = 0
    blocks = iter(np.random.default_rng(seed).permutation(np.arange(1, sum(used) + 1)))
    table = np.zeros((len(counts), max(used) + 1), np.int32)
    for row, count in zip(table, used, strict=True):
        row[:count] = [next(blocks) for _ in range(count)]
    starts = np.concatenate([[0], np.cumsum(counts)])
    arrays = [np.ascontiguousarray(array, np.int32) for array in (positions * 0, positions, starts, lengths)]
    return Batch(*arrays, {"full": table}, np.zeros(1, np.int32))


def limits_of(batch: Batch, block_size: int) -> EngineLimits:
    table = batch.block_tables["full"]
    return EngineLimits(len(batch.positions), len(table), 1, table.shape[1] * block_size, int(table.max()) + 1, block_size)


def live(batch: Batch, block_size: int, before: bool = False) -> np.ndarray:
    """[blocks, block_size] bool: the places that hold a token after the step, or before it. Those of padding do not count."""
    table = batch.block_tables["full"]
    out = np.zeros((int(table.max()) + 1, block_size), bool)
    for row, length, count in zip(table, batch.kv_lengths, np.diff(batch.query_starts), strict=True):
        place = np.arange(length - count if before else length)
        out[row[place // block_size], place % block_size] = True
    out[0] = False
    return out


def random_pool(rng: np.random.Generator, places: np.ndarray, kv_heads: int, size: int) -> np.ndarray:
    """[blocks, 2, block_size, K, D] float32: random where a token is, NaN elsewhere."""
    pool = rng.standard_normal((len(places), 2, places.shape[1], kv_heads, size), np.float32)
    pool.swapaxes(1, 2)[~places] = np.nan
    return pool


def to8(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A pool as bytes: round8(keys / scales[0]), round8(values / scales[1]); NaN stays NaN."""
    return np.clip(values / scales[:, None, None, None], -448, 448).astype(FLOAT8)


def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """An array as the kernels get it. float8 comes as ml_dtypes' and goes over as bytes."""
    if array.dtype == FLOAT8:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.copy()).to(TORCH[dtype])
