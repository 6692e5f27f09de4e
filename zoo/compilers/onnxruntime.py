"""The CPU target: an ONNX file whose weights are recipes, for ONNX Runtime.

    model.onnx     the rewritten graph; every weight is an initializer whose bytes lie in "weights.bin" at a fixed offset
    weights.json   {"file": "weights.bin", "size": bytes, "weights": [{"name", "dtype", "recipe", "offset", "nbytes"}]}

``weights.bin`` itself is not made here: the artifact carries the checkpoint's own files, shared by all profiles of a
model, and the session writes the packed file when it opens the engine. Compiling therefore reads and copies no weights.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from zoo.compilers.base import ITEM_SIZES, CompiledEngine, Compiler, Progress, abi_of, weight_bytes
from zoo.errors import CompileError, UnavailableError
from zoo.graph import ONNX_TYPES, ModelGraph
from zoo.spec import BuildSpec, HardwareSpec, digest_of
from zoo.targets import TARGETS
from zoo.weights.recipe import Recipe, Weight

if TYPE_CHECKING:
    from zoo.weights.reader import Tensors

WEIGHTS_FILE = "weights.bin"
TABLE_FILE = "weights.json"
LARGEST = 256_000_000  # bytes of a matrix that is multiplied in one piece
Slice = tuple[str, int, tuple[int, ...]]  # name, first element, shape
INSTALL = "install it with `pip install 'engine-zoo[cpu]'`"


class OnnxRuntimeCompiler(Compiler):
    """Engines for any CPU that ONNX Runtime runs on."""

    name = "onnxruntime"

    def version(self) -> str:
        try:
            return importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError:
            raise UnavailableError(f"onnxruntime is not installed; {INSTALL}") from None

    def available(self) -> str:
        return "" if importlib.util.find_spec("onnxruntime") else f"onnxruntime is not installed; {INSTALL}"

    def supports(self, hardware: HardwareSpec) -> str:
        if hardware.kind != "cpu":
            return f"it builds for CPUs, and {hardware.name!r} is a {hardware.kind}; pick hardware=cpu or another compiler"
        return ""

    def compile(
        self,
        graph: ModelGraph,
        build: BuildSpec,
        tensors: Tensors | None,
        scales: Mapping[str, float],
        workdir: Path,
        progress: Progress | None = None,
    ) -> CompiledEngine:
        report = progress or (lambda stage, done, total: None)
        if graph.dtype not in TARGETS[self.name].dtypes:
            raise CompileError(f"onnxruntime computes in {', '.join(TARGETS[self.name].dtypes)} on a CPU, not in {graph.dtype}")
        report("compile", 0, 2)
        abi = abi_of(graph, build)
        check_sources(graph.weights.values(), tensors, scales)
        if tensors is not None:
            widen_tables(graph, tensors)
        model, table = bind_later(graph)
        report("compile", 1, 2)
        (workdir / TABLE_FILE).write_text(json.dumps(table, sort_keys=True))
        (workdir / "model.onnx").write_bytes(model.SerializeToString())
        report("compile", 2, 2)
        limits = build.limits.resolve(build.model)
        return CompiledEngine(
            files={"model.onnx": workdir / "model.onnx", TABLE_FILE: workdir / TABLE_FILE},
            abi=abi,
            weights={"table": TABLE_FILE},
            scratch=step_scratch(graph, limits.max_tokens, limits.max_context),
            needs={"kind": "cpu", "sm": 0, "memory": weight_bytes(graph), "packages": {"onnxruntime": self.version()}},
        )


def bind_later(graph: ModelGraph, largest: int = LARGEST) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph with its weights as external initializers, and the table that says how the external file is made.

    Weights with equal recipes and dtypes are packed once. A matrix that is also looked up (a tied embedding) becomes two
    initializers over the same bytes: the head's mapping goes away when it has been packed, and of the embedding's only the
    rows that are looked up become resident. Matrices of more than ``largest`` bytes are multiplied in slices, because a
    mapped slice and its packed copy are both resident while it is packed; a whole head would add a fifth to the peak of a
    1 G-parameter model.
    """
    from zoo.weights.bind import packed_layout

    model = graph.to_onnx()
    first: dict[tuple[str, Recipe], Weight] = {}
    for weight in graph.weights.values():
        first.setdefault((weight.dtype, weight.recipe), weight)
    layout, size = packed_layout(first.values())
    place = {(weight.dtype, weight.recipe): packed for weight, packed in zip(first.values(), layout, strict=True)}
    data_inputs = [value for value in model.graph.input if value.name not in graph.weights]
    del model.graph.input[:]
    model.graph.input.extend(data_inputs)
    sliced = _slice_matrices(model, graph.weights, largest)
    read = {name for node in model.graph.node for name in node.input}
    for weight in graph.weights.values():
        packed = place[weight.dtype, weight.recipe]
        item = packed.nbytes // max(1, prod(packed.shape))
        for name, start, shape in [(weight.name, 0, weight.shape), *sliced.get(weight.name, ())]:
            if name in read:
                offset, nbytes = packed.offset + start * item, prod(shape) * item
                model.graph.initializer.append(_external(name, weight.dtype, shape, offset, nbytes))
    rows = [
        {**weight.to_json(), "offset": packed.offset, "nbytes": packed.nbytes}
        for weight, packed in zip(first.values(), layout, strict=True)
    ]
    table = {"file": WEIGHTS_FILE, "size": size, "weights": rows}
    # The session compares this with the table it was given: an engine whose files were mixed up is refused.
    model.metadata_props.append(onnx.StringStringEntryProto(key="zoo.weights", value=digest_of(table)))
    return model, table


