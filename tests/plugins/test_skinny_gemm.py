"""The skinny GEMM in Triton's interpreter, against float64, at sizes that no tile divides.

M rows, N outputs, K inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from gluon_on_cpu import EVENTS, module
from interpreted import TORCH, exact, gpu_arithmetic, ref

from zoo.errors import CompileError
from zoo.plugins.kernels import Launch, Scratch, Size
from zoo.plugins.skinny_gemm.cuda import (
    BUCKETS,
    COUNTERS,
    MOST_ROWS,
    MULTIPROCESSORS,
    RESIDENT,
    SHARED,
    Early,
    Streamed,
    Tiling,
    alternatives,
    counters_for,
    launches,
    tiling,
)

ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 3e-7}


def function_of(one: Launch) -> Any:
    """For the interpreter, which knows no Gluon."""
    room, _, name = one.kernel.source.partition(":")
    if name != "stream_gemm":
        return getattr(importlib.import_module(room), name)
    spec = importlib.util.find_spec(room)
    assert spec and spec.origin
    return getattr(module(spec.origin, one.kernel.num_warps), name)


def run(made: list[Launch], tensors: dict[str, torch.Tensor], rows: int) -> None:
    """Carry out launches; scratch is poisoned with NaN."""
    scratch: dict[str, torch.Tensor] = {}
    for one in made:
        function = function_of(one)
        names = [name for name, _ in one.kernel.args] + [name for name, _ in one.kernel.constants]
        assert function.arg_names == names
        args: list[Any] = []
        for arg in one.args:
            if isinstance(arg, Scratch):
                size = arg.size.at({"T": rows}) // 4
                args.append(scratch.setdefault(arg.name, torch.full((size,), float("nan"))))
            else:
                assert isinstance(arg, str | Size)
                args.append(tensors[arg] if isinstance(arg, str) else arg.at({"T": rows}))
        with gpu_arithmetic():
            function[tuple(side.at({"T": rows}) for side in one.grid)](*args, **dict(one.kernel.constants))


def made_up(m: int, n: int, k: int, dtype: str, out: str, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x, w = (torch.from_numpy(rng.standard_normal((rows, k)).astype(np.float32)) for rows in (m, n))
    return {
        "x": x.to(TORCH[dtype]),
        "w": w.to(TORCH[dtype]),
        "ws": torch.from_numpy(rng.uniform(0.001, 0.1, n).astype(np.float32)),
        "xs": torch.tensor(0.37),
        "y": torch.full((m, n), float("nan"), dtype=TORCH[out]),
    }


def wanted(tensors: dict[str, torch.Tensor], scaled: bool, deferred: bool = False) -> np.ndarray:
    y = exact(tensors["x"]) @ exact(tensors["w"]).T
    y = y * exact(tensors["xs"]) if scaled else y
    return y * exact(tensors["ws"]) if scaled and not deferred else y


def check(
    m: int, n: int, k: int, dtype: str, out: str, tiles: Tiling, counted: bool, seed: int = 0, deferred: bool = False
) -> torch.Tensor:
    tensors = made_up(m, n, k, dtype, out, seed)
    scaled = dtype == "float8e4m3"
    tensors["zeros"] = torch.zeros(counters_for(n, tiles, m), dtype=torch.int32)
    scales = (None if deferred else ref("ws", "float32", n), ref("xs", "float32")) if scaled else ()
    made = launches(
        ref("x", dtype, 1, "T", k),
        ref("w", dtype, n, k),
        ref("y", out, 1, "T", n),
        tiles,
        *scales,
        counters="zeros" if counted else None,
        most_rows=m,
    )
    run(made, tensors, m)
    expected = wanted(tensors, scaled, deferred)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(exact(tensors["y"]), expected, rtol=ROUNDING[out], atol=3e-6 * largest)
    assert not tensors["zeros"].any()  # as it was found
    return tensors["y"]


@pytest.mark.parametrize(
    ("m", "n", "k", "tiles"),
    [
        (1, 64, 128, Tiling(16, 64, 64, 1, 4, 3)),
        (5, 80, 112, Tiling(16, 64, 64, 1, 4, 3)),  # no tile divides N or K
        (16, 128, 256, Tiling(16, 64, 64, 2, 4, 3)),
        (17, 144, 208, Tiling(32, 64, 32, 3, 4, 3)),  # the last share of K is short, and N has a tile of 16
        (40, 64, 192, Tiling(16, 64, 64, 3, 4, 3)),  # more rows than a tile
    ],
)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("dtype", "out"), [("float8e4m3", "bfloat16"), ("bfloat16", "float32")])
def test_products(m: int, n: int, k: int, tiles: Tiling, counted: bool, dtype: str, out: str) -> None:
    check(m, n, k, dtype, out, tiles, counted)


@pytest.mark.parametrize(("dtype", "out"), [("float8e4m3", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_other_dtypes(dtype: str, out: str) -> None:
    check(3, 96, 96, dtype, out, Tiling(16, 64, 32, 3, 4, 3), counted=True)


@pytest.mark.parametrize("counted", [False, True])
def test_whoever_reads_y_may_scale_its_columns(counted: bool) -> None:
    check(5, 80, 112, "float8e4m3", "bfloat16", Tiling(16, 64, 32, 3, 4, 3), counted, deferred=True)
    check(5, 80, 112, "float8e4m3", "bfloat16", Tiling(16, 64, 64, 1, 4, 3), counted, deferred=True)


@pytest.mark.parametrize(
    ("m", "n", "k", "tiles"),
    [
        (3, 80, 128, Early(16, 64, 64, 1, 4, 1)),  # no tile divides N; one step of two is loaded first
        (16, 64, 256, Early(16, 64, 64, 2, 4, 2, signal=1)),
        (20, 144, 192, Early(16, 64, 32, 3, 4, 2, signal=4)),  # more rows than a tile
    ],
)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("dtype", "out"), [("float8e4m3", "bfloat16"), ("bfloat16", "float32")])
def test_weights_before_x(m: int, n: int, k: int, tiles: Tiling, counted: bool, dtype: str, out: str) -> None:
    assert not tiles.problem(n, k, dtype)
    check(m, n, k, dtype, out, tiles, counted)


STREAMED = [
    (1, 32, 512, Streamed(8, 16, 128, 1, 2, 0, window=2)),  # in registers
    (5, 40, 768, Streamed(8, 16, 128, 1, 2, 0, window=3, bypass=1)),  # no tile divides N
    (8, 32, 768, Streamed(8, 32, 128, 1, 2, 2, window=2)),  # a ring, shorter than K
    (16, 32, 512, Streamed(16, 16, 256, 1, 2, 2, window=1)),  # and as long as K, of steps of 128 bytes a warp
    (11, 96, 512, Streamed(16, 16, 128, 1, 2, 5, window=4, tiles=3)),  # longer than a tile's K
    (11, 96, 512, Streamed(8, 16, 128, 1, 2, 0, window=4, tiles=3)),  # more rows than a tile of x
    (4, 32, 1024, Streamed(8, 32, 128, 1, 2, 4, window=2, bring=256)),
    (2, 16, 1024, Streamed(8, 16, 256, 1, 4, 3, window=4)),
]


@pytest.mark.parametrize(("m", "n", "k", "tiles"), STREAMED)
@pytest.mark.parametrize("signal", range(5))
def test_streams(m: int, n: int, k: int, tiles: Streamed, signal: int) -> None:
    """Right, and in the right order: weights are asked for, the wait, x, y; the next kernel may start where ``signal`` says."""
    tiles = replace(tiles, signal=signal)
    assert not tiles.problem(n, k, "float8e4m3")
    EVENTS.clear()
    check(m, n, k, "float8e4m3", "bfloat16", tiles, counted=True, deferred=signal == 0)
    programs = -(-n // (tiles.block_n * tiles.tiles)) * -(-m // tiles.block_m)
    assert EVENTS.count("wait") == EVENTS.count("start") == programs and not len(EVENTS) % programs
    last = EVENTS[-(len(EVENTS) // programs) :]
    wait, start, ahead = last.index("wait"), last.index("start"), tiles.num_stages or tiles.window
    assert last[:wait].count("weights") == ahead and {"x", "scales", "y"}.isdisjoint(last[:wait])
    assert last.count("y") == tiles.tiles
    match signal:
        case 0:
            assert start == 0
        case 1:
            assert start == wait - 1
        case 2:
            assert start == wait + 1
        case 3:
            assert start > wait and (tiles.num_stages == 0 or "weights" not in last[start:])
        case 4:
            assert last[start:].count("y") == 1 and {"x", "weights"}.isdisjoint(last[start:])


def test_both_ways_to_add_shares_agree_bit_for_bit() -> None:
    tiles = Tiling(16, 64, 32, 4, 4, 3)
    one, two = (check(7, 128, 256, "float8e4m3", "float32", tiles, counted) for counted in (False, True))
    assert torch.equal(one, two)


def test_what_the_first_to_arrive_leaves_does_not_matter() -> None:
    """Two launches over the same counters and scratch, as in two layers of a step."""
    tiles = Tiling(16, 64, 32, 2, 4, 3)
    first = check(4, 64, 64, "bfloat16", "float32", tiles, True, seed=1)
    again = check(4, 64, 64, "bfloat16", "float32", tiles, True, seed=1)
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", ["float8e4m3", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (96, 208)])
def test_tilings_cover_and_fit(n: int, k: int, dtype: str) -> None:
    item = 1 if dtype == "float8e4m3" else 2
    for m in range(1, MOST_ROWS + 1):
        tiles = tiling(m, n, k, dtype)
        assert tiles.block_m >= m and (tiles.block_m < 2 * m or tiles.block_m == 16)
        assert tiles.splits == 1 or -(-n // tiles.block_n) * tiles.splits <= RESIDENT * MULTIPROCESSORS
        assert tiles.splits == 1 or k * item % (128 * tiles.splits) == 0
        assert (1 if m > 64 else 2) * tiles.shared(dtype) <= SHARED  # two programs at once on a multiprocessor


def refs(n: int, k: int, dtype: str = "float8e4m3", out: str = "bfloat16") -> tuple[Any, ...]:
    scales = (ref("xs", "float32"), ref("ws", "float32", n)) if dtype == "float8e4m3" else (None, None)
    return ref("x", dtype, 1, "T", k), ref("w", dtype, n, k), ref("y", out, 1, "T", n), *scales


def test_what_an_engine_has_for_few_rows() -> None:
    found = alternatives(*refs(4096, 14336), {})
    assert [few.most for few in found] == list(BUCKETS)
    assert [few.most for few in alternatives(*refs(4096, 4096), {})] == [16, 32], "16 MiB: cuBLASLt has 64 rows"
    for few in found:
        (one,) = few.launches
        tiles = tiling(few.most, 4096, 14336, "float8e4m3")
        assert one.kernel.overlaps and COUNTERS in one.args and few.counters == 64
        assert [side.at({"T": few.most}) for side in one.grid] == [64, tiles.splits, 1]
        (parts,) = [arg for arg in one.args if isinstance(arg, Scratch)]
        assert parts.size.at({}) == tiles.splits * few.most * 4096 * 4
    assert alternatives(*refs(28672, 4096), {})[0].counters == 0
    assert alternatives(*refs(64, 40, "bfloat16"), {}) and not alternatives(*refs(64, 20, "bfloat16"), {})
    assert not alternatives(*refs(64, 64, "float32", "float32"), {})


def test_tilings_of_a_hardware_profile() -> None:
    tuning = {"4096x4096": {"8": [16, 64, 256, 2, 4, 4], 24: [32, 128, 128, 1, 8, 3]}, "64x64": {}}
    found = alternatives(*refs(4096, 4096), {"skinny": tuning})
    assert [few.most for few in found] == [8, 24]
    kernels = [few.launches[0].kernel for few in found]
    assert [(one.num_warps, one.num_stages) for one in kernels] == [(4, 4), (8, 3)]
    sizes = [[dict(one.constants)[f"BLOCK_{side}"] for side in "MNK"] for one in kernels]
    assert sizes == [[16, 64, 256], [32, 128, 128]]
    assert alternatives(*refs(64, 64), {"skinny": tuning}) == []
    assert len(alternatives(*refs(64, 128), {"skinny": tuning})) == len(BUCKETS) - 1
    special = {"64x64.bfloat16": {"16": [16, 64, 64, 1, 4, 3]}}
    assert len(alternatives(*refs(64, 64, "bfloat16"), {"skinny": tuning | special})) == 1
    others = {"4096x4096": {"8": [8, 32, 512, 1, 8, 6, 2, 8, 3], "16": [16, 64, 512, 8, 4, 1, 1, 4]}}
    first, second = (few.launches[0].kernel for few in alternatives(*refs(4096, 4096), {"skinny": others}))
    assert first.source.endswith(".stream:stream_gemm") and second.source.endswith(".early:early_gemm")
    assert dict(first.constants) | {"SLICE": 64, "STAGES": 6, "WINDOW": 8, "SIGNAL": 3, "TILES": 1, "BRING": 0} == dict(
        first.constants
    )
    assert dict(second.constants) | {"AHEAD": 1, "SIGNAL": 4, "COUNTED": True} == dict(second.constants)
    for wrong, words in (
        ([8, 32, 512, 1, 8, 6, 3], r"a kind and its own numbers may follow \(kind 1: signal; kind 2: window, signal, tiles"),
        ([8, 32, 512, 1, 8, 6, 2, 3], "the window divides the steps"),
        ([8, 32, 512, 1, 8, 9, 2, 8], "as many as stages"),
        ([8, 32, 512, 2, 8, 4, 2, 8], "without splits"),
        ([8, 32, 256, 1, 8, 4, 2, 8], "64 bytes for each warp"),
        ([8, 64, 512, 1, 8, 8, 2, 8], "its ring fits in"),
        ([8, 32, 512, 1, 8, 6, 2, 8, 5], "signal is 0 to 4"),
        ([8, 32, 512, 1, 8, 6, 2, 8, 1, 1, 2048], "inside K"),
        ([16, 64, 512, 8, 4, 2, 1], "no fewer than stages"),
        ([16, 64, 128, 1, 4, 1, 1], "8 at most"),
        ([16, 64, 256, 2, 4], r"tuning\.skinny\.4096x4096\.16 is .*, not \[block_m"),
        ("fast", "not \\[block_m"),
        ([16, 96, 256, 2, 4, 3], "no tiling for float8e4m3: blocks are powers of two"),
        ([16, 64, 512, 2, 4, 8], "fit in 232,448 bytes"),
    ):
        with pytest.raises(CompileError, match=words):
            alternatives(*refs(4096, 4096), {"skinny": {"4096x4096": {"16": wrong}}})


def test_scratch_is_for_few_rows_whatever_a_step_may_hold() -> None:
    tiles = Tiling(16, 128, 128, 8, 4, 4)
    scales = ref("ws", "float32", 4096), ref("xs", "float32")
    first, second = launches(
        ref("x", "float8e4m3", "T", 4096), ref("w", "float8e4m3", 4096, 4096), ref("y", "bfloat16", "T", 4096), tiles, *scales
    )
    (parts,) = [arg for arg in first.args if isinstance(arg, Scratch)]
    assert parts in second.args and parts.size == Size("", 8 * 16 * 4096 * 4)


def test_float8_has_every_finite_value() -> None:
    """Each value of float8e4m3 times one: the operands are read as they are."""
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    every = every[np.isfinite(every.astype(np.float32))][:240]
    n, k = 240, 32
    weight = np.zeros((n, k), np.float32)
    weight[:, 0] = every.astype(np.float32)
    tensors = made_up(1, n, k, "float8e4m3", "float32", 0)
    tensors["w"] = torch.from_numpy(weight).to(torch.float8_e4m3fn)
    tensors["x"] = torch.ones((1, k)).to(torch.float8_e4m3fn)
    tensors["ws"], tensors["xs"] = torch.ones(n), torch.tensor(1.0)
    scales = ref("ws", "float32", n), ref("xs", "float32")
    shapes = ref("x", "float8e4m3", "T", k), ref("w", "float8e4m3", n, k), ref("y", "float32", "T", n)
    run(launches(*shapes, Tiling(16, 64, 32, 1, 4, 3), *scales), tensors, 1)
    np.testing.assert_array_equal(exact(tensors["y"])[0], weight[:, 0])


COMPILE = """
import importlib
import json
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from zoo.plugins.kernels import TensorRef
from zoo.plugins.skinny_gemm.cuda import _tuned, launches, tiling
dtype, out, numbers = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tiles = _tuned("", 16, numbers, 4096, 4096, dtype) if numbers else tiling(16, 4096, 4096, dtype)
scales = [TensorRef("ws", "float32", (4096,)), TensorRef("xs", "float32", ())] if dtype == "float8e4m3" else []
x, w, y = TensorRef("x", dtype, ("T", 4096)), TensorRef("w", dtype, (4096, 4096)), TensorRef("y", out, ("T", 4096))
for launch in launches(x, w, y, tiles, *scales, counters="zeros"):
    kernel = launch.kernel
    module, _, name = kernel.source.partition(":")
    function, types, constants = getattr(importlib.import_module(module), name), dict(kernel.args), dict(kernel.constants)
    source = (GluonASTSource if function.is_gluon() else ASTSource)(
        fn=function, signature={one: types.get(one, "constexpr") for one in function.arg_names},
        constexprs={(at,): constants[one] for at, one in enumerate(function.arg_names) if one in constants},
        attrs={(at,): [["tt.divisibility", 16]] for at, one in enumerate(function.arg_names)
               if types.get(one, "").startswith("*")})
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def machine_code(dtype: str, out: str, numbers: list[int]) -> str:
    """PTX of the launches for 16 rows."""
    command = [sys.executable, "-c", COMPILE, dtype, out, str(numbers)]
    environment = {"TRITON_INTERPRET": "0", "HOME": str(Path.home())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("dtype", "out", "product"),
    [("float8e4m3", "bfloat16", "m64n16k32.f32.e4m3.e4m3"), ("bfloat16", "float32", "m64n16k16.f32.bf16.bf16")],
)
def test_the_machine_code_of_sm_90(dtype: str, out: str, product: str) -> None:
    """Weights are the wide side of Hopper's own products, and come in 16 bytes at a time, past the registers."""
    ptx = machine_code(dtype, out, [])
    assert f"wgmma.mma_async.sync.aligned.{product}" in ptx and "mma.sync" not in ptx
    copies = [line for line in ptx.splitlines() if "cp.async." in line and "global" in line]
    assert copies and all("cp.async.cg.shared.global" in line and "0x10" in line for line in copies)
    assert "atom.global.gpu.acq_rel.add" in ptx  # one launch, not two
    # it waits before it reads x or writes; the next kernel may come when K is read, before sums are shared
    order = [ptx.index(one) for one in ("griddepcontrol.wait", "cp.async.", "griddepcontrol.launch_dependents", "atom.global")]
    assert order == sorted(order) and ptx.index("st.global") > order[2]


