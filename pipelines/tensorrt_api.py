"""Records what NVIDIA's TensorRT bindings offer, so that the code that uses them can be checked without a GPU.

    python pipelines/tensorrt_api.py            compare the record with NVIDIA's bindings; exit 1 when they differ
    python pipelines/tensorrt_api.py --write    make the record anew

The bindings' wheel is public, the libraries it is linked with are not. It is downloaded with pip, imported against
stand-ins for the libraries (symbols are bound lazily, so only few must exist), and described: names of the module, and
members, parameters and results of the classes that Engine Zoo uses. Nothing of TensorRT runs. Needs pip and a C compiler.
``tests/compilers/test_tensorrt_names.py`` compares the code with the record.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

VERSION = "11.4.0.106"
WHEEL = "tensorrt-cu13-bindings"
RECORD = Path(__file__).parent.parent / "tests" / "compilers" / "tensorrt_api.json"
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
TAKEN = ("getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins")  # bound at import
CLASSES = (
    "Builder",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "ExecutionContextAllocationStrategy",
    "ComputeCapability",
    "DataType",
    "IAttention",
    "IAttentionInputLayer",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IPluginRegistry",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "IStreamWriter",
    "LayerType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "PreviewFeature",
    "Runtime",
)
PLUGIN_CLASSES = (
    "AutoTuneCombination",
    "KernelLaunchParams",
    "SymInt32",
    "SymIntExprs",
    "Tensor",
    "TensorDesc",
)  # tensorrt.plugin

Api = dict[str, Any]


def describe(module: Any) -> Api:
    """Names of a TensorRT module, and of each class in ``CLASSES`` that it has: member -> signatures, or "value"."""
    return {"version": module.__version__} | _described(module, CLASSES)


def describe_plugin(module: Any) -> Api:
    """The same for ``tensorrt.plugin``, a module in Python, and signatures of its functions, by name."""
    functions = {name: one for name, one in vars(module).items() if inspect.isfunction(one) and not name.startswith("_")}
    return _described(module, PLUGIN_CLASSES) | {"functions": {name: [_signature(one)] for name, one in functions.items()}}


def _described(module: Any, classes: tuple[str, ...]) -> Api:
    return {
        "names": sorted(name for name in dir(module) if not name.startswith("_") and not _is_module(getattr(module, name))),
        "classes": {name: _members(getattr(module, name)) for name in classes if hasattr(module, name)},
    }


def _is_module(value: Any) -> bool:
    return type(value).__name__ == "module"


def _members(one: Any) -> dict[str, Any]:
    public = [name for name in dir(one) if not name.startswith("_")]
    members: dict[str, Any] = {}
    for name in [*public, "__init__"]:
        member = getattr(one, name)
        if inspect.isfunction(member) or inspect.ismethod(member):
            members[name] = [_signature(member)]
            continue
        text = getattr(member, "__doc__", "") or ""
        found = signatures(name, text) if callable(member) else []
        members[name] = found or "value"
    return members


def _signature(function: Any) -> dict[str, Any]:
    """Parameters and result of a function in Python, in the form of ``signatures``."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [one.name + ("*" if one.default is not empty else "") for one in signature.parameters.values()]
    result = signature.return_annotation
    named = "" if result is inspect.Signature.empty else getattr(result, "__name__", str(result)).strip("'").split("[")[0]
    return {"parameters": [one for one in parameters if one != "self"], "result": named.split(".")[-1]}


def signatures(name: str, text: str) -> list[dict[str, Any]]:
    """Parameters (self apart; a star marks one with a default) and result of each overload in a pybind docstring."""
    found = []
    for match in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> (.*))?$", text, re.MULTILINE):
        if match[1] == "*args, **kwargs":
            continue
        parameters = [_parameter(part) for part in _top_level(match[1])]
        result = (match[2] or "").strip().split("[")[0].split(".")[-1].split("::")[-1]
        found.append({"parameters": [one for one in parameters if one != "self"], "result": result})
    return found


def _top_level(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _parameter(text: str) -> str:
    name, _, rest = text.partition(":")
    return name.strip() + ("*" if "=" in rest else "")


def download(folder: Path) -> None:
    """Put the bindings and stand-ins for their libraries into ``folder``. RuntimeError says what is missing."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*command, "--dest", str(folder), f"{WHEEL}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"pip cannot download {WHEEL} {VERSION}: {done.stderr.strip()[-500:]}")
    zipfile.ZipFile(wheels[0]).extractall(folder)
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise RuntimeError("no C compiler (cc) to make the stand-in libraries with")
    (folder / "none.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in TAKEN))
    for library in LIBRARIES:
        command = [
            compiler,
            "-w",
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{library}",
            "-o",
            str(folder / library),
            str(folder / "none.c"),
        ]
        subprocess.run(command, check=True, capture_output=True)


def describe_bindings() -> Api:
    """``describe`` for NVIDIA's own bindings, in a process of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download(folder)
        code = (
            "import sys, os, json; sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)\n"
            f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(folder)!r}]\n"
            "import tensorrt_api, tensorrt_bindings\n"
            "sys.modules['tensorrt'] = tensorrt_bindings  # the package of that name only hands these bindings on\n"
            "import tensorrt.plugin\n"
            "api = tensorrt_api.describe(tensorrt_bindings) | {'plugin': tensorrt_api.describe_plugin(tensorrt.plugin)}\n"
            "print(json.dumps(api))"
        )
        environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"the bindings do not import: {done.stderr.strip()[-800:]}")
        api: Api = json.loads(done.stdout.splitlines()[-1])  # TensorRT's logger may have said something before
        return api


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--write", action="store_true", help="make the record anew")
    found = describe_bindings()
    if arguments.parse_args().write:
        RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"wrote {RECORD}")
        return 0
    if found != json.loads(RECORD.read_text()):
        print(f"{RECORD} differs from {WHEEL} {VERSION}: make it anew with --write and look at the difference")
        return 1
    print(f"{RECORD} is what {WHEEL} {VERSION} offers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