def _slice_matrices(model: onnx.ModelProto, weights: Mapping[str, Weight], largest: int) -> dict[str, list[Slice]]:
    """Turn x @ W.T, W [out, in] large or read by other nodes too, into a concatenation of x @ slice.T over slices of W's rows.

    Gives weight -> [(name of the slice, its first element, its shape)].
    """
    readers = Counter(name for node in model.graph.node for name in node.input)
    sliced: dict[str, list[Slice]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "FusedMatMul" else None
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        if weight is None or not turned or len(weight.shape) != 2:
            nodes.append(node)
            continue
        out, width = weight.shape
        parts = -(-ITEM_SIZES[weight.dtype] * out * width // largest)
        if parts < 2 and readers[weight.name] == 1:
            nodes.append(node)
            continue
        edges = pairwise(out * part // parts for part in range(parts + 1))
        slices: list[Slice] = [
            (f"{weight.name}.part{n}", start * width, (stop - start, width)) for n, (start, stop) in enumerate(edges)
        ]
        sliced[weight.name] = slices
        outputs = [f"{node.output[0]}.part{n}" for n in range(parts)] if parts > 1 else [node.output[0]]
        for n, (name, _, _) in enumerate(slices):
            piece = onnx.NodeProto()
            piece.CopyFrom(node)
            piece.name, piece.input[1], piece.output[0] = f"{node.name}.part{n}", name, outputs[n]
            nodes.append(piece)
        if parts > 1:
            nodes.append(onnx.helper.make_node("Concat", outputs, [node.output[0]], name=f"{node.name}.joined", axis=-1))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return sliced


def _external(name: str, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=name, data_type=ONNX_TYPES[dtype], dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS_FILE), ("offset", str(offset)), ("length", str(nbytes))):
        proto.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    return proto


def check_sources(weights: Any, tensors: Tensors | None, scales: Mapping[str, float]) -> None:
    """Raise CompileError that lists every recipe leaf the checkpoint or the calibration does not provide.

    Without a checkpoint (shapes only) nothing can be compared. Reads headers, no data.
    """
    if tensors is None:
        return
    names, wrong = set(tensors.names), set()
    for weight in weights:
        for leaf in weight.recipe.leaves("tensor"):
            if leaf["name"] not in names:
                wrong.add(f"{weight.name} needs tensor {leaf['name']!r}, which the checkpoint lacks")
            elif tuple(tensors.shape(leaf["name"])) != leaf.shape:
                found = list(tensors.shape(leaf["name"]))
                wrong.add(f"{weight.name} needs {leaf['name']!r} of shape {list(leaf.shape)}; the checkpoint has {found}")
        for leaf in weight.recipe.leaves("scale"):
            if leaf["name"] not in scales:
                wrong.add(f"{weight.name} needs the scale {leaf['name']!r}, which calibration did not give")
    if wrong:
        raise CompileError("the graph and its weights do not fit:\n  " + "\n  ".join(sorted(wrong)))


def widen_tables(graph: ModelGraph, tensors: Tensors) -> None:
    """Make half-precision weights float32 where the checkpoint's file holds them so, whatever the model says of its dtype.

    Each is a table that a Cast follows (``zoo.passes.narrow_lookups``); nothing else in a float32 graph is narrower.
    """
    for weight in list(graph.weights.values()):
        held = {tensors.dtype(leaf["name"]) for leaf in weight.recipe.leaves("tensor")}
        if weight.dtype in ("bfloat16", "float16") and held - {weight.dtype}:
            variable = graph.variable(weight.name)
            (gather,) = variable.outputs
            graph.replace_weight(variable, Weight(weight.name, "float32", weight.recipe))
            gather.outputs[0].dtype = ONNX_TYPES["float32"]


def step_scratch(graph: ModelGraph, tokens: int, context: int) -> int:
    """Bytes of the largest attention score matrix of a step: one sequence takes all ``tokens`` at full ``context``."""
    return max((layer.heads * tokens * context * 4 for layer in graph.layers), default=0)


def run_reference(
    graph: ModelGraph, feeds: Mapping[str, Any], weights: Mapping[str, np.ndarray[Any, Any]], threads: int = 1
) -> dict[str, np.ndarray[Any, Any]]:
    """Run a graph, plain or ragged, rewritten or not, as it stands: the judge of every pass and of calibration.

    ``feeds`` and ``weights`` are arrays by input name; missing weights are an error of ONNX Runtime's. Gives all outputs by
    name. Nothing is bound or packed, so this is slow and for small models.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(graph.to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise CompileError(f"onnxruntime refuses the graph: {error}") from error
    values = {}
    for node in session.get_inputs():
        array = feeds[node.name] if node.name in feeds else weights[node.name]
        values[node.name] = _ort_value(ort, np.asarray(array))
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, (value.numpy() for value in session.run_with_ort_values(names, values)), strict=True))


def _ort_value(ort: Any, array: np.ndarray[Any, Any]) -> Any:
    array = np.ascontiguousarray(array).reshape(array.shape)
    code = {"bfloat16": onnx.TensorProto.BFLOAT16, "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN}.get(array.dtype.name)
    if code is None:
        return ort.OrtValue.ortvalue_from_numpy(array)
    raw = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, code)
