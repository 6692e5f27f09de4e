"""GEMMs of cuBLASLt through ctypes: no maintained binding of it is as small as the few calls that a session needs.

Constants and structures are those of the public header ``cublasLt.h`` of the nvidia-cublas wheel, and a test compares them where
the header is at hand.

    y[M, N] = x[M, K] · w[N, K]ᵀ        all row-major, rows contiguous

cuBLASLt thinks in columns: row-major [M, K] is its column-major K x M. So w is its A (transposed), x its B, and what it writes,
N x M, is our y. Both operands lie along K, which is what FP8 tensor cores ask for.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, NamedTuple

from zoo.errors import EngineError, IncompatibleError, ResourceError, UnavailableError
from zoo.runtime.cuda.driver import Device

PACKAGE = "install it with `pip install 'nvidia-cublas>=13,<14'`"
WORKSPACE = 64 << 20  # bytes; Hopper's algorithms ask for up to 32 MiB

# cudaDataType_t (library_types.h)
DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14, "float8e4m3": 28}
# Names as in cublasLt.h and cublas_api.h, without the head CUBLAS_ or CUBLASLT_.
CONSTANTS = {
    "STATUS_SUCCESS": 0,
    "STATUS_NOT_INITIALIZED": 1,
    "STATUS_ALLOC_FAILED": 3,
    "OP_N": 0,
    "OP_T": 1,
    "COMPUTE_32F": 68,
    "MATMUL_DESC_POINTER_MODE": 2,
    "MATMUL_DESC_TRANSA": 3,
    "MATMUL_DESC_TRANSB": 4,
    "MATMUL_DESC_EPILOGUE": 7,
    "MATMUL_DESC_BIAS_POINTER": 8,
    "MATMUL_DESC_A_SCALE_POINTER": 17,
    "MATMUL_DESC_B_SCALE_POINTER": 18,
    "MATMUL_DESC_FAST_ACCUM": 25,
    "MATMUL_DESC_BIAS_DATA_TYPE": 26,
    "MATMUL_DESC_A_SCALE_MODE": 31,
    "MATMUL_DESC_B_SCALE_MODE": 32,
    "MATMUL_MATRIX_SCALE_SCALAR_32F": 0,
    "MATMUL_MATRIX_SCALE_OUTER_VEC_32F": 3,
    "POINTER_MODE_HOST": 0,
    "POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO": 3,
    "EPILOGUE_DEFAULT": 1,
    "EPILOGUE_BIAS": 4,
    "MATMUL_PREF_MAX_WORKSPACE_BYTES": 1,
}
C = CONSTANTS


class Heuristic(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class Gemm:
    """What to multiply.

        x         dtype of x and w: bfloat16, float16, float32 or float8e4m3
        y         dtype of y, and of a bias [N]
        scaling   of float8e4m3: "outer": y = (x · wᵀ) * x_scale[m] * w_scale[n], both vectors of float32;
                  "tensor": both scalars; "alpha": x_scale is a scalar, w_scale a vector. Else "none".
        turned    w lies as [K, N] (not for float8e4m3)
        fast      float8e4m3 only: add in the tensor cores' few bits, without moving on to float32 now and then

    Sizes of float8e4m3 must be multiples of 16, but for ``m``.
    """

    m: int
    n: int
    k: int
    x: str
    y: str
    scaling: str = "none"
    bias: bool = False
    turned: bool = False
    fast: bool = False

    def __post_init__(self) -> None:
        assert min(self.m, self.n, self.k) > 0 and self.x in DATA_TYPES and self.y in DATA_TYPES, self
        assert (self.x == "float8e4m3") == (self.scaling in ("outer", "tensor", "alpha")), self
        assert self.x != "float8e4m3" or (not self.turned and self.k % 16 == self.n % 16 == 0), self


class Pointers(NamedTuple):
    """Addresses of one product. Scales are float32 on the GPU."""

    x: int
    w: int
    y: int
    x_scale: int = 0
    w_scale: int = 0
    bias: int = 0


@dataclass
class Plan:
    """A product with the algorithm chosen for it: layouts, algorithm, and a descriptor for each set of scales and bias."""

    gemm: Gemm
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]  # w, x, y
    algo: Any
    workspace: int
    waves: float
    described: dict[tuple[int, int, int], ctypes.c_void_p]


def m_bucket(m: int) -> int:
    """``m`` rounded up so that few plans do for all: multiples of 8 up to 64, then eight steps for each doubling.

    A plan for a bucket reads and writes rows up to it, so buffers must have them.
    """
    step = max(8, 1 << max(0, (m - 1).bit_length() - 4))
    return -(-m // step) * step


def library() -> ctypes.CDLL:
    """libcublasLt from the nvidia-cublas wheel, a CUDA toolkit or the loader's path. UnavailableError when there is none."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        path = "libcublasLt.so.13"
    else:
        try:
            path = str(load_nvidia_dynamic_lib("cublasLt").abs_path)
        except RuntimeError as error:
            raise UnavailableError(f"cuBLASLt is missing ({error}); {PACKAGE}") from None
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise UnavailableError(f"cuBLASLt cannot be loaded ({error}); {PACKAGE}") from None


