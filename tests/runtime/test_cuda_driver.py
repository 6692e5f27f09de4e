"""The CUDA driver layer on a stand-in, its names against cuda-python's own, and argument blocks."""

from __future__ import annotations

import ctypes
import inspect
import threading

import numpy as np
import pytest
from cuda_standin import Driver, Kernel

from zoo.errors import ArtifactError, EngineError, IncompatibleError, ResourceError, UnavailableError
from zoo.runtime.cuda import driver as module
from zoo.runtime.cuda.arguments import HIDDEN, SCALARS, Arguments
from zoo.runtime.cuda.driver import Device

ELF = b"\x7fELF cubin"


def add_one(cu: Driver) -> Kernel:
    """kernel(x: *i32, n: i32): x[:n] += 1."""

    def run(grid: tuple[int, int, int], place: int, count: int) -> None:
        cu.view(place, np.int32, count)[:] += 1

    return Kernel((ctypes.c_uint64, ctypes.c_int32), run)


@pytest.fixture
def cu() -> Driver:
    made = Driver(sms=(89, 90))
    made.kernels["add_one"] = add_one(made)
    return made


@pytest.fixture
def device(cu: Driver) -> Device:
    return Device(90, cu)


def test_finds_the_gpu_of_an_sm(device: Device) -> None:
    assert (device.sm, device.name, device.multiprocessors, device.max_shared) == (90, "NVIDIA Standin", 132, 232448)
    assert device.driver_version == 13000


def test_no_such_gpu() -> None:
    with pytest.raises(IncompatibleError, match=r"no visible GPU has SM 9\.0, only 8\.0, 8\.9; set CUDA_VISIBLE_DEVICES"):
        Device(90, Driver(sms=(89, 80, 89)))
    with pytest.raises(UnavailableError, match="no GPU that may be used: no CUDA-capable device is detected; choose a profile"):
        Device(90, Driver(sms=()))


def test_no_driver() -> None:
    class Missing(Driver):
        def cuInit(self, flags: int) -> tuple[int]:
            raise RuntimeError("libcuda.so.1 is not there")

    with pytest.raises(UnavailableError, match=r"needs NVIDIA's driver, which does not load here: libcuda\.so\.1 is not there"):
        Device(90, Missing())


def test_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnavailableError, match=r"needs cuda-python .*; install it with `pip install 'cuda-bindings>=13,<14'`"):
        module.bindings()


def test_memory_and_copies(cu: Driver, device: Device) -> None:
    stream = device.stream()
    place, other = device.allocate(64), device.allocate(64)
    assert place % 256 == 0
    data = np.arange(16, dtype=np.int32)
    device.send(place, data, stream)
    device.copy(other, place, 64, stream)
    device.fill(place, 0, 64, stream)
    got = np.empty(16, np.int32)
    device.fetch(got, other, stream)
    device.wait(stream)
    np.testing.assert_array_equal(got, data)
    assert not cu.view(place, np.int32, 16).any()
    device.fill_float(place, 0.25, 16, stream)
    device.wait(stream)
    assert (cu.view(place, np.float32, 16) == 0.25).all()
    pinned = device.pinned(100)
    assert pinned.shape == (100,) and pinned.dtype == np.uint8 and pinned.flags.writeable
    pinned[:] = 3
    assert (cu.host[pinned.ctypes.data] == 3).all()


def test_no_room_names_sizes() -> None:
    device = Device(90, Driver(room=3_000_000_000))
    with pytest.raises(ResourceError, match=r"cannot give 16\.1 GB for the weights: 3\.0 GB of its 3\.0 GB is free; stop"):
        device.allocate(16_100_000_000, "the weights")


def test_close_frees_everything_in_any_state(cu: Driver, device: Device) -> None:
    stream = device.stream()
    device.allocate(10)
    device.pinned(10)
    device.event()
    device.load(ELF)
    device.capture(stream, lambda: None)
    device.free(device.allocate(7))
    device.close()
    device.close()
    assert cu.live() == []
    with pytest.raises(AssertionError, match="closed"):
        device.allocate(1)


