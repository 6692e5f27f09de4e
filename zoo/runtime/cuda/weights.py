"""A weight table on the GPU: what each recipe takes is decided without a GPU, then files stream into one arena.

    straight    the recipe only joins, cuts or renames whole runs of bytes of the target dtype: file to arena
    quantized   ``quantize`` and ``channel_scale`` along rows of such runs: file to scratch, kernels write both results
    made        anything else: ``zoo.weights.bind.materialize`` on the CPU, then to the arena

The arena's layout is a function of the table alone. Errors are those of the CPU path (``zoo.weights.evaluate``).

Shape legend: N rows (output channels), K columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from zoo.errors import CheckpointError, ZooError
from zoo.runtime.cuda.arguments import Arguments
from zoo.runtime.cuda.driver import Device
from zoo.runtime.cuda.runs import Run, cut_runs, runs_of
from zoo.runtime.cuda.streaming import Piece, Streamer
from zoo.weights.bind import Packed, materialize, packed_layout
from zoo.weights.reader import NUMPY, Tensors
from zoo.weights.recipe import Recipe, Weight

ALIGN = 256  # bytes; what the kernels count on
WINDOW = 64 << 20  # bytes of a matrix that is being quantized which are on the GPU at a time
# (kernel, dtype of the source) -> arguments, as ``zoo.plugins.weight_kernels`` compiles them; one program a row.
SOURCES = ("bfloat16", "float16", "float32")
CHANNEL_SCALE = ("*x", "*fp32", "*i32", "i32", "fp32")  # x, scale, bad, columns, limit
QUANTIZE = ("*x", "*fp32", "*fp8e4nv", "i32")  # x, scale, y, columns


class WeightKernels(Protocol):
    """The kernels of ``zoo.plugins.weight_kernels``, as a session has them. Everything but sizes is an address."""

    def channel_scale(
        self, x: int, dtype: str, rows: int, columns: int, limit: float, scale: int, bad: int, stream: int
    ) -> None: ...

    def quantize(self, x: int, dtype: str, rows: int, columns: int, scale: int, y: int, stream: int) -> None: ...


class CompiledWeightKernels:
    """``WeightKernels`` from compiled functions: (kernel, dtype) -> (function, warps, bytes of shared memory)."""

    def __init__(self, device: Device, functions: Mapping[tuple[str, str], tuple[int, int, int]]) -> None:
        self._device, self._functions = device, functions

    def channel_scale(self, x: int, dtype: str, rows: int, columns: int, limit: float, scale: int, bad: int, stream: int) -> None:
        self._launch("channel_scale", dtype, rows, Arguments(CHANNEL_SCALE, (x, scale, bad, columns, limit)), stream)

    def quantize(self, x: int, dtype: str, rows: int, columns: int, scale: int, y: int, stream: int) -> None:
        self._launch("quantize", dtype, rows, Arguments(QUANTIZE, (x, scale, y, columns)), stream)

    def _launch(self, name: str, dtype: str, rows: int, arguments: Arguments, stream: int) -> None:
        function, warps, shared = self._functions[name, dtype]
        self._device.launch(function, (rows, 1, 1), warps, shared, arguments, stream)


@dataclass(frozen=True)
class Straight:
    """Bytes of files, as they are, to one slot."""

    slot: Packed
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K] of ``dtype`` in files, to a float8e4m3 slot, a slot of its channel scales, or both."""

    source: Recipe
    dtype: str
    runs: tuple[Run, ...]
    limit: float
    weight: Packed | None
    scale: Packed | None


@dataclass(frozen=True)
class Made:
    """A weight that is made on the CPU."""

    slot: Packed
    weight: Weight


Step = Straight | Quantized | Made


def arena_layout(table: Sequence[Weight]) -> tuple[dict[str, Packed], int]:
    """Where each weight lies in the arena, by name, and the arena's size. Equal recipes of one dtype share a slot."""
    slots: dict[tuple[Recipe, str], Packed] = {}
    firsts = list({(weight.recipe, weight.dtype): weight for weight in reversed(table)}.values())[::-1]
    layout, total = packed_layout(firsts, ALIGN)
    for weight, packed in zip(firsts, layout, strict=True):
        slots[weight.recipe, weight.dtype] = packed
    return {weight.name: slots[weight.recipe, weight.dtype] for weight in table}, total


def plan_weights(table: Sequence[Weight], tensors: Tensors | None) -> list[Step]:
    """How each slot of ``arena_layout`` is filled, in the order of the table; a matrix that is quantized is read once."""
    slots, _ = arena_layout(table)
    steps: dict[int | tuple[Recipe, float], Step] = {}  # by slot, or by matrix and limit
    for weight in table:
        slot = slots[weight.name]
        if slot.nbytes == 0:
            continue
        if (scales := _scales_of(weight)) is not None and (runs := _rows_of(scales.inputs[0], tensors)) is not None:
            source, limit = scales.inputs[0], float(scales["limit"])
            step = steps.get((source, limit))
            if not isinstance(step, Quantized):
                step = Quantized(source, runs[0].dtype, runs, limit, None, None)
            change: dict[str, Any] = {"scale" if weight.recipe is scales else "weight": slot}
            steps[source, limit] = replace(step, **change)
        elif slot.offset not in steps:
            straight = runs_of(weight.recipe, tensors)
            if straight is not None and all(run.dtype == weight.dtype for run in straight):
                steps[slot.offset] = Straight(slot, straight)
            else:
                steps[slot.offset] = Made(slot, weight)
    return list(steps.values())


