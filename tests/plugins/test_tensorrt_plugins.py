"""TensorRT plugins: from contracts to NVIDIA's quick plugins, and through a build as far as that goes without the library.

NVIDIA's bindings are downloaded with pip, as in tests/compilers/test_tensorrt_names.py; ZOO_OFFLINE=1 switches that off.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from zoo.compilers import tensorrt as compiler
from zoo.compilers.tensorrt_common import build_plan, choose, registered
from zoo.compilers.tensorrt_kernels import kernels_of
from zoo.compilers.tensorrt_model import parser_model
from zoo.errors import ArtifactError, CompileError, EngineError, UnavailableError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.plugins import tensorrt as plugins
from zoo.plugins import tensorrt_kernels
from zoo.plugins.tensorrt import bindings, register_function, sizes_of
from zoo.plugins.tensorrt_kernels import Code, enqueue, read_code
from zoo.spec import BuildSpec, HardwareSpec, Limits, ParallelSpec, QuantSpec
from zoo.targets import TARGETS
from zoo.weights.reader import Tensors

ROOT = Path(__file__).parents[2]
ATTENTION, LINEAR = (bindings()[op] for op in ("ZooPagedAttention", "ZooFp8Linear"))
ATTRIBUTES = {"num_heads": 8, "kv_heads": 2, "head_dim": 64, "block_size": 16, "scale": 0.125, "window": 0, "softcap": 0.0}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``quick_plugins.py`` found, with NVIDIA's bindings."""
    if os.environ.get("ZOO_OFFLINE"):
        pytest.skip("ZOO_OFFLINE is set: NVIDIA's bindings are not downloaded")
    spec = importlib.util.spec_from_file_location("tensorrt_api", ROOT / "pipelines" / "tensorrt_api.py")
    assert spec and spec.loader
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    folder, kernels = tmp_path_factory.mktemp("bindings"), tmp_path_factory.mktemp("kernels")
    try:
        api.download(folder)
    except RuntimeError as error:
        if os.environ.get("ZOO_CI"):
            raise
        pytest.skip(f"NVIDIA's bindings cannot be looked at here: {error}")
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (ROOT, here.parent, here)))
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, here / "quick_plugins.py", folder, kernels], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_nvidias_bindings_take_the_plugins(findings: dict[str, Any]) -> None:
    assert findings["creators"] == [["ZooFp8Linear", "1", "zoo"], ["ZooPagedAttention", "1", "zoo"]]
    assert "T of its contract is float16 or bfloat16" in findings["float32"]


@pytest.mark.parametrize("pool", ["in place", "apart"])
def test_attention_runs_through_nvidias_jit_plugin(findings: dict[str, Any], pool: str) -> None:
    """kv_out shares the memory of input 3, kv. Where TensorRT keeps them apart, the pool is copied before the launch."""
    found = findings[pool]
    assert found["kind"] == "_TemplateJITPlugin" and found["aliases"] == [-1, 3]
    assert found["error"] < 1.2e-2 and found["pool"]
    launch = ["launch", 3, 5, 1]  # 3 key/value heads; 28 // 32 + 5 tiles
    assert found["calls"] == ([launch] if pool == "in place" else [["copy", 23 * 2 * 8 * 3 * 24 * 2], launch])


def test_attention_is_described_to_nvidias_aot_plugin(findings: dict[str, Any]) -> None:
    """Parameters: seven inputs, four sizes, two outputs, and none of Triton's own."""
    found = findings["aot attention"]
    assert found["kind"] == "_TemplateAOTPlugin" and found["entry"] == "paged_attention" and found["parameters"] == 7 + 4 + 2
    assert (found["grid"], found["block"], found["scalars"]) == ([3, 5, 1], [128, 1, 1], [28, 5, 9, 23])
    assert 0 < found["shared"] <= 48 << 10


def test_linear_layers_run_through_nvidias_plugins(findings: dict[str, Any]) -> None:
    assert findings["linear"]["aliases"] == [-1] and findings["linear"]["error"] < 2e-3
    assert findings["linear"]["calls"] == [["launch", 2, 2, 1]]
    found = findings["aot linear"]
    assert (found["parameters"], found["grid"], found["scalars"]) == (4 + 1 + 1, [2, 2, 1], [70])


class Desc:
    """``tensorrt.plugin.TensorDesc``, as far as a register function needs it."""

    def __init__(self, shape: tuple[Any, ...], dtype: str) -> None:
        self.shape_expr, self.dtype = shape, dtype

    def aliased(self) -> Any:
        return ("aliased", self)


TRT = SimpleNamespace(DataType=SimpleNamespace(FLOAT="fp32", HALF="fp16", BF16="bf16", FP8="fp8", INT32="i32"))
TRTP = SimpleNamespace(TensorDesc=Desc, from_shape_expr=lambda shape, dtype: (shape, dtype))