def test_launches_and_graphs(cu: Driver, device: Device) -> None:
    stream, place = device.stream(), device.allocate(40)
    device.fill(place, 0, 40, stream)
    function = device.function(device.load(ELF), "add_one")
    params = Arguments(("*i32", "i32"), (place, 4))

    def step() -> None:
        device.launch(function, (1, 1, 1), 4, 0, params, stream)

    step()
    params[1] = 6
    step()
    graph = device.capture(stream, step)
    values = cu.view(place, np.int32, 10)
    device.wait(stream)
    assert values.tolist() == [2] * 4 + [1] * 2 + [0] * 4  # capturing runs nothing
    params[1] = 10  # too late for the graph
    device.replay(graph, stream)
    device.replay(graph, stream)
    device.wait(stream)
    assert values.tolist() == [4] * 4 + [3] * 2 + [0] * 4
    with pytest.raises(EngineError, match=r"cannot launch a kernel over \(0, 1, 1\): invalid argument"):
        device.launch(function, (0, 1, 1), 4, 0, params, stream)


def test_launches_that_overlap(cu: Driver, device: Device) -> None:
    """With other grids and on other streams in between: what they have in common is made once a stream."""
    one, two, place = device.stream(), device.stream(), device.allocate(40)
    device.fill(place, 0, 40, one)
    function = device.function(device.load(ELF), "add_one")
    params = Arguments(("*i32", "i32"), (place, 4))
    for stream, grid in ((one, (1, 2, 3)), (two, (1, 1, 1)), (one, (4, 1, 1))):
        device.launch(function, grid, 4, 1000, params, stream, overlap=True)
        device.wait(stream)
    device.launch(function, (1, 1, 1), 4, 0, params, one)
    assert cu.overlapped == 3 and len(device._configs) == 2
    device.overlap = False
    device.launch(function, (1, 1, 1), 4, 0, params, one, overlap=True)
    assert cu.overlapped == 3
    device.wait(one)
    assert cu.view(place, np.int32, 5).tolist() == [5] * 4 + [0]
    device.overlap = True
    graph = device.capture(one, lambda: device.launch(function, (1, 1, 1), 4, 0, params, one, overlap=True))
    device.replay(graph, one)
    device.wait(one)
    assert cu.view(place, np.int32, 5).tolist() == [6] * 4 + [0]
    with pytest.raises(EngineError, match=r"cannot launch a kernel over \(0, 1, 1\): invalid argument"):
        device.launch(function, (0, 1, 1), 4, 0, params, one, overlap=True)


def test_a_capture_that_fails_leaves_nothing(cu: Driver, device: Device) -> None:
    stream = device.stream()
    before = len(cu.live())

    def broken() -> None:
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        device.capture(stream, broken)
    assert len(cu.live()) == before and not cu.captured


def test_shared_memory_is_asked_for(cu: Driver, device: Device) -> None:
    loaded = device.load(ELF)
    function = device.function(loaded, "add_one", 100_000)
    assert cu.attributes == {(function, 9): 100, (function, 8): 100_000}
    with pytest.raises(IncompatibleError, match=r"needs 300,000 bytes of shared memory a block, NVIDIA Standin has 232,448"):
        device.function(loaded, "add_one", 300_000)


