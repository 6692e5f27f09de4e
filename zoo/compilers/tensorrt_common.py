"""The build that TensorRT-RTX and TensorRT have in common: weights, profiles, progress, messages, the plan's file.

Every function that needs the library takes its module (``tensorrt_rtx`` or ``tensorrt``) as ``trt``: nothing here imports
one. tests/compilers/test_tensorrt_names.py checks every name used below against both libraries; for that, a TensorRT
object is always held in a variable named after its class (``builder``, ``config``, ``network``, ``parser``, ...).

Weights reach the parser as pointers. The model it gets (``parser_model``) has initializers without bytes, so a model of any
size is a few hundred kilobytes of ONNX, and only one copy of the weights is ours. The plan is streamed to its file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from zoo.compilers.base import Progress, pool_bytes, weight_bytes
from zoo.compilers.tensorrt_fit import check, check_device
from zoo.compilers.tensorrt_model import parser_model, shapes
from zoo.errors import CompileError, ResourceError
from zoo.graph import ModelGraph
from zoo.resources import check_disk
from zoo.spec import BuildSpec
from zoo.targets import TARGETS

if TYPE_CHECKING:
    import numpy as np

    from zoo.weights.reader import Tensors

PLAN_FILE = "engine.plan"
PROGRESS_STEPS = 1000


class Log:
    """Messages of one build: errors for the user, and the builder's memory report.

    TensorRT reports memory only in words: one "Total Activation Memory" a profile and "Device Persistent Memory". An engine
    can be asked, but only where it can be loaded, on its GPU.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.activation: list[int] = []
        self.persistent = 0

    def add(self, severity: str, text: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            # Where there is no GPU the builder asks for one after any error, and says that it found none.
            if text not in self.errors and "CUDA driver version is insufficient" not in text:
                self.errors.append(text)
        elif severity == "INFO":
            if found := re.search(r"Total Activation Memory: (\d+) bytes", text):
                self.activation.append(int(found[1]))
            elif found := re.search(r"Total Device Persistent Memory: (\d+) bytes", text):
                self.persistent = max(self.persistent, int(found[1]))

    @property
    def scratch(self) -> int:
        """Bytes of the largest profile's activations and persistent memory; 0 when the builder said nothing."""
        return max(self.activation) + self.persistent if self.activation else 0


class Progression:
    """Nested phases of a builder as one number that only grows: each step of a phase has an equal share of it.

    ``error`` is what the receiver raised: an exception must not travel through the library, so the build is stopped first.
    """

    def __init__(self, report: Progress) -> None:
        self.report = report
        self.open: list[list[Any]] = []  # [name, steps, steps done]
        self.shown = 0
        self.error: BaseException | None = None

    def start(self, name: str, steps: int) -> None:
        self.open.append([name, max(steps, 1), 0])

    def step(self, name: str, step: int) -> bool:
        """Count a step; False when the build should stop."""
        for phase in self.open:
            if phase[0] == name:
                phase[2] = min(step + 1, phase[1])
        share, done = 1.0, 0.0
        for _, steps, count in self.open:
            share /= steps
            done += share * count
        now = min(int(done * PROGRESS_STEPS), PROGRESS_STEPS)
        if now > self.shown and self.error is None:
            self.shown = now
            try:
                self.report("compile", now, PROGRESS_STEPS)
            except BaseException as error:
                self.error = error
        return self.error is None

    def finish(self, name: str) -> None:
        for index in range(len(self.open) - 1, -1, -1):
            if self.open[index][0] == name:
                del self.open[index]
                return


def _logger(trt: Any, log: Log) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.add(severity.name, msg)

    return Logger()


def _monitor(trt: Any, progression: Progression) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progression.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progression.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progression.finish(phase_name)

    return Monitor()


def _writer(trt: Any, file: Any, failed: list[OSError]) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes, size: int | None = None) -> int:  # the library gives the bytes alone
            try:
                return int(file.write(data))
            except OSError as error:
                failed.append(error)
                return 0

    return Writer()


def _parse(trt: Any, network: Any, logger: Any, model: bytes, arrays: Mapping[str, np.ndarray[Any, Any]], log: Log) -> Any:
    """Fill the network from the model, its weights by pointer; the arrays must live until the network is gone."""
    parser = trt.OnnxParser(network, logger)
    if not parser.load_model_proto(model):
        raise CompileError("the parser cannot read the model" + _said(log))
    for name, array in arrays.items():
        assert array.flags.c_contiguous, f"weight {name} is not contiguous"
        if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
            raise CompileError(f"the parser refuses the weight {name} of {array.nbytes} bytes" + _said(log))
    if not parser.parse_model_proto():
        lines = []
        for index in range(parser.num_errors):
            parser_error = parser.get_error(index)
            where = parser_error.node_name() or f"node {parser_error.node()}"
            lines.append(f"{where} ({parser_error.node_operator()}): {parser_error.desc()}")
        raise CompileError("the parser refuses the graph:\n  " + "\n  ".join(lines or log.errors or ["without a message"]))
    return parser


