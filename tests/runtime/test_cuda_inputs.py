"""A step's inputs on their way: packed, aligned, one copy, through pinned buffers in turn."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_standin import Driver

from zoo.runtime.abi import SAMPLING
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.inputs import ALIGN, Inputs

MOST = {"ids": 4 * 100, "table": 4 * 12, "none": 4, "sampling": 3 * SAMPLING.itemsize}


@pytest.fixture
def cu() -> Driver:
    return Driver()


@pytest.fixture
def device(cu: Driver) -> Device:
    return Device(90, cu)


def arrays(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    records = np.zeros(3, SAMPLING)
    records["temperature"], records["counter"] = rng.random(3), rng.integers(0, 9, 3)
    return {
        "ids": rng.integers(-5, 5, count).astype(np.int32),
        "table": rng.integers(0, 99, (3, 4)).astype(np.int32),
        "none": np.empty((0, 4), np.int32),
        "sampling": records,
    }


def read(cu: Driver, inputs: Inputs, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a kernel would find at the places of a step's inputs."""
    return {
        name: cu.view(inputs.cells[name].value, array.dtype, array.size).reshape(array.shape).copy()
        for name, array in given.items()
    }


def test_inputs_lie_packed_and_aligned(cu: Driver, device: Device) -> None:
    stream = device.stream()
    inputs = Inputs(device, MOST, 3)
    for count in (1, 64, 65, 100):
        given = arrays(count, count)
        inputs.send(0, given, stream)
        device.wait(stream)
        for name, found in read(cu, inputs, given).items():
            np.testing.assert_array_equal(found, given[name])
        places = [inputs.cells[name].value for name in given]
        assert all(place % ALIGN == 0 for place in places) and places == sorted(set(places))
        assert places[1] - places[0] == -(-4 * count // ALIGN) * ALIGN, "what is shorter moves what is behind it"


def test_arrays_may_be_changed_and_slots_are_apart(cu: Driver, device: Device) -> None:
    """The stand-in copies as late as it may: a step's inputs are its own until then."""
    stream, first, second = device.stream(), arrays(1, 30), arrays(2, 30)
    inputs = Inputs(device, MOST, 2)
    kept = {name: array.copy() for name, array in first.items()}
    inputs.send(0, first, stream)
    event = device.event()
    device.record(event, stream)
    for array in first.values():
        array[...] = np.zeros((), array.dtype)
    inputs.send(1, second, stream)
    device.wait_event(event)
    for name, found in read(cu, inputs, kept).items():
        np.testing.assert_array_equal(found, kept[name])
    device.wait(stream)
    for name, found in read(cu, inputs, second).items():
        np.testing.assert_array_equal(found, second[name])


def test_views_that_are_not_contiguous(cu: Driver, device: Device) -> None:
    stream = device.stream()
    inputs = Inputs(device, MOST, 1)
    table = np.arange(24, dtype=np.int32).reshape(3, 8)[:, ::2]
    inputs.send(0, {"table": table}, stream)
    device.wait(stream)
    np.testing.assert_array_equal(read(cu, inputs, {"table": table})["table"], table)


def test_more_than_there_is_room_for_is_a_bug(device: Device) -> None:
    inputs = Inputs(device, MOST, 1)
    with pytest.raises(AssertionError, match=r"ids: 4,000 bytes in a step, the engine takes 400"):
        inputs.send(0, arrays(0, 1000), device.stream())


def test_closing_the_device_gives_all_back(cu: Driver, device: Device) -> None:
    Inputs(device, MOST, 3)
    device.close()
    assert cu.live() == []
