"""A rewritten graph becomes a launch plan: kernel launches and GEMMs in order, with a place in memory for every tensor.

    views      Cast of ids, Squeeze, Unsqueeze, Reshape, Identity move no bytes: their output is another name of their input
    gemms      MatMul, FusedMatMul and ZooFp8Gemm by a weight become GEMM steps; a Cast of logits to float32 is part of its GEMM
    launches   every other node becomes what its ``lower`` says (``zoo.compilers.cuda.lowers``)

The plan is JSON (docs/engine-format.md) and says nothing of addresses: the session has an arena, weights, pools and inputs.

T tokens, R rows of logits, N outputs and K inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import onnx_graphsurgeon as gs

from zoo.compilers.base import DTYPE_NAMES, ITEM_SIZES, onnx_code
from zoo.compilers.cuda.lowers import LOWERS
from zoo.compilers.cuda.memory import Block, place
from zoo.errors import CompileError
from zoo.graph import ModelGraph
from zoo.plugins.kernels import CudaNode, Kernel, Launch, Scratch, Size, TensorRef
from zoo.spec import BuildSpec

SCHEMA = 1
VIEWS = ("Squeeze", "Unsqueeze", "Reshape", "Identity")
GEMMS = ("MatMul", "FusedMatMul", "ZooFp8Gemm")
SPLITS = 32  # the most parts that a decode step cuts a context into

Json = dict[str, Any]


@dataclass
class Gemm:
    """y [M, N] = x [M, K] · wᵀ, w [N, K] (or w [K, N] with ``stored`` "in_out"); float8 operands have scales."""

    x: str
    w: str
    y: str
    rows: Size
    n: int
    k: int
    dtype: str  # of x and w
    out: str  # dtype of y
    stored: str = "out_in"
    w_scale: str = ""
    x_scale: str = ""

    def to_json(self) -> Json:
        data = {key: value for key, value in vars(self).items() if key != "rows"}
        return {"op": "gemm", "rows": size_json(self.rows), **data}


@dataclass
class Plan:
    """What a session runs. ``kernels`` are compiled apart, by name."""

    steps: list[Launch | Gemm] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)  # another name of a tensor -> the tensor
    places: dict[str, int] = field(default_factory=dict)  # tensor or scratch -> offset in the arena
    arena: int = 0

    def root(self, name: str) -> str:
        """The tensor that a name is a view of, or itself."""
        while name in self.views:
            name = self.views[name]
        return name

    def add(self, launch: Launch) -> None:
        self.kernels[launch.kernel.name] = launch.kernel
        self.steps.append(launch)


def size_json(size: Size) -> list[Any]:
    return [size.symbol, size.times, size.over]


def largest(build: BuildSpec) -> dict[str, int]:
    """The most that each symbol of a step can be; what buffers are sized for."""
    limits = build.limits.resolve(build.model)
    return {
        "T": limits.max_tokens,
        "B": limits.max_sequences,
        "R": limits.max_rows,
        "W": limits.max_tokens,
        "S": SPLITS,
    }


class Planner:
    """Walks a rewritten graph once. ``tuning`` goes to every kernel's ``lower``."""

    def __init__(self, graph: ModelGraph, build: BuildSpec, tuning: Mapping[str, Any]) -> None:
        self.graph, self.build, self.tuning = graph, build, tuning
        limits = build.limits.resolve(build.model)
        self.limits = {key: int(getattr(limits, key)) for key in vars(limits)}
        self.plan = Plan()
        self.outside = {variable.name for variable in (*graph.graph.inputs, *graph.graph.outputs)}
        self.refs: dict[str, TensorRef] = {}
        self.skipped: set[int] = set()

    def run(self) -> Plan:
        """The whole plan. CompileError for a node that this target has no way to run."""
        for node in self.graph.graph.nodes:
            if id(node) not in self.skipped:
                self._node(node)
        self._place()
        return self.plan

    def _node(self, node: gs.Node) -> None:
        if self._is_view(node):
            self.plan.views[node.outputs[0].name] = node.inputs[0].name
            return
        self._alias_pools(node)
        if node.op in GEMMS and node.inputs[1].name in self.graph.weights:
            self.plan.steps.append(self._gemm(node))
            return
        if node.op not in LOWERS:
            raise CompileError(f"{node.name}: the cuda target has no kernel for {node.op}; it has {', '.join(sorted(LOWERS))}")
        made = LOWERS[node.op](
            CudaNode(
                op=node.op,
                name=node.name,
                attrs=dict(node.attrs),
                inputs=tuple(None if tensor.is_empty() else self._ref(tensor) for tensor in node.inputs),
                outputs=tuple(self._ref(tensor) for tensor in node.outputs),
                sm=self.build.hardware.sm,
                limits=self.limits,
                tuning=self.tuning,
            )
        )
        for launch in made:
            self.plan.add(launch)

    def _is_view(self, node: gs.Node) -> bool:
        if node.op in VIEWS:
            return True
        # int32 ids and positions are widened for standard ops; kernels read them as they come
        return node.op == "Cast" and self._dtype(node.inputs[0]) == "int32" and self._dtype(node.outputs[0]) == "int64"

    def _alias_pools(self, node: gs.Node) -> None:
        for tensor in node.outputs:
            if tensor.name.startswith("kv_out."):
                self.plan.views[tensor.name] = tensor.name.replace("kv_out.", "kv.")

    def _dtype(self, tensor: gs.Tensor) -> str:
        return DTYPE_NAMES[onnx_code(tensor.dtype)]

    def _ref(self, tensor: gs.Tensor) -> TensorRef:
        """A tensor as kernels see it: by its own shape, but the dtype and the name of what it is a view of."""
        if isinstance(tensor, gs.Constant):
            return TensorRef(tensor.name, str(tensor.values.dtype), tuple(tensor.values.shape))
        if tensor.shape is None or tensor.dtype is None:
            raise CompileError(f"{tensor.name} has no shape or dtype: a pass left it undescribed")
        root = self.plan.root(tensor.name)
        shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
        if tensor.name not in self.refs:
            dtype = self.refs[root].dtype if root in self.refs and root != tensor.name else self._dtype(tensor)
            if root != tensor.name and root in self.outside:
                dtype = self._dtype(self.graph.variable(root))
            if root.startswith("kv."):
                dtype = self.build.cache_dtype  # in the graph a float8 pool has the compute type, for its judges
            self.refs[tensor.name] = TensorRef(root, dtype, shape)
        return self.refs[tensor.name]

    def _gemm(self, node: gs.Node) -> Gemm:
        x, w, y = self._ref(node.inputs[0]), self._ref(node.inputs[1]), self._ref(node.outputs[0])
        turned = node.op == "ZooFp8Gemm" or bool(node.attrs.get("transB", 0))
        n, k = (w.shape if turned else w.shape[::-1])[:2]
        assert isinstance(n, int) and isinstance(k, int)
        readers = node.outputs[0].outputs
        if len(readers) == 1 and readers[0].op == "Cast" and self._dtype(readers[0].outputs[0]) == "float32":
            self.skipped.add(id(readers[0]))
            y = self._ref(readers[0].outputs[0])
        scales = [self._ref(tensor).name for tensor in node.inputs[2:]]
        return Gemm(
            x.name,
            w.name,
            y.name,
            x.rows,
            n,
            k,
            w.dtype,
            y.dtype,
            "out_in" if turned else "in_out",
            *scales[:2],
        )

    def _place(self) -> None:
        """Lifetimes from the first step that writes a tensor to the last that reads it; scratch lives for its launches."""
        most = largest(self.build)
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        sizes: dict[str, int] = {}
        by_name = {ref.name: ref for ref in self.refs.values()}
        for number, step in enumerate(self.plan.steps):
            for name, size in self._touched(step, by_name, most):
                first.setdefault(name, number)
                last[name] = number
                sizes[name] = max(size, sizes.get(name, 0))
        blocks = [Block(name, sizes[name], first[name], last[name]) for name in first]
        self.plan.places, self.plan.arena = place(blocks)

    def _touched(self, step: Launch | Gemm, refs: Mapping[str, TensorRef], most: Mapping[str, int]) -> list[tuple[str, int]]:
        if isinstance(step, Gemm):
            names: list[Any] = [step.x, step.y]
        else:
            names = [arg for arg in step.args if isinstance(arg, str | Scratch)]
        found = []
        for name in names:
            if isinstance(name, Scratch):
                found.append((name.name, name.size.at(most)))
            elif name not in self.outside or name == "logits":
                ref = refs[name]
                sides = [size if isinstance(size, int) else most[size] for size in ref.shape]
                found.append((name, prod(sides) * ITEM_SIZES[ref.dtype]))
        return found


def arg_json(arg: Any, plan: Plan) -> Json:
    """One argument of a launch: a tensor outside the arena, a place in it, a number of the step, or a float."""
    if isinstance(arg, Size):
        return {"size": size_json(arg)}
    if isinstance(arg, float):
        return {"float": arg}
    name = arg.name if isinstance(arg, Scratch) else plan.root(arg)
    return {"arena": plan.places[name]} if name in plan.places else {"tensor": name}


def launch_json(launch: Launch, plan: Plan) -> Json:
    return {
        "op": "launch",
        "kernel": launch.kernel.name,
        "grid": [size_json(side) for side in launch.grid],
        "args": [arg_json(arg, plan) for arg in launch.args],
    }


def gemm_json(gemm: Gemm, plan: Plan) -> Json:
    return (
        gemm.to_json()
        | {name: arg_json(getattr(gemm, name), plan) for name in ("x", "w", "y")}
        | {name: arg_json(getattr(gemm, name), plan) if getattr(gemm, name) else None for name in ("w_scale", "x_scale")}
    )
