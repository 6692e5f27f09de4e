"""The GPU's part of ``narrow_bench.py``: a candidate checked and timed, alone and in the chain of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpu_tools import Compiled, seconds
from narrow_cases import SHAPES, Candidate, Job

from zoo.plugins.kernels import Launch, Scratch, Size
from zoo.plugins.skinny_gemm.cuda import COUNTERS, Streamed
from zoo.runtime.cuda.arguments import HIDDEN, Arguments
from zoo.runtime.cuda.driver import Device

CUDA = "cuda"
FLOAT8 = getattr(torch, "float8_e4m3fn")  # noqa: B009
HIDDEN_SIZE, INNER = 4096, 14336
COLD = 256 << 20  # bytes of weights that launches go through
LAUNCHES = 96  # in a graph of one product, at least: that a graph starts takes as long as a product
LAYERS, SETS = 8, 2  # in a graph of layers, and of weights for them: 436 MB
TUNING = {"row_warps": 16}  # conf/hardware/h200-sxm.yaml
SCALE = 0.0123  # of float8 activations
ROUNDING = 1.01 * 2**-8  # of bfloat16
# Of the largest value. The warpgroup's float8 products are added in few bits; see ``zoo.plugins.skinny_gemm.kernels``.
NOISE, NOISE_OF_FEW_BITS = 5e-5, 2e-3
FAR = 0.35  # relative, of what comes out of eight random layers, from what today's kernels give

Call = Callable[[bool], None]  # whether it overlaps with the one before


def elementwise() -> list[Launch]:
    """Quantize, add + norm, activation."""
    import elementwise_bench

    ops = {op.label: op for op in elementwise_bench.ops(HIDDEN_SIZE, INNER, "bfloat16")}
    found = [ops[label].launches(TUNING) for label in ("quantize fp8", "add rms_norm fp8", "gated silu fp8")]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


class Runner:
    """Kernels on the GPU, and launches of them."""

    def __init__(self, device: Device, compiled: Mapping[Job, Compiled]) -> None:
        self.device, self.compiled, self.stream = device, compiled, device.stream()
        self._functions: dict[tuple[Job, bool], int] = {}
        self.zeros = torch.zeros(1 << 16, dtype=torch.int32, device=CUDA)
        self.scratch = torch.full((1 << 24,), float("nan"), device=CUDA)

    def function(self, job: Job, alike: bool = False) -> int:
        """``alike``: a kernel without shared memory leaves as little to the L1 cache as the others, as a multiprocessor that has
        to change that first lets its kernels end."""
        if (job, alike) not in self._functions:
            made, cu = self.compiled[job], self.device._driver
            function = self._functions[job, alike] = self.device.function(
                self.device.load(made.cubin, made.entry), made.entry, made.shared
            )
            if alike:
                attribute = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                (code,) = cu.cuFuncSetAttribute(function, attribute, 100)
                assert not int(code), f"{made.entry}: its memory cannot be divided ({code})"
        return self._functions[job, alike]

    def registers(self, job: Job) -> int:
        attribute = self.device._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
        return int(self.device._driver.cuFuncGetAttribute(attribute, self.function(job))[1])

    def call(self, launch: Launch, registers: int, tensors: Mapping[str, torch.Tensor], m: int, alike: bool = False) -> Call:
        values: list[Any] = []
        for arg in launch.args:
            if isinstance(arg, Scratch):
                assert arg.size.at({"T": m}) <= 4 * len(self.scratch)
                values.append(self.scratch.data_ptr())
            elif isinstance(arg, Size):
                values.append(arg.at({"T": m}))
            elif isinstance(arg, float):
                values.append(arg)
            else:
                values.append(self.zeros.data_ptr() if arg == COUNTERS else tensors[arg].data_ptr())
        job = launch.kernel, registers
        function, made = self.function(job, alike), self.compiled[job]
        assert made.parameters == len(values) + HIDDEN, f"{launch.kernel.name} has {made.parameters} parameters"
        params = Arguments([kind for _, kind in launch.kernel.args], values)
        x, y, z = (side.at({"T": m}) for side in launch.grid)
        overlaps = launch.kernel.overlaps

        def call(overlap: bool) -> None:
            self.device.launch(function, (x, y, z), made.warps, made.shared, params, self.stream, overlap and overlaps)

        return call

    def run(self, calls: Sequence[Call], overlap: bool) -> None:
        """And wait, for torch's stream first."""
        torch.cuda.synchronize()
        in_order(calls, overlap)
        self.device.wait(self.stream)

    def seconds(self, calls: Sequence[Call], count: int, repeats: int = 5) -> float:
        torch.cuda.synchronize()
        return seconds(self.device, self.stream, lambda: in_order(calls, True), count, repeats)