@pytest.mark.parametrize(
    ("cubin", "error", "words"),
    [
        (b"garbage", ArtifactError, "kernel k: the cubin cannot be loaded .*image is invalid.*rebuild the engine"),
        (ELF + b"other", IncompatibleError, "kernel k: the cubin is not for NVIDIA Standin or needs a newer driver"),
    ],
)
def test_cubins_that_do_not_load(device: Device, cubin: bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        device.load(cubin, "k")


def test_a_kernel_that_is_not_there(device: Device) -> None:
    with pytest.raises(ArtifactError, match=r"kernel absent is not in its cubin \(named symbol not found\); pull or rebuild"):
        device.function(device.load(ELF), "absent")


def test_what_fails_on_the_gpu_says_so(cu: Driver, device: Device) -> None:
    stream = device.stream()
    cu.fails["cuStreamSynchronize"] = 700
    with pytest.raises(EngineError, match=r"the GPU \(NVIDIA Standin\) cannot finish: an illegal memory access"):
        device.wait(stream)


def test_events(device: Device) -> None:
    stream, start, stop = device.stream(), device.event(timing=True), device.event(timing=True)
    device.record(start, stream)
    device.record(stop, stream)
    device.wait_event(stop)
    device.stream_wait(device.stream(), stop)
    assert device.elapsed(start, stop) == 1.5


def test_other_threads_get_the_context(device: Device) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            device.allocate(8)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def read(block: Arguments, index: int, kind: type) -> object:
    cells = (ctypes.c_uint64 * (index + 1)).from_address(block.address)
    return kind.from_address(cells[index]).value


def test_argument_blocks() -> None:
    shared = ctypes.c_int32(5)
    one = Arguments(("*bf16", "i32", "fp32", "i64"), (1 << 40, shared, 0.5))
    two = Arguments(("i32",), (shared,))
    assert (len(one), len(two)) == (4, 1)
    assert [read(one, place, kind) for place, kind in enumerate((ctypes.c_uint64, ctypes.c_int32, ctypes.c_float))] == [
        1 << 40, 5, 0.5,
    ]  # fmt: skip
    assert read(one, 3, ctypes.c_int64) == 0
    shared.value = -7
    one[3] = -(1 << 40)
    address = one.address
    assert read(one, 1, ctypes.c_int32) == read(two, 0, ctypes.c_int32) == one[1] == -7
    assert read(one, 3, ctypes.c_int64) == -(1 << 40) and one.address == address
    assert [read(one, 4 + place, ctypes.c_uint64) for place in range(HIDDEN)] == [0] * HIDDEN
    with pytest.raises(AssertionError, match="a shared cell of c_int"):
        Arguments(("*i32",), (shared,))


def test_the_real_bindings_have_every_name() -> None:
    """Calls, enumerations and error codes, as cuda-python declares them; nothing is called."""
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is an extra (cuda) of the package")
    for name, member in vars(Driver).items():
        if name.startswith("cu") and callable(member):
            assert callable(getattr(real, name)), name
            documented = str(getattr(real, name).__doc__).partition("\n")[0]
            taken = [part for part in documented.partition("(")[2].rpartition(")")[0].split(",") if part.strip()]
            wanted = list(inspect.signature(member).parameters)[1:]
            if name != "cuLaunchKernel":
                assert len(taken) == len(wanted), f"{name}: {documented}"
    for enum in ("CUdevice_attribute", "CUstream_flags", "CUevent_flags", "CUfunction_attribute", "CUstreamCaptureMode",
                 "CUlaunchAttributeID"):  # fmt: skip
        for name, value in vars(getattr(Driver, enum)).items():
            assert int(getattr(getattr(real, enum), name)) == value, name
    for kind in ("CUlaunchConfig", "CUlaunchAttribute"):
        made = getattr(Driver, kind)()
        assert all(hasattr(getattr(real, kind), name) for name in (*vars(type(made)), *vars(made)) if not name.startswith("__"))
    codes = {name: int(value) for name, value in real.CUresult.__members__.items()}
    assert codes["CUDA_ERROR_OUT_OF_MEMORY"] == module.OUT_OF_MEMORY
    named = ("INVALID_PTX", "UNSUPPORTED_PTX_VERSION", "NO_BINARY_FOR_GPU")
    assert tuple(codes[f"CUDA_ERROR_{name}"] for name in named) == module.OTHER_GPU
    named = ("NO_DEVICE", "STUB_LIBRARY", "SYSTEM_DRIVER_MISMATCH", "INVALID_DEVICE")
    assert tuple(codes[f"CUDA_ERROR_{name}"] for name in named) == module.NO_GPU


def test_the_real_bindings_take_what_overlapping_launches_have_in_common() -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is an extra (cuda) of the package")
    device = object.__new__(Device)
    device._driver, device._configs = real, {}
    config = device._overlapping(4096)
    (attribute,) = config.attrs
    assert (config.numAttrs, int(attribute.id), int(config.hStream)) == (1, 6, 4096)
    assert attribute.value.programmaticStreamSerializationAllowed == 1
    config.gridDimX, config.blockDimX, config.sharedMemBytes = 7, 128, 1000
    raw = (ctypes.c_uint32 * 7).from_address(config.getPtr())  # as cuda.h lays them out
    assert list(raw) == [7, 0, 0, 128, 1, 1, 1000]


def test_every_kind_of_scalar_has_its_size() -> None:
    assert {name: ctypes.sizeof(kind) for name, kind in SCALARS.items()} == {
        "i1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8,
    }  # fmt: skip
