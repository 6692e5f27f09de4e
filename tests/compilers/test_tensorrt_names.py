"""Every TensorRT name that the code uses exists in NVIDIA's bindings, and is called with parameters that it has.

No machine here has datacenter TensorRT, so this is the one check that its code gets. The code is read, not run: a TensorRT
object stands in a variable whose name says its class (``VARIABLES``), and what is read from such a variable or from ``trt`` is
looked up in the record of the 11.4 bindings and in the TensorRT-RTX that is installed. ``trtp`` is ``tensorrt.plugin``, which
TensorRT-RTX has not. The record itself is compared with the real bindings, downloaded with pip; ZOO_OFFLINE=1 switches that off.

Names that TensorRT-RTX alone has stand in zoo/compilers/tensorrt_rtx.py and in functions named ``rtx_...``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorrt_graphs import rtx

from zoo.targets import TARGETS

ROOT = Path(__file__).parents[2]
RECORD = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())
PLUGINS = "zoo/plugins/tensorrt.py"
SHARED = ("zoo/compilers/tensorrt_common.py", "zoo/compilers/tensorrt.py", "zoo/runtime/sessions/tensorrt.py", PLUGINS)
RTX_ONLY = ("zoo/compilers/tensorrt_rtx.py",)
VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "layer": "ILayer",
    "attention_layer": "IAttentionInputLayer",
    "attention": "IAttention",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
PLUGIN_VARIABLES = {"desc": "TensorDesc", "tensor": "Tensor"}  # classes of tensorrt.plugin
PROFILE = {"profile": "IOptimizationProfile"}  # a number in the session
ALIASES = {"IParserError": "ParserError"}
# Classes of the library that the code makes or gets, where no variable of that class may go by another name.
TRACKED = {*VARIABLES.values(), *PROFILE.values()}


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("tensorrt_api", ROOT / "pipelines" / "tensorrt_api.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt_api"] = module
    spec.loader.exec_module(module)
    return module


API = _script()


@dataclass(frozen=True)
class Use:
    """One use of a name: ``path`` from the module or from a class, and the call's arguments if it is called."""

    where: str
    path: tuple[str, ...]
    called: tuple[int, tuple[str, ...]] | None
    rtx_only: bool

    def __str__(self) -> str:
        return f"{self.where}: {'.'.join(self.path)}"


def uses(source: str, where: str, variables: dict[str, str], rtx_only: bool = False, module: str = "trt") -> Iterator[Use]:
    """All uses of a module of the library in a source file. AssertionError for an object in a variable that hides its class."""

    called: set[ast.AST] = set()

    def visit(node: ast.AST, rtx: bool) -> Iterator[Use]:
        for child in ast.iter_child_nodes(node):
            inside = rtx or (isinstance(child, ast.FunctionDef) and child.name.startswith("rtx_"))
            if isinstance(child, ast.Assign):
                _check_target(child)
            if isinstance(child, ast.ClassDef):
                yield from _overridden(child, inside)
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and (path := chain(child.func)):
                called.add(child.func)
                names = tuple(keyword.arg or "**" for keyword in child.keywords)
                yield Use(f"{where}:{child.lineno}", path, (len(child.args), names), inside)
            elif isinstance(child, ast.Attribute) and child not in called and (path := chain(child)):
                yield Use(f"{where}:{child.lineno}", path, None, inside)
            if isinstance(child, ast.Attribute):
                text = ast.unparse(child.value)
                assert text not in ("self._engine", "self._runtime", "self._runtime_cache", "self._trt") and not text.startswith(
                    "self._contexts["
                ), f"{where}:{child.lineno}: {ast.unparse(child)} hides the class; take it into a variable of VARIABLES first"
            yield from visit(child, inside)

    def chain(node: ast.Attribute) -> tuple[str, ...]:
        names: list[str] = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            names.insert(0, value.attr)
            value = value.value
        if not isinstance(value, ast.Name):
            return ()
        if value.id == module:
            return tuple(names)
        return (variables[value.id], *names) if value.id in variables else ()

    def _overridden(node: ast.ClassDef, rtx: bool) -> Iterator[Use]:
        for base in node.bases:
            if isinstance(base, ast.Attribute) and (path := chain(base)):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                        count = len(method.args.args) - 1
                        yield Use(f"{where}:{method.lineno}", (*path, method.name), (count, ()), rtx)

    def _check_target(node: ast.Assign) -> None:
        if not (isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)):
            return
        made = result_of(chain(node.value.func))
        for target in node.targets:
            if made in TRACKED and isinstance(target, ast.Name):
                assert variables.get(target.id) == made, (
                    f"{where}:{node.lineno}: {target.id} holds a {made}; name it after its class"
                )
            if made in TRACKED:
                assert isinstance(target, ast.Name), f"{where}:{node.lineno}: {ast.unparse(target)} hides a {made}"

    yield from visit(ast.parse(source), rtx_only)


