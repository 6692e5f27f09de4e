"""The kernels of TensorRT plugins, one a node, in Triton's interpreter against the reference bodies; and that they compile.

Errors are relative to the largest output: 1e-5 in float32, 2e-3 in float16, 1.2e-2 in bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import triton
import triton.runtime.interpreter as interpreter
from attention_graphs import Shape
from interpreted import TORCH, exact, round8
from one_op import FLOAT8, body_session, live, ragged, random_pool, run_body, run_kernels, tensor

from zoo.compilers.tensorrt_kernels import compile_plugins, without_hidden
from zoo.errors import CompileError
from zoo.plugins.kernels import Kernel, Launch, fixed
from zoo.plugins.tensorrt import bindings
from zoo.plugins.tensorrt_kernels import LARGE_SHARED, Binding, read_code
from zoo.runtime.abi import Batch

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}
ATTENTION, LINEAR = (bindings()[op] for op in ("ZooPagedAttention", "ZooFp8Linear"))


SHAPES = {
    "grouped": Shape(4, 2, 16),
    "multi-query": Shape(9, 1, 8, block_size=8),
    "all-heads": Shape(2, 2, 32, block_size=32),
    "more-heads-than-rows": Shape(71, 1, 16),
    "odd-size": Shape(4, 2, 80),
    "large-heads": Shape(2, 1, 160),
    "window": Shape(4, 2, 16, block_size=8, window=6),
    "window-of-one": Shape(2, 1, 16, window=1),
    "window-softcap": Shape(6, 3, 24, block_size=8, window=19, softcap=2.0),
    "softcap": Shape(4, 1, 16, softcap=1.5),
}
STEPS = {  # new tokens, length after the step
    "prefill": ([13, 2, 70, 3], [13, 2, 93, 44]),
    "decode": ([1, 1, 1, 1], [1, 37, 16, 17]),
    "mixture": ([1, 20, 1, 5, 1], [41, 20, 1, 60, 16]),
}


@functools.cache
def session(shape: Shape) -> onnxruntime.InferenceSession:
    return body_session(ATTENTION.plugin, **shape.attributes)


def arrays_of(shape: Shape, batch: Batch, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 inputs by name; the pool is NaN but for tokens of earlier steps."""
    rng = np.random.default_rng(seed)
    tokens = len(batch.positions)
    places = np.pad(live(batch, shape.block_size, before=True), ((0, 2), (0, 0)))
    return {
        "q": 2 * rng.standard_normal((1, tokens, shape.heads * shape.size), np.float32),
        **{name: rng.standard_normal((1, tokens, shape.kv_heads * shape.size), np.float32) for name in ("k", "v")},
        "kv": random_pool(rng, places, shape.kv_heads, shape.size),
        "block_table": batch.block_tables["full"],
        "query_starts": batch.query_starts,
        "kv_lengths": batch.kv_lengths,
    }


