"""cuBLASLt: constants against the header and descriptors against the library where they are at hand, products on a stand-in.

The stand-in thinks in columns as cuBLASLt does, so it tells whether rows and columns were turned into each other correctly.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_standin import Driver

from zoo.errors import EngineError, IncompatibleError, UnavailableError
from zoo.runtime.cuda import cublaslt
from zoo.runtime.cuda.cublaslt import CONSTANTS, DATA_TYPES, CublasLt, Gemm, Heuristic, Pointers, library, m_bucket
from zoo.runtime.cuda.driver import Device
from zoo.weights.reader import NUMPY

C = CONSTANTS
TYPES = {code: NUMPY[name] for name, code in DATA_TYPES.items()}
WORKSPACE = 4096


class Function:
    """A function of a library: ctypes lets its types be set."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        assert self.argtypes is not None and len(args) == len(self.argtypes)
        return self.call(*[getattr(arg, "_obj", arg) for arg in args])


class Library:
    """libcublasLt in numpy. ``supported``: which products the heuristic answers."""

    def __init__(self, cu: Driver) -> None:
        self.cu, self.things, self.calls = cu, {}, 0
        self.supported = True
        for name in dir(self):
            if name.startswith("_cublasLt"):
                setattr(self, name[1:], Function(getattr(self, name)))

    def _new(self, out: ctypes.c_void_p, thing: Any) -> int:
        out.value = 1000 + 8 * len(self.things)
        self.things[out.value] = thing
        return 0

    def _cublasLtGetVersion(self) -> int:
        return 130100

    def _cublasLtGetStatusString(self, status: int) -> bytes:
        return b"the status %d" % status

    def _cublasLtCreate(self, out: ctypes.c_void_p) -> int:
        return self._new(out, "handle")

    def _cublasLtDestroy(self, handle: ctypes.c_void_p) -> int:
        return self._gone(handle)

    def _gone(self, handle: ctypes.c_void_p) -> int:
        assert self.things.pop(handle.value)
        self.things[-handle.value] = None  # numbers are not given twice
        return 0

    def _cublasLtMatrixLayoutCreate(self, out: ctypes.c_void_p, kind: int, rows: int, columns: int, ld: int) -> int:
        return self._new(out, (TYPES[kind], rows, columns, ld))

    _cublasLtMatrixLayoutDestroy = _cublasLtMatmulDescDestroy = _cublasLtMatmulPreferenceDestroy = _gone

    def _cublasLtMatmulDescCreate(self, out: ctypes.c_void_p, compute: int, scale: int) -> int:
        assert (compute, scale) == (68, 0)
        return self._new(out, {})

    def _cublasLtMatmulPreferenceCreate(self, out: ctypes.c_void_p) -> int:
        return self._new(out, {})

    def _set(self, what: ctypes.c_void_p, attribute: int, value: Any, size: int) -> int:
        assert size == ctypes.sizeof(value)
        self.things[what.value][attribute] = value.value
        return 0

    _cublasLtMatmulDescSetAttribute = _cublasLtMatmulPreferenceSetAttribute = _set

    def _cublasLtMatmulAlgoGetHeuristic(self, handle: Any, desc: Any, a: Any, b: Any, c: Any, d: Any, preference: Any,
                                        count: int, results: Any, found: ctypes.c_int) -> int:  # fmt: skip
        if not self.supported:
            return 15
        assert self.things[preference.value] == {1: WORKSPACE}
        self.calls += 1
        found.value = min(count, 2)
        for place in range(found.value):
            results[place].algo[0], results[place].workspace, results[place].waves = 5 + place, 64, 0.5
        return 0

    def _matrix(self, place: int, layout: Any) -> np.ndarray:
        """A column-major matrix of the GPU, rows x columns, shared."""
        kind, rows, columns, ld = self.things[layout.value]
        return self.cu.view(place, kind, ld * columns).reshape(columns, ld)[:, :rows].T

    def _cublasLtMatmul(self, handle: Any, desc: Any, alpha: int, a: int, at_a: Any, b: int, at_b: Any, beta: int, c: int,
                        at_c: Any, d: int, at_d: Any, algo: Any, workspace: int, size: int, stream: int) -> int:  # fmt: skip
        told = self.things[desc.value]
        assert (c, at_c.value) == (d, at_d.value) and algo[0] in (5, 6) and size == WORKSPACE
        x, y, out = self._matrix(a, at_a), self._matrix(b, at_b), self._matrix(d, at_d)
        x = x.T if told.get(C["MATMUL_DESC_TRANSA"], 0) else x
        y = y.T if told.get(C["MATMUL_DESC_TRANSB"], 0) else y
        made = x.astype(np.float64) @ y.astype(np.float64)
        for scale, mode, axis in (("A", "A", 0), ("B", "B", 1)):
            if place := told.get(C[f"MATMUL_DESC_{scale}_SCALE_POINTER"]):
                if told.get(C[f"MATMUL_DESC_{mode}_SCALE_MODE"], 0) == C["MATMUL_MATRIX_SCALE_OUTER_VEC_32F"]:
                    factors = self.cu.view(place, np.float32, made.shape[axis])
                    made = made * (factors[:, None] if axis == 0 else factors[None, :])
                else:
                    made = made * self.cu.view(place, np.float32, 1)[0]
        if told.get(C["MATMUL_DESC_POINTER_MODE"], 0) == C["POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO"]:
            made = made * self.cu.view(alpha, np.float32, made.shape[0])[:, None]
        else:
            assert ctypes.c_float.from_address(alpha).value == 1 and ctypes.c_float.from_address(beta).value == 0
        if told.get(C["MATMUL_DESC_EPILOGUE"], 1) == C["EPILOGUE_BIAS"]:
            kind = TYPES[told[C["MATMUL_DESC_BIAS_DATA_TYPE"]]]
            made = made + self.cu.view(told[C["MATMUL_DESC_BIAS_POINTER"]], kind, made.shape[0])[:, None].astype(np.float64)
        out[...] = made.astype(out.dtype)
        return 0


