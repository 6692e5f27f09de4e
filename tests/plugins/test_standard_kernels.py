"""Kernels of standard operators: each against numpy in float64, refusals with reasons, and all of them compiled for SM 9.0."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreted import ROUNDING, TORCH, column_scales, exact, launch, node, poisoned, ref
from test_gated_activation import activation

from zoo.errors import CompileError
from zoo.plugins.fp8_gemm import cuda as fp8_gemm
from zoo.plugins.gated_activation import cuda as gated_activation
from zoo.plugins.kernels import Kernel, TensorRef
from zoo.plugins.rms_norm import cuda as rms_norm
from zoo.plugins.standard.cuda import STANDARD
from zoo.plugins.standard.tile import matrix

DTYPES = ["float32", "float16", "bfloat16"]
SHAPES = [(7, 40), (2, 2500), (3, 101)]  # several rows in a tile; a row in two tiles; a multiple of nothing


def random(rows: int, width: int, dtype: str, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(1, rows, width, generator=torch.Generator().manual_seed(seed))).to(TORCH[dtype])


def run(op: str, tensors: dict[str, torch.Tensor], refs: list[TensorRef], y: TensorRef, rows: int, **attrs: object) -> np.ndarray:
    """y as float64; one more row behind it must stay as it was."""
    out = poisoned(y, {"T": rows + 1, "R": rows + 1})
    before = out.clone()
    launch(STANDARD[op](node(op, refs, [y], **attrs)), tensors | {y.name: out}, {"T": rows, "R": rows})
    axis = 1 if len(y.shape) == 3 else 0
    assert torch.equal(out.narrow(axis, rows, 1).view(torch.uint8), before.narrow(axis, rows, 1).view(torch.uint8))
    return exact(out.narrow(axis, 0, rows))


def close(got: np.ndarray, wanted: np.ndarray, dtype: str, floor: float = 1e-7) -> None:
    """One rounding to the dtype, and float32 noise."""
    np.testing.assert_allclose(got, wanted, rtol=1.01 * ROUNDING[dtype] + 1e-6, atol=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("case", ["sigmoid", "tanh", "relu", "gelu", "gelu_tanh"])
def test_activations(case: str, rows: int, width: int, dtype: str) -> None:
    x, shape = random(rows, width, dtype), (1, "T", width)
    op, attrs = {
        "sigmoid": ("Sigmoid", {}),
        "tanh": ("Tanh", {}),
        "relu": ("Relu", {}),
        "gelu": ("Gelu", {"approximate": "none"}),
        "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    }[case]
    got = run(op, {"x": x}, [ref("x", dtype, *shape)], ref("y", dtype, *shape), rows, **attrs)
    if case in ("sigmoid", "tanh"):
        wanted = 1 / (1 + np.exp(-exact(x))) if case == "sigmoid" else np.tanh(exact(x))
    else:
        wanted = activation(exact(x), case)
    close(got, wanted, dtype, floor=1e-6)


def test_tanh_at_its_ends() -> None:
    x = torch.tensor([[[-float("inf"), -200.0, -1e-3, -0.0, 0.0, 1e-3, 200.0, float("inf"), float("nan")]]])
    shape = ref("x", "float32", 1, "T", 9)
    got = run("Tanh", {"x": x}, [shape], dataclasses.replace(shape, name="y"), 1)
    np.testing.assert_allclose(got, np.tanh(exact(x)), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize(("op", "form"), [("Add", "equal"), ("Mul", "equal"), ("Add", "bias"), ("Add", "bias first")])
def test_sums_and_products(op: str, form: str, rows: int, width: int, dtype: str) -> None:
    a = random(rows, width, dtype)
    b = random(rows, width, dtype, 1) if form == "equal" else random(1, width, dtype, 1)[0, 0]
    shape = (1, "T", width)
    refs = [ref("a", dtype, *shape), ref("b", dtype, *(shape if form == "equal" else (width,)))]
    got = run(op, {"a": a, "b": b}, refs[::-1] if "first" in form else refs, ref("y", dtype, *shape), rows)
    close(got, exact(a) + exact(b) if op == "Add" else exact(a) * exact(b), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["Add", "Mul", "Div"])
@pytest.mark.parametrize("form", ["number", "one", "number first", "row", "rows", "rows first", "equal"])
def test_an_operand_may_have_fewer_rows(form: str, op: str, dtype: str) -> None:
    """A number, a row that all share, or a row [3, N] for each of a token's three, as a norm of heads has them."""
    for rows, width in SHAPES:
        shape = ("T", 3, width)
        a = random(rows * 3, width, dtype)[0].view(rows, 3, width)
        sizes = {"number": (), "one": (1, 1), "row": (width,), "rows": (3, width), "equal": (rows, 3, width)}[form.split()[0]]
        b = (1 + torch.rand(sizes, generator=torch.Generator().manual_seed(1))).to(TORCH[dtype])
        refs = [ref("a", dtype, *shape), ref("b", dtype, *(shape if form == "equal" else sizes))]
        given, y = {"a": a, "b": b}, ref("y", dtype, *shape)
        if "first" in form and op == "Div":
            with pytest.raises(CompileError, match="neither equal nor a row beside rows"):
                STANDARD[op](node(op, refs[::-1], [y]))
            continue
        out = poisoned(y, {"T": rows + 1})
        launch(STANDARD[op](node(op, refs[::-1] if "first" in form else refs, [y])), given | {"y": out}, {"T": rows})
        assert np.isnan(exact(out[rows])).all()
        left, right = exact(a), exact(b)
        close(exact(out[:rows]), {"Add": left + right, "Mul": left * right, "Div": left / right}[op], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip(dtype: str) -> None:
    for rows, width in SHAPES:
        x, shape = random(rows, width, dtype), (1, "T", width)
        x[0, 0, 0] = float("nan")
        bounds = {"low": torch.tensor(-1.5), "high": torch.tensor(0.25)}
        given = {"x": x} | {name: bound.to(TORCH[dtype]) for name, bound in bounds.items()}
        refs = [ref("x", dtype, *shape), ref("low", dtype), ref("high", dtype)]
        got = run("Clip", given, refs, ref("y", dtype, *shape), rows)
        np.testing.assert_array_equal(got, np.clip(exact(x), -1.5, 0.25))


@pytest.mark.parametrize("place", [0, 1])
def test_the_columns_of_one_side_of_a_sum_are_scaled_first(place: int) -> None:
    for rows, width in SHAPES:
        scales, sides = column_scales(width), [random(rows, width, "bfloat16", seed) for seed in range(2)]
        sides[place] = (sides[place].float() / scales).to(torch.bfloat16)
        y = ref("y", "bfloat16", 1, "T", width)
        out, refs = poisoned(y, {"T": rows}), [ref(name, "bfloat16", 1, "T", width) for name in "ab"]
        one = dataclasses.replace(node("Add", refs, [y]), scales={place: ref("scales", "float32", width)})
        launch(STANDARD["Add"](one), dict(zip("ab", sides, strict=True)) | {"scales": scales, "y": out}, {"T": rows})
        scaled = exact(sides[place]) * exact(scales)
        # the sum may cancel what the product, rounded to float32, is off by
        close(exact(out), scaled + exact(sides[1 - place]), "bfloat16", floor=1e-6)


@pytest.mark.parametrize(("source", "target"), [("float32", d) for d in DTYPES[1:]] + [(d, "float32") for d in DTYPES[1:]])
def test_casts_round_to_nearest_even(source: str, target: str) -> None:
    for rows, width in SHAPES:
        x, shape = random(rows, width, source), (1, "T", width)
        got = run("Cast", {"x": x}, [ref("x", source, *shape)], ref("y", target, *shape), rows, to=1)
        np.testing.assert_array_equal(got, exact(x.to(TORCH[target])))


def test_integers_of_no_constant_width_are_cast_too() -> None:
    x = torch.arange(-3, 4, dtype=torch.int32)
    got = run("Cast", {"x": x}, [ref("x", "int32", "T")], ref("y", "int64", "T"), 7, to=7)
    np.testing.assert_array_equal(got, x.numpy())


@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rows_are_looked_up(rows: int, width: int, kind: str) -> None:
    """An embedding: indices [1, T]; the last of them counts from the end."""
    table = random(11, width, "bfloat16")[0]
    ids = torch.arange(rows).mul(5).remainder(11).to(TORCH[kind])
    ids[-1] = -2
    refs = [ref("table", "bfloat16", 11, width), ref("ids", kind, 1, "T")]
    got = run("Gather", {"table": table, "ids": ids[None]}, refs, ref("y", "bfloat16", 1, "T", width), rows, axis=0)
    np.testing.assert_array_equal(got[0], exact(table)[ids.numpy()])


def test_logit_rows_are_looked_up() -> None:
    hidden, rows = random(5, 40, "float16")[0], torch.tensor([4, 0, 3, 3, 1], dtype=torch.int32)
    refs = [ref("hidden", "float16", "T", 40), ref("logit_rows", "int32", "R")]
    got = run("Gather", {"hidden": hidden, "logit_rows": rows}, refs, ref("y", "float16", "R", 40), 5, axis=0)
    np.testing.assert_array_equal(got, exact(hidden)[rows.numpy()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "biased"), [(9, 64, True), (3, 100, True), (2, 1030, True), (3, 100, False)])
def test_layer_norm(rows: int, width: int, biased: bool, dtype: str) -> None:
    """A mean that is large beside the deviation: a variance by E[x²] - E[x]² would lose it."""
    x = (random(rows, width, "float32") + 100).to(TORCH[dtype])
    weight, bias = random(1, width, dtype, 1)[0, 0], random(1, width, dtype, 2)[0, 0]
    refs = [ref("x", dtype, 1, "T", width), ref("weight", dtype, width), ref("bias", dtype, width)]
    given = {"x": x, "weight": weight, "bias": bias}
    got = run("LayerNormalization", given, refs[: 2 + biased], ref("y", dtype, 1, "T", width), rows, axis=-1, epsilon=1e-5)
    centered = exact(x) - exact(x).mean(-1, keepdims=True)
    wanted = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * exact(weight) + exact(bias) * biased
    # The mean is near 100 and right to 100 * 2^-24; the bias may cancel what is that far off.
    np.testing.assert_allclose(got, wanted, rtol=1.01 * ROUNDING[dtype] + 2e-5, atol=3e-5)


def test_split() -> None:
    """q, k and v of a fused layer, one narrower than a tile and one of two tiles."""
    x, widths = random(3, 2500 + 40 + 8, "bfloat16"), (2500, 40, 8)
    outputs = [ref(name, "bfloat16", 1, "T", width) for name, width in zip("qkv", widths, strict=True)]
    made = {y.name: poisoned(y, {"T": 4}) for y in outputs}
    split = node("Split", [ref("x", "bfloat16", 1, "T", 2548), ref("sizes", "int64", 3)], outputs, axis=-1)
    launch(STANDARD["Split"](split), {"x": x} | made, {"T": 3})
    got = [exact(made[y.name]) for y in outputs]
    assert all(np.isnan(part[:, 3:]).all() for part in got)
    np.testing.assert_array_equal(np.concatenate(got, axis=-1)[:, :3], exact(x))


def test_concat() -> None:
    """q, k and v become one again, one narrower than a tile and one of two tiles."""
    widths = (2500, 40, 8)
    parts = {name: random(3, width, "bfloat16", width) for name, width in zip("qkv", widths, strict=True)}
    refs = [ref(name, "bfloat16", 1, "T", width) for name, width in zip("qkv", widths, strict=True)]
    got = run("Concat", parts, refs, ref("y", "bfloat16", 1, "T", sum(widths)), 3, axis=2)
    np.testing.assert_array_equal(got, np.concatenate([exact(part) for part in parts.values()], axis=-1))


X = ref("x", "bfloat16", 1, "T", 64)
REFUSED = {
    "columns of another width": ("Concat", [X, X], {"axis": -1}, "its inputs have 128 columns, its output 64"),
    "rows behind each other": ("Concat", [X, X], {"axis": 1}, "axis is 1 of 3, not the last"),
    "a bound for each column": (
        "Clip",
        [X, ref("l", "bfloat16", 64), ref("h", "bfloat16")],
        {},
        "its bounds have the shapes [64]",
    ),
    "no upper bound": ("Clip", [X, ref("l", "bfloat16")], {}, "it has 2 inputs and 1 outputs, not 3 and 1"),
    "other rows": ("Mul", [X, ref("b", "bfloat16", 3, 64)], {}, "shapes [1, 'T', 64] and [3, 64] are neither"),
    "another broadcast": ("Add", [X, ref("b", "bfloat16", 1, "T", 1)], {}, "shapes [1, 'T', 64] and [1, 'T', 1] are neither"),
    "another axis": ("RMSNormalization", [X, ref("w", "bfloat16", "T", 64)], {"axis": 1}, "axis is 1 of 3, not the last"),
    "half a norm": ("RMSNormalization", [X, ref("w", "bfloat16", 64)], {"stash_type": 10}, "stash_type is 10"),
    "columns": ("Gather", [ref("d", "bfloat16", 8, 64), ref("i", "int64", 2)], {"axis": 1}, "axis is 1 of [8, 64], not 0"),
    "no weight": ("LayerNormalization", [X], {}, "it has 1 inputs and 1 outputs, not 2 and 1"),
    "float8": ("Cast", [ref("x", "float8e4m3", 1, "T", 64)], {}, "float8e4m3 to bfloat16; it knows float32"),
    "first axis": ("Split", [X], {"axis": 0}, "axis is 0 of 3, not the last"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_kernel_can_run_is_refused(case: str) -> None:
    op, inputs, attrs, reason = REFUSED[case]
    with pytest.raises(CompileError) as caught:
        STANDARD[op](node(op, inputs, [X], **attrs))
    assert f"the.{op}: the cuda target has no kernel for this {op}: {reason}" in str(caught.value)


def test_a_tensor_as_rows() -> None:
    for shape, rows, width in (((1, "T", 8), 5, 8), (("T",), 5, 1), (("R", 8), 3, 8), ((8,), 1, 8), ((), 1, 1)):
        size, columns = matrix(ref("x", "float32", *shape))
        assert (size.at({"T": 5, "R": 3}), columns) == (rows, width)


def kernels(width: int, inner: int, dtype: str) -> list[Kernel]:
    """One of each kernel, as a model of this width has them."""

    def row(size: int = width, kind: str = dtype) -> TensorRef:
        return ref("t", kind, 1, "T", size)

    weight, scale, y8 = ref("w", dtype, width), ref("s", "float32"), row(kind="float8e4m3")
    given = {
        "Add": ([row(), weight], row()),
        "Cast": ([row()], row(kind="float32")),
        "Clip": ([row(), scale, scale], row()),
        "Concat": ([row(inner), row(inner)], row(2 * inner)),
        "Div": ([row(), scale], row()),
        "Gather": ([ref("e", dtype, 99, width), ref("i", "int32", "T")], row()),
        "Gelu": ([row(inner)], row(inner)),
        "LayerNormalization": ([row(), weight, weight], row()),
        "Mul": ([row(inner), row(inner)], row(inner)),
        "RMSNormalization": ([row(), weight], row()),
        "Relu": ([row(inner)], row(inner)),
        "Sigmoid": ([row(inner)], row(inner)),
        "Tanh": ([row(inner)], row(inner)),
    }
    launches = [
        STANDARD[op](node(op, inputs, [y], **({"axis": -1} if op == "Concat" else {}))) for op, (inputs, y) in given.items()
    ]
    launches += [
        STANDARD["Mul"](
            node("Mul", [ref("x", dtype, 1, "T", 8, width), ref("w", dtype, 8, width)], [ref("y", dtype, 1, "T", 8, width)])
        ),
        STANDARD["Split"](node("Split", [row(2 * inner)], [row(inner), row(inner)], axis=-1)),
        rms_norm.lower(node("ZooRmsNormFp8", [row(), weight, scale], [y8], epsilon=1e-5)),
        rms_norm.lower(node("ZooAddRmsNorm", [row(), row(), weight], [row(), row()], epsilon=1e-5)),
        rms_norm.lower(node("ZooAddRmsNormFp8", [row(), row(), weight, scale], [row(), y8], epsilon=1e-5)),
        fp8_gemm.lower(node("ZooQuantizeFp8", [row(), scale], [y8])),
        *(gated_activation.lower(node("ZooGatedActivation", [row(2 * inner)], [row(inner)], kind=k)) for k in range(4)),
        gated_activation.lower(
            node("ZooGatedActivationFp8", [row(2 * inner), scale], [row(inner, "float8e4m3")], kind=0),
        ),
    ]
    return list({one.kernel.name: one.kernel for some in launches for one in some}.values())


COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
for source, args, constants, warps, stages in json.load(sys.stdin):
    module, _, function = source.partition(":")
    fn = getattr(importlib.import_module(module), function)
    signature = dict(args) | {name: "constexpr" for name, _ in constants}
    attrs = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(fn.arg_names) if signature[name][0] == "*"}
    source = triton.compiler.ASTSource(fn=fn, signature=signature, constexprs=dict(constants), attrs=attrs)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    wide = [line for line in made.asm["ptx"].splitlines() if "ld.global" in line and ".v4." in line]
    print(function, len(made.asm["cubin"]), made.metadata.shared, len(wide))
"""


@pytest.mark.parametrize(("width", "inner", "dtype"), [(4096, 14336, "bfloat16"), (768, 1001, "float16")])
def test_every_kernel_compiles_for_hopper(tmp_path: Path, width: int, inner: int, dtype: str) -> None:
    """Ahead of time, without a GPU, in a process where kernels are not interpreted; wide loads where the width allows."""
    wanted = kernels(width, inner, dtype)
    rows = [[one.source, one.args, one.constants, one.num_warps, one.num_stages] for one in wanted]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(wanted)
    for function, cubin, shared, wide in lines:
        assert int(cubin) > 0 and int(shared) <= 48 * 1024
        assert width % 8 or inner % 8 or int(wide) > 0, f"{function} reads less than 16 bytes at once"
