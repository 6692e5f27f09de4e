"""Real TensorRT-RTX plans, built on this machine without a GPU, and what is said when none can be built."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import families
import pytest
from tensorrt_graphs import build_spec, hardware, rtx, tiny_graph, write_checkpoint

from zoo.calibration import calibrate
from zoo.compilers import tensorrt_common, tensorrt_rtx
from zoo.compilers.base import pool_bytes, weight_bytes
from zoo.compilers.tensorrt import TensorRtCompiler
from zoo.compilers.tensorrt_common import Log, Progression
from zoo.compilers.tensorrt_fit import device_bytes
from zoo.compilers.tensorrt_rtx import TensorRtRtxCompiler
from zoo.errors import CompileError, ResourceError, UnavailableError
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.spec import BuildSpec, HardwareSpec, Limits, ParallelSpec, QuantSpec
from zoo.targets import TARGETS
from zoo.weights.reader import Tensors

COMPILER = TensorRtRtxCompiler()
MAGIC = b"vtrt"
H200 = HardwareSpec("h200-sxm", "gpu", 90, 150_000_000_000, dtypes=("bfloat16",), compilers=("cuda", "tensorrt"))
A100 = hardware("a100", 80, quants=("none",))
CPU = HardwareSpec("cpu", "cpu")


@pytest.fixture
def tensors(tmp_path: Path) -> Tensors:
    write_checkpoint(tmp_path)
    return Tensors.open(tmp_path)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def plan_size(data: bytes) -> int:
    """The length that a plan's own header gives: 64 bits at byte 16."""
    return int.from_bytes(data[16:24], "little")


@pytest.mark.parametrize(
    ("sm", "dtype", "quant"),
    [
        (80, "bfloat16", "none"),
        (80, "float16", "none"),
        (89, "float16", "fp8"),
        (89, "bfloat16", "fp8"),
        (120, "bfloat16", "fp8"),
    ],
)
def test_plans_are_built_without_a_gpu(tensors: Tensors, work: Path, sm: int, dtype: str, quant: str) -> None:
    rtx()
    graph, build, seen = tiny_graph(dtype, quant == "fp8"), build_spec(hardware(sm=sm), dtype, quant), []
    engine = COMPILER.compile(graph, build, tensors, {"linear": 0.02}, work, lambda *one: seen.append(one))
    data = engine.files["engine.plan"].read_bytes()
    assert data.startswith(MAGIC) and plan_size(data) == len(data) > 1000
    assert [path.name for path in work.iterdir()] == ["engine.plan"]
    assert engine.scratch > 0 and engine.weights == {"table": ""}
    assert engine.needs["sm"] == sm and engine.needs["packages"] == {"tensorrt_rtx": COMPILER.version()}
    assert engine.needs["memory"] == device_bytes(weight_bytes(graph), pool_bytes(graph, build), engine.scratch)
    assert engine.abi.caches[0].dtype == dtype and [one.name for one in engine.abi.index_inputs] == ["slots", "query_rows"]
    steps = [done for stage, done, _ in seen if stage == "compile"]
    assert steps == sorted(steps) and steps[-1] == 1000 and len(steps) > 5
    assert ("bind weights", len(graph.weights), len(graph.weights)) in seen


def test_the_plan_holds_the_weights(tensors: Tensors, work: Path) -> None:
    """The embedding's bytes stand in the plan as they are: they came by pointer, not through the model."""
    rtx()
    engine = COMPILER.compile(tiny_graph(), build_spec(hardware()), tensors, {}, work)
    rows = tensors.array("embed").astype("float16")
    assert rows.tobytes() in engine.files["engine.plan"].read_bytes()