def result_of(path: tuple[str, ...]) -> str:
    """The class that a call gives, as the record says; empty when unknown."""
    if len(path) == 1:
        return path[0]
    member = RECORD["classes"].get(path[0], {}).get(path[1]) if path else None
    results = {ALIASES.get(one["result"], one["result"]) for one in member} if isinstance(member, list) else set()
    return results.pop() if len(results) == 1 else ""


def problem(use: Use, api: dict[str, Any]) -> str:
    """Empty when the library has what is used, else what it lacks."""
    first, *rest = use.path
    if first not in api["names"]:
        return f"{use}: there is no {first}"
    if first.islower() and not rest:  # a function of the module
        known = api.get("functions", {}).get(first, [])
        if use.called and known and not any(_accepts(one["parameters"], *use.called) for one in known):
            return f"{use}: called with {use.called[0]} arguments, it takes {[one['parameters'] for one in known]}"
        return ""
    if first not in api["classes"]:
        return f"{use}: {first} is not in the record; add it to CLASSES of pipelines/tensorrt_api.py"
    members = api["classes"][first]
    name = rest[0] if rest else "__init__"
    if name == "__class__":
        return ""
    if rest and name not in members:
        return f"{use}: {first} has no {name}"
    overloads = members.get(name, "value")
    if use.called and name != "__init__" and overloads == "value":
        return f"{use}: {first}.{name} is no method"
    if not use.called and isinstance(overloads, list) and rest:
        return f"{use}: {first}.{name} is a method and is not called"
    # A base class's constructor is called with self; a class is called with what its constructor takes.
    if use.called and isinstance(overloads, list) and (not rest or name != "__init__"):
        count, keywords = use.called
        if not any(_accepts(one["parameters"], count, keywords) for one in overloads):
            return f"{use}: called with {count} arguments {list(keywords)}, it takes {[one['parameters'] for one in overloads]}"
    return ""


def _accepts(parameters: list[str], count: int, keywords: tuple[str, ...]) -> bool:
    names = [one.rstrip("*") for one in parameters]
    given = set(names[:count]) | set(keywords)
    needed = {one for one in parameters if not one.endswith("*")}
    return count <= len(names) and set(keywords) <= set(names[count:]) and needed <= given


def all_uses() -> list[Use]:
    found = []
    for file in (*SHARED, *RTX_ONLY):
        variables = VARIABLES if "sessions" in file else VARIABLES | PROFILE
        found += uses((ROOT / file).read_text(), file, variables, file in RTX_ONLY)
    return found


def plugin_uses() -> list[Use]:
    return list(uses((ROOT / PLUGINS).read_text(), PLUGINS, PLUGIN_VARIABLES, module="trtp"))


def test_the_reader_sees_the_code() -> None:
    """It finds what is known to be there, in every file, so that an empty answer is no pass."""
    seen = {(use.where.split(":")[0], ".".join(use.path)) for use in all_uses()}
    for one in (
        (SHARED[0], "OnnxParser.load_initializer"),
        (SHARED[0], "IOptimizationProfile.set_shape"),
        (SHARED[0], "IBuilderConfig.progress_monitor"),
        (SHARED[0], "IProgressMonitor.step_complete"),
        (SHARED[2], "ICudaEngine.get_tensor_profile_shape"),
        (SHARED[2], "IExecutionContext.execute_async_v3"),
        (SHARED[2], "IRuntimeCache.serialize"),
        (SHARED[0], "IPluginRegistry.get_creator"),
        (RTX_ONLY[0], "IBuilderConfig.set_compute_capability"),
        (SHARED[1], "PreviewFeature.ALIASED_PLUGIN_IO_10_03"),
        (PLUGINS, "DataType.FP8"),
        (PLUGINS, "IPluginRegistry.get_creator"),
    ):
        assert one in seen
    assert len(seen) > 40
    plugins = {".".join(use.path) for use in plugin_uses()}
    for one in ("register", "autotune", "aot_impl", "impl", "TensorDesc.aliased", "Tensor.data_ptr", "SymIntExprs.from_tuple"):
        assert one in plugins


