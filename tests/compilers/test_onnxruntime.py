"""ONNX Runtime engines as files: what the compiler writes, judged by onnx.checker, ONNX Runtime and transformers."""

from __future__ import annotations

import dataclasses
import json
from math import prod
from pathlib import Path

import families
import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnxruntime_engines import rewritten
from ragged import build_spec, engine_limits

from zoo.compilers import COMPILERS, get_compiler, predict
from zoo.compilers.base import abi_of, pool_bytes, weight_bytes
from zoo.compilers.onnxruntime import OnnxRuntimeCompiler, bind_later, run_reference
from zoo.errors import CompileError
from zoo.graph import ModelGraph, new_graph
from zoo.graph_templates import expand
from zoo.runtime.abi import Batch
from zoo.runtime.indices import INDEX_BUILDERS
from zoo.spec import COMPILERS as KNOWN
from zoo.spec import HardwareSpec
from zoo.weights.bind import materialize, write_packed
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight, computed, scale, tensor

CASES = ("llama-tied", "llama-biases", "mistral-window", "qwen3-norms", "gpt2")
COMPILER = OnnxRuntimeCompiler()


@pytest.fixture(params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = families.CASES[request.param]
    return families.make_checkpoint(tmp_path_factory.getbasetemp(), family, **overrides)


@pytest.fixture
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = families.CASES["llama-tied"]
    return families.make_checkpoint(tmp_path_factory.getbasetemp(), family, **overrides)


def write_engine(folder: Path, graph: ModelGraph, checkpoint: Path, largest: int) -> dict:
    """model.onnx and its packed weights in a folder; gives the table."""
    model, table = bind_later(graph, largest)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with Tensors.open(checkpoint) as tensors:
        write_packed(folder / table["file"], [Weight.from_json(row) for row in table["weights"]], tensors, {})
    return table


def run_prompt(folder: Path, graph: ModelGraph, build, prompt: list[int]) -> np.ndarray:
    """Logits of every token of one prompt in one step over pools of NaN."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    limits, count = engine_limits(build.limits), len(prompt)
    blocks = -(-count // limits.block_size)
    place = np.arange(count, dtype=np.int32)
    batch = Batch(
        np.array(prompt, np.int32),
        place,
        np.array([0, count], np.int32),
        np.array([count], np.int32),
        {"full": np.arange(1, blocks + 1, dtype=np.int32)[None]},
        place,
    )
    feeds = {name: getattr(batch, name) for name in ("token_ids", "positions", "query_starts", "kv_lengths", "logit_rows")}
    feeds["block_table.full"] = batch.block_tables["full"]
    feeds |= {extra.name: INDEX_BUILDERS[extra.name](batch, limits) for extra in graph.index_inputs}
    feeds |= {cache.name: np.full(cache.shape, np.nan, np.float32) for cache in abi_of(graph, build).caches}
    wanted = {given.name for given in session.get_inputs()}
    return session.run(["logits"], {name: array for name, array in feeds.items() if name in wanted})[0]


def test_files_pass_the_checker_and_equal_transformers(checkpoint: Path, tmp_path: Path) -> None:
    graph, build = rewritten(checkpoint)
    write_engine(tmp_path, graph, checkpoint, 1 << 30)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    prompt = families.prompt(checkpoint, 23)
    expected = families.reference_logits(checkpoint, prompt)
    np.testing.assert_allclose(run_prompt(tmp_path, graph, build, prompt), expected, atol=2e-5, rtol=1e-5)


def test_every_weight_has_its_place(checkpoint: Path) -> None:
    graph, _ = rewritten(checkpoint)
    model, table = bind_later(graph)
    rows = table["weights"]
    ends = [0, *(row["offset"] + row["nbytes"] for row in rows)]
    assert all(row["offset"] % 4096 == 0 and 0 <= row["offset"] - end < 4096 for row, end in zip(rows, ends, strict=False))
    assert table["size"] == ends[-1]
    recipes = [(row["dtype"], json.dumps(row["recipe"])) for row in rows]
    assert len(set(recipes)) == len(recipes), "equal weights are packed once"
    assert {given.name for given in model.graph.input} == {given.name for given in graph.data_inputs}
    spans = {(row["offset"], row["offset"] + row["nbytes"]) for row in rows}
    covered = set()
    for proto in (one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL):
        data = {entry.key: entry.value for entry in proto.external_data}
        start, stop = int(data["offset"]), int(data["offset"]) + int(data["length"])
        (inside,) = [span for span in spans if span[0] <= start and stop <= span[1]]
        covered.add(inside)
        assert data["location"] == "weights.bin" and stop - start == 4 * prod(proto.dims)
    assert covered == spans


def test_tied_embedding_is_packed_once_and_mapped_twice(tied: Path) -> None:
    graph, _ = rewritten(tied)
    model, table = bind_later(graph)
    (embedding,) = [row for row in table["weights"] if row["nbytes"] == 307 * 64 * 4]
    there = [
        proto.name
        for proto in model.graph.initializer
        if any(entry.key == "offset" and entry.value == str(embedding["offset"]) for entry in proto.external_data)
    ]
    assert len(there) == 2
    readers = {node.op_type for node in model.graph.node for name in node.input if name in there}
    assert readers == {"Gather", "FusedMatMul"}


@pytest.mark.parametrize("largest", [5000, 30000])
def test_sliced_matrices_give_the_same_logits(tied: Path, tmp_path: Path, largest: int) -> None:
    graph, build = rewritten(tied)
    table = write_engine(tmp_path, graph, tied, largest)
    assert table == bind_later(graph)[1], "slicing changes the graph, not the file"
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    slices = [one for one in model.graph.initializer if ".part" in one.name]
    assert len(slices) > 3 and all(4 * prod(one.dims) <= largest + 4 * one.dims[1] for one in slices)
    prompt = families.prompt(tied, 17)
    expected = families.reference_logits(tied, prompt)
    np.testing.assert_allclose(run_prompt(tmp_path, graph, build, prompt), expected, atol=2e-5, rtol=1e-5)


def test_compiling_reads_no_weights(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, build = rewritten(tied)
    stages = []
    with Tensors.open(tied) as tensors:
        monkeypatch.setattr(Tensors, "array", lambda self, name: pytest.fail(f"{name} was read"))
        compiled = COMPILER.compile(graph, build, tensors, {}, tmp_path, lambda *stage: stages.append(stage))
    assert stages[-1] == ("compile", 2, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(compiled.files) == ["model.onnx", "weights.json"]
    assert compiled.weights == {"table": "weights.json"}
    assert compiled.needs["kind"] == "cpu" and compiled.needs["packages"] == {"onnxruntime": onnxruntime.__version__}
    again = tmp_path / "again"
    again.mkdir()
    COMPILER.compile(graph, build, None, {}, again)  # shapes only
    assert all((again / name).read_bytes() == path.read_bytes() for name, path in compiled.files.items()), "reproducible"


def test_abi(tied: Path) -> None:
    graph, build = rewritten(tied)
    abi = abi_of(graph, build)
    names = ["token_ids", "positions", "query_starts", "kv_lengths", "block_table.full", "logit_rows"]
    assert [given.name for given in abi.inputs] == names and all(given.dtype == "int32" for given in abi.inputs)
    assert [(out.name, out.dtype, out.shape) for out in abi.outputs] == [("logits", "float32", ("R", 307))]
    assert [cache.name for cache in abi.caches] == ["kv.0", "kv.1"]
    assert abi.caches[0].shape == (build.limits.max_blocks, 2, 4, 2, 16) and abi.caches[0].dtype == "float32"
    assert [extra.name for extra in abi.index_inputs] == [extra.name for extra in graph.index_inputs]


def test_what_is_missing_is_listed_at_once(tied: Path, tmp_path: Path) -> None:
    graph, build = rewritten(tied)
    norm = graph.weights["final_norm"]
    graph.weights["final_norm"] = dataclasses.replace(norm, recipe=tensor("model.norm.gone", norm.shape))
    name = "layer.0.norm1"
    graph.weights[name] = dataclasses.replace(graph.weights[name], recipe=tensor("model.norm.weight", (65,)))
    graph.weights["layer.0.norm2"] = Weight("layer.0.norm2", "float32", scale("layer.0.qkv"))
    with Tensors.open(tied) as tensors, pytest.raises(CompileError) as caught:
        COMPILER.compile(graph, build, tensors, {}, tmp_path)
    message = str(caught.value)
    assert "final_norm needs tensor 'model.norm.gone'" in message
    assert "layer.0.norm1 needs 'model.norm.weight' of shape [65]; the checkpoint has [64]" in message
    assert "layer.0.norm2 needs the scale 'layer.0.qkv'" in message
    assert not list(tmp_path.iterdir())


def test_refusals(tied: Path, tmp_path: Path) -> None:
    build = build_spec(families.spec(tied))
    plain = expand(build.model, "float32")
    with pytest.raises(CompileError, match="no KV cache"):
        COMPILER.compile(plain, build, None, {}, tmp_path)
    plain.dtype = "bfloat16"
    with pytest.raises(CompileError, match="float32 on a CPU, not in bfloat16"):
        COMPILER.compile(plain, build, None, {}, tmp_path)
    assert COMPILER.supports(HardwareSpec("cpu", "cpu")) == ""
    assert "pick hardware=cpu" in COMPILER.supports(HardwareSpec("h200", "gpu", sm=90, memory=1))
    with pytest.raises(CompileError, match=r"'fast' does not exist here; pick one of onnxruntime"):
        get_compiler("fast")
    assert set(COMPILERS) <= set(KNOWN) and all(compiler.name == name for name, compiler in COMPILERS.items())


def test_prediction_follows_from_the_graph(tied: Path) -> None:
    graph, build = rewritten(tied)
    _, table = bind_later(graph)
    assert weight_bytes(graph) == sum(row["nbytes"] for row in table["weights"])
    assert pool_bytes(graph, build) == sum(4 * prod(cache.shape) for cache in abi_of(graph, build).caches)
    sizes = predict(graph, build)
    assert sizes == COMPILER.predict(graph, build)
    assert sizes["run_ram"] - sizes["build_ram"] == weight_bytes(graph) + pool_bytes(graph, build)


def test_run_reference_is_the_plain_model(tied: Path) -> None:
    build = build_spec(families.spec(tied))
    graph = expand(build.model, "float32")
    with Tensors.open(tied) as tensors:
        weights = {name: materialize(weight, tensors, {}) for name, weight in graph.weights.items()}
        prompt = families.prompt(tied, 9)
        feeds = {"token_ids": np.array([prompt]), "positions": np.arange(9)[None]}
        logits = run_reference(graph, feeds, weights)["logits"]
    np.testing.assert_allclose(logits[0], families.reference_logits(tied, prompt), atol=2e-5, rtol=1e-5)


def test_run_reference_takes_small_floats_and_names_refusals() -> None:
    graph = ModelGraph(new_graph("cast"), {}, [], "float32")
    values = {
        "a": np.array([1.5, -2.0, 448.0], ml_dtypes.float8_e4m3fn),
        "b": np.array([1.5, 3e38, -1e-3], ml_dtypes.bfloat16),
    }
    for name, dtype in (("a", "float8e4m3"), ("b", "bfloat16")):
        x = graph.add_weight(Weight(name, dtype, computed("constant", (3,))))
        out = gs.Variable(f"{name}_out", np.float32, [3])
        graph.graph.nodes.append(gs.Node("Cast", attrs={"to": onnx.TensorProto.FLOAT}, inputs=[x], outputs=[out]))
        graph.graph.outputs.append(out)
    outputs = run_reference(graph, {}, values)
    for name, array in values.items():
        np.testing.assert_array_equal(outputs[f"{name}_out"], array.astype(np.float32))
    graph.graph.nodes[0].op = "Frobnicate"
    with pytest.raises(CompileError, match=r"onnxruntime refuses the graph.*Frobnicate"):
        run_reference(graph, {}, values)