@pytest.mark.parametrize(("sm", "dtype", "quant"), [(80, "bfloat16", "none"), (120, "float16", "fp8")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_models_are_built(tmp_path: Path, work: Path, family: str, sm: int, dtype: str, quant: str) -> None:
    """From a checkpoint through all passes: paged attention in standard ops, FP8 layers, fused weights."""
    rtx()
    folder = families.make_checkpoint(tmp_path, family)
    model, tensors = families.spec(folder), Tensors.open(folder)
    limits = Limits(max_tokens=32, max_sequences=6, block_size=4, max_context=64).resolve(model)
    build = BuildSpec(model, QuantSpec(quant, quant), hardware(sm=sm), ParallelSpec(), limits, "tensorrt_rtx", dtype)
    graph = run_passes(expand(model, dtype, limits.max_context), build, TARGETS["tensorrt_rtx"])
    scales = calibrate(model, tensors, families.prompt(folder, 32)) if quant == "fp8" else {}
    engine = COMPILER.compile(graph, build, tensors, scales, work)
    data = engine.files["engine.plan"].read_bytes()
    assert data.startswith(MAGIC) and plan_size(data) == len(data) > weight_bytes(graph)
    assert engine.scratch > 0


def test_datacenter_graphs_pass_the_same_builder(tmp_path: Path) -> None:
    """What the ``tensorrt`` target makes of a model, zoo ops in standard ops, with TensorRT-RTX as the library."""
    trt = rtx()
    folder = families.make_checkpoint(tmp_path, "llama")
    model, tensors = families.spec(folder), Tensors.open(folder)
    limits = Limits(max_tokens=32, max_sequences=6, block_size=4, max_context=64).resolve(model)
    build = BuildSpec(model, QuantSpec("fp8", "fp8"), hardware(), ParallelSpec(), limits, "tensorrt", "bfloat16")
    graph = run_passes(expand(model, "bfloat16", limits.max_context), build, TARGETS["tensorrt"])
    assert {node.op for node in graph.graph.nodes if node.domain == "zoo"} == {"ZooPagedAttentionPadded", "ZooFp8Linear"}
    assert tensorrt_common.registered(trt, graph) == frozenset()

    def configure(trt: Any, config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)

    scales = calibrate(model, tensors, families.prompt(folder, 32))
    tensorrt_common.build_plan(trt, graph, build, tensors, scales, tmp_path / "engine.plan", None, configure)
    assert (tmp_path / "engine.plan").read_bytes().startswith(MAGIC)


def test_head_sizes_without_a_kernel_are_built_from_elementary_layers(tmp_path: Path, work: Path) -> None:
    rtx()
    folder = families.make_checkpoint(tmp_path, "llama", head_dim=40, num_hidden_layers=1)
    graph, build = family_graph(folder)
    assert COMPILER.compile(graph, build, Tensors.open(folder), {}, work).files["engine.plan"].stat().st_size > 10_000


def test_odd_head_sizes_are_refused(tmp_path: Path, work: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama", head_dim=10, num_hidden_layers=1)
    graph, build = family_graph(folder)
    with pytest.raises(CompileError, match=r"head sizes that are multiples of 8, and 'llama-.*' has 10"):
        COMPILER.compile(graph, build, Tensors.open(folder), {}, work)


def family_graph(folder: Path) -> tuple[Any, BuildSpec]:
    model = families.spec(folder)
    limits = Limits(max_tokens=16, max_sequences=2, block_size=4, max_context=16).resolve(model)
    build = BuildSpec(model, QuantSpec("none"), hardware(), ParallelSpec(), limits, "tensorrt_rtx", "bfloat16")
    return run_passes(expand(model, "bfloat16", 16), build, TARGETS["tensorrt_rtx"]), build


def test_parser_errors_name_node_and_op(tensors: Tensors, work: Path) -> None:
    rtx()
    with pytest.raises(CompileError, match=r"refuses the graph:\n  layer\.0\.linear/product \(NoSuchOp\): .*Plugin not found"):
        COMPILER.compile(tiny_graph(op="NoSuchOp"), build_spec(hardware()), tensors, {}, work)
    assert list(work.iterdir()) == []


def test_builder_errors_are_passed_on(tensors: Tensors, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that parses and cannot be built: the builder's own words, and no line about the missing GPU."""
    rtx()
    monkeypatch.setattr(tensorrt_common, "shapes", lambda graph, limits: [])
    with pytest.raises(CompileError, match=r"tensorrt_rtx cannot build tiny none-l40s-tensorrt_rtx-tp1:\n.*profile") as caught:
        COMPILER.compile(tiny_graph(), build_spec(hardware()), tensors, {}, work)
    assert "driver" not in str(caught.value)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop")])
def test_a_receiver_that_raises_stops_the_build(tensors: Tensors, work: Path, error: BaseException) -> None:
    rtx()
    calls = []

    def receive(stage: str, done: int, total: int) -> None:
        if stage == "compile":
            calls.append(done)
            raise error

    with pytest.raises(type(error)):
        COMPILER.compile(tiny_graph(), build_spec(hardware()), tensors, {}, work, receive)
    assert len(calls) == 1 and list(work.iterdir()) == []


def test_a_full_disk_leaves_nothing(tensors: Tensors, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx()
    real = tensorrt_common._writer

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            self.file.write(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorrt_common, "_writer", lambda trt, file, failed: real(trt, Full(file), failed))
    with pytest.raises(ResourceError, match=r"could not be written to .*engine\.plan: .*No space left"):
        COMPILER.compile(tiny_graph(), build_spec(hardware()), tensors, {}, work)
    assert list(work.iterdir()) == []


def test_too_little_disk_is_said_before_the_build(tensors: Tensors, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match=r"needs 50\.0 MB of disk"):
        COMPILER.compile(tiny_graph(), build_spec(hardware()), tensors, {}, work)


def test_a_float8_cache_is_refused(tensors: Tensors, work: Path) -> None:
    with pytest.raises(CompileError, match=r"refuses a float8 cache \(kv.0\): keep the cache in float16"):
        COMPILER.compile(tiny_graph(pool_dtype="float8e4m3"), build_spec(hardware()), tensors, {}, work)


@pytest.mark.parametrize(
    ("build", "graph_dtype", "said"),
    [
        (build_spec(hardware(), "float32"), "float32", "cannot compute in float32 on l40s; pick dtype=bfloat16 or float16"),
        (build_spec(A100, quant="fp8"), "float16", "a100 does not run quant 'fp8'; pick one of method none"),
        (build_spec(H200, "bfloat16"), "bfloat16", "8.9, 12.0, 12.1, not 9.0; for h200-sxm use compiler=cuda or tensorrt"),
    ],
)
def test_what_cannot_be_built(tensors: Tensors, work: Path, build: BuildSpec, graph_dtype: str, said: str) -> None:
    with pytest.raises(CompileError, match=said.replace(".", r"\.")):
        COMPILER.compile(tiny_graph(graph_dtype), build, tensors, {}, work)
    assert list(work.iterdir()) == []


def test_a_model_without_a_checkpoint_is_refused(work: Path) -> None:
    with pytest.raises(CompileError, match=r"model 'tiny' names no checkpoint: set model\.checkpoint=FOLDER"):
        COMPILER.compile(tiny_graph(), build_spec(hardware()), None, {}, work)


def test_supports() -> None:
    assert COMPILER.supports(hardware(sm=89)) == "" and COMPILER.supports(hardware(sm=120)) == ""
    assert "SM 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not 9.0" in COMPILER.supports(H200)
    assert COMPILER.supports(CPU).startswith("it builds for GPUs, and 'cpu' is a cpu; for cpu use compiler=onnxruntime")
    assert "it computes in float16, bfloat16" in COMPILER.supports(HardwareSpec("old", "gpu", 75, 1 << 30))
    assert TensorRtCompiler().supports(H200) == ""


@pytest.mark.parametrize(
    ("memory", "blocks", "context", "said"),
    [
        (600_000_000, 200_000, 16, r"lower limits\.max_blocks to \d+ \(now 200000\)"),
        (501_000_000, 1025, 4096, r"lower limits\.max_context to \d+ and limits\.max_blocks to \d+"),
        (400_000_000, 9, 16, "take a larger GPU, or quant=fp8"),
    ],
)
def test_what_does_not_fit_the_card_says_how_much(
    tensors: Tensors, work: Path, memory: int, blocks: int, context: int, said: str
) -> None:
    """Before anything is compiled. With the advice followed it fits."""
    build = build_spec(hardware(memory=memory), max_blocks=blocks, max_context=context)
    text = (
        r"KV pools 2 x [\d.]+ [kM]B .*this target reads one copy and writes another.*l40s has "
        if blocks > 9
        else r"weights 8\.2 kB"
    )
    with pytest.raises(ResourceError, match=f"{text}.*{said}"):
        COMPILER.compile(tiny_graph(), build, tensors, {}, work)


def test_the_advice_fits(tensors: Tensors, work: Path) -> None:
    rtx()
    import re

    build = build_spec(hardware(memory=600_000_000), max_blocks=200_000)
    with pytest.raises(ResourceError) as caught:
        COMPILER.compile(tiny_graph(), build, tensors, {}, work)
    blocks = int(re.search(r"max_blocks to (\d+)", str(caught.value))[1])
    smaller = build_spec(hardware(memory=600_000_000), max_blocks=blocks)
    needed = device_bytes(weight_bytes(tiny_graph()), pool_bytes(tiny_graph(), smaller), 0)
    assert needed <= 600_000_000 < device_bytes(weight_bytes(tiny_graph()), pool_bytes(tiny_graph(), build), 0)


def test_scratch_that_does_not_fit_is_found_after_the_build(tensors: Tensors, work: Path) -> None:
    rtx()
    build = build_spec(hardware(memory=500_300_000))
    with pytest.raises(ResourceError, match=r"scratch 8\.\d MB.*lower limits\.max_tokens or limits\.max_context"):
        COMPILER.compile(tiny_graph(), build, tensors, {}, work)
    assert list(work.iterdir()) == []


def test_predict_counts_both_pools() -> None:
    graph, build = tiny_graph(), build_spec(hardware())
    predicted = COMPILER.predict(graph, build)
    assert predicted["run_ram"] == device_bytes(weight_bytes(graph), pool_bytes(graph, build), 0)
    assert predicted["build_ram"] > 3 * weight_bytes(graph)


def test_an_absent_library_is_one_line(work: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    monkeypatch.setattr(tensorrt_rtx.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tensorrt_rtx, "PACKAGE", "no-such-distribution")
    for text in (
        COMPILER.available(),
        _error(COMPILER.version),
        _error(lambda: COMPILER.compile(tiny_graph(), build_spec(hardware()), tensors, {}, work)),
    ):
        assert "pip install 'engine-zoo[rtx]'" in text and "\n" not in text


def _error(call: Any) -> str:
    with pytest.raises(UnavailableError) as caught:
        call()
    return str(caught.value)


def test_datacenter_tensorrt_refuses_without_package_or_gpu(
    work: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.compilers import tensorrt

    compiler = TensorRtCompiler()
    build = build_spec(H200, "bfloat16", compiler="tensorrt")
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'engine-zoo[trt]'" in compiler.available()
    assert "pip install 'engine-zoo[trt]'" in _error(lambda: compiler.compile(tiny_graph("bfloat16"), build, tensors, {}, work))
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(tensorrt, "describe_machine", lambda: type("Machine", (), {"gpus": ()})())
    assert "this machine has no NVIDIA GPU" in compiler.available()
    assert "this machine has no NVIDIA GPU" in _error(lambda: compiler.compile(tiny_graph("bfloat16"), build, tensors, {}, work))
    gpu = type("Gpu", (), {"sm": 89, "name": "NVIDIA L40S"})()
    monkeypatch.setattr(tensorrt, "describe_machine", lambda: type("Machine", (), {"gpus": (gpu,)})())
    with pytest.raises(UnavailableError, match=r"NVIDIA L40S has SM 8\.9, hardware 'h200-sxm' has SM 9\.0"):
        tensorrt.check_gpu(build)


def test_log_keeps_errors_and_adds_memory_up() -> None:
    log = Log()
    for severity, text in (
        ("INFO", "Total Device Persistent Memory: 512 bytes"),
        ("INFO", "Total Activation Memory: 1000 bytes"),
        ("INFO", "Total Activation Memory: 3000 bytes"),
        ("INFO", "Total Weights Memory: 77 bytes"),
        ("ERROR", "wrong"),
        ("ERROR", "wrong"),
        ("WARNING", "odd"),
    ):
        log.add(severity, text)
    assert log.errors == ["wrong"] and log.scratch == 3512 and Log().scratch == 0


def test_progress_of_nested_phases_only_grows() -> None:
    seen: list[int] = []
    progression = Progression(lambda stage, done, total: seen.append(done))
    progression.start("outer", 2)
    progression.start("inner", 4)
    for step in range(4):
        assert progression.step("inner", step)
    progression.finish("inner")
    progression.step("outer", 0)
    progression.start("inner", 2)
    progression.step("inner", 0)
    progression.finish("inner")
    progression.step("outer", 1)
    progression.finish("outer")
    assert seen == [125, 250, 375, 500, 750, 1000] and progression.open == []