def test_contracts_become_descriptions() -> None:
    describe = register_function(TRT, TRTP, ATTENTION)
    signature = inspect.signature(describe)
    kinds = {name: one.annotation for name, one in signature.parameters.items()}
    inputs = ["q", "k", "v", "kv", "block_table", "query_starts", "kv_lengths"]
    assert list(kinds) == [*inputs, *ATTRIBUTES] and {kinds[name] for name in inputs} == {Desc}
    assert kinds["window"] == NDArray[np.int64] and kinds["scale"] == NDArray[np.float64]
    assert signature.return_annotation == tuple[Desc, Desc]
    q, k, v, kv = (Desc((1, "t", 512), "bf16"), *[Desc((1, "t", 128), "bf16")] * 2, Desc(("n", 2, 16, 2, 64), "bf16"))
    tables = Desc(("b", "p"), "i32"), Desc(("b+1",), "i32"), Desc(("b",), "i32")
    assert describe(q, k, v, kv, *tables, **ATTRIBUTES) == (((1, "t", 512), "bf16"), ("aliased", kv))


@pytest.mark.parametrize("leading", [(), ("r",), (1, "t"), (2, 3, "t")])
def test_leading_axes_and_widths(leading: tuple[Any, ...]) -> None:
    describe = register_function(TRT, TRTP, LINEAR)
    x, weight = Desc((*leading, 64), "fp16"), Desc((96, 64), "fp8")
    assert describe(x, weight, Desc((96,), "fp32"), Desc((), "fp32")) == (((*leading, 96), "fp16"),)
    assert sizes_of(LINEAR.plugin, LINEAR.plugin.outputs[0], {"x": 3, "weight": 2}) == [("x", 0), ("x", 1), ("weight", 0)]


@pytest.mark.parametrize("op", bindings())
def test_kernels_take_inputs_then_sizes_then_outputs(op: str) -> None:
    binding = bindings()[op]
    dtypes = binding.dtypes("bfloat16")
    kernel = binding.launch(ATTRIBUTES, dtypes, {"weight": (256, 128)}).kernel
    assert kernel.args == binding.kernel_args(dtypes) and binding.plugin.version == "1"
    names = [name for name, _ in kernel.args]
    assert names[: len(binding.plugin.inputs)] == [port.name for port in binding.plugin.inputs]
    assert [name for name, kind in kernel.args if kind == "i32"] == list(binding.sizes)
    assert names[-len(binding.plugin.outputs) :] == [port.name for port in binding.plugin.outputs]


def test_without_tensorrt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt.plugin"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match=r"quick plugins cannot be imported .*pip install 'engine-zoo\[trt\]'"):
        plugins.register(None, ["ZooPagedAttention"], {})


def call(monkeypatch: pytest.MonkeyPatch, code: dict[str, Code], **results: Any) -> None:
    """One launch of a linear layer, with a driver that answers as told."""
    driver = {name: lambda *_, answer=answer: answer for name, answer in results.items()}
    monkeypatch.setattr(tensorrt_kernels, "CODE", code)
    monkeypatch.setattr(tensorrt_kernels, "_FUNCTIONS", {})
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", SimpleNamespace(**driver) if driver else None)
    shapes = {"x": (1, 3, 128), "weight": (256, 128), "weight_scale": (256,), "x_scale": (), "y": (1, 3, 256)}
    enqueue(LINEAR, {}, LINEAR.dtypes("bfloat16"), shapes, dict.fromkeys(shapes, 256), 7)


def test_what_goes_wrong_at_a_launch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = LINEAR.launch({}, LINEAR.dtypes("bfloat16"), {"weight": (256, 128)}).kernel
    code = {kernel.name: Code(b"cubin", b"ptx", "fp8_linear", 4, 0, 2)}
    with pytest.raises(EngineError, match="is not among those of this engine; rebuild it"):
        call(monkeypatch, {})
    with pytest.raises(UnavailableError, match="pip install 'cuda-bindings"):
        call(monkeypatch, code)
    with pytest.raises(EngineError, match=r"cannot load kernel fp8_linear-.*: CUDA error 209"):
        call(monkeypatch, code, cuCtxGetCurrent=(0, 1), cuModuleLoadData=(209, None))
    done = {"cuCtxGetCurrent": (0, 1), "cuModuleLoadData": (0, 2), "cuModuleGetFunction": (0, 3)}
    call(monkeypatch, code, **done, cuLaunchKernel=(0,))
    with pytest.raises(EngineError, match="cannot launch a kernel: CUDA error 719"):
        call(monkeypatch, code, **done, cuLaunchKernel=(719,))


def test_kernels_that_are_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the kernels of its plugins cannot be read"):
        read_code(tmp_path)


