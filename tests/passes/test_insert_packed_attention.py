"""Packed attention insertion: before and after, graphs that must not match, twice changes nothing, and the same numbers.

Numbers are float32 in ONNX Runtime, and differ by no more than 1e-5 of the largest.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import encoders
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from compilers.tensorrt_graphs import hardware, rtx
from ragged import build_spec

from zoo.compilers import tensorrt_common
from zoo.compilers.base import abi_of, context_bytes, pool_bytes
from zoo.compilers.onnxruntime import run_reference
from zoo.compilers.tensorrt_rtx import TensorRtRtxCompiler
from zoo.errors import CompileError, ConfigError, PassError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.passes.frame import PassContext, run
from zoo.passes.packed_attention import InsertPackedAttention, match
from zoo.passes.paged_attention import InsertPagedAttention
from zoo.runtime.embedding import batch_of
from zoo.runtime.indices import INDEX_BUILDERS
from zoo.spec import BuildSpec, Limits, ModelSpec, ParallelSpec, QuantSpec
from zoo.targets import TARGETS
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors

LIMITS = Limits(max_tokens=200, max_sequences=8, max_context=40)
PASS = InsertPackedAttention()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


def spec_of(root: Path, name: str) -> tuple[ModelSpec, Path]:
    folder = root / name
    folder = folder if folder.is_dir() else encoders.folder(root, name)
    return encoders.spec(folder), folder


def context(model: ModelSpec, compiler: str = "onnxruntime") -> PassContext:
    return PassContext(build_spec(model, LIMITS, compiler), TARGETS[compiler])


def inserted(model: ModelSpec) -> tuple[ModelGraph, PassContext]:
    graph, ctx = expand(model, "float32", 40), context(model)
    return run([PASS], graph, ctx.build, ctx.target, check=True), ctx


def hidden(graph: ModelGraph, folder: Path, texts: list[list[int]]) -> np.ndarray:
    with Tensors.open(folder) as tensors:
        weights = {name: materialize(weight, tensors, {}) for name, weight in graph.weights.items()}
    batch = batch_of(texts)
    feeds = {name: getattr(batch, name) for name in ("token_ids", "positions", "query_starts")}
    feeds |= {one.name: INDEX_BUILDERS[one.name](batch, None) for one in graph.index_inputs}  # type: ignore[arg-type]
    return run_reference(graph, feeds, weights)["hidden"]


def test_before_and_after(root: Path) -> None:
    model, _ = spec_of(root, "modernbert")
    graph, ctx = inserted(model)
    assert [one.name for one in graph.data_inputs] == ["token_ids", "positions", "query_starts"]
    assert [list(one.shape) for one in graph.data_inputs] == [["T"], ["T"], ["B+1"]]
    (output,) = graph.graph.outputs
    assert (output.name, list(output.shape)) == ("hidden", ["T", 64]) and graph.ragged
    packed = [node for node in graph.graph.nodes if node.op == "ZooPackedAttention"]
    assert [node.name for node in packed] == [f"layer.{i}.attention" for i in range(3)]
    assert [node.attrs["window"] for node in packed] == [0, 8, 8]
    assert all(node.inputs[3] is graph.variable("query_starts") for node in packed)
    assert not any(node.op in ("Attention", "Range", "LessOrEqual") for node in graph.graph.nodes), "masks are left behind"
    (report,) = graph.reports
    assert report.counts == {"ZooPackedAttention": 3, "masks": 2} and not report.misses
    assert list(packed[0].outputs[0].shape) == [1, "T", 64]
    assert graph.weights["rope.cos"].shape[0] == graph.weights["rope_local.cos"].shape[0] == ctx.build.limits.max_tokens


def test_twice_changes_nothing(root: Path) -> None:
    graph, ctx = inserted(spec_of(root, "bert")[0])
    before = graph.to_onnx().SerializeToString(deterministic=True)
    assert not PASS.apply(graph, ctx).changed
    PASS.ensures(graph, ctx)
    assert graph.to_onnx().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ["bert", "roberta-masked-odd", "modernbert-masked-odd"])
def test_the_same_numbers_as_the_plain_graph(root: Path, name: str) -> None:
    """Body, both lowerings, with all other passes: each text as if it were alone."""
    model, folder = spec_of(root, name)
    texts = encoders.texts([40, 1, 7, 33, 2])
    plain = expand(model, "float32", 40)
    with Tensors.open(folder) as tensors:
        weights = {key: materialize(weight, tensors, {}) for key, weight in plain.weights.items()}
    rows = []
    for text in texts:
        feeds = {"token_ids": np.array([text]), "positions": np.arange(len(text))[None]}
        wanted = {variable.name for variable in plain.data_inputs}
        rows.append(run_reference(plain, {key: feeds[key] for key in wanted}, weights)["hidden"][0])
    want = np.concatenate(rows)
    graphs = [inserted(model)[0]]
    for compiler in ("onnxruntime", "tensorrt_rtx"):
        build = build_spec(model, LIMITS, compiler)
        graphs.append(run_passes(expand(model, "float32", 40), build, TARGETS[compiler], check=True))
    for graph in graphs:
        assert np.abs(hidden(graph, folder, texts) - want).max() <= 1e-5 * np.abs(want).max()
    assert [one.name for one in graphs[1].index_inputs] == ["text_tiles", "window_tiles"]
    assert [one.name for one in graphs[2].index_inputs] == ["query_rows", "token_rows"]


def attention(graph: ModelGraph, layer: int) -> gs.Node:
    return next(node for node in graph.graph.nodes if node.name == f"layer.{layer}.attention")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda node: node.attrs.update(is_causal=1), "is_causal is 1, an encoder of this layer table has 0"),
        (lambda node: node.attrs.update(scale=0.7), "scale is 0.7, the layer table says 0.25"),
        (lambda node: node.attrs.update(softcap=3.0), "softcap is 3.0, the layer table says 0.0"),
        (lambda node: node.attrs.update(qk_matmul_output_mode=1), "it has the attributes qk_matmul_output_mode"),
        (lambda node: node.inputs.pop(), "the layer table says window 8, but it has no mask"),
        (lambda node: setattr(node, "name", "other"), "it is not layer.0.attention to layer.2.attention"),
        (lambda node: node.outputs.append(gs.Variable("more")), "it has a cache of its own"),
    ],
)
def test_what_does_not_fit_is_left_alone(root: Path, change: object, reason: str) -> None:
    model, _ = spec_of(root, "modernbert")
    graph, ctx = expand(model, "float32", 40), context(model)
    change(attention(graph, 1))  # type: ignore[operator]
    before = graph.to_onnx().SerializeToString(deterministic=True)
    report = PASS.apply(graph, ctx)
    assert not report.changed and reason in report.misses[0].reason
    assert graph.to_onnx().SerializeToString(deterministic=True) == before and not graph.ragged


def test_masks_and_tables_that_disagree(root: Path) -> None:
    model, _ = spec_of(root, "modernbert")
    for field, value, reason in (
        ("window", 0, "it has a mask, but the layer table says no window"),
        ("sinks", True, "the layer table says sinks, which packed attention does not have"),
        ("alibi", True, "the layer table says alibi, which packed attention does not have"),
    ):
        graph = expand(model, "float32", 40)
        graph.layers[1] = dataclasses.replace(graph.layers[1], **{field: value})
        assert [miss.reason for miss in match(graph)[1]] == [reason]
    graph = expand(model, "float32", 40)
    attention(graph, 1).inputs[3] = graph.variable("layer.0.norm2")
    assert "its mask is made from layer.0.norm2, by the layer table from no weight" in match(graph)[1][0].reason


def test_a_missing_layer_is_an_error_of_the_pass(root: Path) -> None:
    model, _ = spec_of(root, "bert")
    graph, ctx = expand(model, "float32", 40), context(model)
    attention(graph, 1).op = "Other"
    with pytest.raises(PassError, match=r"found nothing to rewrite.*layer.1.attention: there is no such Attention node"):
        run([PASS], graph, ctx.build, ctx.target)


def test_each_pass_is_for_its_own_template(root: Path) -> None:
    model, _ = spec_of(root, "bert")
    decoder = dataclasses.replace(model, template="decoder", pooling="none", token_types=0)
    for one, wanted in ((model, PASS), (decoder, InsertPagedAttention())):
        build = dataclasses.replace(build_spec(model, LIMITS), model=one)
        passes = [each for each in (PASS, InsertPagedAttention()) if each.wanted(build, TARGETS["onnxruntime"])]
        assert [type(each) for each in passes] == [type(wanted)]
    ctx = context(model)
    graph = expand(model, "float32", 40)
    graph.graph.outputs[0].name = "logits"
    with pytest.raises(PassError, match=r"starts from inputs token_ids, positions and the output hidden, not from .* and logits"):
        PASS.requires(graph, ctx)


def test_rotations_by_length_are_refused(root: Path) -> None:
    model, _ = spec_of(root, "modernbert")
    rope = dataclasses.replace(model.rope, kind="dynamic", factor=2.0, original_max_positions=20)
    ctx = context(model)
    ctx = dataclasses.replace(ctx, build=dataclasses.replace(ctx.build, model=dataclasses.replace(model, rope=rope)))
    with pytest.raises(PassError, match=r"rope.kind dynamic goes by a sequence's length"):
        PASS.requires(expand(model, "float32", 40), ctx)


def test_an_engine_without_a_cache(root: Path) -> None:
    """No pools in its ABI and none in its memory; limits have no blocks, and a text is one step."""
    model, _ = spec_of(root, "bert")
    graph, ctx = inserted(model)
    abi = abi_of(graph, ctx.build)
    assert abi.caches == () and [one.name for one in abi.outputs] == ["hidden"]
    assert pool_bytes(graph, ctx.build) == context_bytes(graph, ctx.build) == 0
    limits = Limits(max_tokens=30).resolve(model)
    assert (limits.max_context, limits.max_rows, limits.max_blocks) == (30, 0, 0) and limits.resolve(model) == limits
    for given, words in (
        (Limits(max_blocks=5), "limits.max_blocks is 5, but model 'bert' is an encoder, which has no KV cache"),
        (Limits(max_rows=5), "limits.max_rows is 5"),
        (Limits(max_tokens=30, max_context=31), "limits.max_context is 31 and limits.max_tokens 30: a text of an encoder is one"),
        (Limits(max_context=41), "has positions for 40"),
    ):
        with pytest.raises(ConfigError, match=words):
            given.resolve(model)


def test_tensorrt_rtx_takes_the_padded_lowering(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library builds a plan of it. Nothing runs such plans yet, so the compiler says so before it builds one."""
    rtx()
    model, folder = spec_of(root, "modernbert")
    target = "tensorrt_rtx"
    model = dataclasses.replace(model, num_layers=1, window_layers=(0,))
    build = BuildSpec(model, QuantSpec("none"), hardware(), ParallelSpec(), LIMITS.resolve(model), target, "float16")
    graph = run_passes(expand(model, "float16", 40), build, TARGETS[target])
    with Tensors.open(folder) as tensors:
        with pytest.raises(CompileError, match="is an encoder, and tensorrt_rtx engines of encoders have nothing that runs them"):
            TensorRtRtxCompiler().compile(graph, build, tensors, {}, tmp_path)
        monkeypatch.setattr(tensorrt_common, "check", lambda *_: None)
        made = TensorRtRtxCompiler().compile(graph, build, tensors, {}, tmp_path)
    assert made.files["engine.plan"].stat().st_size > 1000 and made.scratch > 0