@pytest.mark.parametrize(
    ("numbers", "read", "product"),
    [
        ([8, 32, 512, 1, 8, 6, 2, 8, 1], "cp.async.cg.shared.global [ ", "mma.sync.aligned.m16n8k32"),
        ([16, 32, 512, 1, 8, 0, 2, 2, 1], "ld.global.L1::evict_first.L2::cache_hint.v4.b32", "mma.sync.aligned.m16n8k32"),
        (
            [16, 64, 512, 8, 4, 1, 1, 0],
            "ld.global.L1::evict_first.L2::cache_hint.v4.b32",
            "wgmma.mma_async.sync.aligned.m64n16k32",
        ),
    ],
)
def test_the_machine_code_of_weights_before_x(numbers: list[int], read: str, product: str) -> None:
    """They are asked for 16 bytes at a time, before the wait; x and y come after it."""
    ptx = machine_code("float8e4m3", "bfloat16", numbers)
    wait = ptx.index("griddepcontrol.wait")
    assert read in ptx[:wait] and product in ptx[wait:] and "st.global" not in ptx[:wait]
    assert ptx[wait:].index("ld.global") < ptx[wait:].index(product)  # x
    assert ptx[:wait].count("griddepcontrol.launch_dependents") == 1
    assert numbers[6] == 1 or "prmt" not in ptx  # words, not bytes, are what goes around in loops
