"""Ahead-of-time compilation: Triton functions to cubins for one SM, on a machine without a GPU.

Run as ``python -m zoo.compilers.cuda.aot SM FOLDER`` with a JSON list of kernels on standard input: it writes
``FOLDER/<name>.cubin`` for each and prints a JSON object of what a launch needs to know. A process of its own keeps Triton's
memory and its environment (no interpreter, no line information, so that cubins do not depend on paths) out of the builder.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import CompileError
from zoo.plugins.kernels import Kernel

ENVIRONMENT = {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
POINTER_ALIGNMENT = [["tt.divisibility", 16]]


def compile_kernels(
    kernels: Sequence[Kernel], sm: int, folder: Path, progress: Callable[[int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Cubins of all kernels in ``folder``; name -> {"entry", "warps", "shared", "hidden"}, ``hidden`` the parameters that
    Triton adds behind the kernel's own. CompileError with Triton's words for a kernel that does not compile.
    """
    workers = max(1, min(len(os.sched_getaffinity(0)), 8, len(kernels)))
    shares = [list(kernels[number::workers]) for number in range(workers)]
    command = [sys.executable, "-m", "zoo.compilers.cuda.aot", str(sm), str(folder)]
    running = []
    for share in shares:
        process = subprocess.Popen(  # noqa: S603
            command,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):  # what ended it before it read is on its standard error
            process.stdin.write(json.dumps([to_json(kernel) for kernel in share]))
            process.stdin.close()
        process.stdin = None
        running.append(process)
    done: dict[str, dict[str, Any]] = {}
    problems = []
    for process in running:
        out, errors = process.communicate()
        if process.returncode:
            problems.append((errors.strip().splitlines() or ["the compiling process ended without a word"])[-1][:500])
            continue
        done |= json.loads(out)
        if progress:
            progress(len(done))
    if problems:
        raise CompileError(f"kernels for SM {sm // 10}.{sm % 10} do not compile: {problems[0]}")
    return done


def to_json(kernel: Kernel) -> dict[str, Any]:
    return {"name": kernel.name, **vars(kernel)}


def from_json(data: dict[str, Any]) -> Kernel:
    return Kernel(
        data["source"],
        tuple((name, kind) for name, kind in data["args"]),
        tuple((name, value) for name, value in data["constants"]),
        data["num_warps"],
        data["num_stages"],
        data["overlaps"],
    )


def compile_one(kernel: Kernel, sm: int) -> tuple[bytes, dict[str, Any]]:
    """One cubin and its description. Needs triton, not torch, and no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = kernel.source.partition(":")
    jit = getattr(importlib.import_module(module), function)
    types, constants = dict(kernel.args), dict(kernel.constants)
    assert [name for name in jit.arg_names if name in types] == [name for name, _ in kernel.args], (
        f"{kernel.source} takes {jit.arg_names}, the launch gives {list(types)} and {list(constants)}"
    )
    assert set(jit.arg_names) == set(types) | set(constants), f"{kernel.source}: {jit.arg_names} beside {types} and {constants}"
    source = ASTSource(
        fn=jit,
        signature={name: types.get(name, "constexpr") for name in jit.arg_names},
        constexprs={(place,): constants[name] for place, name in enumerate(jit.arg_names) if name in constants},
        attrs={(place,): POINTER_ALIGNMENT for place, name in enumerate(jit.arg_names) if types.get(name, "").startswith("*")},
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    meta = made.metadata
    if getattr(meta, "global_scratch_size", 0) or getattr(meta, "profile_scratch_size", 0):
        raise CompileError(f"{kernel.source} wants scratch memory of Triton's own, which no launch here gives")
    if getattr(meta, "num_ctas", 1) != 1:
        raise CompileError(f"{kernel.source} wants thread block clusters, which no launch here gives")
    if kernel.overlaps != ("griddepcontrol.wait" in made.asm["ptx"]):
        raise CompileError(f"{kernel.source} {'does not wait' if kernel.overlaps else 'waits'} for its inputs by itself")
    hidden = made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0].count(".param") - len(kernel.args)
    return made.asm["cubin"], {"entry": meta.name, "warps": meta.num_warps, "shared": meta.shared, "hidden": hidden}


def main() -> int:
    sm, folder = int(sys.argv[1]), Path(sys.argv[2])
    done = {}
    for data in json.load(sys.stdin):
        kernel = from_json(data)
        try:
            cubin, described = compile_one(kernel, sm)
        except Exception as error:  # Triton's errors share no base class; the last line is what it has to say
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            print(f"{kernel.source} ({data['name']}): {last}", file=sys.stderr)
            return 1
        (folder / f"{data['name']}.cubin").write_bytes(cubin)
        done[data["name"]] = described
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