def registered(trt: Any, graph: ModelGraph) -> frozenset[str]:
    """The zoo ops of a graph that the library has a plugin for, by type, version and namespace."""
    registry = trt.get_plugin_registry()
    nodes = {node.op: node.attrs for node in graph.graph.nodes if node.domain == "zoo"}
    found = {op: registry.get_creator(op, attrs["plugin_version"], attrs["plugin_namespace"]) for op, attrs in nodes.items()}
    return frozenset(op for op, creator in found.items() if creator is not None)


def choose(model: onnx.ModelProto, implementations: Mapping[str, str]) -> None:
    """Say which implementation a quick plugin's node gets, by the attribute that the parser reads for it."""
    for node in model.graph.node:
        if node.op_type in implementations:
            node.attribute.add(name="aot", type=onnx.AttributeProto.INT, i=int(implementations[node.op_type] == "aot"))


def _allow_any_attention(trt: Any, network: Any) -> None:
    """Let attention of a shape without a kernel of its own (head size 40, say) become elementary layers."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class, and there is no other cast
            attention_layer = layer
            attention = attention_layer.attention
            attention.decomposable = True


def _said(log: Log) -> str:
    return ":\n  " + "\n  ".join(log.errors[-5:]) if log.errors else ""


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Any]:
    """A file beside ``path`` that becomes ``path`` when everything went well, and is removed otherwise."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def build_plan(
    trt: Any,
    graph: ModelGraph,
    build: BuildSpec,
    tensors: Tensors | None,
    scales: Mapping[str, float],
    path: Path,
    progress: Progress | None,
    configure: Callable[[Any, Any], None],
    implementations: Mapping[str, str] | None = None,
) -> int:
    """Build the engine of a rewritten graph into ``path`` and give its peak scratch in bytes (0: unknown).

    ``configure(trt, config)`` sets what only this library knows, such as the GPU to build for. ``implementations`` says which
    registered plugins to use, and of our own the implementation, "aot" or "jit" (``zoo.plugins.tensorrt``); without it, all that
    are registered. Raises CompileError with the node and the library's own words, ResourceError when the engine cannot fit its
    hardware or the plan its disk. Nothing is left behind then.
    """
    from zoo.weights.bind import materialize

    report: Progress = progress or (lambda stage, done, total: None)
    check(graph, build, tensors)
    limits = build.limits.resolve(build.model)
    device = weight_bytes(graph)
    check_device(build, device, pool_bytes(graph, build), 0)
    check_disk(device + 50_000_000, path.parent, f"the plan of {build.model.name} {build.profile}")

    plugins = registered(trt, graph) if TARGETS[build.compiler].zoo_ops == "plugin" else frozenset()
    if implementations is not None:
        if missing := sorted(set(implementations) - plugins):
            raise CompileError(f"{build.compiler} has not taken the plugins for {', '.join(missing)}")
        plugins &= set(implementations)
    model, weights = parser_model(graph, plugins)
    choose(model, implementations or {})
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for count, weight in enumerate(weights):
        report("bind weights", count, len(weights))
        arrays[weight.name] = materialize(weight, tensors, scales)
    report("bind weights", len(weights), len(weights))

    log = Log()
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    configure(trt, config)
    progression = Progression(report)
    config.progress_monitor = monitor = _monitor(trt, progression)
    for inputs in shapes(graph, limits):
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in inputs.items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    parser = _parse(trt, network, logger, model.SerializeToString(), arrays, log)
    _allow_any_attention(trt, network)
    failed: list[OSError] = []
    try:
        with _aside(path) as file:
            writer = _writer(trt, file, failed)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            if progression.error:
                raise progression.error
            if failed:
                raise failed[0]
            if not built:
                raise CompileError(f"{build.compiler} cannot build {build.model.name} {build.profile}" + _said(log))
            if file.tell() == 0:
                raise CompileError(f"{build.compiler} wrote an empty plan" + _said(log))
            check_device(build, device, pool_bytes(graph, build), log.scratch)
    except OSError as error:
        raise ResourceError(f"the plan of {build.model.name} {build.profile} could not be written to {path}: {error}") from error
    finally:
        del parser, monitor
    report("compile", PROGRESS_STEPS, PROGRESS_STEPS)
    return log.scratch