@pytest.fixture
def cu() -> Driver:
    return Driver()


@pytest.fixture
def device(cu: Driver) -> Device:
    return Device(90, cu)


@pytest.fixture
def blas(cu: Driver, device: Device) -> CublasLt:
    return CublasLt(device, WORKSPACE, Library(cu))


def put(device: Device, stream: int, array: np.ndarray) -> int:
    place = device.allocate(array.nbytes)
    device.send(place, np.ascontiguousarray(array), stream)
    return place


@pytest.mark.parametrize(
    "gemm",
    [
        Gemm(5, 24, 16, "bfloat16", "bfloat16"),
        Gemm(5, 24, 16, "bfloat16", "float32", turned=True),
        Gemm(3, 8, 32, "float16", "float16", bias=True),
        Gemm(7, 32, 48, "float8e4m3", "bfloat16", "outer"),
        Gemm(7, 32, 48, "float8e4m3", "float16", "tensor", bias=True, fast=True),
        Gemm(7, 32, 48, "float8e4m3", "bfloat16", "alpha"),
    ],
    ids=str,
)
def test_products(cu: Driver, device: Device, blas: CublasLt, gemm: Gemm) -> None:
    rng = np.random.default_rng(0)
    stream = device.stream()
    x, w = (
        rng.standard_normal((gemm.m, gemm.k)).astype(NUMPY[gemm.x]),
        rng.standard_normal((gemm.n, gemm.k)).astype(NUMPY[gemm.x]),
    )
    lies = w.T if gemm.turned else w
    xs = rng.uniform(0.5, 2, gemm.m if gemm.scaling == "outer" else 1).astype(np.float32)
    ws = rng.uniform(0.5, 2, gemm.n if gemm.scaling in ("outer", "alpha") else 1).astype(np.float32)
    bias = rng.standard_normal(gemm.n).astype(NUMPY[gemm.y])
    pointers = Pointers(
        put(device, stream, x), put(device, stream, lies), device.allocate(gemm.m * gemm.n * NUMPY[gemm.y].itemsize),
        put(device, stream, xs), put(device, stream, ws), put(device, stream, bias),
    )  # fmt: skip
    blas.run(blas.plan(gemm), pointers, stream)
    wanted = x.astype(np.float64) @ w.astype(np.float64).T
    if gemm.scaling != "none":
        wanted = wanted * xs[:, None] * ws[None, :]
    if gemm.bias:
        wanted = wanted + bias.astype(np.float64)
    got = cu.view(pointers.y, NUMPY[gemm.y], gemm.m * gemm.n).reshape(gemm.m, gemm.n).astype(np.float64)
    rounding = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-6}[gemm.y]
    np.testing.assert_allclose(got, wanted, rtol=rounding, atol=1e-6)


