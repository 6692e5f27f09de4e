"""Writing a ``cuda`` engine: plan, cubins, weight table. See ``zoo.compilers.cuda``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.compilers.base import CompiledEngine, Progress, abi_of, context_bytes, weight_bytes
from zoo.compilers.cuda.aot import compile_kernels, to_json
from zoo.compilers.cuda.plan import SCHEMA, Gemm, Plan, Planner, gemm_json, largest, launch_json
from zoo.graph import ModelGraph
from zoo.plugins.kernels import Launch
from zoo.plugins.sampling import cuda as sampling
from zoo.plugins.weight_kernels import weight_kernels
from zoo.spec import BuildSpec

PLAN_FILE = "plan.json"
TABLE_FILE = "weights.json"
BINDINGS = {"cuda-bindings": "13.0"}  # cuBLASLt may come from a wheel or from a toolkit, so the session looks for it
UNSAMPLED = ("greedy", "sample", "resolve")  # parts of a plan that an encoder has no launches in
RUNTIME = 400_000_000  # bytes of GPU memory that a session takes beside these: cuBLASLt's workspace, inputs, graphs, modules


def write_engine(graph: ModelGraph, build: BuildSpec, workdir: Path, report: Progress) -> CompiledEngine:
    """Plan, compile and write. CompileError for a node without a kernel, or a kernel that does not compile."""
    plan = Planner(graph, build, build.hardware.tuning).run()
    encoder = build.model.template == "encoder"  # it gives hidden states, of which nothing is sampled
    choosers = {part: [] for part in UNSAMPLED} if encoder else sampling.launches(build.model.vocab_size)
    kernels = plan.kernels | {one.kernel.name: one.kernel for launches in choosers.values() for one in launches}
    loaders = weight_kernels() if any(weight.recipe.op == "quantize" for weight in graph.weights.values()) else {}
    kernels |= {kernel.name: kernel for kernel in loaders.values()}
    folder = workdir / "kernels"
    folder.mkdir()
    report("compile kernels", 0, len(kernels))
    made = compile_kernels(
        list(kernels.values()), build.hardware.sm, folder, lambda done: report("compile kernels", done, len(kernels))
    )
    files = {f"kernels/{name}.cubin": folder / f"{name}.cubin" for name in kernels}
    described = {
        name: to_json(kernels[name]) | made[name] | {"digest": _digest(folder / f"{name}.cubin")} for name in sorted(kernels)
    }
    data = plan_json(plan, graph, build, described, choosers)
    limits = build.limits.resolve(build.model)
    data["sampling_scratch"] = {} if encoder else sampling.scratch(build.model.vocab_size, limits.max_rows)
    data["weight_kernels"] = {kind: {} for kind, _ in loaders}
    for (kind, dtype), kernel in loaders.items():
        data["weight_kernels"][kind][dtype] = kernel.name
    (workdir / PLAN_FILE).write_text(json.dumps(data, sort_keys=True))
    table = {"weights": [weight.to_json() for weight in graph.weights.values()]}
    (workdir / TABLE_FILE).write_text(json.dumps(table, sort_keys=True))
    return CompiledEngine(
        files={PLAN_FILE: workdir / PLAN_FILE, TABLE_FILE: workdir / TABLE_FILE, **files},
        abi=abi_of(graph, build),
        weights={"table": TABLE_FILE},
        scratch=plan.arena,
        needs={
            "kind": "gpu",
            "sm": build.hardware.sm,
            "memory": weight_bytes(graph) + plan.arena + context_bytes(graph, build) + RUNTIME,
            "packages": BINDINGS,
        },
    )


def plan_json(
    plan: Plan,
    graph: ModelGraph,
    build: BuildSpec,
    kernels: Mapping[str, Any],
    choosers: Mapping[str, list[Launch]],
) -> dict[str, Any]:
    """The plan as the artifact holds it."""
    inputs = {variable.name for variable in graph.data_inputs if not variable.name.startswith("kv.")}
    return {
        "schema": SCHEMA,
        "sm": build.hardware.sm,
        "dtype": build.dtype,
        "vocab_size": build.model.vocab_size,
        "largest": largest(build),
        "arena": plan.arena,
        "logits": plan.places[plan.root(graph.graph.outputs[0].name)],
        "inputs": sorted(inputs),
        "kernels": kernels,
        "steps": [gemm_json(step, plan) if isinstance(step, Gemm) else launch_json(step, plan) for step in plan.steps],
        "sampling": {name: [launch_json(launch, Plan()) for launch in launches] for name, launches in choosers.items()},
    }


def _digest(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