def _scales_of(weight: Weight) -> Recipe | None:
    """The channel scales along rows that a weight is, or that it is quantized with; None for any other weight."""
    recipe = weight.recipe
    if recipe.op == "quantize":
        x, scales = recipe.inputs
        if (recipe["dtype"], weight.dtype, recipe["axis"] % len(x.shape)) != ("float8e4m3", "float8e4m3", 0):
            return None
        if scales.op != "channel_scale" or scales.inputs[0] != x:
            return None
    else:
        scales = recipe
        if scales.op != "channel_scale" or weight.dtype != "float32":
            return None
    return scales if scales["axis"] % len(scales.inputs[0].shape) == 0 else None


def _rows_of(source: Recipe, tensors: Tensors | None) -> tuple[Run, ...] | None:
    """The runs of a matrix whose rows the kernels can quantize; None if they cannot."""
    if len(source.shape) != 2 or source.shape[1] % 16 or 0 in source.shape:
        return None
    runs = runs_of(source, tensors)
    if runs is None or runs[0].dtype not in SOURCES or any(run.dtype != runs[0].dtype for run in runs):
        return None
    return runs


def load_weights(
    device: Device,
    stream: int,
    table: Sequence[Weight],
    tensors: Tensors | None,
    scales: Mapping[str, float],
    kernels: WeightKernels,
) -> dict[str, int]:
    """Every weight's address on the GPU, by name, aligned to 256 bytes; all lie in one allocation that the device frees.

    Returns when everything is in place. Raises what ``materialize`` raises: CheckpointError for a tensor that is missing, has
    another shape or holds no numbers where it is quantized, ArtifactError for a malformed recipe; ResourceError when the GPU
    has no room. Nothing stays allocated then.
    """
    slots, total = arena_layout(table)
    steps = plan_weights(table, tensors)
    arena = device.allocate(total, "the weights")
    try:
        _fill(device, stream, arena, total, steps, tensors, scales, kernels)
    except BaseException:
        with contextlib.suppress(ZooError):
            device.free(arena)
        raise
    return {name: arena + slot.offset for name, slot in slots.items()}


def _fill(
    device: Device,
    stream: int,
    arena: int,
    total: int,
    steps: Sequence[Step],
    tensors: Tensors | None,
    scales: Mapping[str, float],
    kernels: WeightKernels,
) -> None:
    matrices = [step for step in steps if isinstance(step, Quantized)]
    window = max((_window_rows(step) * _row_bytes(step) for step in matrices), default=0)
    most_rows = max((step.source.shape[0] for step in matrices if step.scale is None), default=0)
    # One allocation: the window, scales that no weight keeps, and a flag for each matrix.
    spare = -(-window // ALIGN) * ALIGN
    flags = spare + -(-most_rows * 4 // ALIGN) * ALIGN
    scratch = device.allocate(flags + 4 * len(matrices), "weights being quantized")
    streamer = None
    try:
        device.fill(scratch + flags, 0, 4 * len(matrices), stream)
        streamer = Streamer(device, stream, max(total, window))
        number = 0
        for step in steps:
            match step:
                case Straight(slot, runs):
                    _add(streamer, runs, arena + slot.offset)
                case Quantized():
                    bad = scratch + flags + 4 * number
                    _quantize(streamer, step, arena, scratch, scratch + spare, bad, kernels, stream)
                    number += 1
                case Made(slot, weight):
                    array = materialize(weight, tensors, scales)
                    streamer.add(Piece(array, 0, array.nbytes, arena + slot.offset))
        streamer.finish()
        found = np.zeros(len(matrices), np.int32)
        device.fetch(found, scratch + flags, stream)
        device.wait(stream)
    finally:
        if streamer:
            with contextlib.suppress(ZooError):
                streamer.close()
        with contextlib.suppress(ZooError):
            device.free(scratch)
    for step, flag in zip(matrices, found, strict=True):
        if flag:
            names = ", ".join(leaf["name"] for leaf in step.source.leaves())
            raise CheckpointError(f"tensor {names}: holds NaN or infinity, so it cannot be quantized")


def _row_bytes(step: Quantized) -> int:
    return step.source.shape[1] * NUMPY[step.dtype].itemsize


def _window_rows(step: Quantized) -> int:
    return min(step.source.shape[0], max(1, WINDOW // _row_bytes(step)))


def _add(streamer: Streamer, runs: Sequence[Run], to: int) -> None:
    for run in runs:
        streamer.add(Piece(run.path, run.offset, run.nbytes, to))
        to += run.nbytes


def _quantize(
    streamer: Streamer,
    step: Quantized,
    arena: int,
    window: int,
    spare: int,
    bad: int,
    kernels: WeightKernels,
    stream: int,
) -> None:
    """Window by window: rows into scratch, kernels over them. The stream keeps a window from being overwritten too early."""
    rows, columns = step.source.shape
    at_once, row_bytes = _window_rows(step), _row_bytes(step)
    scale = arena + step.scale.offset if step.scale else spare
    for top in range(0, rows, at_once):
        count = min(at_once, rows - top)
        _add(streamer, cut_runs(step.runs, top * row_bytes, count * row_bytes), window)

        def launch(top: int = top, count: int = count) -> None:
            at = scale + top * 4
            kernels.channel_scale(window, step.dtype, count, columns, step.limit, at, bad, stream)
            if step.weight:
                kernels.quantize(window, step.dtype, count, columns, at, arena + step.weight.offset + top * columns, stream)

        streamer.then(launch)
