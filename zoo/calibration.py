"""Calibration: the static activation scales of FP8 linear layers, measured on real text.

The float32 plain graph runs over the text in ONNX Runtime, cut off behind the last linear input, with one more output for
each tensor that a linear layer reads: max|x|, inside the graph, so that no activation leaves it. A scale is that maximum
over all text, divided by 448 (Micikevicius et al. 2022, per-tensor static scaling).

The plain graph, rather than an engine behind ``zoo.runtime``: activations inside an engine have no names on its ABI, the
plain graph computes the same numbers (tests hold that), and it needs neither a cache nor a scheduler for whole sequences.

Names are those that the FP8 pass asks for, by the same functions. Weights are packed into one temporary file that ONNX
Runtime maps, so that memory stays near the size of one chunk's activations; it takes 4 bytes a parameter, without the head, in
the folder for temporary files (TMPDIR).
Without a checkpoint there is nothing to run: ``unbound_scales`` lists what an engine then still needs.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zoo.checkpoints import Checkpoint, fit_names
from zoo.errors import CheckpointError, ConfigError
from zoo.graph import ONNX_TYPES, ModelGraph
from zoo.graph_templates import expand
from zoo.passes.fuse_linears import fuse_linears
from zoo.passes.insert_experts import insert_experts
from zoo.passes.linears import activation_names, linears
from zoo.passes.lower_experts import lower_experts
from zoo.ropetables import tables
from zoo.spec import ModelSpec
from zoo.weights.bind import packed_layout, write_packed
from zoo.weights.reader import Tensors
from zoo.weights.recipe import FLOAT8_MAX

if TYPE_CHECKING:
    import onnxruntime

TEXT = Path(__file__).parent / "calibration_text.txt"
CHUNK = 512  # tokens that run as one sequence
PROBE = "probe"  # the sum of the last linear input's magnitudes: not finite if anything before it was not
Progress = Callable[[str, int, int], None]  # stage, done, total


def default_text() -> str:
    """The text that calibration runs over: Python and English prose, written for this purpose."""
    return TEXT.read_text(encoding="utf-8")


def text_digest() -> str:
    """Digest of the default text; part of what an FP8 engine is made from."""
    return "sha256:" + hashlib.sha256(TEXT.read_bytes()).hexdigest()


def calibrate_checkpoint(
    model: ModelSpec, checkpoint: Checkpoint, tokens: int, progress: Progress | None = None, cache: bool = False
) -> dict[str, float]:
    """Scales of a checkpoint over the first ``tokens`` tokens of the default text, by its own tokenizer; see ``calibrate``.

    Raises ConfigError for fewer than one token, CheckpointError when the folder has no tokenizer.json.
    """
    if tokens < 1:
        raise ConfigError(f"quant.calibration_tokens is {tokens}; it must be at least 1")
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint.folder}: no tokenizer.json, which calibration needs to read text; add it, or build with quant=none"
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()  # settings of training, which some files hold
    if model.template == "encoder":  # each chunk is a text, between the special tokens of one, whose activations are the largest
        tokenizer.enable_truncation(_length(model))
    found = tokenizer.encode(default_text())
    token_ids = [token for one in (found, *found.overflowing) for token in one.ids]
    return calibrate(model, checkpoint.tensors, token_ids[:tokens], progress, cache)


def _length(model: ModelSpec) -> int:
    """Tokens of a chunk."""
    return min(CHUNK, model.max_positions)


def calibrate(
    model: ModelSpec, tensors: Tensors, token_ids: Sequence[int], progress: Progress | None = None, cache: bool = False
) -> dict[str, float]:
    """Scale of every linear layer's input: max|x| / 448 over the text; 1.0 for an input that is all zeros.

    ``cache``: also of every layer's keys and values as attention reads them, ``layer.{i}.k_cache`` and ``layer.{i}.v_cache``.

    The text runs in chunks of at most 512 tokens, each a sequence from position 0. The same text, threads and machine give
    the same scales.

    Raises ConfigError for no text or ids outside the vocabulary, CheckpointError for activations that are not finite.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1 or not ids.size:
        raise ConfigError("calibration needs a list of token ids, at least one; raise quant.calibration_tokens")
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise ConfigError(
            f"calibration text has token id {ids.max() if ids.min() >= 0 else ids.min()}; model {model.name!r} knows 0 to "
            f"{model.vocab_size - 1}; is the tokenizer the model's own?"
        )
    length = _length(model)
    first = tables(model.rope, model.max_positions, length)[-1].first_row  # of the rotary table for such lengths
    graph = observed(expand(fit_names(model, tensors), "float32", length), cache)
    names = [variable.name for variable in graph.graph.outputs]
    peaks = np.zeros(len(names), dtype=np.float32)  # of PROBE, the largest sum
    with tempfile.TemporaryDirectory(prefix="zoo-calibration-") as folder:
        session = _session(graph, tensors, Path(folder), progress)
        for start in range(0, len(ids), length):
            if progress:
                progress("calibrate", start, len(ids))
            chunk = ids[None, start : start + length]
            feeds = {"token_ids": chunk, "positions": first + np.arange(chunk.shape[1], dtype=np.int64)[None]}
            wanted = {given.name for given in session.get_inputs()}
            peaks = np.maximum(peaks, session.run(names, {name: feeds[name] for name in wanted}))
        del session
    if not np.isfinite(peaks).all():
        bad = [name for name, peak in zip(names[:-1], peaks, strict=False) if not np.isfinite(peak)] or names[-2:-1]
        raise CheckpointError(f"model {model.name!r}: activations that are not finite at {', '.join(bad[:5])}; check the weights")
    scales = np.where(peaks > 0, peaks / np.float32(FLOAT8_MAX), np.float32(1))
    return {name: float(value) for name, value in zip(names, scales, strict=True) if name != PROBE}


