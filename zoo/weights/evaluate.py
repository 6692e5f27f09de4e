"""Evaluating recipes box by box: a tile of the result asks its inputs for just the part it needs, down to views of the
mapped checkpoint. So a weight of any size takes a few megabytes of memory, transposes are done blockwise, and bfloat16
becomes float32 at memory speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from zoo.errors import ArtifactError, CheckpointError
from zoo.weights.reader import NUMPY, Array, Tensors
from zoo.weights.recipe import FLOAT8_MAX, Recipe, Weight
from zoo.weights.tables import TABLES

TILE = 4 << 20  # bytes of result that one step makes
BLOCK = 128  # rows and columns of a transposed block: 32 KB of bfloat16 in, 64 KB of float32 out, within L2
Box = tuple[slice, ...]  # start and stop for each axis


def cut(x: Array, box: Box) -> Array:
    """``x[box]`` as a view, also when there are no axes."""
    index: Any = (*box, ...)
    part: Array = x[index]
    return part


def tiles_of(weight: Weight, maker: Maker) -> Iterator[Box]:
    """Boxes of at most ``TILE`` bytes that cover a weight: whole rows, or blocks where rows are long and transposed.

    Of a stack of matrices, each of which is larger, they cover one matrix after the other.
    """
    if 0 not in weight.shape:
        yield from _tiles(weight.shape, max(NUMPY[weight.dtype].itemsize, 4), maker.turns(weight.recipe))


def _tiles(shape: tuple[int, ...], item: int, turned: bool) -> Iterator[Box]:
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:]) * item
    if len(shape) > 2 and row > TILE:
        for number in range(shape[0]):
            yield from ((slice(number, number + 1), *box) for box in _tiles(shape[1:], item, turned))
        return
    rest = tuple(slice(0, size) for size in shape[1:])
    rows = max(1, TILE // row)
    if len(shape) == 2 and rows < BLOCK and turned:
        rows = min(shape[0], 4 * BLOCK)
        columns = max(BLOCK, TILE // (rows * item) // BLOCK * BLOCK)
        for start in range(0, shape[1], columns):
            for top in range(0, shape[0], rows):
                yield slice(top, min(top + rows, shape[0])), slice(start, min(start + columns, shape[1]))
        return
    for top in range(0, shape[0], rows):
        yield slice(top, min(top + rows, shape[0])), *rest


class Maker:
    """Evaluates boxes of recipes. Safe to share between threads once a weight's channel scales are known."""

    def __init__(self, tensors: Tensors | None, scales: Mapping[str, float]) -> None:
        self.tensors, self.scales = tensors, scales
        self.kept: dict[Recipe, Array] = {}  # small whole results: channel scales and computed tables

    def fill(self, weight: Weight, box: Box, out: Array) -> None:
        """Make one box of a weight, cast to its dtype, in ``out``."""
        made = self.box(weight.recipe, box)
        if made.shape != out.shape:
            raise ArtifactError(
                f"weight {weight.name!r}: its recipe gives {made.shape}, expected {out.shape}; rebuild the engine"
            )
        try:
            _cast(made, out)
        except FloatingPointError:
            raise CheckpointError(
                f"weight {weight.name!r}: values beyond the range of {weight.dtype}; build with dtype=bfloat16 or float32"
            ) from None

    def prepare(self, weight: Weight) -> None:
        """Make what every tile of a weight needs whole, before threads share it."""
        for recipe in _parts(weight.recipe):
            if recipe.op in ("computed", "channel_scale"):
                self.box(recipe, _whole(recipe.shape))

    def forget(self, weight: Weight) -> None:
        """Let go of what a weight kept, and of the pages it read."""
        self.kept.clear()
        self.release(weight.recipe)

    def release(self, recipe: Recipe) -> None:
        """Give back the resident pages of the checkpoint that a recipe reads; they may be read again."""
        if self.tensors:
            for leaf in recipe.leaves():
                self.tensors.release(leaf["name"])

    def turns(self, recipe: Recipe) -> bool:
        """Whether a matrix, or each of a stack, lies transposed in its file, somewhere below."""
        if recipe.op == "transpose":
            return tuple(recipe["perm"]) in ((1, 0), (0, 2, 1))
        return any(self.turns(child) for child in recipe.inputs if len(child.shape) in (2, 3))

    def whole_view(self, recipe: Recipe) -> Array | None:
        """The whole of a recipe that needs no work, as a view; None when something has to be made."""
        if any(part.op not in ("tensor", "transpose", "slice", "reshape") for part in _parts(recipe)):
            return None
        return self.box(recipe, _whole(recipe.shape))

    def box(self, recipe: Recipe, box: Box) -> Array:
        """One box of a recipe's value, in the dtype it comes in; a view where that is possible."""
        made: Array
        match recipe.op:
            case "tensor":
                return cut(self._tensor(recipe), box)
            case "scale":
                if recipe["name"] not in self.scales:
                    raise ArtifactError(f"no calibrated scale for {recipe['name']!r}; rebuild the engine")
                return np.asarray(self.scales[recipe["name"]], np.float32)
            case "computed":
                return cut(self._keep(recipe, self._table), box)
            case "channel_scale":
                return cut(self._keep(recipe, self._channel_scale), box)
            case "transpose":
                perm = recipe["perm"]
                inner = [box[perm.index(axis)] for axis in range(len(perm))]
                return self.box(recipe.inputs[0], tuple(inner)).transpose(perm)
            case "slice":
                axis, start, _ = recipe.attrs
                inner = list(box)
                inner[axis] = slice(box[axis].start + start, box[axis].stop + start)
                return self.box(recipe.inputs[0], tuple(inner))
            case "every":
                axis, start, step = recipe.attrs
                inner = list(box)
                inner[axis] = slice(start + box[axis].start * step, start + (box[axis].stop - 1) * step + 1)
                found = self.box(recipe.inputs[0], tuple(inner))
                made = found[(slice(None),) * (axis % found.ndim) + (slice(None, None, step),)]
                return made
            case "weave":
                return self._weave(recipe, box)
            case "shift":
                made = _float32(self.box(recipe.inputs[0], box)) + np.float32(recipe["value"])
                return made
            case "reshape":
                child = recipe.inputs[0]
                made = self.box(child, _whole(child.shape)).reshape(recipe.shape)
                return cut(made, box)
            case "concat":
                return self._concat(recipe, box)
            case "quantize":
                x, scales = recipe.inputs
                axis = recipe["axis"] % len(recipe.shape)
                divisor = self.box(scales, (box[axis],)).reshape([-1 if a == axis else 1 for a in range(len(recipe.shape))])
                return _quantize(self.box(x, box), divisor, recipe["dtype"])
        raise ArtifactError(f"weight recipe: unknown op {recipe.op!r}; rebuild the engine")

    def _tensor(self, recipe: Recipe) -> Array:
        name = recipe["name"]
        if self.tensors is None:
            raise CheckpointError(f"tensor {name!r} is needed, but there is no checkpoint; give one with model.checkpoint=FOLDER")
        if self.tensors.shape(name) != recipe.shape:
            raise CheckpointError(
                f"{self.tensors.file_of(name)}: tensor {name!r} is {list(self.tensors.shape(name))}, not {list(recipe.shape)}"
            )
        return self.tensors.array(name)

    def _keep(self, recipe: Recipe, make: Callable[[Recipe], Array]) -> Array:
        if recipe not in self.kept:
            self.kept[recipe] = make(recipe)
        return self.kept[recipe]

    def _table(self, recipe: Recipe) -> Array:
        kind, params = recipe["kind"], dict(recipe["params"])
        if kind not in TABLES:
            raise ArtifactError(f"weight recipe: unknown table {kind!r}; known are {', '.join(TABLES)}; rebuild the engine")
        return TABLES[kind](recipe.shape, params)

    def _channel_scale(self, recipe: Recipe) -> Array:
        (x,) = recipe.inputs
        axis, limit = recipe["axis"] % len(x.shape), recipe["limit"]
        while x.op == "transpose":  # the same channels, read in the order they lie in
            axis, x = x["perm"][axis], x.inputs[0]
        peak = np.zeros(recipe.shape, np.float32)
        others = tuple(a for a in range(len(x.shape)) if a != axis)
        if 0 not in x.shape:
            for number, box in enumerate(tiles_of(Weight("", "float32", x), self), 1):
                part = _magnitude(self.box(x, box), others)
                np.maximum(peak[box[axis]], part, out=peak[box[axis]])
                if number % 16 == 0:
                    self.release(x)
        if not np.isfinite(peak).all():
            names = ", ".join(leaf["name"] for leaf in x.leaves())
            raise CheckpointError(f"tensor {names}: holds NaN or infinity, so it cannot be quantized")
        scale = peak / np.float32(limit)
        return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)

    def _concat(self, recipe: Recipe, box: Box) -> Array:
        axis, at, parts = recipe["axis"] % len(recipe.shape), 0, []
        for child in recipe.inputs:
            size = child.shape[axis]
            start, stop = max(box[axis].start - at, 0), min(box[axis].stop - at, size)
            if start < stop:
                inner = list(box)
                inner[axis] = slice(start, stop)
                parts.append(self.box(child, tuple(inner)))
            at += size
        if len(parts) == 1:
            return parts[0]
        if len({part.dtype for part in parts}) > 1:
            parts = [_float32(part) for part in parts]
        kind = parts[0].dtype
        joined: Array = np.concatenate([_bits(part) for part in parts], axis=axis)
        return joined.view(kind)

    def _weave(self, recipe: Recipe, box: Box) -> Array:
        """Whole turns of every part, then what the box wants of them."""
        axis, count = recipe["axis"] % len(recipe.shape), len(recipe.inputs)
        first = box[axis].start // count
        inner = list(box)
        inner[axis] = slice(first, -(-box[axis].stop // count))
        turns = np.stack([self.box(part, tuple(inner)) for part in recipe.inputs], axis=axis + 1)
        made: Array = turns.reshape([*turns.shape[:axis], -1, *turns.shape[axis + 2 :]])
        inner = [slice(0, size) for size in made.shape]
        inner[axis] = slice(box[axis].start - first * count, box[axis].stop - first * count)
        return cut(made, tuple(inner))


def _parts(recipe: Recipe) -> Iterator[Recipe]:
    yield recipe
    for child in recipe.inputs:
        yield from _parts(child)


def _whole(shape: Sequence[int]) -> Box:
    return tuple(slice(0, size) for size in shape)


def _bits(x: Array) -> Array:
    """The same bytes as unsigned integers, where numpy moves them faster than the small float types of ml_dtypes."""
    if x.dtype == NUMPY["bfloat16"]:
        return x.view(np.uint16)
    return x.view(np.uint8) if x.dtype.itemsize == 1 else x


def _float32(x: Array) -> Array:
    if x.dtype == np.float32:
        return x
    out: Array = np.empty(x.shape, np.float32)
    _cast(x, out)
    return out


def _quantize(x: Array, divisor: Array, dtype: str) -> Array:
    """As ONNX QuantizeLinear with saturation: divide in float32, round to nearest even, clamp to the largest finite value."""
    scaled = np.divide(_float32(x), divisor, dtype=np.float32)
    np.clip(scaled, -FLOAT8_MAX, FLOAT8_MAX, out=scaled)
    if dtype == "float8e4m3" and not np.isnan(scaled).any():
        return _float8(scaled)
    return scaled.astype(NUMPY[dtype])


def _float8(x: Array) -> Array:
    """float8e4m3 of float32 values within its range, to nearest even; several times as fast as the cast of ml_dtypes.

    Normal values lose 20 bits of mantissa and change the bias of the exponent from 127 to 7. Below 2**-6 the result counts
    steps of 2**-9, which is what remains after adding 2**14: float32 has exactly that spacing there.
    """
    bits = x.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    small = (magnitude.view(np.float32) + np.float32(2**14)).view(np.uint32)
    small -= np.float32(2**14).view(np.uint32)
    code = magnitude >> np.uint32(20)
    code &= np.uint32(1)
    code += magnitude
    code += np.uint32(0x7FFFF)
    code >>= np.uint32(20)
    code -= np.uint32((127 - 7) << 3)
    np.copyto(code, small, where=magnitude < np.float32(2**-6).view(np.uint32))
    code |= (bits >> np.uint32(24)) & np.uint32(0x80)
    return code.astype(np.uint8).view(NUMPY["float8e4m3"])


def _magnitude(x: Array, axes: tuple[int, ...]) -> Array:
    """Largest magnitude over some axes, float32; NaN wins."""
    if x.dtype == NUMPY["bfloat16"]:  # magnitudes of floats order as their bits do
        peak = (x.view(np.uint16) & np.uint16(0x7FFF)).max(axis=axes)
        return np.asarray(peak.astype(np.uint32) << np.uint32(16)).view(np.float32)
    made: Array = np.abs(_float32(x)).max(axis=axes)
    return made


def _cast(x: Array, out: Array) -> None:
    """``out[...] = x`` with a cast. FloatingPointError when a finite value leaves the range of float16."""
    if x.ndim == 3 and x.strides[1] < x.strides[2]:
        for part, to in zip(x, out, strict=True):
            _cast(part, to)
        return
    if x.ndim == 2 and x.strides[0] < x.strides[1] and min(x.shape) > 1 and not _covers(x.shape):
        for top in range(0, x.shape[0], BLOCK):  # source and result in different order: block by block, each within the cache
            for left in range(0, x.shape[1], BLOCK):
                cut = slice(top, top + BLOCK), slice(left, left + BLOCK)
                _cast_block(x[cut], out[cut])
        return
    _cast_block(x, out)


def _covers(shape: tuple[int, ...]) -> bool:
    return shape[0] <= BLOCK and shape[1] <= BLOCK


def _cast_block(x: Array, out: Array) -> None:
    if x.dtype == out.dtype:
        np.copyto(_bits(out), _bits(x))
    elif x.dtype == NUMPY["bfloat16"] and out.dtype == np.float32:
        np.left_shift(x.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    elif out.dtype == np.float16:
        with np.errstate(over="raise"):
            np.copyto(out, _float32(x), casting="same_kind")
    else:
        np.copyto(out, x, casting="unsafe")
