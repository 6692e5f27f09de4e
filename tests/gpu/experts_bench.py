"""Experts and routers on a GPU: right first, then how fast. Needs torch and triton and nothing else.

    python tests/gpu/experts_bench.py [few | many]        a tuning of tiles may stand in TUNING

Kernels and their launches are those that the ``cuda`` compiler writes. Correctness: fresh random inputs, scratch and outputs full
of NaN, the same sums in float64 as the judge, routers against torch.topk of float64 scores, and twice the same bits. Speed: the
median of launches in a CUDA graph over weights that together exceed the L2 cache. What a step must take at least is the reading
of the experts that its tokens chose, once, or its products at the tensor cores' rate, whichever is longer.

T tokens, X experts, k a token, E hidden, F intermediate.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from attention_on_gpu import DEVICE, Load, carry_out, microseconds, prepare
from gpu_tools import PEAKS, ROOT, table

room = sys.modules["zoo.plugins.moe"] = types.ModuleType("zoo.plugins.moe")
room.__path__ = [str(ROOT / "zoo" / "plugins" / "moe")]
moe = importlib.import_module("zoo.plugins.moe.cuda")
seam = importlib.import_module("zoo.plugins.kernels")

# X, k, E, F
MODELS = {"qwen3-30b-a3b": (128, 8, 2048, 768), "mixtral-8x7b": (8, 2, 4096, 14336), "gpt-oss-20b": (32, 4, 2880, 2880)}
STEPS = {"few": (1, 4, 16, 64), "many": (256, 1024, 4096, 8192)}
TUNING: dict[str, Any] = {}
L2 = 160 << 20
FLOPS = 7e14  # a second, bfloat16: what cuBLASLt reaches on these GPUs
Tensors = dict[str, torch.Tensor]


def launches(
    op: str, shapes: Mapping[str, tuple[int | str, ...]], outputs: Mapping[str, tuple[int | str, ...]], **attrs: Any
) -> Any:
    kinds = {"chosen": "int32", "weights": "float32"}
    refs = [[seam.TensorRef(n, kinds.get(n, "bfloat16"), s) for n, s in ports.items()] for ports in (shapes, outputs)]
    node = seam.CudaNode(op, op, attrs, tuple(refs[0]), tuple(refs[1]), 90, {"max_tokens": 8192}, TUNING)
    return moe.LOWERS[op](node)


def routing(x: int, k: int, e: int) -> Any:
    choice = {"chosen": (1, "T", k), "weights": (1, "T", k)}
    attrs = {"top_k": k, "score": 0, "normalize": 1, "groups": 1, "top_groups": 1, "group_score": 0, "scale": 1.0}
    return launches("ZooRouter", {"x": (1, "T", e), "router": (x, e)}, choice, **attrs)


def mixing(x: int, k: int, e: int, f: int) -> Any:
    row = (1, "T", e)
    shapes = {"x": row, "chosen": (1, "T", k), "weights": (1, "T", k), "gate_up": (x, 2 * f, e), "down": (x, e, f)}
    return launches("ZooExperts", shapes, {"y": row}, kind=0, top_k=k)


def random_step(tokens: int, x: int, k: int, e: int) -> Tensors:
    rows = torch.randn(tokens, e, device=DEVICE).to(torch.bfloat16)
    picks = torch.rand(tokens, x, device=DEVICE).topk(k)[1].to(torch.int32)
    shares = torch.rand(tokens, k, device=DEVICE) + 0.05
    return {"x": rows, "chosen": picks, "weights": shares, "y": torch.full_like(rows, float("nan"))}


def random_weights(x: int, e: int, f: int) -> Tensors:
    made = {"gate_up": torch.randn(x, 2 * f, e, device=DEVICE) * e**-0.5, "down": torch.randn(x, e, f, device=DEVICE) * f**-0.5}
    return {name: one.to(torch.bfloat16) for name, one in made.items()}


def wanted(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """y in float64, and sums of magnitudes, which errors of roundings are a part of."""
    y = torch.zeros(t["x"].shape, dtype=torch.float64, device=DEVICE)
    size = y.clone()
    for expert in range(len(t["down"])):
        token, nth = (t["chosen"] == expert).nonzero(as_tuple=True)
        gate, up = (t["x"][token].double() @ t["gate_up"][expert].double().T).chunk(2, dim=-1)
        h, down, share = torch.nn.functional.silu(gate) * up, t["down"][expert].double(), t["weights"][token, nth, None].double()
        y.index_add_(0, token, share * (h @ down.T))
        size.index_add_(0, token, share * (h.abs() @ down.abs().T))
    return y, size


def check(tokens: int, x: int, k: int, e: int, f: int) -> None:
    given = random_step(tokens, x, k, e) | random_weights(x, e, f)
    carry_out(mixing(x, k, e, f), given, {"T": tokens})
    exact, size = wanted(given)
    assert ((given["y"].double() - exact).abs() <= 3.1 * 2**-8 * size).all(), f"experts are off: {tokens} tokens"
    again = given | {"y": torch.full_like(given["y"], float("nan"))}
    carry_out(mixing(x, k, e, f), again, {"T": tokens})
    assert torch.equal(given["y"], again["y"]), "another run, other bits"

    router = {"router": (torch.randn(x, e, device=DEVICE) * e**-0.5).to(torch.bfloat16), "x": given["x"]}
    router |= {"chosen": torch.full_like(given["chosen"], -1), "weights": torch.full_like(given["weights"], float("nan"))}
    carry_out(routing(x, k, e), router, {"T": tokens})
    scores = (router["x"].double() @ router["router"].double().T).softmax(-1)
    best, _ = scores.topk(k)
    found = scores.gather(1, router["chosen"].long())
    assert ((found - best).abs() <= 1e-5 * best).all(), "routers choose others"  # scores nearer than that may change places
    assert (router["chosen"].sort(dim=-1)[0].diff(dim=-1) > 0).all(), "an expert is chosen twice"
    assert ((router["weights"] - (found / found.sum(-1, keepdim=True))).abs() <= 1e-5).all(), "weights are off"


def speed(tokens: int, x: int, k: int, e: int, f: int, peak: float) -> tuple[Any, ...]:
    """Microseconds of the router, and of the experts; the share of what the GPU can do."""
    each = 3 * f * e * 2
    sets = [random_step(tokens, x, k, e) | random_weights(x, e, f) for _ in range(max(1, min(16, L2 // (x * each))))]
    used = len(sets[0]["chosen"].unique())
    time = microseconds(Load(sets, {"T": tokens}, used * each).calls(mixing(x, k, e, f)))
    least = max(used * each / peak, tokens * k * 6 * e * f / FLOPS) * 1e6
    routers = [one | {"router": torch.randn(x, e, device=DEVICE).to(torch.bfloat16)} for one in sets]
    router = microseconds(Load(routers, {"T": tokens}, 0).calls(routing(x, k, e)))
    return tokens, used, f"{router:.1f}", f"{time:.1f}", f"{least / time:.0%}"


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAKS.items() if key in name), PEAKS["H100"])
    steps = [count for key, counts in STEPS.items() if not sys.argv[1:] or key in sys.argv[1:] for count in counts]
    for model, sizes in MODELS.items():
        prepare([*mixing(*sizes), *routing(*sizes[:3])])
        for tokens in (1, 7, 64, 300):
            check(tokens, *sizes)
        print(f"{name}, {model}: right")
        table(("tokens", "experts", "router us", "experts us", "of peak"), [speed(count, *sizes, peak) for count in steps])


if __name__ == "__main__":
    main()