def observed(graph: ModelGraph, cache: bool = False) -> ModelGraph:
    """The plain graph, its linear layers fused as engines fuse them, with max|x| of their inputs as outputs, and ``PROBE``.

    The probe is there because ONNX Runtime's ReduceMax passes over a NaN among numbers; ReduceSum does not.
    """
    insert_experts(graph)
    lower_experts(graph, "chosen")  # only the experts that a token's router chose
    fuse_linears(graph)
    names = activation_names(graph)
    measured = {}  # name of a scale -> the tensor that it is of
    for linear in linears(graph):
        if names[linear.name] == f"{linear.name}.x":  # else another layer reads the same tensor and gave it its name
            measured[names[linear.name]] = linear.input
    last = linear.input
    for node in graph.graph.nodes if cache else ():
        if node.op == "Attention":
            layer = node.name.removesuffix(".attention")
            measured |= {f"{layer}.{role}_cache": tensor for role, tensor in zip("kv", node.inputs[1:3], strict=True)}
    outputs: list[gs.Variable] = []
    nodes: list[gs.Node] = []
    sizes: dict[str, gs.Variable] = {}
    for name, tensor in measured.items():
        size = sizes[tensor.name] = gs.Variable(f"{name}.abs", dtype=ONNX_TYPES["float32"])
        peak = gs.Variable(name, dtype=ONNX_TYPES["float32"], shape=[])
        nodes.append(gs.Node("Abs", f"{name}.abs", inputs=[tensor], outputs=[size]))
        nodes.append(gs.Node("ReduceMax", f"{name}.max", attrs={"keepdims": 0}, inputs=[size], outputs=[peak]))
        outputs.append(peak)
    probe = gs.Variable(PROBE, dtype=ONNX_TYPES["float32"], shape=[])
    nodes.append(gs.Node("ReduceSum", PROBE, attrs={"keepdims": 0}, inputs=[sizes[last.name]], outputs=[probe]))
    outputs.append(probe)
    graph.graph.nodes.extend(nodes)
    graph.graph.outputs = outputs
    graph.graph.cleanup(remove_unused_graph_inputs=False)
    graph.drop_unused_weights()
    return graph


def unbound_scales(graph: ModelGraph) -> list[str]:
    """The calibrated scales that a graph's weights ask for, sorted: empty unless it is quantized."""
    return sorted({str(leaf["name"]) for weight in graph.weights.values() for leaf in weight.recipe.leaves("scale")})


def _session(graph: ModelGraph, tensors: Tensors, folder: Path, progress: Progress | None) -> onnxruntime.InferenceSession:
    """Load the graph with its weights mapped from a packed file. Prepacking would copy every weight, for a handful of runs."""
    import onnxruntime

    def report(done: int, total: int) -> None:
        if progress:
            progress("pack float32 weights", done, total)

    weights = list(graph.weights.values())
    write_packed(folder / "weights.bin", weights, tensors, {}, report)
    model = graph.to_onnx()
    data = [given for given in model.graph.input if given.name not in graph.weights]
    del model.graph.input[:]
    model.graph.input.extend(data)
    for packed in packed_layout(weights)[0]:
        stored = model.graph.initializer.add(name=packed.name, data_type=ONNX_TYPES[packed.dtype], dims=packed.shape)
        stored.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", packed.offset), ("length", packed.nbytes)):
            stored.external_data.add(key=key, value=str(value))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
