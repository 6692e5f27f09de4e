"""The elementwise kernels on a GPU: right first, then how fast. Needs torch and triton and nothing else.

    python tests/gpu/elementwise_bench.py

Kernels and their launches are those that the ``cuda`` compiler writes, compiled as it does it. Correctness: fresh random
inputs, outputs full of NaN, float64 as the judge, every launch with a row behind its output that must stay NaN. Speed: the
median of launches in a CUDA graph over inputs that together exceed the L2 cache, and of single launches after a flush of it;
bytes are what a launch must read and write once. The first line is torch's own copy, which is the bandwidth to compare with.

T rows, E hidden, F intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from attention_on_gpu import Load, carry_out, prepare

from zoo.plugins.fp8_gemm import cuda as fp8_gemm
from zoo.plugins.gated_activation import cuda as gated_activation
from zoo.plugins.kernels import CudaNode, Launch, TensorRef
from zoo.plugins.rms_norm import cuda as rms_norm
from zoo.plugins.standard.cuda import STANDARD

HIDDEN, INNER, SCALE, EPSILON = 4096, 14336, 0.0123, 1e-5
ROWS = (1, 16, 64, 512, 8192)
L2 = 160 << 20  # bytes of inputs to rotate through: three times an H100's cache
TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8e4m3": torch.float8_e4m3fn,
    "int32": torch.int32,
}
HALF_ULP = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}


Tensors = dict[str, torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Op:
    """One kernel: the shapes it is run on, its launches, what it should give, and the inputs that no step shares."""

    label: str
    inputs: dict[str, tuple[str, tuple[int | str, ...]]]  # name -> dtype, shape
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    lower: Callable[[CudaNode], list[Launch]]
    attrs: dict[str, Any]
    wanted: Callable[[Tensors], Tensors]  # in float64; float8 outputs before their rounding
    op: str

    def launches(self, tuning: Mapping[str, Any] | None = None) -> list[Launch]:
        refs = [[TensorRef(n, d, s) for n, (d, s) in ports.items()] for ports in (self.inputs, self.outputs)]
        return self.lower(CudaNode(self.op, self.label, self.attrs, tuple(refs[0]), tuple(refs[1]), 90, {}, tuning or {}))

    def given(self, rows: int) -> Tensors:
        return {name: self._random(name, *port, rows) for name, port in self.inputs.items()}

    def made(self, rows: int) -> Tensors:
        return {n: torch.full(_at(s, rows), float("nan"), device=DEVICE).to(TORCH[d]) for n, (d, s) in self.outputs.items()}

    def bytes(self, rows: int) -> int:
        """Read and written once; of a table, the rows that are looked up, as many bytes as are written."""
        read = {name: port for name, port in self.inputs.items() if name != "table"}
        ports = [*read.values(), *self.outputs.values(), *(self.outputs.values() if "table" in self.inputs else ())]
        return sum(math.prod(_at(shape, rows)) * TORCH[dtype].itemsize for dtype, shape in ports)

    def load(self, rows: int) -> Load:
        """Inputs and outputs that together exceed the L2 cache; weights and scales are shared, as the rows of a step do."""
        size, shared = self.bytes(rows), self.given(1)
        fixed = {n: shared[n] for n, (_, shape) in self.inputs.items() if not any(isinstance(s, str) for s in shape)}
        sets = [self.given(rows) | self.made(rows) | fixed for _ in range(max(2, min(64, L2 // size)))]
        return Load(sets, {"T": rows}, size)

    def _random(self, name: str, dtype: str, shape: tuple[int | str, ...], rows: int) -> torch.Tensor:
        if name.endswith("scale"):
            return torch.tensor(SCALE, device=DEVICE)
        if dtype == "int32":
            return torch.randint(0, int(self.inputs["table"][1][0]), _at(shape, rows), device=DEVICE, dtype=torch.int32)
        return (2 * torch.randn(_at(shape, rows), device=DEVICE)).to(TORCH[dtype])


def _at(shape: Sequence[int | str], rows: int) -> list[int]:
    return [rows if isinstance(size, str) else size for size in shape]


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def activated(x: torch.Tensor, kind: int) -> torch.Tensor:
    if kind == 0:
        return x * x.sigmoid()
    if kind == 3:
        return x.relu()
    return torch.nn.functional.gelu(x, approximate="tanh" if kind == 2 else "none")


def ops(e: int, f: int, dtype: str) -> list[Op]:
    """Every kernel once, as a model of hidden size ``e`` and intermediate size ``f`` has it."""
    row, wide, both = (dtype, (1, "T", e)), (dtype, (1, "T", f)), (dtype, (1, "T", 2 * f))
    row8, wide8, one = ("float8e4m3", (1, "T", e)), ("float8e4m3", (1, "T", f)), (dtype, (e,))
    scale, kind, table = ("float32", ()), TORCH[dtype], (dtype, (32000 if e <= 4096 else 1000, e))
    x, pair = {"x": row, "weight": one}, {"x": row, "residual": row, "weight": one}
    out, sums, y_scale = {"y": row}, {"sum": row, "y": row}, {"y_scale": scale}
    gated, eps, last = {"gate_up": both}, {"epsilon": EPSILON}, {"axis": -1, "epsilon": EPSILON}

    def norm(t: Tensors) -> Tensors:
        if "residual" not in t:
            return {"y": normed(t["x"], t["weight"])}
        total = (t["x"] + t["residual"]).to(kind).double()
        return {"sum": total, "y": normed(total, t["weight"])}

    def gate(number: int) -> Callable[[Tensors], Tensors]:
        return lambda t: {"y": activated(t["gate_up"][..., :f], number) * t["gate_up"][..., f:]}

    def layer_norm(t: Tensors) -> Tensors:
        return {"y": torch.nn.functional.layer_norm(t["x"], (e,), t["weight"], t["bias"], EPSILON)}

    def standard(label: str, op: str, inputs: Any, outputs: Any, wanted: Any, **attrs: Any) -> Op:
        return Op(label, inputs, outputs, STANDARD[op], attrs, wanted, op)

    return [
        standard("rms_norm", "RMSNormalization", x, out, norm, **last),
        Op("rms_norm fp8", x | y_scale, {"y": row8}, rms_norm.lower, eps, norm, "ZooRmsNormFp8"),
        Op("add rms_norm", pair, sums, rms_norm.lower, eps, norm, "ZooAddRmsNorm"),
        Op("add rms_norm fp8", pair | y_scale, sums | {"y": row8}, rms_norm.lower, eps, norm, "ZooAddRmsNormFp8"),
        standard("layer_norm", "LayerNormalization", x | {"bias": one}, out, layer_norm, **last),
        *(
            Op(
                f"gated {name}",
                {"gate_up": both},
                {"y": wide},
                gated_activation.lower,
                {"kind": n},
                gate(n),
                "ZooGatedActivation",
            )
            for n, name in enumerate(("silu", "gelu", "gelu_tanh", "relu"))
        ),
        Op(
            *("gated silu fp8", gated | y_scale, {"y": wide8}),
            *(gated_activation.lower, {"kind": 0}, gate(0), "ZooGatedActivationFp8"),
        ),
        Op(
            *("quantize fp8", {"x": row, "x_scale": scale}, {"y": row8}),
            *(fp8_gemm.lower, {}, lambda t: {"y": t["x"]}, "ZooQuantizeFp8"),
        ),
        standard("add", "Add", {"a": row, "b": row}, out, lambda t: {"y": t["a"] + t["b"]}),
        standard("add bias", "Add", {"a": row, "b": one}, out, lambda t: {"y": t["a"] + t["b"]}),
        standard("mul", "Mul", {"a": wide, "b": wide}, {"y": wide}, lambda t: {"y": t["a"] * t["b"]}),
        standard("gelu_tanh", "Gelu", {"x": wide}, {"y": wide}, lambda t: {"y": activated(t["x"], 2)}, approximate="tanh"),
        standard("sigmoid", "Sigmoid", {"x": wide}, {"y": wide}, lambda t: {"y": t["x"].sigmoid()}),
        standard("cast to float32", "Cast", {"x": row}, {"y": ("float32", row[1])}, lambda t: {"y": t["x"]}),
        standard(
            *("gather rows", "Gather", {"table": table, "ids": ("int32", (1, "T"))}, out),
            lambda t: {"y": t["table"][t["ids"].long()]},
        ),
        standard(
            *("split", "Split", {"x": both}, {"gate": wide, "up": wide}),
            lambda t: {"gate": t["x"][..., :f], "up": t["x"][..., f:]},
            axis=-1,
        ),
    ]


def round8(x: torch.Tensor) -> torch.Tensor:
    """Nearest even, saturating, as float64; divided in float32 as QuantizeLinear does."""
    return (x.float() / torch.tensor(SCALE, device=x.device)).clamp(-448, 448).to(torch.float8_e4m3fn).double()


def check(op: Op, rows: int, tuning: Mapping[str, Any] | None = None) -> str:
    """What is wrong with a kernel's outputs; "" if nothing is."""
    given, made = op.given(rows), op.made(rows + 1)
    carry_out(op.launches(tuning), given | made, {"T": rows})
    wanted = op.wanted({n: t.double() if t.is_floating_point() else t for n, t in given.items()})
    for name, (kind, _) in op.outputs.items():
        got, behind = made[name][:, :rows].double(), made[name][:, rows:].float()
        if not behind.isnan().all():
            return f"{name}: the row behind the output was written"
        if kind == "float8e4m3":
            noise = 0.0 if op.op == "ZooQuantizeFp8" else 3e-6
            margin = wanted[name].abs() * noise + (1e-6 if "Gated" in op.op else 0.0)
            low, high = round8(wanted[name] - margin), round8(wanted[name] + margin)
            if not ((got == low) | (got == high)).all():
                return f"{name}: {((got != low) & (got != high)).sum().item()} of {got.numel()} float8 values are off"
        else:
            bound = wanted[name].abs() * (1.01 * HALF_ULP[kind] + 2e-6) + (1e-5 if op.op == "LayerNormalization" else 1e-6)
            if not ((got - wanted[name]).abs() <= bound).all():
                return f"{name}: off by up to {(got - wanted[name]).abs().max().item():.3g}"
    return ""