def built(folder: Path, tuning: dict[str, Any] | None = None, quant: str = "fp8") -> tuple[ModelGraph, BuildSpec]:
    """A model as the passes leave it for TensorRT where attention is left to a plugin."""
    model = families.spec(families.make_checkpoint(folder, "llama"))
    limits = Limits(max_tokens=32, max_sequences=6, block_size=4, max_context=64).resolve(model)
    on = HardwareSpec("h100", "gpu", 90, 80_000_000_000, dtypes=("bfloat16",), quants=("none", "fp8"), compilers=("tensorrt",),
                      tuning=tuning or {})  # fmt: skip
    build = BuildSpec(model, QuantSpec(quant, quant), on, ParallelSpec(), limits, "tensorrt", "bfloat16")
    target = dataclasses.replace(TARGETS["tensorrt"], attention="plugin")
    return run_passes(expand(model, "bfloat16", limits.max_context), build, target), build


def test_attention_is_left_to_its_plugin_and_fp8_to_tensorrt(tmp_path: Path) -> None:
    graph, build = built(tmp_path)
    assert compiler.implementations_of(graph, build) == {"ZooPagedAttention": "aot"}
    kernels = kernels_of(graph, {"ZooPagedAttention": "aot"})
    assert len(kernels) == 1  # for all layers
    model, _ = parser_model(graph, {"ZooPagedAttention"})
    choose(model, {"ZooPagedAttention": "aot"})
    nodes = [node for node in model.graph.node if node.domain == "zoo"]
    assert len(nodes) == len(graph.layers) and {node.op_type for node in nodes} == {"ZooPagedAttention"}
    for node in nodes:
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        assert attributes["aot"] == 1 and attributes["plugin_namespace"] == b"zoo" and attributes["plugin_version"] == b"1"
    assert [value.name for value in model.graph.output if value.name.startswith("kv_out.")]
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def test_tuning_chooses_implementations(tmp_path: Path) -> None:
    choice = {"ZooPagedAttention": "jit", "ZooFp8Linear": "aot"}
    graph, build = built(tmp_path, {"tensorrt_plugins": choice})
    assert compiler.implementations_of(graph, build) == choice
    assert {kernel.source.partition(":")[2] for kernel in kernels_of(graph, choice).values()} == {"paged_attention", "fp8_linear"}
    for wrong in ({"ZooPagedAttention": "fast"}, {"ZooRmsNorm": "aot"}):
        _, build = built(tmp_path / str(len(wrong)) / next(iter(wrong)), {"tensorrt_plugins": wrong})
        with pytest.raises(CompileError, match="plugins exist for ZooPagedAttention, ZooFp8Linear, each as aot or jit"):
            compiler.implementations_of(graph, build)


def test_todays_graphs_ask_for_no_plugin(tmp_path: Path) -> None:
    """Until somebody has run one, the target lowers attention to standard ops."""
    _, build = built(tmp_path)
    graph = run_passes(expand(build.model, "bfloat16", build.limits.max_context), build, TARGETS["tensorrt"])
    assert compiler.implementations_of(graph, build) == {}


def test_an_engine_carries_the_kernels_of_its_jit_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = {"ZooPagedAttention": "jit", "ZooFp8Linear": "aot"}
    graph, build = built(tmp_path, {"tensorrt_plugins": choice})
    seen: list[Any] = []
    monkeypatch.setattr(plugins, "register", lambda trt, ops, code: seen.append((ops, code)))
    files = compiler.register_plugins(None, graph, build, choice, tmp_path / "plugins")
    ((ops, code),) = seen
    assert ops == list(choice) and set(code) == set(kernels_of(graph, choice))
    assert all(one.cubin.startswith(b"\x7fELF") and b".target sm_90a" in one.ptx for one in code.values())
    (jit,) = kernels_of(graph, {"ZooPagedAttention": "jit"})
    assert set(files) == {"plugins/plugins.json", f"plugins/{jit}.cubin"}
    engine = tmp_path / "engine"
    (engine / "plugins").mkdir(parents=True)
    for name, path in files.items():
        (engine / name).write_bytes(path.read_bytes())
    assert json.loads(files["plugins/plugins.json"].read_text())["implementations"] == choice
    assert read_code(engine / "plugins") == {jit: dataclasses.replace(code[jit], ptx=b"")}


def test_a_plugin_that_tensorrt_does_not_know_is_an_error(tmp_path: Path) -> None:
    graph, build = built(tmp_path, quant="none")
    registry = SimpleNamespace(get_creator=lambda op, version, namespace: None)
    trt = SimpleNamespace(get_plugin_registry=lambda: registry)
    assert registered(trt, graph) == frozenset()
    tensors = Tensors.open(families.make_checkpoint(tmp_path / "again", "llama"))
    with pytest.raises(CompileError, match="tensorrt has not taken the plugins for ZooPagedAttention"):
        build_plan(trt, graph, build, tensors, {}, tmp_path / "p", None, lambda *_: None, {"ZooPagedAttention": "aot"})
