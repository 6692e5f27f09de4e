"""A rewritten graph becomes a launch plan: kernel launches and GEMMs in order, with a place in memory for every tensor.

    views      Cast of ids, Squeeze, Unsqueeze, Reshape, Identity move no bytes: their output is another name of their input
    gemms      MatMul, FusedMatMul and ZooFp8Gemm by a weight become GEMM steps; a Cast of logits to float32 is part of its GEMM
    launches   every other node becomes what its ``lower`` says (``zoo.compilers.cuda.lowers``)

A GEMM of few rows has launches of its own in the plan (``zoo.plugins.skinny_gemm``). A float8 GEMM whose output one node reads
that can scale columns (``SCALED_INPUTS``) leaves w's scales to it, which are the same numbers a little later: cuBLASLt is faster
without them. float16 would not hold the sums.

The plan is JSON (docs/engine-format.md) and says nothing of addresses: the session has an arena, weights, pools and inputs.

    step        {"op": "launch", "kernel", "grid": [size, size, size], "args": [arg, ...], "overlap": it may start while the
                step before it runs, for whose end its kernel waits}
                {"op": "gemm", "rows": size, "n", "k", "dtype", "out", "stored", "x": arg, "w": arg, "y": arg, "w_scale": arg or
                null, "x_scale": arg or null, "deferred": y is not multiplied by w_scale, "small": [{"most": rows, "launches":
                [step, ...]}, ...] in the order of rows, "counters": how many zeros those launches share}
    size        [symbol, times, over]
    arg         {"arena": offset}, {"tensor": name}, {"size": size} or {"float": number}

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
from zoo.plugins.gated_activation import cuda as gated_activation
from zoo.plugins.kernels import CudaNode, Kernel, Launch, Scratch, Size, TensorRef
from zoo.plugins.rms_norm import cuda as rms_norm
from zoo.plugins.rotary_cache import cuda as rotary_cache
from zoo.plugins.skinny_gemm import cuda as skinny_gemm
from zoo.plugins.standard import cuda as standard
from zoo.spec import BuildSpec

SCHEMA = 1
VIEWS = ("Squeeze", "Unsqueeze", "Reshape", "Identity")
GEMMS = ("MatMul", "FusedMatMul", "ZooFp8Gemm")
# op -> its inputs whose columns it can scale first
SCALED_INPUTS: Mapping[str, tuple[int, ...]] = {
    **rms_norm.SCALED,
    **rotary_cache.SCALED,
    **gated_activation.SCALED,
    **standard.SCALED,
}

Json = dict[str, Any]


@dataclass
class Gemm:
    """y [M, N] = x [M, K] · wᵀ, w [N, K] (or w [K, N] with ``stored`` "in_out"); float8 operands have scales.

    deferred  y is not yet multiplied by w_scale
    small     launches for few rows, in the order of rows
    """

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
    deferred: bool = False
    small: list[skinny_gemm.Few] = field(default_factory=list)

    @property
    def launches(self) -> list[Launch]:
        return [one for few in self.small for one in few.launches]


@dataclass
class Plan:
    """What a session runs. ``kernels`` are compiled apart, by name."""

    steps: list[Launch | Gemm] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)  # another name of a tensor -> the tensor
    places: dict[str, int] = field(default_factory=dict)  # tensor or scratch -> offset in the arena
    arena: int = 0
    overlap: bool = True  # let launches overlap whose kernels can

    def root(self, name: str) -> str:
        """The tensor that a name is a view of, or itself."""
        while name in self.views:
            name = self.views[name]
        return name

    def add(self, step: Launch | Gemm) -> None:
        self.steps.append(step)
        for launch in [step] if isinstance(step, Launch) else step.launches:
            self.kernels[launch.kernel.name] = launch.kernel


def size_json(size: Size) -> list[Any]:
    return [size.symbol, size.times, size.over]


def largest(build: BuildSpec) -> dict[str, int]:
    """The most that each symbol of a step can be that buffers are sized for; how often contexts are split sizes none."""
    limits = build.limits.resolve(build.model)
    return {
        "T": limits.max_tokens,
        "B": limits.max_sequences,
        "R": limits.max_rows,
        "W": limits.max_tokens,
    }


class Planner:
    """Walks a rewritten graph once. ``tuning`` goes to every kernel's ``lower``; of its own it has ``overlap`` and ``deferred``,
    true where left out.
    """

    def __init__(self, graph: ModelGraph, build: BuildSpec, tuning: Mapping[str, Any]) -> None:
        self.graph, self.build, self.tuning = graph, build, tuning
        limits = build.limits.resolve(build.model)
        self.limits = {key: int(getattr(limits, key)) for key in vars(limits)}
        self.plan = Plan(overlap=bool(tuning.get("overlap", True)))
        self.outside = {variable.name for variable in (*graph.graph.inputs, *graph.graph.outputs)}
        self.refs: dict[str, TensorRef] = {}
        self.skipped: set[int] = set()
        self.deferred: dict[str, TensorRef] = {}  # output of a GEMM -> the scales that its reader multiplies it by

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
            self.plan.add(self._gemm(node))
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
                scales={at: self.deferred[one.name] for at, one in enumerate(node.inputs) if one.name in self.deferred},
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
        w_scale, x_scale = [self._ref(tensor) for tensor in node.inputs[2:4]] or (None, None)
        made = Gemm(x.name, w.name, y.name, x.rows, n, k, w.dtype, y.dtype, "out_in" if turned else "in_out")
        if w_scale and x_scale:
            made.w_scale, made.x_scale = w_scale.name, x_scale.name
            made.deferred = self._defers(node.outputs[0], y)
            if made.deferred:
                self.deferred[y.name] = w_scale
        if turned:
            left = None if made.deferred else w_scale
            made.small = skinny_gemm.alternatives(x, w, y, x_scale, left, self.tuning)
        return made

    def _defers(self, output: gs.Variable, y: TensorRef) -> bool:
        """Whether the one reader of a float8 GEMM's output scales its columns."""
        if not self.tuning.get("deferred", True) or y.dtype != "bfloat16" or y.name in self.outside or len(output.outputs) != 1:
            return False
        (reader,) = output.outputs
        places = [at for at, tensor in enumerate(reader.inputs) if tensor is output]
        return len(places) == 1 and places[0] in SCALED_INPUTS.get(reader.op, ()) and self._whole(reader)

    def _whole(self, reader: gs.Node) -> bool:
        """Not a row beside rows: where an Add has a bias [N], its kernel takes the bias for the operand that all rows share."""
        return reader.op != "Add" or bool(reader.inputs[0].shape == reader.inputs[1].shape)

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
            scratch = [arg for one in step.launches for arg in one.args if isinstance(arg, Scratch)]
            names: list[Any] = [step.x, step.y, *scratch]
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
        "overlap": launch.kernel.overlaps and plan.overlap,
    }


def gemm_json(gemm: Gemm, plan: Plan) -> Json:
    return (
        {"op": "gemm", "rows": size_json(gemm.rows), "n": gemm.n, "k": gemm.k}
        | {name: getattr(gemm, name) for name in ("dtype", "out", "stored", "deferred")}
        | {name: arg_json(getattr(gemm, name), plan) for name in ("x", "w", "y")}
        | {name: arg_json(getattr(gemm, name), plan) if getattr(gemm, name) else None for name in ("w_scale", "x_scale")}
        | {"small": [{"most": few.most, "launches": [launch_json(one, plan) for one in few.launches]} for few in gemm.small]}
        | {"counters": max((few.counters for few in gemm.small), default=0)}
    )