class CublasLt:
    """cuBLASLt for one device, with one workspace: products run on one stream at a time.

    Raises UnavailableError without the library, IncompatibleError for a product that it cannot do on this GPU, ResourceError
    when memory is short, EngineError when a product fails to start.
    """

    def __init__(self, device: Device, workspace: int = WORKSPACE, lib: Any = None) -> None:
        self._lib = lib = lib if lib is not None else library()
        _declare(lib)
        number = int(lib.cublasLtGetVersion())
        self.version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
        device.use()
        self._handle = ctypes.c_void_p()
        status = lib.cublasLtCreate(ctypes.byref(self._handle))
        if status == C["STATUS_NOT_INITIALIZED"]:
            raise UnavailableError(f"cuBLASLt {self.version} does not start with this driver; update the driver")
        if status:
            raise ResourceError(f"cuBLASLt {self.version} does not start: {self._text(status)}")
        self._device = device
        self._size = workspace
        self._workspace = device.allocate(workspace, "cuBLASLt")
        self._plans: dict[tuple[Gemm, int], Plan] = {}
        self._made: list[tuple[Any, ctypes.c_void_p]] = []  # (destroy, what)
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._one_at, self._zero_at = ctypes.addressof(self._one), ctypes.addressof(self._zero)

    def plan(self, gemm: Gemm, choice: int = 0) -> Plan:
        """The plan of a product, made on first use: ``choice`` 0 is what the library thinks fastest, 1 the next, and so on."""
        if (gemm, choice) not in self._plans:
            if not (found := self.choices(gemm, choice + 1)[choice:]):
                raise IncompatibleError(
                    f"cuBLASLt {self.version} cannot do {gemm} on {self._device.name}; use another version, or another profile"
                )
            self._plans[gemm, choice] = found[0]
        return self._plans[gemm, choice]

    def choices(self, gemm: Gemm, count: int) -> list[Plan]:
        """Up to ``count`` plans, the one that the library thinks fastest first; none when it cannot do the product."""
        self._device.use()
        lib, n, k = self._lib, gemm.n, gemm.k
        layouts = (
            self._layout(gemm.x, n, k) if gemm.turned else self._layout(gemm.x, k, n),
            self._layout(gemm.x, k, gemm.m),
            self._layout(gemm.y, n, gemm.m),
        )
        preference = ctypes.c_void_p()
        self._do("set a limit", lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
        # Only the addresses' alignment matters here.
        somewhere = Pointers(*[self._workspace] * 6)
        desc = self._describe(gemm, somewhere)
        results, found = (Heuristic * count)(), ctypes.c_int()
        try:
            limit = ctypes.c_uint64(self._size)
            self._set(lib.cublasLtMatmulPreferenceSetAttribute, preference, "MATMUL_PREF_MAX_WORKSPACE_BYTES", limit)
            w, x, y = layouts
            status = lib.cublasLtMatmulAlgoGetHeuristic(
                self._handle, desc, w, x, y, y, preference, count, results, ctypes.byref(found)
            )
        finally:
            lib.cublasLtMatmulPreferenceDestroy(preference)
            lib.cublasLtMatmulDescDestroy(desc)
        plans = []
        for result in results[: found.value if status == 0 else 0]:
            if result.state == 0 and result.workspace <= self._size:
                algo = (ctypes.c_uint64 * 8)(*result.algo)
                plans.append(Plan(gemm, layouts, algo, int(result.workspace), float(result.waves), {}))
        return plans

    def run(self, plan: Plan, pointers: Pointers, stream: int) -> None:
        """Queue a product. The calling thread has the device's context (``Device.use``)."""
        x, w, y, x_scale, w_scale, bias = pointers
        desc = plan.described.get((x_scale, w_scale, bias))
        if desc is None:
            desc = plan.described[x_scale, w_scale, bias] = self._describe(plan.gemm, pointers)
            self._made.append((self._lib.cublasLtMatmulDescDestroy, desc))
        alpha = w_scale if plan.gemm.scaling == "alpha" else self._one_at
        at_w, at_x, at_y = plan.layouts
        status = self._lib.cublasLtMatmul(
            self._handle, desc, alpha, w, at_w, x, at_x, self._zero_at, y, at_y, y, at_y, plan.algo, self._workspace, self._size,
            stream,
        )  # fmt: skip
        if status:
            raise EngineError(f"cuBLASLt {self.version} cannot start {plan.gemm}: {self._text(status)}")

    def close(self) -> None:
        """Let go of the handle and the workspace; before the device is closed. Calling it twice is allowed."""
        if not self._handle:
            return
        for destroy, what in self._made:
            destroy(what)
        self._made.clear()
        self._plans.clear()
        self._lib.cublasLtDestroy(self._handle)
        self._handle = ctypes.c_void_p()
        self._device.free(self._workspace)

    def _layout(self, dtype: str, rows: int, columns: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        status = self._lib.cublasLtMatrixLayoutCreate(ctypes.byref(made), DATA_TYPES[dtype], rows, columns, rows)
        self._do("describe a matrix", status)
        self._made.append((self._lib.cublasLtMatrixLayoutDestroy, made))
        return made

    def _describe(self, gemm: Gemm, pointers: Pointers) -> ctypes.c_void_p:
        """A descriptor of a product with its scales and bias."""
        lib, desc = self._lib, ctypes.c_void_p()
        self._do("describe a product", lib.cublasLtMatmulDescCreate(ctypes.byref(desc), C["COMPUTE_32F"], DATA_TYPES["float32"]))
        int32, address = ctypes.c_int32, ctypes.c_uint64
        given: list[tuple[str, Any]] = [
            ("MATMUL_DESC_TRANSA", int32(C["OP_N" if gemm.turned else "OP_T"])),
            ("MATMUL_DESC_TRANSB", int32(C["OP_N"])),
        ]
        if gemm.scaling == "outer":
            mode = C["MATMUL_MATRIX_SCALE_OUTER_VEC_32F"]
            given += [("MATMUL_DESC_A_SCALE_MODE", int32(mode)), ("MATMUL_DESC_B_SCALE_MODE", int32(mode))]
        if gemm.scaling == "alpha":
            given.append(("MATMUL_DESC_POINTER_MODE", int32(C["POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO"])))
        if gemm.scaling in ("outer", "tensor"):
            given.append(("MATMUL_DESC_A_SCALE_POINTER", address(pointers.w_scale)))
        if gemm.scaling != "none":
            given.append(("MATMUL_DESC_B_SCALE_POINTER", address(pointers.x_scale)))
            given.append(("MATMUL_DESC_FAST_ACCUM", ctypes.c_int8(gemm.fast)))
        if gemm.bias:
            given.append(("MATMUL_DESC_EPILOGUE", ctypes.c_uint32(C["EPILOGUE_BIAS"])))
            given.append(("MATMUL_DESC_BIAS_DATA_TYPE", int32(DATA_TYPES[gemm.y])))
            given.append(("MATMUL_DESC_BIAS_POINTER", address(pointers.bias)))
        for name, value in given:
            self._set(lib.cublasLtMatmulDescSetAttribute, desc, name, value)
        return desc

    def _set(self, setter: Any, what: ctypes.c_void_p, name: str, value: Any) -> None:
        self._do(f"set {name}", setter(what, C[name], ctypes.byref(value), ctypes.sizeof(value)))

    def _do(self, what: str, status: int) -> None:
        if status:
            raise EngineError(f"cuBLASLt {self.version} cannot {what}: {self._text(status)}")

    def _text(self, status: int) -> str:
        name = self._lib.cublasLtGetStatusString(status)
        return name.decode() if isinstance(name, bytes) else str(name)


def _declare(lib: Any) -> None:
    """Types of the functions that are called, as the header declares them."""
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    uint64, int64 = ctypes.c_uint64, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "cublasLtGetVersion": (size, []),
        "cublasLtGetStatusString": (ctypes.c_char_p, [integer]),
        "cublasLtCreate": (integer, [pointer]),
        "cublasLtDestroy": (integer, [pointer]),
        "cublasLtMatrixLayoutCreate": (integer, [pointer, integer, uint64, uint64, int64]),
        "cublasLtMatrixLayoutDestroy": (integer, [pointer]),
        "cublasLtMatmulDescCreate": (integer, [pointer, integer, integer]),
        "cublasLtMatmulDescDestroy": (integer, [pointer]),
        "cublasLtMatmulDescSetAttribute": (integer, [pointer, integer, pointer, size]),
        "cublasLtMatmulPreferenceCreate": (integer, [pointer]),
        "cublasLtMatmulPreferenceDestroy": (integer, [pointer]),
        "cublasLtMatmulPreferenceSetAttribute": (integer, [pointer, integer, pointer, size]),
        "cublasLtMatmulAlgoGetHeuristic": (integer, [pointer] * 7 + [integer, pointer, pointer]),
        "cublasLtMatmul": (integer, [pointer] * 14 + [size, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