def run(
    binding: Binding, attributes: Mapping[str, Any], dtypes: Mapping[str, str], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The plugin's one launch, as TensorRT would make it; outputs are poisoned first, or share their input's memory."""
    shapes = {name: tuple(one.shape) for name, one in tensors.items()}
    launched = binding.launch(attributes, dtypes, shapes)
    assert launched.kernel.args == binding.kernel_args(dtypes)
    sizes = binding.measure(shapes)
    tensors = tensors | {port.name: tensors[port.alias] for port in binding.plugin.outputs if port.alias}
    grid = tuple(fixed(side) for side in launched.grid(sizes))
    args = tuple(name if kind.startswith("*") else fixed(sizes[name]) for name, kind in launched.kernel.args)
    run_kernels(lambda node: [Launch(launched.kernel, grid, args)], None, tensors, {})  # type: ignore[arg-type]
    return tensors


def attend(shape: Shape, given: Mapping[str, np.ndarray], dtype: str = "float32") -> dict[str, torch.Tensor]:
    tensors = {name: tensor(array, "int32" if array.dtype == np.int32 else dtype) for name, array in given.items()}
    tensors["out"] = torch.full(tensors["q"].shape, float("nan"), dtype=TORCH[dtype])
    return run(ATTENTION, shape.attributes, ATTENTION.dtypes(dtype), tensors)


def check(shape: Shape, batch: Batch, dtype: str = "float32", seed: int = 0, padding: int = 0) -> None:
    """Outputs near the body's, the pool's new places bit for bit, and no other place touched."""
    given = arrays_of(shape, batch, seed)
    rounded = {name: exact(tensor(a, dtype)).astype(np.float32) if a.dtype == np.float32 else a for name, a in given.items()}
    want, got = run_body(session(shape), rounded), attend(shape, given, dtype)
    real = len(batch.positions) - padding
    found, expected = exact(got["out"])[0, :real], want["out"][0, :real]
    assert np.isfinite(found).all() and np.isfinite(expected).all()
    assert np.abs(found - expected).max() <= TOLERANCES[dtype] * np.abs(expected).max()
    np.testing.assert_array_equal(exact(got["kv"])[1:], want["kv_out"][1:])  # block 0 is nobody's
    assert np.isfinite(exact(got["kv"])[1:]).sum() == 2 * live(batch, shape.block_size).sum() * shape.kv_heads * shape.size


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention(shape: Shape, step: str) -> None:
    check(shape, ragged(*STEPS[step], shape.block_size, seed=1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("grouped", "odd-size", "window-softcap")])
def test_attention_in_half_precision(shape: Shape, dtype: str) -> None:
    check(shape, ragged(*STEPS["mixture"], shape.block_size, seed=2), dtype)


@pytest.mark.parametrize("padding", [1, 90])
@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("grouped", "window")])
def test_padding_is_a_sequence_of_its_own(shape: Shape, padding: int) -> None:
    """As a captured step has it; what it writes lands in block 0, and its output is finite."""
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=3, padding=padding)
    check(shape, batch, padding=padding)
    assert np.isfinite(exact(attend(shape, arrays_of(shape, batch))["out"])).all()


def test_one_sequences_nan_stays_its_own() -> None:
    shape = SHAPES["grouped"]
    batch = ragged([1, 6, 1], [20, 30, 35], shape.block_size, seed=4)
    given = arrays_of(shape, batch)
    want = run_body(session(shape), given)["out"][0]
    given["kv"][batch.block_tables["full"][1, 0], 1, 2, 0, 0] = np.nan
    got = exact(attend(shape, given)["out"])[0]
    lost = np.isnan(got).any(axis=1)
    assert lost.tolist() == [False, *[True] * 6, False]
    assert np.abs(got - want)[~lost].max() <= 1e-5 * np.abs(want).max()


def test_the_tests_notice_a_wrong_window() -> None:
    shape = SHAPES["window"]
    given = arrays_of(shape, ragged(*STEPS["mixture"], shape.block_size, seed=5))
    got = exact(attend(shape, given)["out"])
    wrong = run_body(session(dataclasses.replace(shape, window=7)), given)["out"]
    assert np.abs(got - wrong).max() > 1e-2 * np.abs(wrong).max()


@pytest.mark.parametrize("seed", range(6))
def test_made_up_indices_lead_nowhere_outside(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder may time a plugin on any integers: no load or store leaves the tensors that the kernel was given."""
    shape = SHAPES["window" if seed % 2 else "grouped"]
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=6)
    given = arrays_of(shape, batch)
    rng = np.random.default_rng(seed)
    for name in ("block_table", "query_starts", "kv_lengths"):
        bound = 2**31 - 1 if seed > 3 else 50
        given[name] = rng.integers(-bound, bound, given[name].shape).astype(np.int32)
    spans: list[tuple[int, int]] = []
    touched = 0

    def inside(ptrs: Any, mask: Any) -> None:
        nonlocal touched
        places = np.asarray(ptrs.data)[np.broadcast_to(np.asarray(mask.data), np.shape(ptrs.data))].astype(np.int64)
        touched += places.size
        known = np.zeros(places.shape, bool)
        for begin, end in spans:
            known |= (places >= begin) & (places < end)
        assert known.all()

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    monkeypatch.setattr(builder, "create_masked_load", lambda self, p, m, *r: (inside(p, m), load(self, p, m, *r))[1])
    monkeypatch.setattr(builder, "create_masked_store", lambda self, p, v, m, *r: (inside(p, m), store(self, p, v, m, *r))[1])
    tensors = {name: tensor(array, "int32" if array.dtype == np.int32 else "float32") for name, array in given.items()}
    tensors["out"] = torch.full(tensors["q"].shape, float("nan"))
    spans += [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors.values()]
    run(ATTENTION, shape.attributes, ATTENTION.dtypes("float32"), tensors)
    assert touched


def operands(m: int, n: int, k: int, dtype: str, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    weight = np.clip(rng.standard_normal((n, k)) * 100, -448, 448).astype(FLOAT8)
    return {
        "x": tensor(rng.standard_normal((1, m, k), np.float32), dtype),
        "weight": tensor(weight, "float8e4m3"),
        "weight_scale": torch.from_numpy(rng.uniform(0.001, 0.01, n).astype(np.float32)),
        "x_scale": torch.tensor(0.0137),
        "y": torch.full((1, m, n), float("nan"), dtype=TORCH[dtype]),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 64), (5, 80, 112), (70, 200, 128), (64, 130, 40)])
