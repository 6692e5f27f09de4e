"""The stand-in itself: what a GPU would answer with a broken answer, or not at all, it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import Gpu, compile_kernels, gpu_on_cpu

from zoo.plugins.kernels import Kernel
from zoo.runtime.cuda.arguments import Arguments
from zoo.runtime.cuda.cublaslt import CublasLt, Gemm, Pointers
from zoo.runtime.cuda.driver import Device
from zoo.weights.reader import NUMPY

# y = x cast to float32, [rows, 4]
CAST = Kernel(
    "zoo.plugins.standard.kernels:unary",
    (("x", "*bf16"), ("y", "*fp32"), ("rows", "i32")),
    (("OP", "cast"), ("WIDTH", 4), ("ROWS", 4), ("BLOCK", 4)),
)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def device(gpu: Gpu) -> Device:
    with gpu_on_cpu(gpu):
        return Device(90)


def load(device: Device, folder: Path) -> int:
    described = compile_kernels([CAST], 90, folder)
    return device.function(device.load((folder / f"{CAST.name}.cubin").read_bytes()), described[CAST.name]["entry"])


def test_a_kernel_runs_on_addresses_when_somebody_waits(gpu: Gpu, device: Device, tmp_path: Path) -> None:
    function, stream = load(device, tmp_path), device.stream()
    x, y = device.allocate(2 * 8), device.allocate(4 * 8)
    gpu.view(x, NUMPY["bfloat16"], 8)[:] = np.arange(8)
    arguments = Arguments([kind for _, kind in CAST.args], (x, y, 2))
    device.launch(function, (1, 1, 1), 4, 0, arguments, stream)
    arguments[2] = 7  # a launch keeps its arguments
    assert gpu.ran["unary"] == 0 and np.isnan(gpu.view(y, np.float32, 8)).all()
    device.wait(stream)
    np.testing.assert_array_equal(gpu.view(y, np.float32, 8), np.arange(8))
    assert gpu.ran["unary"] == 1


@pytest.mark.parametrize(("rows", "words"), [(3, "unary reads bytes that are not one allocation's"), (-1, "")])
def test_what_lies_outside_an_allocation(gpu: Gpu, device: Device, tmp_path: Path, rows: int, words: str) -> None:
    function, stream = load(device, tmp_path), device.stream()
    x, y = device.allocate(2 * 8), device.allocate(4 * 8)
    device.launch(function, (1, 1, 1), 4, 0, Arguments([kind for _, kind in CAST.args], (x, y, rows)), stream)
    if words:
        with pytest.raises(AssertionError, match=words):
            device.wait(stream)
    else:  # nothing is read or written
        device.wait(stream)


def test_an_address_that_a_kernel_was_not_compiled_for(device: Device, tmp_path: Path) -> None:
    function, stream = load(device, tmp_path), device.stream()
    x, y = device.allocate(64), device.allocate(64)
    device.launch(function, (1, 1, 1), 4, 0, Arguments([kind for _, kind in CAST.args], (x + 8, y, 1)), stream)
    with pytest.raises(AssertionError, match="unary is compiled for multiples of 16, and x is"):
        device.wait(stream)


def test_overlap_is_for_kernels_that_wait(gpu: Gpu, device: Device, tmp_path: Path) -> None:
    function, stream = load(device, tmp_path), device.stream()
    arguments = Arguments([kind for _, kind in CAST.args], (0, 0, 0))
    with pytest.raises(AssertionError, match="its kernel does not wait for its inputs"):
        device.launch(function, (1, 1, 1), 4, 0, arguments, stream, True)


def test_cubins_are_known_by_what_they_are(gpu: Gpu, device: Device, tmp_path: Path) -> None:
    from zoo.errors import ArtifactError

    with pytest.raises(ArtifactError, match="cannot be loaded"):
        device.load(b"\x7fELF real machine code")
    compile_kernels([CAST], 90, tmp_path)
    digest = "sha256:9d9595c5d94fb65b824f56e9999527dba9542481580d69feb89056aabaa0aa87"
    plan = {"kernels": {"x": {"digest": digest, "source": CAST.source, "args": CAST.args, "constants": CAST.constants}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    gpu.learn(tmp_path / "plan.json")
    assert digest in gpu.known


@pytest.mark.parametrize("scaling", ["none", "tensor", "outer", "alpha"])
def test_products(gpu: Gpu, device: Device, scaling: str) -> None:
    """Numpy's own in float64; a vector of alphas only where a GPU is said to have it."""
    kind = "bfloat16" if scaling == "none" else "float8e4m3"
    gpu.blas.alpha = scaling == "alpha"
    with gpu_on_cpu(gpu):
        blas, stream, rng = CublasLt(device), device.stream(), np.random.default_rng(0)
    m, n, k = 5, 32, 16
    arrays = [rng.standard_normal((m, k)).astype(NUMPY[kind]), rng.standard_normal((n, k)).astype(NUMPY[kind])]
    scales = [rng.uniform(0.5, 2, m if scaling == "outer" else 1), rng.uniform(0.5, 2, 1 if scaling == "tensor" else n)]
    arrays += [one.astype(np.float32) for one in scales]
    x, w, x_scale, w_scale = places = [device.allocate(array.nbytes) for array in arrays]
    for place, array in zip(places, arrays, strict=True):
        device.send(place, array, stream)
    y = device.allocate(4 * m * n)
    pointers = Pointers(x, w, y) if scaling == "none" else Pointers(x, w, y, x_scale, w_scale)
    blas.run(blas.plan(Gemm(m, n, k, kind, "float32", scaling)), pointers, stream)
    device.wait(stream)
    want = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64).T
    if scaling != "none":
        want = want * arrays[2].astype(np.float64)[:, None] * arrays[3].astype(np.float64)[None, :]
    np.testing.assert_allclose(gpu.view(y, np.float32, m * n).reshape(m, n), want, rtol=1e-6, atol=1e-6)
    blas.close()
    assert not gpu.blas.things
