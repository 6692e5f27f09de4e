"""Weight recipes: small expressions that say how a weight is made, without reading anything.

A leaf is a checkpoint tensor, a computed table or a calibrated scale; an inner node is one transform. Shapes are known,
bytes are not. A recipe is plain JSON data both ways, so that it can travel in an artifact and be carried out elsewhere.

    q = tensor("model.layers.0.self_attn.q_proj.weight", (4096, 4096))
    k = tensor("model.layers.0.self_attn.k_proj.weight", (1024, 4096))
    Weight("layer.0.qkv", "bfloat16", transpose(concat([q, k], axis=0), (1, 0)))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import ArtifactError

# op -> its attributes. `tensor`, `computed` and `scale` are leaves.
OPS: dict[str, tuple[str, ...]] = {
    "tensor": ("name",),  # a checkpoint tensor, in the dtype it is stored in
    "computed": ("kind", "params"),  # a table, float32: see zoo.weights.bind.TABLES
    "scale": ("name",),  # a calibrated activation scale, float32, shape ()
    "transpose": ("perm",),
    "concat": ("axis",),
    "slice": ("axis", "start", "stop"),
    "every": ("axis", "start", "step"),  # x[start::step] along an axis
    "weave": ("axis",),  # inputs of one shape in turns along an axis: the first of each, then the second of each, ...
    "reshape": (),
    "shift": ("value",),  # x + value, float32
    "channel_scale": ("axis", "limit"),  # max(|x|) over all axes but `axis`, divided by `limit`; float32
    "quantize": ("axis", "dtype"),  # inputs x and its channel_scale: x / scale, rounded to `dtype`, saturating
}
FLOAT8_MAX = 448.0  # the largest finite float8e4m3


@dataclass(frozen=True)
class Recipe:
    """One node of a weight's expression. ``attrs`` are the values of ``OPS[op]`` in that order."""

    op: str
    shape: tuple[int, ...]
    inputs: tuple[Recipe, ...] = ()
    attrs: tuple[Any, ...] = ()

    def __getitem__(self, attr: str) -> Any:
        return self.attrs[OPS[self.op].index(attr)]

    def leaves(self, op: str = "tensor") -> Iterator[Recipe]:
        """All leaves of one kind, left to right."""
        if self.op == op:
            yield self
        for child in self.inputs:
            yield from child.leaves(op)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"op": self.op, "shape": list(self.shape)}
        data |= dict(zip(OPS[self.op], self.attrs, strict=True))
        if self.inputs:
            data["inputs"] = [child.to_json() for child in self.inputs]
        return data

    @classmethod
    def from_json(cls, data: Any, depth: int = 0) -> Recipe:
        """Rebuild a recipe; ArtifactError for anything that ``to_json`` does not write."""
        if not isinstance(data, dict) or data.get("op") not in OPS or depth > 16:
            raise ArtifactError("weight recipe: expected an object with a known 'op', at most 16 deep; rebuild the engine")
        op = data["op"]
        if set(data) - {"op", "shape", "inputs"} != set(OPS[op]):
            raise ArtifactError(f"weight recipe: {op} takes {', '.join(OPS[op]) or 'no attributes'}, found {sorted(data)}")
        shape = data.get("shape")
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ArtifactError(f"weight recipe: {op} has the shape {shape!r}; expected a list of sizes")
        inputs = tuple(cls.from_json(child, depth + 1) for child in data.get("inputs", ()))
        attrs = tuple(_freeze(data[key]) for key in OPS[op])
        return cls(op, tuple(shape), inputs, attrs)


def _freeze(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((str(key), _freeze(item)) for key, item in value.items()))
    return value


