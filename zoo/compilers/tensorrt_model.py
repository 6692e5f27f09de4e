"""What a TensorRT parser gets: the rewritten graph as ONNX without weight data, and the shapes it is built for.

Profiles (T tokens, B sequences, P blocks a sequence, R rows of logits, L queries a sequence after padding):

    decode    L = 1                      B and T up to max_sequences
    prefill   L and T up to max_tokens   B up to PREFILL_SEQUENCES

A padded attention computes B x L queries. Two boxes keep that product small: a step that mixes prefill with decode is
run by the session as one decode call and a few prefill calls.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import onnx
import onnx.inliner

from zoo.errors import CompileError
from zoo.graph import ONNX_TYPES, ModelGraph
from zoo.spec import Limits
from zoo.weights.recipe import Weight

WEIGHTS_FILE = "weights.bin"  # where the parser model's initializers would lie; the parser gets pointers instead
PREFILL_SEQUENCES = 4
Range = tuple[int, int, int]  # least, best, most


def parser_model(graph: ModelGraph, plugins: Collection[str] = ()) -> tuple[onnx.ModelProto, list[Weight]]:
    """The model whose bytes the parser gets, and the weights that its initializers stand for, in the same order.

    A zoo node whose op is not among ``plugins`` is replaced by its function's nodes, named ``<node>/<inner node>``, so that a
    message about one says where it stands; a plugin's node keeps its op type, which the parser looks it up by. Functions are
    not left to the parser: it cannot take one with a quantizer in it twice. Initializers hold no data: they refer to
    ``weights.bin`` in the layout of ``zoo.weights.bind.packed_layout``. Weights with equal recipes and dtypes become one.
    """
    from zoo.weights.bind import packed_layout

    model = graph.to_onnx()
    kept: dict[tuple[str, Any], str] = {}
    same_as = {w.name: kept.setdefault((w.dtype, w.recipe), w.name) for w in graph.weights.values()}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same_as.get(name, name)
    data_inputs = [value for value in model.graph.input if value.name not in graph.weights]
    del model.graph.input[:]
    model.graph.input.extend(data_inputs)
    model = _inlined(model, plugins)
    weights = [weight for name, weight in graph.weights.items() if same_as[name] == name]
    for weight, packed in zip(weights, packed_layout(weights)[0], strict=True):
        proto = model.graph.initializer.add(name=weight.name, data_type=ONNX_TYPES[weight.dtype], dims=weight.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_FILE), ("offset", str(packed.offset)), ("length", str(packed.nbytes))):
            proto.external_data.add(key=key, value=value)
    return model, weights


def _inlined(model: onnx.ModelProto, plugins: Collection[str]) -> onnx.ModelProto:
    """Local functions inlined. Each call gets a function of its own first, whose nodes carry the caller's name."""
    functions = {(function.domain, function.name): function for function in model.functions if function.name not in plugins}
    del model.functions[:]
    for number, node in enumerate(model.graph.node):
        if not (function := functions.get((node.domain, node.op_type))):
            continue
        own = model.functions.add()
        own.CopyFrom(function)
        own.name = node.op_type = f"{function.name}_{number}"
        for index, inner in enumerate(own.node):
            inner.name = f"{node.name}/{inner.name or f'{inner.op_type}.{index}'}"
    model = onnx.inliner.inline_local_functions(model, False)
    for node in model.graph.node:
        if "/" in node.name:
            node.name = re.sub(r"__\d+$", "", node.name)  # the inliner numbers calls; the caller's name says which
    left_over = [node for node in model.graph.node if node.domain == "zoo"]
    if left := sorted({f"{node.op_type} ({node.name})" for node in left_over if node.op_type not in plugins}):
        raise CompileError(f"no function body for {', '.join(left[:5])}: this target needs it as standard ops")
    used = [entry for entry in model.opset_import if entry.domain != "zoo" or left_over]
    del model.opset_import[:]
    model.opset_import.extend(used)
    return model


def profiles(limits: Limits) -> dict[str, dict[str, Range]]:
    """Ranges of the symbolic sizes in each optimisation profile. ``limits`` are resolved."""
    sequences = min(limits.max_sequences, limits.max_tokens)
    blocks: Range = (1, limits.blocks_per_sequence, limits.blocks_per_sequence)
    rows: Range = (1, limits.max_rows, limits.max_rows)
    decode: Range = (1, sequences, sequences)
    tokens: Range = (1, limits.max_tokens, limits.max_tokens)
    return {
        "decode": {"T": decode, "B": decode, "P": blocks, "R": rows, "L": (1, 1, 1)},
        "prefill": {"T": tokens, "B": (1, 1, min(PREFILL_SEQUENCES, sequences)), "P": blocks, "R": rows, "L": tokens},
    }


def size_of(size: int | str, values: Mapping[str, int], where: str) -> int:
    """The number that a symbolic size stands for: a number, a name, or a name plus a number such as ``B+1``."""
    if isinstance(size, int):
        return size
    name, _, more = (part.strip() for part in size.partition("+"))
    if name not in values or not (more or "0").isdigit():
        raise CompileError(f"{where} has the size {size!r}; known are numbers, {', '.join(values)}, and those plus a number")
    return values[name] + int(more or 0)


def shapes(graph: ModelGraph, limits: Limits) -> list[dict[str, tuple[tuple[int, ...], ...]]]:
    """For each profile the least, best and most shape of every input that has a symbolic size."""
    result = []
    for ranges in profiles(limits).values():
        inputs = {}
        for variable in graph.data_inputs:
            sizes = [size if isinstance(size, int) else str(size) for size in variable.shape]
            if any(isinstance(size, str) for size in sizes):
                points = [{name: span[at] for name, span in ranges.items()} for at in range(3)]
                where = f"input {variable.name!r}"
                inputs[variable.name] = tuple(tuple(size_of(size, point, where) for size in sizes) for point in points)
        result.append(inputs)
    return result