def test_plans_are_made_once(cu: Driver, device: Device, blas: CublasLt) -> None:
    lib: Any = blas._lib
    gemm = Gemm(16, 32, 32, "bfloat16", "bfloat16")
    plan = blas.plan(gemm)
    assert blas.plan(Gemm(16, 32, 32, "bfloat16", "bfloat16")) is plan and lib.calls == 1
    assert plan.algo[0] == 5 and plan.workspace == 64 and plan.waves == 0.5
    assert blas.plan(gemm, choice=1).algo[0] == 6
    assert [found.algo[0] for found in blas.choices(gemm, 8)] == [5, 6]
    with pytest.raises(IncompatibleError, match=r"cuBLASLt 13\.1\.0 cannot do Gemm\(m=16, .* on NVIDIA Standin; use another"):
        blas.plan(gemm, choice=2)
    lib.supported = False
    with pytest.raises(IncompatibleError, match="cannot do"):
        blas.plan(Gemm(32, 32, 32, "bfloat16", "bfloat16"))


def test_close_leaves_nothing(cu: Driver, device: Device, blas: CublasLt) -> None:
    gemm = Gemm(16, 32, 32, "float8e4m3", "bfloat16", "tensor")
    plan, stream = blas.plan(gemm), device.stream()
    places = [device.allocate(4096) for _ in range(6)]
    blas.run(plan, Pointers(*places), stream)
    blas.run(plan, Pointers(*places), stream)
    assert len(plan.described) == 1
    blas.run(plan, Pointers(*places)._replace(w_scale=places[0]), stream)
    assert len(plan.described) == 2
    blas.close()
    blas.close()
    lib: Any = blas._lib
    assert not [number for number in lib.things if number > 0]
    device.close()
    assert cu.live() == []


def test_what_fails_says_so(device: Device, blas: CublasLt) -> None:
    lib: Any = blas._lib
    plan = blas.plan(Gemm(16, 32, 32, "bfloat16", "bfloat16"))
    lib.cublasLtMatmul.call = lambda *_: 13
    with pytest.raises(EngineError, match=r"cuBLASLt 13\.1\.0 cannot start Gemm\(.*\): the status 13"):
        blas.run(plan, Pointers(0, 0, 0), device.stream())


def test_an_old_driver(cu: Driver, device: Device) -> None:
    lib: Any = Library(cu)
    lib.cublasLtCreate.call = lambda *_: 1
    with pytest.raises(UnavailableError, match=r"cuBLASLt 13\.1\.0 does not start with this driver"):
        CublasLt(device, WORKSPACE, lib)


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="cuda-bindings is an extra (cuda) of the package")

    def missing(name: str) -> None:
        raise RuntimeError(f"no {name}")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    with pytest.raises(
        UnavailableError, match=r"cuBLASLt is missing \(no cublasLt\); install it with `pip install 'nvidia-cublas"
    ):
        library()


@pytest.mark.parametrize("wrong", [{"k": 24}, {"n": 40}, {"scaling": "none"}, {"turned": True}, {"m": 0}])
def test_products_that_make_no_sense(wrong: dict[str, Any]) -> None:
    right = {"m": 5, "n": 32, "k": 32, "x": "float8e4m3", "y": "bfloat16", "scaling": "outer"}
    Gemm(**right)
    with pytest.raises(AssertionError):
        Gemm(**right | wrong)


def test_buckets() -> None:
    assert [m_bucket(m) for m in (1, 8, 9, 64, 65, 128, 129, 1000, 8192)] == [8, 8, 16, 64, 72, 128, 144, 1024, 8192]
    for m in range(1, 9000):
        assert m <= m_bucket(m) <= max(8, m + 7, m * 1.125 + 1) and m_bucket(m_bucket(m)) == m_bucket(m)
    assert len({m_bucket(m) for m in range(1, 8193)}) < 70