def test_names_exist_in_tensorrt_11_4() -> None:
    assert RECORD["version"] == API.VERSION
    problems = [text for use in all_uses() if not use.rtx_only and (text := problem(use, RECORD))]
    assert not problems, "\n".join(problems)


def test_names_exist_in_tensorrt_plugin() -> None:
    problems = [text for use in plugin_uses() if (text := problem(use, RECORD["plugin"]))]
    assert not problems, "\n".join(problems)


def test_names_exist_in_tensorrt_rtx() -> None:
    module = rtx()
    api = API.describe(module)
    problems = [text for use in all_uses() if (text := problem(use, api))]
    assert not problems, "\n".join(problems)
    for sm in TARGETS["tensorrt_rtx"].sms:
        assert hasattr(module.ComputeCapability, f"SM{sm}")
    assert not hasattr(module.ComputeCapability, "SM90")


def test_rtx_only_names_are_marked() -> None:
    """What is marked as TensorRT-RTX's own is really absent from TensorRT, in at least one use of each marked function."""
    own = {".".join(use.path) for use in all_uses() if use.rtx_only and problem(use, RECORD)}
    assert {"IBuilderConfig.set_compute_capability", "Runtime.get_engine_validity", "IRuntimeConfig.create_runtime_cache"} <= own


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.set_compute_capability(1, 0)", "IBuilderConfig has no set_compute_capability"),
        ("trt.NoSuchThing()", "there is no NoSuchThing"),
        ("trt.NetworkDefinitionCreationFlag.WEAKLY_TYPED", "NetworkDefinitionCreationFlag has no WEAKLY_TYPED"),
        ("parser.load_initializer('a', 1)", "called with 2 arguments"),
        ("parser.load_initializer('a', pointer=1, size=2)", "called with 1 arguments ['pointer', 'size']"),
        ("config.progress_monitor()", "is no method"),
        ("n = network.num_layers + builder.reset", "is a method and is not called"),
        ("class L(trt.ILogger):\n  def say(self, severity, msg): ...", "ILogger has no say"),
        ("class L(trt.ILogger):\n  def log(self, msg): ...", "called with 1 arguments"),
    ],
)
def test_wrong_names_are_found(line: str, said: str) -> None:
    problems = [problem(use, RECORD) for use in uses(line, "here", VARIABLES)]
    assert any(said in text for text in problems), problems


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trtp.implement(plugin_id)", "there is no implement"),
        ("trtp.impl(plugin_id, function)", "called with 2 arguments"),
        ("trtp.KernelLaunchParams(grid=1)", "called with 0 arguments ['grid']"),
        ("trtp.SymIntExprs.of([])", "SymIntExprs has no of"),
        ("trtp.from_shape_expr(shape)", "called with 1 arguments"),
        ("x = desc.aliased", "is a method and is not called"),
        ("x = tensor.address", "Tensor has no address"),
    ],
)
def test_wrong_names_of_plugins_are_found(line: str, said: str) -> None:
    problems = [problem(use, RECORD["plugin"]) for use in uses(line, "here", PLUGIN_VARIABLES, module="trtp")]
    assert any(said in text for text in problems), problems


@pytest.mark.parametrize(
    "line",
    [
        "b = trt.Builder(logger)",
        "self._x = trt.OnnxParser(network, logger)",
        "self._engine.serialize()",
        "thing = builder.create_builder_config()",
    ],
)
def test_hidden_objects_are_found(line: str) -> None:
    with pytest.raises(AssertionError, match=r"hold|hides"):
        list(uses(line, "here", VARIABLES))


@pytest.mark.skipif(bool(os.environ.get("ZOO_OFFLINE")), reason="ZOO_OFFLINE is set: NVIDIA's bindings are not downloaded")
def test_the_record_is_what_nvidia_ships() -> None:
    try:
        real = API.describe_bindings()
    except RuntimeError as error:
        if os.environ.get("ZOO_CI"):
            raise
        pytest.skip(f"NVIDIA's bindings cannot be looked at here: {error}")
    assert real == RECORD, "make the record anew: python pipelines/tensorrt_api.py --write"
