"""Launches of standard operators. ``STANDARD`` is the list: op type -> its lowering.

A node that an operator allows and that no kernel here can run (another axis, a broadcast of another kind) is a CompileError
which says so. Reshape, Squeeze, Unsqueeze and Identity move no byte and MatMul is a library call: they are the compiler's.
"""

from __future__ import annotations

from collections.abc import Mapping

from zoo.errors import CompileError
from zoo.plugins.gated_activation import GELU, GELU_TANH, RELU
from zoo.plugins.kernels import CudaNode, Launch, Lower, TensorRef, fixed
from zoo.plugins.rms_norm import cuda as rms_norm
from zoo.plugins.standard.tile import matrix, row_tiles, tiles

KERNELS = "zoo.plugins.standard.kernels"
FLOATS = ("float32", "float16", "bfloat16")
NUMBERS = (*FLOATS, "int32", "int64")
GELUS = {"none": GELU, "tanh": GELU_TANH}
SCALED = {"Add": (0, 1)}  # inputs whose columns a kernel can scale first (``CudaNode.scales``)


def _refuse(node: CudaNode, reason: str) -> CompileError:
    return CompileError(f"{node.name}: the cuda target has no kernel for this {node.op}: {reason}")


def _given(node: CudaNode, count: int) -> tuple[TensorRef, ...]:
    """The inputs of a node that must have ``count`` of them, and one output."""
    given = tuple(tensor for tensor in node.inputs if tensor is not None)
    if len(given) != count or len(node.inputs) != count or len(node.outputs) != 1:
        raise _refuse(node, f"it has {len(given)} inputs and {len(node.outputs)} outputs, not {count} and 1")
    return given


def _check_last_axis(node: CudaNode, tensor: TensorRef) -> None:
    axis = int(node.attrs.get("axis", 0 if node.op == "Split" else -1))
    if axis not in (-1, len(tensor.shape) - 1):
        raise _refuse(node, f"axis is {axis} of {len(tensor.shape)}, not the last")


def _unary(node: CudaNode, op: str | int, dtypes: tuple[str, ...] = FLOATS) -> list[Launch]:
    (x,), y = _given(node, 1), node.outputs[0]
    if not {x.dtype, y.dtype} <= set(dtypes):
        raise _refuse(node, f"{x.dtype} to {y.dtype}; it knows {', '.join(dtypes)}")
    return [tiles(y).launch(f"{KERNELS}:unary", [("x", x), ("y", y)], OP=op)]


def cast(node: CudaNode) -> list[Launch]:
    """Between float32, float16, bfloat16, int32 and int64; the output says to which."""
    return _unary(node, "cast", NUMBERS)


def sigmoid(node: CudaNode) -> list[Launch]:
    return _unary(node, "sigmoid")


def tanh(node: CudaNode) -> list[Launch]:
    return _unary(node, "tanh")


def relu(node: CudaNode) -> list[Launch]:
    return _unary(node, RELU)


def gelu(node: CudaNode) -> list[Launch]:
    return _unary(node, GELUS[str(node.attrs.get("approximate", "none"))])


def _binary(node: CudaNode, op: str) -> list[Launch]:
    """Equal shapes, or one operand a number, a row that all rows share, or rows [H, N] for an output [..., H, N]."""
    a, b = _given(node, 2)
    y = node.outputs[0]
    if op != "divide" and (1 in node.scales or (_period(a, y) not in (0, None) and _period(b, y) == 0)):
        a, b = b, a
    scale, period = next(iter(node.scales.values()), a), _period(b, y)
    if _period(a, y) != 0 or period is None:
        raise _refuse(node, f"shapes {list(a.shape)} and {list(b.shape)} are neither equal nor a row beside rows")
    tensors = [("a", a), ("b", b), ("a_scale", scale), ("y", y)]
    return [tiles(y).launch(f"{KERNELS}:binary", tensors, OP=op, PERIOD=period, SCALED=bool(node.scales))]


def _period(tensor: TensorRef, y: TensorRef) -> int | None:
    """How many rows an operand has that the rows of y take in turns; 0: as many as y; -1: it is a number; None: none of these."""
    (rows, width), (_, whole) = matrix(tensor), matrix(y)
    if matrix(tensor) == matrix(y):
        return 0
    if all(size == 1 for size in tensor.shape):
        return -1
    if rows.symbol or width != whole or (rows != fixed(1) and (rows.times,) != y.shape[-2:-1]):
        return None
    return rows.times