def test_linear(m: int, n: int, k: int, dtype: str) -> None:
    """Against float64 on the values that the rounding leaves, and in float32 against the body."""
    tensors = operands(m, n, k, dtype)
    got = exact(run(LINEAR, {}, LINEAR.dtypes(dtype), tensors)["y"])
    rounded = round8(exact(tensors["x"]), float(tensors["x_scale"]))
    want = rounded @ exact(tensors["weight"]).T * (float(tensors["x_scale"]) * exact(tensors["weight_scale"]))
    unit = {"float32": 3e-7, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(got, want, rtol=unit, atol=3e-6 * np.abs(want).max())
    if dtype == "float32":
        names = [port.name for port in LINEAR.plugin.inputs]
        given = {name: tensors[name].numpy() for name in names if name != "weight"}
        given |= {"x": given["x"][0], "weight": tensors["weight"].view(torch.uint8).numpy().view(FLOAT8)}
        body = run_body(body_session(LINEAR.plugin), given)["y"]
        np.testing.assert_allclose(got[0], body, rtol=0, atol=1e-5 * np.abs(want).max())


def test_leading_axes_are_rows() -> None:
    tensors = operands(6, 32, 48, "bfloat16")
    want = run(LINEAR, {}, LINEAR.dtypes("bfloat16"), tensors)["y"].clone()
    for shape in ((6,), (2, 3), (2, 1, 3)):
        again = tensors | {
            "x": tensors["x"].reshape(*shape, 48),
            "y": torch.full((*shape, 32), float("nan"), dtype=torch.bfloat16),
        }
        assert torch.equal(run(LINEAR, {}, LINEAR.dtypes("bfloat16"), again)["y"].reshape(want.shape), want)


def kernels(sm: int) -> dict[str, Kernel]:
    """Of common models, and of shapes at the edges."""
    found = [ATTENTION.launch(Shape(32, 8, 128).attributes, ATTENTION.dtypes("bfloat16"), {}).kernel]
    shapes = [Shape(32, 32, 128, window=4096, softcap=30.0), *([Shape(16, 8, 256), Shape(71, 1, 64)] if sm == 90 else [])]
    found += [ATTENTION.launch(shape.attributes, ATTENTION.dtypes("float16"), {}).kernel for shape in shapes]
    if sm >= 89:
        found.append(LINEAR.launch({}, LINEAR.dtypes("bfloat16"), {"weight": (6144, 4096)}).kernel)
    if sm == 90:
        found.append(LINEAR.launch({}, LINEAR.dtypes("float16"), {"weight": (200, 112)}).kernel)
    return {kernel.name: kernel for kernel in found}


@pytest.mark.parametrize(("sm", "arch"), [(90, "sm_90a"), (89, "sm_89"), (80, "sm_80")])
def test_they_compile(sm: int, arch: str, tmp_path: Path) -> None:
    """For every kernel a cubin without spills, and PTX with the kernel's own parameters alone, which assembles."""
    made = kernels(sm)
    compile_plugins(made, sm, tmp_path)
    code = read_code(tmp_path)
    assert set(code) == set(made)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name, one in code.items():
        assert one.shared <= LARGE_SHARED and one.hidden == 2
        usage = [tools / "cuobjdump", "--dump-resource-usage", tmp_path / f"{name}.cubin"]
        assert "STACK:0" in subprocess.run(usage, capture_output=True, text=True, check=True).stdout
        ptx = one.ptx.decode()
        assert ptx.partition(".entry")[2].partition(")")[0].count(".param") == len(made[name].args)
        subprocess.run([tools / "ptxas", f"-arch={arch}", "-o", tmp_path / "again", tmp_path / f"{name}.ptx"], check=True)
        if sm == 90:
            assert "wgmma.mma_async" in ptx or dict(made[name].constants)["BLOCK_M"] < 64


def test_fp8_needs_a_gpu_that_has_it(tmp_path: Path) -> None:
    kernel = LINEAR.launch({}, LINEAR.dtypes("bfloat16"), {"weight": (256, 128)}).kernel
    with pytest.raises(CompileError, match="fp8e4nv not supported in this architecture"):
        compile_plugins({kernel.name: kernel}, 80, tmp_path)


def test_parameters_that_are_read_stay() -> None:
    ptx = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 .ptr .global .align 1 f_param_1\n)\n{ ld [f_param_%d]; }"
    assert "f_param_1" not in without_hidden(ptx % 0, 1) and without_hidden(ptx % 0, 1).count(".param ") == 1
    with pytest.raises(AssertionError, match="reads f_param_1"):
        without_hidden(ptx % 1, 1)