def check_all() -> int:
    wrong = 0
    shapes = [(HIDDEN, INNER, "bfloat16"), (777, 1001, "float16"), (128, 192, "bfloat16"), (28672, 2048, "float32")]
    prepare(one for shape in shapes for op in ops(*shape) for one in op.launches())
    for e, f, dtype in shapes:
        for op in ops(e, f, dtype):
            for rows in (1, 37) if e == HIDDEN else (37,):
                if reason := check(op, rows):
                    wrong += 1
                    print(f"WRONG {op.label} {dtype} E={e} F={f} T={rows}: {reason}")
    print(f"correctness: {'all right' if not wrong else f'{wrong} wrong'}")
    return wrong


def measure(call: Callable[[int], None], sets: int) -> tuple[float, float]:
    """Microseconds of a launch: in a CUDA graph that rotates through the sets, and alone after a flush of the cache."""
    turn = [0]

    def step() -> None:
        call(turn[0] % sets)
        turn[0] += 1

    for _ in range(3):
        step()
    alone = triton.testing.do_bench(step, warmup=5, rep=25, return_mode="median")
    graph, count = torch.cuda.CUDAGraph(), max(sets, 20)
    turn[0] = 0
    with torch.cuda.graph(graph):
        for _ in range(count):
            step()
    together = triton.testing.do_bench(graph.replay, warmup=5, rep=25, return_mode="median") / count
    return 1e3 * together, 1e3 * alone