def add(node: CudaNode) -> list[Launch]:
    return _binary(node, "add")


def multiply(node: CudaNode) -> list[Launch]:
    return _binary(node, "multiply")


def divide(node: CudaNode) -> list[Launch]:
    """By what has the shape of the first operand, or fewer rows."""
    return _binary(node, "divide")


def clip(node: CudaNode) -> list[Launch]:
    """Between two numbers that are tensors of one element."""
    x, low, high = _given(node, 3)
    y = node.outputs[0]
    if any(size != 1 for bound in (low, high) for size in bound.shape):
        raise _refuse(node, f"its bounds have the shapes {list(low.shape)} and {list(high.shape)}, not one element")
    return [tiles(y).launch(f"{KERNELS}:clip", [("x", x), ("low", low), ("high", high), ("y", y)])]


def concat(node: CudaNode) -> list[Launch]:
    """Along the last axis: one launch an input."""
    y = node.outputs[0]
    _check_last_axis(node, y)
    (_, width), start, launches = matrix(y), 0, []
    for x in node.inputs:
        assert x is not None
        launches.append(tiles(x).launch(f"{KERNELS}:paste_columns", [("x", x), ("y", y)], TO=width, START=start))
        start += matrix(x)[1]
    if start != width:
        raise _refuse(node, f"its inputs have {start} columns, its output {width}")
    return launches


def split(node: CudaNode) -> list[Launch]:
    """Along the last axis: one launch an output; the outputs' widths say where."""
    x = node.inputs[0]
    assert x is not None
    _check_last_axis(node, x)
    (_, width), start, launches = matrix(x), 0, []
    for y in node.outputs:
        launches.append(tiles(y).launch(f"{KERNELS}:copy_columns", [("x", x), ("y", y)], FROM=width, START=start))
        start += matrix(y)[1]
    if start != width:
        raise _refuse(node, f"its outputs have {start} columns, its input {width}")
    return launches


def gather(node: CudaNode) -> list[Launch]:
    """Rows of a table [V, E] by int32 or int64 indices of any shape."""
    data, indices = _given(node, 2)
    y = node.outputs[0]
    if int(node.attrs.get("axis", 0)) != 0 or len(data.shape) != 2:
        raise _refuse(node, f"axis is {node.attrs.get('axis', 0)} of {list(data.shape)}, not 0 of two")
    if indices.dtype not in ("int32", "int64"):
        raise _refuse(node, f"its indices are {indices.dtype}")
    tensors = [("data", data), ("indices", indices), ("y", y)]
    return [tiles(y).launch(f"{KERNELS}:gather_rows", tensors, [("height", "i32", data.rows)])]


def rms_normalization(node: CudaNode) -> list[Launch]:
    x, _ = _given(node, 2)
    _check_norm(node, x)
    return rms_norm.lower(node)


def layer_normalization(node: CudaNode) -> list[Launch]:
    biased = len(node.inputs) == 3
    x, weight, *bias = _given(node, 3 if biased else 2)
    _check_norm(node, x)
    tensors = [("x", x), ("weight", weight), ("bias", bias[0] if biased else weight), ("y", node.outputs[0])]
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    return [row_tiles(node, x).launch(f"{KERNELS}:layer_norm", tensors, [("epsilon", "fp32", epsilon)], BIASED=biased)]


def _check_norm(node: CudaNode, x: TensorRef) -> None:
    _check_last_axis(node, x)
    if int(node.attrs.get("stash_type", 1)) != 1:
        raise _refuse(node, f"stash_type is {node.attrs['stash_type']}; kernels norm in float32 (1)")


STANDARD: Mapping[str, Lower] = {
    "Add": add,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Div": divide,
    "Gather": gather,
    "Gelu": gelu,
    "LayerNormalization": layer_normalization,
    "Mul": multiply,
    "RMSNormalization": rms_normalization,
    "Relu": relu,
    "Sigmoid": sigmoid,
    "Split": split,
    "Tanh": tanh,
}
