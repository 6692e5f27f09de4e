"""ZooRotaryCache and its variants: bodies against float64 numpy and the separate nodes, kernels against the bodies.

Errors are relative to the largest value: 2e-6 in float32, one rounding of the dtype beside that in half precision; float8
values may fall to either side where the number to round stands within 1e-5 of the middle (1e-6 for small ones).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from interpreted import ROUNDING, assert_rounds_to8, column_scales, exact, ref, round8
from one_op import FLOAT8, body_session, cuda_node, limits_of, live, ragged, random_pool, run_body, run_kernels, tensor, to8

from zoo.plugins.kernels import Launch
from zoo.plugins.rotary_cache import PLUGINS, op_name
from zoo.plugins.rotary_cache.cuda import LOWERS, lower
from zoo.runtime.abi import Batch
from zoo.runtime.cuda_indices import token_slots

EPSILON = 1e-5
SCALES = np.array([0.013, 0.02], np.float32)


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    size: int
    rotary: int = 0  # 0: the whole head
    interleaved: int = 0
    block_size: int = 4

    def attributes(self, op: str) -> dict[str, Any]:
        found = {
            "num_heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.size,
            "block_size": self.block_size,
            "rotary_dim": self.rotary or self.size,
            "interleaved": self.interleaved,
            "epsilon": EPSILON,
        }
        return {attribute.name: found[attribute.name] for attribute in PLUGINS[op].attributes}


SHAPES = {
    "grouped": Shape(4, 2, 16),
    "seven-to-one": Shape(7, 1, 8, block_size=16),
    "all-heads": Shape(2, 2, 32, block_size=8),
    "partial": Shape(4, 4, 16, rotary=4),
    "odd-sizes": Shape(6, 2, 20, rotary=12),
    "interleaved": Shape(4, 2, 16, interleaved=1),
    "interleaved-partial": Shape(2, 1, 24, rotary=12, interleaved=1),
}
BATCH = ragged([5, 1, 3, 1], [5, 9, 7, 1], 4, seed=0, padding=2)


def arrays_of(shape: Shape, batch: Batch, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 inputs of any variant by name; the pool holds what was there before the step."""
    rng = np.random.default_rng(seed)
    tokens, rotary = len(batch.positions), shape.rotary or shape.size
    angles = rng.uniform(0, 7, (40, rotary // 2))
    return {
        "qkv": rng.standard_normal((1, tokens, (shape.heads + 2 * shape.kv_heads) * shape.size), np.float32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "positions": batch.positions,
        "q_norm": rng.uniform(0.5, 1.5, shape.size).astype(np.float32),
        "k_norm": rng.uniform(0.5, 1.5, shape.size).astype(np.float32),
        "kv": random_pool(rng, live(batch, shape.block_size, before=True), shape.kv_heads, shape.size),
        "token_slots": token_slots(batch, limits_of(batch, shape.block_size)),
        "kv_scale": SCALES,
    }


def batch_for(shape: Shape) -> Batch:
    return ragged([5, 1, 3, 1], [5, 9, 7, 1], shape.block_size, seed=1, padding=2)


def wanted(op: str, shape: Shape, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v [T, heads, D] in float64, before anything is stored."""
    x = given["qkv"][0].astype(np.float64).reshape(-1, shape.heads + 2 * shape.kv_heads, shape.size)
    q, k, v = np.split(x, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    if "Norm" in op:
        q, k = (
            part / np.sqrt((part * part).mean(-1, keepdims=True) + EPSILON) * weight
            for part, weight in ((q, given["q_norm"]), (k, given["k_norm"]))
        )
    if "Write" not in op:
        q, k = (rotated(part, shape, given) for part in (q, k))
    return q, k, v


def rotated(x: np.ndarray, shape: Shape, given: dict[str, np.ndarray]) -> np.ndarray:
    rotary = shape.rotary or shape.size
    first, second = (
        (slice(0, rotary, 2), slice(1, rotary, 2)) if shape.interleaved else (slice(0, rotary // 2), slice(rotary // 2, rotary))
    )
    cos, sin = (given[name].astype(np.float64)[given["positions"]][:, None] for name in ("cos", "sin"))
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def stored(pool: np.ndarray, given: dict[str, np.ndarray], real: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a pool that the first ``real`` tokens went to: keys, values [T, K, D]."""
    slots, size = given["token_slots"][:real], pool.shape[2]
    return pool[slots // size, 0, slots % size], pool[slots // size, 1, slots % size]


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    assert got.shape == expected.shape and np.isfinite(got).all()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("op", PLUGINS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bodies(op: str, shape: Shape) -> None:
    batch = batch_for(shape)
    given = arrays_of(shape, batch)
    got = run_body(body_session(PLUGINS[op], **shape.attributes(op)), given)
    q, k, v = wanted(op, shape, given)
    real = len(q) - 2
    close(got["q"].reshape(q.shape), q)
    keys, values = stored(got["kv_out"], given, real)
    if "Fp8" in op:
        eighths = (keys / SCALES[0]).astype(FLOAT8)
        np.testing.assert_array_equal(keys, eighths.astype(np.float32) * SCALES[0])
        assert_rounds_to8(eighths.astype(np.float64), k[:real], SCALES[0], 1e-5, 1e-6)
        np.testing.assert_array_equal(values, (round8(v[:real], SCALES[1]).astype(np.float32) * SCALES[1]))
    else:
        close(keys, k[:real])
        np.testing.assert_array_equal(values, v[:real])
    untouched = live(batch, shape.block_size, before=True)
    for half in range(2):
        np.testing.assert_array_equal(got["kv_out"][:, half][untouched], given["kv"][:, half][untouched])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("op", PLUGINS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels(op: str, shape: Shape, dtype: str) -> None:
    batch = batch_for(shape)
    given = arrays_of(shape, batch)
    got, before, after = run(op, shape, batch, given, dtype)
    rounded = {name: exact(tensor(array, dtype)) if array.dtype == np.float32 else array for name, array in given.items()}
    q, k, v = wanted(op, shape, rounded)
    real = len(q) - 2
    tolerance = 2e-6 + ROUNDING[dtype]
    close(exact(got["q"]).reshape(q.shape), q, tolerance)
    keys, values = stored(after, given, real)
    if "Fp8" in op:
        assert_rounds_to8(keys, k[:real], SCALES[0], 1e-5, 1e-6)
        np.testing.assert_array_equal(values, round8(v[:real], SCALES[1]))
    else:
        close(keys, k[:real], tolerance)
        np.testing.assert_array_equal(values, v[:real])
    fresh = live(batch, shape.block_size) & ~live(batch, shape.block_size, before=True)
    fresh[0] = True  # padding may go there
    for half in range(2):
        np.testing.assert_array_equal(after[:, half][~fresh], before[:, half][~fresh])


def run(
    op: str,
    shape: Shape,
    batch: Batch,
    given: dict[str, np.ndarray],
    dtype: str,
    scales: torch.Tensor | None = None,
    **tuning: int,
) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]:
    """Tensors after the launches; the pool before and after, as numbers. ``scales``: of the columns of qkv."""
    tensors = {
        name: tensor(array, dtype if array.dtype == np.float32 and name != "kv_scale" else str(array.dtype))
        for name, array in given.items()
    }
    if "Fp8" in op:
        tensors["kv"] = tensor(to8(given["kv"], SCALES), "float8e4m3")
    before = exact(tensors["kv"])
    tokens = len(batch.positions)
    tensors["q"] = torch.full((1, tokens, shape.heads * shape.size), float("nan")).to(tensors["qkv"].dtype)
    shapes: dict[str, Any] = {name: tuple(value.shape) for name, value in tensors.items()}
    shapes |= {"qkv": (1, "T", given["qkv"].shape[-1]), "positions": ("T",), "token_slots": ("T",)}
    node = cuda_node(PLUGINS[op], dtype, shapes, tuning, **shape.attributes(op))
    if scales is not None:
        tensors["scales"] = scales
        node = dataclasses.replace(node, scales={0: ref("scales", "float32", len(scales))})
    (one,) = run_kernels(LOWERS[op], node, tensors, {"T": tokens})
    assert isinstance(one, Launch)
    return tensors, before, exact(tensors["kv"])


@pytest.mark.parametrize("op", PLUGINS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_columns_are_scaled_first(op: str, shape: Shape) -> None:
    """What a float8 GEMM left to do: the same of the same numbers."""
    batch = batch_for(shape)
    given = arrays_of(shape, batch)
    scales = column_scales(given["qkv"].shape[-1])
    raw = exact(tensor((given["qkv"] / scales.numpy()).astype(np.float32), "bfloat16")).astype(np.float32)
    got, _, after = run(op, shape, batch, given | {"qkv": raw}, "bfloat16", scales)
    rounded = {name: exact(tensor(array, "bfloat16")) if array.dtype == np.float32 else array for name, array in given.items()}
    q, k, v = wanted(op, shape, rounded | {"qkv": raw.astype(np.float64) * exact(scales)})
    real = len(q) - 2
    close(exact(got["q"]).reshape(q.shape), q, 2e-6 + ROUNDING["bfloat16"])
    keys, values = stored(after, given, real)
    if "Fp8" in op:
        assert_rounds_to8(keys, k[:real], SCALES[0], 1e-5, 1e-6)
        assert_rounds_to8(values, v[:real], SCALES[1], 1e-5, 1e-6)
    else:
        close(keys, k[:real], 2e-6 + ROUNDING["bfloat16"])
        close(values, v[:real], 2e-6 + ROUNDING["bfloat16"])


@pytest.mark.parametrize("elements", [16, 64, 1 << 14])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_any_tile_gives_the_same_bits(elements: int, heads: int) -> None:
    shape = SHAPES["grouped"]
    batch = batch_for(shape)
    given = arrays_of(shape, batch)
    first, _, pool = run("ZooRotaryCacheNormFp8", shape, batch, given, "float16")
    other, _, same = run("ZooRotaryCacheNormFp8", shape, batch, given, "float16", rotary_elements=elements, rotary_heads=heads)
    np.testing.assert_array_equal(exact(first["q"]), exact(other["q"]))
    np.testing.assert_array_equal(pool[1:], same[1:])


def test_float8_saturates_and_keeps_nan() -> None:
    shape = SHAPES["grouped"]
    batch = batch_for(shape)
    given = arrays_of(shape, batch)
    given["qkv"][0, 0, -1], given["qkv"][0, 1, -1] = 1e4, -1e4
    given["qkv"][0, 2, -1] = np.nan
    _, _, pool = run("ZooCacheWriteFp8", shape, batch, given, "float32")
    values = stored(pool, given, 3)[1][:, -1, -1]
    assert values[:2].tolist() == [448, -448] and np.isnan(values[2])


def test_a_pool_larger_than_int32() -> None:
    """Places are computed in 64 bits: the last block of a pool of 2^31 values. Nothing is allocated for the others."""
    shape = Shape(1, 1, 64, block_size=16)
    blocks = (1 << 31) // (2 * 16 * 64) + 2
    pool = torch.empty((blocks, 2, 16, 1, 64), dtype=torch.float8_e4m3fn)  # never touched, so never in memory
    slots = np.array([(blocks - 1) * 16 + 15], np.int32)
    tensors = {
        "qkv": torch.ones((1, 1, 192)),
        "kv": pool,
        "token_slots": torch.from_numpy(slots),
        "kv_scale": torch.ones(2),
        "q": torch.zeros((1, 1, 64)),
    }
    shapes: dict[str, Any] = {name: tuple(value.shape) for name, value in tensors.items()}
    shapes |= {"qkv": (1, "T", 192), "token_slots": ("T",)}
    node = cuda_node(PLUGINS["ZooCacheWriteFp8"], "float32", shapes, {}, **shape.attributes("ZooCacheWriteFp8"))
    run_kernels(lower, node, tensors, {"T": 1})
    assert (exact(pool[-1, :, 15]) == 1).all()


@pytest.mark.parametrize("op", PLUGINS)
def test_bodies_write_once_and_launches_are_one(op: str) -> None:
    body = PLUGINS[op].body
    onnx.checker.check_function(body)
    (scatter,) = [node for node in body.node if node.op_type == "ScatterND"]
    assert (scatter.input[0], scatter.output[0]) == ("kv", "kv_out")
    assert list(body.output) == ["q", "kv_out"] and op in LOWERS


def test_names_say_what_is_done() -> None:
    assert {op_name(*flags) for flags in ((True, False, False), (True, True, True), (False, False, True))} == {
        "ZooRotaryCache",
        "ZooRotaryCacheNormFp8",
        "ZooCacheWriteFp8",
    }
    assert set(LOWERS) == set(PLUGINS)


def test_the_tests_notice_a_wrong_angle() -> None:
    shape = SHAPES["grouped"]
    given = arrays_of(shape, BATCH)
    q, k, _ = wanted("ZooRotaryCache", shape, given)
    given["positions"] = given["positions"] + 1
    other, _, _ = wanted("ZooRotaryCache", shape, given)
    assert np.abs(q - other).max() > 0.1 and k.shape[1] == 2 and FLOAT8(1) == 1
