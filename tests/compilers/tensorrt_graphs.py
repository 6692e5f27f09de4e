"""A ragged graph of a few nodes with everything a TensorRT build meets: pools, index inputs, a zoo function, bound weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from zoo.graph import ONNX_TYPES, OPSET, IndexInput, LayerInfo, ModelGraph, new_graph
from zoo.spec import BuildSpec, HardwareSpec, Limits, ModelSpec, ParallelSpec, QuantSpec
from zoo.weights.recipe import Weight, channel_scale, computed, quantize, scale, tensor, transpose

HIDDEN, VOCAB, BLOCKS, BLOCK = 32, 48, 9, 4
LIMITS = Limits(max_tokens=16, max_sequences=6, max_context=16, max_blocks=BLOCKS, block_size=BLOCK)


def rtx() -> Any:
    """The tensorrt_rtx module. Without it a test is skipped with the reason; in CI (ZOO_CI=1) its absence is a failure."""
    if not importlib.util.find_spec("tensorrt_rtx"):
        text = "TensorRT-RTX is not installed: pip install 'engine-zoo[rtx]'"
        pytest.fail(text) if os.environ.get("ZOO_CI") else pytest.skip(text)
    import tensorrt_rtx

    return tensorrt_rtx


def hardware(
    name: str = "l40s", sm: int = 89, memory: int = 48_000_000_000, quants: tuple[str, ...] = ("none", "fp8")
) -> HardwareSpec:
    return HardwareSpec(
        name, "gpu", sm, memory, dtypes=("bfloat16", "float16"), quants=quants, compilers=("tensorrt_rtx", "tensorrt")
    )


def build_spec(
    on: HardwareSpec, dtype: str = "float16", quant: str = "none", compiler: str = "tensorrt_rtx", **limits: int
) -> BuildSpec:
    model = ModelSpec("tiny", "llama", VOCAB, HIDDEN, 1, 1, 1, HIDDEN, HIDDEN, max_positions=4096)
    chosen = dataclasses.replace(LIMITS, **limits).resolve(model)
    return BuildSpec(model, QuantSpec(quant, quant), on, ParallelSpec(), chosen, compiler, dtype)


def write_checkpoint(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """model.safetensors with an embedding [VOCAB, HIDDEN] and a linear weight [out, in], float32."""
    random = np.random.default_rng(seed)
    arrays = {
        "embed": random.standard_normal((VOCAB, HIDDEN), dtype=np.float32),
        "linear": random.standard_normal((HIDDEN, HIDDEN), dtype=np.float32) / 6,
    }
    save_file(arrays, folder / "model.safetensors")
    return arrays


def _linear(name: str, quantized: bool, inner: str = "MatMul") -> onnx.FunctionProto:
    """[1, T, in] times [in, out], or the same with float8 weights [out, in] and scales."""
    if not quantized:
        nodes = [helper.make_node(inner, ["x", "w"], ["y"], name="product")]
        return helper.make_function("zoo", name, ["x", "w"], ["y"], nodes, [helper.make_opsetid("", OPSET)])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale"], ["xq"], output_dtype=TensorProto.FLOAT8E4M3FN, name="quantize"),
        helper.make_node("DequantizeLinear", ["xq", "x_scale"], ["xf"], name="dequantize"),
        helper.make_node("CastLike", ["xf", "x"], ["xr"], name="cast"),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wf"], axis=0, name="weight"),
        helper.make_node("CastLike", ["wf", "x"], ["wr"], name="weight.cast"),
        helper.make_node("Transpose", ["wr"], ["wt"], perm=[1, 0], name="weight.transpose"),
        helper.make_node(inner, ["xr", "wt"], ["y"], name="product"),
    ]
    return helper.make_function("zoo", name, ["x", "w", "w_scale", "x_scale"], ["y"], nodes, [helper.make_opsetid("", OPSET)])


def tiny_graph(dtype: str = "float16", quantized: bool = False, op: str = "MatMul", pool_dtype: str = "") -> ModelGraph:
    """token -> embedding -> linear (a zoo function) -> written into the pool and, beside it, to logits.

    Inputs token_ids [T], block_table.full [B, P], query_starts [B+1], kv_lengths [B], logit_rows [R], kv.0, then the index
    inputs slots [T, 2] (block and offset) and query_rows [B, L]. Every input is read, because TensorRT drops the others.
    """
    graph = ModelGraph(new_graph("tiny"), {}, [LayerInfo(0, 1, 1, HIDDEN, 1.0)], dtype, ragged=True)
    real, pool_type = ONNX_TYPES[dtype], ONNX_TYPES[pool_dtype or dtype]
    nodes = graph.graph.nodes

    def given(name: str, kind: str, shape: list[int | str]) -> gs.Variable:
        variable = gs.Variable(name, dtype=ONNX_TYPES[kind], shape=shape)
        graph.graph.inputs.append(variable)
        return variable

    def node(kind: str, name: str, inputs: list[gs.Tensor], dtype: int = real, **attrs: object) -> gs.Variable:
        out = gs.Variable(f"{name}.out", dtype=dtype)
        domain = {"domain": "zoo"} if kind.startswith("Zoo") else {}
        nodes.append(gs.Node(kind, name, attrs=attrs, inputs=inputs, outputs=[out], **domain))
        return out

    token_ids = given("token_ids", "int32", ["T"])
    table = given("block_table.full", "int32", ["B", "P"])
    starts = given("query_starts", "int32", ["B+1"])
    lengths = given("kv_lengths", "int32", ["B"])
    rows = given("logit_rows", "int32", ["R"])
    pool = gs.Variable("kv.0", dtype=pool_type, shape=[BLOCKS, 2, BLOCK, 1, HIDDEN])
    graph.graph.inputs.append(pool)
    slots = given("slots", "int64", ["T", 2, 3])
    query_rows = given("query_rows", "int64", ["B", "L"])
    graph.index_inputs = [IndexInput("slots", "int64", ("T", 2, 3)), IndexInput("query_rows", "int64", ("B", "L"))]

    embed = graph.add_weight(Weight("embed", dtype, tensor("embed", (VOCAB, HIDDEN))))
    linear = tensor("linear", (HIDDEN, HIDDEN))
    first = gs.Constant("axis.0", np.array([0], np.int64))
    wide = node("Gather", "embed", [embed, token_ids])
    x = node("Unsqueeze", "batch", [wide, first])
    if quantized:
        scales = channel_scale(linear, 0)
        weights = [
            graph.add_weight(Weight("linear", "float8e4m3", quantize(linear, scales, 0))),
            graph.add_weight(Weight("linear.scale", "float32", scales)),
            graph.add_weight(Weight("linear.x_scale", "float32", scale("linear"))),
        ]
    else:
        weights = [graph.add_weight(Weight("linear", dtype, transpose(linear, (1, 0))))]
    graph.functions["ZooTinyLinear"] = _linear("ZooTinyLinear", quantized, op)
    y = node("ZooTinyLinear", "layer.0.linear", [x, *weights])
    flat = node("Squeeze", "flat", [y, first])
    both = node("Reshape", "pair", [flat, gs.Constant("pair.shape", np.array([-1, 1, 1, HIDDEN], np.int64))])
    pair = node("Concat", "both", [both, both], axis=1)
    if pool_dtype:
        pair = node("Cast", "pool.cast", [pair], dtype=pool_type, to=pool_type)
    out = gs.Variable("kv_out.0", dtype=pool_type, shape=[BLOCKS, 2, BLOCK, 1, HIDDEN])
    nodes.append(gs.Node("ScatterND", "layer.0.write", inputs=[pool, slots, pair], outputs=[out]))
    # Everything of the batch is read: sums of the small integers are added, times zero, to the rows that logits come from.
    terms = [node("Cast", f"{v.name}.real", [v], dtype=real, to=real) for v in (table, starts, lengths, query_rows)]
    sums = [node("ReduceSum", f"{t.name}.sum", [t], keepdims=0) for t in terms]
    total = node("Sum", "batch.sum", sums)
    nothing = node(
        "Mul", "batch.nothing", [total, graph.add_weight(Weight("zero", dtype, computed("constant", (1,), value=0.0)))]
    )
    kept = node("Gather", "rows", [flat, rows])
    shifted = node("Add", "rows.shifted", [kept, nothing])
    head = graph.add_weight(Weight("lm_head", dtype, transpose(tensor("embed", (VOCAB, HIDDEN)), (1, 0))))
    scores = node("MatMul", "lm_head", [shifted, head])
    logits = gs.Variable("logits", dtype=TensorProto.FLOAT, shape=["R", VOCAB])
    nodes.append(gs.Node("Cast", "logits", attrs={"to": TensorProto.FLOAT}, inputs=[scores], outputs=[logits]))
    graph.graph.outputs = [logits, out]
    return graph
