"""Quantizing weights on a GPU: the kernels in Triton's interpreter, bit for bit against ``zoo.weights.bind.materialize``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from interpreted import TORCH, gpu_arithmetic

from zoo.errors import CheckpointError
from zoo.plugins.kernels import TRITON_TYPES
from zoo.plugins.weight_kernels import SOURCES, kernels, weight_kernels
from zoo.weights.bind import materialize
from zoo.weights.reader import Tensors
from zoo.weights.recipe import FLOAT8_MAX, Weight, channel_scale, quantize, tensor

NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def run(x: torch.Tensor, limit: float = FLOAT8_MAX, block: int = 64) -> tuple[np.ndarray, np.ndarray, int]:
    """Bytes of float8, scales and the flag; outputs are poisoned first."""
    rows, columns = x.shape
    scale, bad = torch.full((rows,), float("nan")), torch.zeros(1, dtype=torch.int32)
    y = torch.full((rows, columns), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with gpu_arithmetic():
        kernels.channel_scale[(rows,)](x, scale, bad, columns, limit, BLOCK=block)
        kernels.quantize[(rows,)](x, scale, y, columns, BLOCK=block)
    return y.view(torch.uint8).numpy(), scale.numpy(), int(bad)


def on_cpu(x: torch.Tensor, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    safetensors.torch.save_file({"w": x}, folder / "model.safetensors")
    source = tensor("w", x.shape)
    scales = channel_scale(source, 0)
    with Tensors.open(folder) as tensors:
        y = materialize(Weight("w", "float8e4m3", quantize(source, scales, 0)), tensors, {})
        scale = materialize(Weight("s", "float32", scales), tensors, {})
    return y.view(np.uint8), scale


def hard(dtype: str, rows: int, columns: int) -> np.ndarray:
    """Rows of very different sizes, of zeros, of signed zeros, subnormals and powers of two."""
    rng = np.random.default_rng(SOURCES.index(dtype))
    x = rng.standard_normal((rows, columns)) * np.exp(rng.uniform(-8, 8, (rows, 1)))
    x[0] = 0.0
    x[1] = -0.0
    x[2] = 2.0 ** rng.integers(-14, 14, columns)
    x[3] = np.float64(2e-7) * rng.integers(-9, 9, columns)  # subnormal in float16
    x[4] = rng.choice([1.0, 448.0, 447.9, 0.5, -448.0, 17.0, 19.0], columns)  # scale 1: ties between neighbours
    if dtype != "float16":
        x[5] = 1e-39 * rng.integers(-9, 9, columns)  # subnormal in float32
        x[6] = rng.uniform(-3e38, 3e38, columns)
    x = np.clip(x, -6e4, 6e4) if dtype == "float16" else x
    return x.astype(NUMPY[dtype])


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("columns", [16, 64, 208])
def test_bit_for_bit_as_on_the_cpu(dtype: str, columns: int, tmp_path: Path) -> None:
    bits = hard(dtype, 24, columns).view(np.uint16 if dtype != "float32" else np.uint32)
    x = torch.from_numpy(bits.copy()).view(TORCH[dtype])
    y, scale, bad = run(x)
    wanted, scales = on_cpu(x, tmp_path)
    np.testing.assert_array_equal(scale.view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(y, wanted)
    assert bad == 0 and scale[0] == scale[1] == 1


def test_another_limit() -> None:
    x = torch.tensor([[1.0, -3.0] + [0.0] * 14])
    assert run(x, limit=100.0)[1].tolist() == [np.float32(3) / np.float32(100)]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", SOURCES)
def test_what_is_no_number_is_flagged(dtype: str, value: float, tmp_path: Path) -> None:
    x = torch.ones((3, 32), dtype=TORCH[dtype])
    x[2, 31] = value
    assert run(x)[2] == 1
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        on_cpu(x, tmp_path)


def test_what_is_compiled_matches_the_functions() -> None:
    made = weight_kernels()
    assert set(made) == {(name, dtype) for name in ("channel_scale", "quantize") for dtype in SOURCES}
    for (name, dtype), kernel in made.items():
        function = getattr(kernels, name)
        assert [one for one, _ in (*kernel.args, *kernel.constants)] == function.arg_names
        assert kernel.args[0] == ("x", "*" + TRITON_TYPES[dtype])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zoo.plugins.weight_kernels import kernels, weight_kernels
for (name, dtype), kernel in weight_kernels().items():
    if dtype == "bfloat16":
        function, types, constants = getattr(kernels, name), dict(kernel.args), dict(kernel.constants)
        source = ASTSource(fn=function, signature={one: types.get(one, "constexpr") for one in function.arg_names},
                           constexprs=constants,
                           attrs={(at,): [["tt.divisibility", 16]] for at, one in enumerate(function.arg_names)
                                  if types.get(one, "").startswith("*")})
        print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"])
"""


def test_the_machine_code_divides_as_ieee_and_loads_wide() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], env={"TRITON_INTERPRET": "0", "HOME": str(Path.home())},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ptx = done.stdout
    assert "div.rn.f32" in ptx and "div.full" not in ptx and "rcp" not in ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx and "ld.global.b16" not in ptx