def include() -> Path:
    """The folder of cublasLt.h: beside the library of the nvidia-cublas wheel."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        found = load_nvidia_dynamic_lib("cublasLt").abs_path
    except (ImportError, RuntimeError):
        pytest.skip("nvidia-cublas is an extra (cuda) of the package")
    folder = Path(str(found)).parent.parent / "include"
    if not (folder / "cublasLt.h").is_file():
        pytest.skip(f"no cublasLt.h in {folder}")
    return folder


def test_constants_are_those_of_the_header() -> None:
    folder = include()
    text = (folder / "cublasLt.h").read_text() + (folder / "cublas_api.h").read_text()
    for name, value in CONSTANTS.items():
        found = set(re.findall(rf"\bCUBLAS(?:LT)?_{name} = (\w+)", text)) - {"CUBLAS_POINTER_MODE_HOST"}
        assert found == {str(value)}, name
    assert "uint64_t data[8];\n} cublasLtMatmulAlgo_t;" in text and ctypes.sizeof(Heuristic) == 96
    for name, (_, arguments) in declared().items():
        (taken,) = re.findall(rf"\b{name}\(([^;]*?)\);", re.sub(r"//.*", "", text))
        count = 0 if taken.strip() in ("", "void") else taken.count(",") + 1
        assert count == len(arguments), name


def test_data_types_are_those_of_the_runtime() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is an extra (cuda) of the package")
    names = {"float32": "CUDA_R_32F", "float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF", "float8e4m3": "CUDA_R_8F_E4M3"}
    assert {name: int(getattr(runtime.cudaDataType, of)) for name, of in names.items()} == DATA_TYPES


def declared() -> dict[str, tuple[Any, list[Any]]]:
    """What ``_declare`` says of each function."""

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            self.__dict__[name] = Function(None)
            return self.__dict__[name]

    recorder = Recorder()
    cublaslt._declare(recorder)
    return {name: (function.restype, function.argtypes) for name, function in vars(recorder).items()}


@pytest.mark.parametrize("scaling", ["none", "outer", "tensor", "alpha"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_real_library_takes_the_descriptors(cu: Driver, device: Device, scaling: str, bias: bool) -> None:
    """Everything is real but the handle and the heuristic, which want a GPU."""
    include()
    real: Any = ctypes.CDLL(library()._name)
    asked: list[tuple[Any, ...]] = []
    function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 7, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def heuristic(*args: Any) -> int:
        asked.append(args)
        names = ["TRANSA", "POINTER_MODE", "A_SCALE_POINTER", "B_SCALE_POINTER", "FAST_ACCUM", "A_SCALE_MODE", "EPILOGUE"]
        for name in names:
            value, written = ctypes.c_uint64(), ctypes.c_size_t()
            real.cublasLtMatmulDescGetAttribute(
                ctypes.c_void_p(args[1]), C[f"MATMUL_DESC_{name}"], ctypes.byref(value), ctypes.c_size_t(sizes[name]),
                ctypes.byref(written),
            )  # fmt: skip
            read[name] = value.value
        return 15

    sizes = {
        "TRANSA": 4,
        "POINTER_MODE": 4,
        "A_SCALE_POINTER": 8,
        "B_SCALE_POINTER": 8,
        "FAST_ACCUM": 1,
        "A_SCALE_MODE": 4,
        "EPILOGUE": 4,
    }
    read: dict[str, int] = {}
    real.cublasLtMatmulAlgoGetHeuristic = function(heuristic)
    real.cublasLtCreate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: 0)
    blas = CublasLt(device, WORKSPACE, real)
    x = "bfloat16" if scaling == "none" else "float8e4m3"
    with pytest.raises(IncompatibleError):
        blas.plan(Gemm(5, 32, 48, x, "bfloat16", scaling, bias, fast=scaling == "tensor"))
    (args,) = asked
    assert args[7] == 1 and args[5] == args[4]
    scaled = scaling in ("outer", "tensor")
    assert read == {
        "TRANSA": 1,
        "POINTER_MODE": 3 if scaling == "alpha" else 0,
        "A_SCALE_POINTER": blas._workspace if scaled else 0,
        "B_SCALE_POINTER": blas._workspace if scaling != "none" else 0,
        "FAST_ACCUM": int(scaling == "tensor"),
        "A_SCALE_MODE": 3 if scaling == "outer" else 0,
        "EPILOGUE": 4 if bias else 1,
    }
