"""The bytes that a TensorRT parser gets: run in ONNX Runtime as they are, they give what the plain graph gives.

ONNX Runtime's CPU has no bfloat16, so the numbers are judged in float32 and float16 and the bfloat16 model's nodes compared.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import families
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from ragged import Ragged, Traffic, engine_limits
from tensorrt_graphs import LIMITS, build_spec, hardware, tiny_graph

from zoo.calibration import calibrate
from zoo.compilers.tensorrt_model import PREFILL_SEQUENCES, WEIGHTS_FILE, parser_model, profiles, shapes, size_of
from zoo.errors import CompileError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.runtime.abi import Batch
from zoo.runtime.indices import INDEX_BUILDERS
from zoo.spec import BuildSpec, Limits, ParallelSpec, QuantSpec
from zoo.targets import TARGETS
from zoo.weights.bind import NUMPY, materialize, packed_layout, write_packed
from zoo.weights.reader import Tensors

SMALL = Limits(max_tokens=32, max_sequences=6, block_size=4, max_context=64)
CASES = ("llama-grouped", "mistral-window", "qwen3-norms", "gpt2")


def rewritten(folder: Path, dtype: str, quant: str = "none", compiler: str = "tensorrt_rtx") -> tuple[ModelGraph, BuildSpec]:
    model = families.spec(folder)
    build = BuildSpec(model, QuantSpec(quant, quant), hardware(), ParallelSpec(), SMALL.resolve(model), compiler, dtype)
    return run_passes(expand(model, dtype, build.limits.max_context), build, TARGETS[compiler]), build


class Parsed(Ragged):
    """A graph's parser bytes in ONNX Runtime, unchanged, beside the weights that they refer to."""

    def __init__(self, graph: ModelGraph, build: BuildSpec, tensors: Tensors, scales: dict[str, float], folder: Path) -> None:
        model, weights = parser_model(graph)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        write_packed(folder / WEIGHTS_FILE, weights, tensors, scales)
        onnx.checker.check_model(folder / "model.onnx", full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.wanted = {given.name for given in self.session.get_inputs()}
        self.weights: dict[str, onnxruntime.OrtValue] = {}
        self.limits, self.index_inputs = engine_limits(build.limits), graph.index_inputs
        self.pools = {
            variable.name: np.full(variable.shape, np.nan, NUMPY[graph.dtype])
            for variable in graph.data_inputs
            if variable.name.startswith("kv.")
        }


def checkpoint(tmp_path: Path, case: str) -> Path:
    family, overrides = families.CASES[case]
    return families.make_checkpoint(tmp_path, family, **overrides)


def drive(engine: Ragged, folder: Path) -> list[tuple[list[int], np.ndarray]]:
    """(tokens so far, logits of the last) of two sequences through prefill, a mixed step, a chunk and decode."""
    traffic, one, two = Traffic(engine), families.prompt(folder, 20, 1), families.prompt(folder, 17, 2)
    seen = []
    for step in (
        {"a": one[:9]},
        {"a": one[9:10], "b": two[:11]},
        {"b": two[11:15], "a": one[10:11]},
        {"a": one[11:12], "b": two[15:16]},
    ):
        logits = traffic.step(step)
        seen += [(list(traffic.tokens[name]), row) for name, row in zip(step, logits, strict=True)]
    return seen


@pytest.mark.parametrize("case", CASES)
def test_parser_bytes_equal_the_plain_graph(tmp_path: Path, case: str) -> None:
    folder = checkpoint(tmp_path, case)
    tensors = Tensors.open(folder)
    plain = families.Plain(expand(families.spec(folder), "float32"), tensors)
    for tokens, logits in drive(Parsed(*rewritten(folder, "float32"), tensors, {}, tmp_path), folder):
        np.testing.assert_allclose(logits, plain.logits([tokens])[0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["llama-grouped", "gpt2"])
def test_float16_parser_bytes_run_as_they_are(tmp_path: Path, case: str) -> None:
    """Judged by transformers in float16: at most twice as far from float32 as that (seen: 1.3 times)."""
    folder = checkpoint(tmp_path, case)
    tensors = Tensors.open(folder)
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, attn_implementation="eager").eval()
    for tokens, logits in drive(Parsed(*rewritten(folder, "float16"), tensors, {}, tmp_path), folder):
        exact = families.reference_logits(folder, tokens)[-1]
        with torch.no_grad():
            theirs = half(torch.tensor([tokens])).logits[0, -1].float().numpy()
        assert np.linalg.norm(logits - exact) <= 2 * np.linalg.norm(theirs - exact)


def test_fp8_parser_bytes_equal_the_judges_graph(tmp_path: Path) -> None:
    """The same FP8 model as ONNX Runtime's own target runs it, from the reference body of ZooFp8Linear."""
    folder = checkpoint(tmp_path, "llama-grouped")
    tensors = Tensors.open(folder)
    scales = calibrate(families.spec(folder), tensors, families.prompt(folder, 64))
    graph, build = rewritten(folder, "float32", "fp8", "onnxruntime")
    judge = Ragged(graph, {n: materialize(w, tensors, scales) for n, w in graph.weights.items()}, engine_limits(build.limits))
    ours = drive(Parsed(*rewritten(folder, "float32", "fp8"), tensors, scales, tmp_path), folder)
    for (tokens, logits), (expected_tokens, expected) in zip(ours, drive(judge, folder), strict=True):
        assert tokens == expected_tokens
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_only_dtypes_differ_from_what_was_judged(tmp_path: Path, dtype: str, quant: str) -> None:
    folder = checkpoint(tmp_path, "qwen3-norms")
    names = []
    for one in (dtype, "float32"):
        nodes = [
            (n.op_type, n.name, list(n.input), list(n.output))
            for n in parser_model(rewritten(folder, one, quant)[0])[0].graph.node
        ]
        if nodes[-1][:2] == ("Cast", "logits"):  # logits are float32 in any case
            (_, _, given, _), (op, name, inputs, made) = nodes.pop(), nodes[-1]
            assert given == made
            nodes[-1] = (op, name, inputs, ["logits"])
        names.append(nodes)
    assert names[0] == names[1] and len(names[0]) > 100


def test_inlined_nodes_carry_their_callers_name() -> None:
    model, weights = parser_model(tiny_graph(quantized=True))
    assert not model.functions and {entry.domain for entry in model.opset_import} == {""}
    assert "layer.0.linear/product" in [node.name for node in model.graph.node if node.op_type == "MatMul"]
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert [value.name for value in model.graph.input] == [v.name for v in tiny_graph().data_inputs]
    layout = packed_layout(weights)[0]
    bound = [proto for proto in model.graph.initializer if proto.name in {weight.name for weight in weights}]
    for proto, weight, packed in zip(bound, weights, layout, strict=True):
        places = {entry.key: entry.value for entry in proto.external_data}
        assert proto.name == weight.name and tuple(proto.dims) == weight.shape and not proto.raw_data
        assert places == {"location": "weights.bin", "offset": str(packed.offset), "length": str(packed.nbytes)}


def test_plugin_nodes_stay() -> None:
    model, _ = parser_model(tiny_graph(), {"ZooTinyLinear"})
    assert not model.functions and any(node.op_type == "ZooTinyLinear" and node.domain == "zoo" for node in model.graph.node)
    assert {entry.domain for entry in model.opset_import} == {"", "zoo"}


def test_a_zoo_op_without_a_body_is_refused() -> None:
    graph = tiny_graph()
    del graph.functions["ZooTinyLinear"]
    with pytest.raises(CompileError, match=r"no function body for ZooTinyLinear \(layer.0.linear\)"):
        parser_model(graph)


def test_equal_weights_are_held_once() -> None:
    graph = tiny_graph()
    first = graph.weights["linear"]
    graph.replace_weight(graph.variable("lm_head"), dataclasses.replace(graph.weights["lm_head"]))
    model, weights = parser_model(graph)
    twin = graph.add_weight(dataclasses.replace(first, name="linear.twin"))
    node = next(node for node in graph.graph.nodes if node.name == "layer.0.linear")
    node.inputs[1] = twin
    again, same = parser_model(graph)
    assert [w.name for w in same] == [w.name for w in weights]
    assert [list(n.input) for n in again.graph.node] == [list(n.input) for n in model.graph.node]


def test_profiles_of_the_tiny_graph() -> None:
    decode, prefill = shapes(tiny_graph(), build_spec(hardware()).limits)
    assert decode["token_ids"] == ((1,), (6,), (6,)) and prefill["token_ids"] == ((1,), (16,), (16,))
    assert decode["query_starts"] == ((2,), (7,), (7,)) and prefill["query_starts"] == ((2,), (2,), (5,))
    assert decode["query_rows"] == ((1, 1), (6, 1), (6, 1)) and prefill["query_rows"] == ((1, 1), (1, 16), (4, 16))
    assert decode["block_table.full"] == ((1, 1), (6, 4), (6, 4))
    assert decode["slots"] == ((1, 2, 3), (6, 2, 3), (6, 2, 3))
    assert "kv.0" not in decode and "linear" not in decode


def test_profiles_hold_one_sequence_and_many() -> None:
    one = profiles(dataclasses.replace(LIMITS, max_sequences=1, max_rows=1))
    assert one["decode"]["B"] == one["prefill"]["B"] == (1, 1, 1)
    few = profiles(dataclasses.replace(LIMITS, max_tokens=2, max_rows=6))
    assert few["decode"]["T"] == (1, 2, 2) and few["prefill"]["B"][2] == 2 < PREFILL_SEQUENCES


def test_unknown_sizes_are_named() -> None:
    assert size_of("B+1", {"B": 3}, "x") == 4 and size_of(7, {}, "x") == 7
    graph = tiny_graph()
    graph.variable("slots").shape = ["S", 2, 3]
    with pytest.raises(CompileError, match="input 'slots' has the size 'S'; known are numbers, T, B, P, R, L"):
        shapes(graph, build_spec(hardware()).limits)


def test_every_index_input_fits_its_profile(tmp_path: Path) -> None:
    """The largest batches that the profiles allow, as the session's index builders fill them."""
    graph, build = rewritten(checkpoint(tmp_path, "llama-grouped"), "float32")
    limits = engine_limits(build.limits)
    for kind, tokens in ((0, [1] * 6), (1, [32]), (1, [8, 8, 8, 8])):
        starts = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int32)
        places = np.concatenate([np.arange(n) for n in tokens]).astype(np.int32)
        table = np.ones((len(tokens), 16), np.int32)
        batch = Batch(places, places, starts, np.array(tokens, np.int32), {"full": table}, np.array([0], np.int32))
        for extra in graph.index_inputs:
            least, _, most = shapes(graph, build.limits)[kind][extra.name]
            shape = INDEX_BUILDERS[extra.name](batch, limits).shape
            assert all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)), (extra.name, shape)