def in_order(calls: Sequence[Call], overlap: bool) -> None:
    for place, call in enumerate(calls):
        call(overlap and place > 0)


def random8(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA).to(FLOAT8)


# ----------------------------------------------------------------------------------------------------------------- alone


class Alone:
    """One product with copies of its weights."""

    def __init__(self, runner: Runner, shape: str) -> None:
        self.runner, (self.n, self.k) = runner, SHAPES[shape]
        copies = -(-COLD // (self.n * self.k))
        self.weights = [random8(self.n, self.k) for _ in range(max(3, copies))]
        self.short = 0.0
        self.scale = torch.tensor(SCALE, device=CUDA)

    def rows(self, m: int) -> None:
        """Fresh x, and the product in float64."""
        self.m, self.x = m, random8(m, self.k)
        self.wanted = (self.x.double() @ self.weights[0].double().t()) * self.scale.double()
        self.y = torch.empty(m + 1, self.n, dtype=torch.bfloat16, device=CUDA)

    def measure(self, one: Candidate) -> tuple[float, str]:
        """Seconds of a launch, and what is wrong with it. ``short``: those of one in a graph of each weight once."""
        (launch,) = one.launches
        fixed = {"x": self.x, "xs": self.scale, "y": self.y}
        calls = [self.runner.call(launch, one.registers, fixed | {"w": w}, self.m) for w in self.weights]
        self.y.fill_(float("nan"))
        self.runner.run(calls[:1], False)
        problem = self.problem(one)
        if problem:
            return 0.0, problem
        first = self.y[: self.m].clone()
        self.runner.run(calls[1:3] + calls[:1], True)
        if not torch.equal(first, self.y[: self.m]):
            return 0.0, "other bits when it overlaps"
        if self.runner.zeros.any():
            self.runner.zeros.zero_()
            return 0.0, "counters are left behind"
        queue = calls * -(-LAUNCHES // len(calls))
        self.short = self.runner.seconds(calls, len(calls))
        return self.runner.seconds(queue, len(queue), 7), ""

    def problem(self, one: Candidate) -> str:
        found, behind = self.y[: self.m].double(), self.y[self.m :]
        noise = NOISE if isinstance(one.tiles, Streamed) else NOISE_OF_FEW_BITS
        off = (found - self.wanted).abs() - ROUNDING * self.wanted.abs() - noise * self.wanted.abs().max()
        if not bool((off <= 0).all()):  # NaN is not
            return f"off by {float((found - self.wanted).abs().max() / self.wanted.abs().max()):.1e} of the largest value"
        return "" if bool(behind.isnan().all()) else "it writes behind y"


# ----------------------------------------------------------------------------------------------------------------- a layer


class Chain:
    """Layers with the kernels of any combination of candidates."""

    def __init__(self, runner: Runner, m: int, weights: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self.runner, self.m, self.weights = runner, m, weights
        sixteen = dict.fromkeys(("o", "down", "sum", "sum 2"), HIDDEN_SIZE) | {"qkv": 6144, "gate_up": 2 * INNER}
        self.made = {name: torch.empty(m, width, dtype=torch.bfloat16, device=CUDA) for name, width in sixteen.items()}
        eight = {"a": HIDDEN_SIZE, "b": HIDDEN_SIZE, "c": HIDDEN_SIZE, "d": INNER}
        self.made |= {name: torch.empty(m, width, dtype=torch.uint8, device=CUDA) for name, width in eight.items()}
        self.start = (torch.randn(m, HIDDEN_SIZE, device=CUDA) / SCALE).to(FLOAT8).view(torch.uint8)
        self.given = {
            "residual": torch.randn(m, HIDDEN_SIZE, device=CUDA).bfloat16(),
            "weight": torch.ones(HIDDEN_SIZE, device=CUDA).bfloat16(),
            "scale": torch.tensor(SCALE, device=CUDA),
            "xs": torch.tensor(SCALE / 64, device=CUDA),  # sums of 4,096 products of random numbers come out near 1
        }
        self._calls: dict[tuple[str, int], Call] = {}
        self.around = {alike: self._around(alike) for alike in (False, True)}
        self.usual: dict[str, torch.Tensor] | None = None

    def _around(self, alike: bool) -> dict[str, Call]:
        quantize, norm, activation = elementwise()
        tensors = self.made | self.given

        def call(launch: Launch, **names: str) -> Call:
            return self.runner.call(launch, 0, {name: tensors[of] for name, of in names.items()}, self.m, alike)

        return {
            "quantize": call(quantize, x="qkv", x_scale="scale", y="b"),
            "norm": call(norm, x="o", residual="residual", weight="weight", y_scale="scale", sum="sum", y="c"),
            "activation": call(activation, gate_up="gate_up", y_scale="scale", y="d"),
            "norm 2": call(norm, x="down", residual="residual", weight="weight", y_scale="scale", sum="sum 2", y="a"),
        }

    def _product(self, one: Candidate, number: int) -> Call:
        if (one.key, number) not in self._calls:
            x, y = {"qkv": ("a", "qkv"), "o": ("b", "o"), "gate_up": ("c", "gate_up"), "down": ("d", "down")}[one.shape]
            tensors = {"x": self.made[x], "y": self.made[y], "xs": self.given["xs"], "w": self.weights[number][one.shape]}
            (launch,) = one.launches
            self._calls[one.key, number] = self.runner.call(launch, one.registers, tensors, self.m)
        return self._calls[one.key, number]

    def calls(self, chosen: Mapping[str, Candidate], alike: bool = False) -> list[Call]:
        found, around = [], self.around[alike]
        for layer in range(LAYERS):
            product = {shape: self._product(one, layer % SETS) for shape, one in chosen.items()}
            found += [product["qkv"], around["quantize"], product["o"], around["norm"]]
            found += [product["gate_up"], around["activation"], product["down"], around["norm 2"]]
        return found

    def outcome(self, calls: Sequence[Call], overlap: bool) -> dict[str, torch.Tensor]:
        """What is in memory after all layers; before, everything that they make is NaN."""
        for tensor in self.made.values():
            tensor.fill_(0x7F if tensor.dtype == torch.uint8 else float("nan"))
        self.made["a"].copy_(self.start)
        self.runner.run(calls, overlap)
        return {name: tensor.clone() for name, tensor in self.made.items()}

    def measure(self, chosen: Mapping[str, Candidate], repeats: int = 5, alike: bool = False) -> tuple[float, str]:
        """Seconds of a layer, and what is wrong."""
        calls = self.calls(chosen, alike)
        waited, overlapped = self.outcome(calls, False), self.outcome(calls, True)
        if not all(torch.equal(overlapped[name].view(torch.uint8), waited[name].view(torch.uint8)) for name in waited):
            return 0.0, "other bits in a chain that overlaps"
        down = overlapped["down"].double()
        if self.usual is None:
            self.usual = overlapped
        usual = self.usual["down"].double()
        far = float(((down - usual).square().mean() / usual.square().mean()).sqrt())
        if not far < FAR:
            return 0.0, f"{far:.2f} from what today's kernels give in a chain"
        return self.runner.seconds(calls, LAYERS, repeats), ""
