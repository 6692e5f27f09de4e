"""Kernels of TensorRT plugins, compiled ahead of time: cubins for "jit" plugins, PTX that "aot" plugins embed in an engine.

Run as ``python -m zoo.compilers.tensorrt_kernels SM FOLDER`` with a JSON list of kernels on standard input: it leaves
``plugins.json`` and for each kernel ``<name>.cubin`` and ``<name>.ptx`` in the folder. A process of its own, as for the ``cuda``
target (``zoo.compilers.cuda.aot``, which does the compiling).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.compilers.cuda.aot import ENVIRONMENT, compile_one, from_json, to_json
from zoo.errors import CompileError
from zoo.graph import ModelGraph
from zoo.plugins.kernels import Kernel
from zoo.plugins.tensorrt import bindings
from zoo.plugins.tensorrt_kernels import INDEX


def kernels_of(graph: ModelGraph, ops: Mapping[str, str]) -> dict[str, Kernel]:
    """The kernels of all nodes of these ops, by name."""
    found = {}
    for node in graph.graph.nodes:
        if node.op in ops:
            binding = bindings()[node.op]
            ports = zip((port.name for port in binding.plugin.inputs), node.inputs, strict=True)
            shapes = {name: tuple(size if isinstance(size, int) else -1 for size in tensor.shape or ()) for name, tensor in ports}
            kernel = binding.launch(node.attrs, binding.dtypes(graph.dtype), shapes).kernel
            found[kernel.name] = kernel
    return found


def compile_plugins(kernels: Mapping[str, Kernel], sm: int, folder: Path) -> None:
    """Compile kernels into ``folder``; CompileError with Triton's words for one that does not compile."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "zoo.compilers.tensorrt_kernels", str(sm), str(folder)],
            env=os.environ | ENVIRONMENT | {"TRITON_CACHE_DIR": cache},
            input=json.dumps([to_json(kernel) for kernel in kernels.values()]),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise CompileError(f"kernels of plugins for SM {sm // 10}.{sm % 10} do not compile: {done.stderr.strip()[-2000:]}")


def without_hidden(ptx: str, hidden: int) -> str:
    """PTX whose kernel takes its own parameters only.

    Triton adds pointers to scratch memory behind them, which TensorRT would not pass: the driver would read arguments that
    nobody gave. A kernel that asks for no scratch never reads them, so they can go. AssertionError if it does.
    """
    head, entry, rest = ptx.partition(".entry ")
    given, closed, body = rest.partition(")")
    name, opened, listed = given.partition("(")
    parameters = [one.strip() for one in listed.split(",") if one.strip()]
    kept = parameters[: len(parameters) - hidden]
    for parameter in parameters[len(kept) :]:
        symbol = parameter.split()[-1]
        assert not re.search(rf"\b{re.escape(symbol)}\b", body), f"{name.strip()} reads {symbol}"
    assert entry and opened and closed, "PTX without a kernel"
    return f"{head}{entry}{name}(\n\t" + ",\n\t".join(kept) + f"\n){body}"


def main() -> int:
    sm, folder, cache = int(sys.argv[1]), Path(sys.argv[2]), Path(os.environ["TRITON_CACHE_DIR"])
    described: dict[str, Any] = {}
    for data in json.load(sys.stdin):
        known = set(cache.glob("*/*.ptx"))
        cubin, described[data["name"]] = compile_one(from_json(data), sm)
        (made,) = set(cache.glob("*/*.ptx")) - known  # Triton keeps every stage of a compilation in its cache
        (folder / f"{data['name']}.cubin").write_bytes(cubin)
        (folder / f"{data['name']}.ptx").write_text(without_hidden(made.read_text(), described[data["name"]]["hidden"]))
    (folder / INDEX).write_text(json.dumps({"kernels": described}, sort_keys=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