@dataclass(frozen=True)
class Weight:
    """A named graph input that stands for a weight: its recipe, and the dtype it is cast to at the end."""

    name: str
    dtype: str  # float32 | float16 | bfloat16 | float8e4m3 | int64 ...: see zoo.weights.bind.NUMPY
    recipe: Recipe

    @property
    def shape(self) -> tuple[int, ...]:
        return self.recipe.shape

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "recipe": self.recipe.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Weight:
        if not isinstance(data, dict) or not isinstance(data.get("name"), str) or not isinstance(data.get("dtype"), str):
            raise ArtifactError("weight table: expected objects with name, dtype and recipe; rebuild the engine")
        return cls(data["name"], data["dtype"], Recipe.from_json(data.get("recipe")))


def tensor(name: str, shape: Sequence[int]) -> Recipe:
    """A checkpoint tensor of a known shape."""
    return Recipe("tensor", tuple(shape), (), (name,))


def computed(kind: str, shape: Sequence[int], /, **params: Any) -> Recipe:
    """A table that is calculated, such as rotary cosines; ``params`` are plain numbers and strings."""
    return Recipe("computed", tuple(shape), (), (kind, _freeze(params)))


def scale(name: str) -> Recipe:
    """The calibrated scale of one activation, a scalar."""
    return Recipe("scale", (), (), (name,))


def transpose(x: Recipe, perm: Sequence[int]) -> Recipe:
    """Axes reordered as in ``numpy.transpose``. Two that cancel vanish."""
    if x.op == "transpose" and tuple(x["perm"][p] for p in perm) == tuple(range(len(perm))):
        return x.inputs[0]
    return Recipe("transpose", tuple(x.shape[p] for p in perm), (x,), (tuple(perm),))


def concat(parts: Sequence[Recipe], axis: int) -> Recipe:
    """Parts joined along an axis."""
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return Recipe("concat", tuple(shape), tuple(parts), (axis,))


def slice_(x: Recipe, axis: int, start: int, stop: int) -> Recipe:
    """``x[start:stop]`` along an axis."""
    shape = list(x.shape)
    shape[axis] = stop - start
    return Recipe("slice", tuple(shape), (x,), (axis, start, stop))


def every(x: Recipe, axis: int, start: int, step: int) -> Recipe:
    """``x[start::step]`` along an axis, whose size ``step`` divides."""
    assert x.shape[axis] % step == 0, f"{x.shape[axis]} rows in turns of {step}"
    shape = list(x.shape)
    shape[axis] //= step
    return Recipe("every", tuple(shape), (x,), (axis, start, step))


def weave(parts: Sequence[Recipe], axis: int) -> Recipe:
    """Parts of one shape in turns along an axis: what ``every`` takes apart. Parts that it took from one thing give that."""
    first, count = parts[0], len(parts)
    assert all(part.shape == first.shape for part in parts), f"{[part.shape for part in parts]} in turns"
    if all(part.op == "transpose" and part["perm"] == first["perm"] for part in parts):
        return transpose(weave([part.inputs[0] for part in parts], first["perm"][axis]), first["perm"])
    turns = [("every", first.inputs, (axis, number, count)) for number in range(count)]
    if [(part.op, part.inputs, part.attrs) for part in parts] == turns:
        return first.inputs[0]
    shape = list(first.shape)
    shape[axis] *= count
    return Recipe("weave", tuple(shape), tuple(parts), (axis,))


def shift(x: Recipe, value: float) -> Recipe:
    """``x + value``, in float32."""
    return Recipe("shift", x.shape, (x,), (value,))


def reshape(x: Recipe, shape: Sequence[int]) -> Recipe:
    """The same elements in another shape."""
    return Recipe("reshape", tuple(shape), (x,))


def channel_scale(x: Recipe, axis: int, limit: float = FLOAT8_MAX) -> Recipe:
    """The scale of each channel along ``axis`` so that its largest magnitude becomes ``limit``; 1 for a channel of zeros."""
    return Recipe("channel_scale", (x.shape[axis],), (x,), (axis, limit))


def quantize(x: Recipe, scales: Recipe, axis: int, dtype: str = "float8e4m3") -> Recipe:
    """``x`` divided by its channel's scale and rounded to ``dtype``, saturating."""
    return Recipe("quantize", x.shape, (x, scales), (axis, dtype))