def report(label: str, rows: int, size: int, call: Callable[[int], None], sets: int) -> None:
    together, alone = measure(call, sets)
    print(f"{label:18s} {rows:6d} {together:9.2f} {alone:9.2f} {size / together / 1e3:8.0f}")


def speed() -> None:
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; E={HIDDEN} F={INNER} bfloat16"
    )
    print(f"{'kernel':18s} {'rows':>6s} {'us graph':>9s} {'us alone':>9s} {'GB/s':>8s}")
    for rows in ROWS:
        size = rows * HIDDEN * 4
        sets = max(2, min(64, L2 // size))
        source = [torch.randn(rows, HIDDEN, device=DEVICE).bfloat16() for _ in range(sets)]
        target = [torch.empty_like(x) for x in source]
        report("torch copy", rows, size, lambda n, t=target, x=source: t[n].copy_(x[n]), sets)
    for op in ops(HIDDEN, INNER, "bfloat16"):
        for rows in ROWS:
            load = op.load(rows)
            calls = load.calls(op.launches())
            report(op.label, rows, load.moved, lambda n, calls=calls: calls[n](), len(calls))
            del load, calls


if __name__ == "__main__":
    if DEVICE != "cuda":
        raise SystemExit("this needs a CUDA GPU")
    torch.manual_seed(torch.seed())  # fresh inputs each time
    failed = check_all()
    if not failed:
        speed()
    raise SystemExit(bool(failed))
