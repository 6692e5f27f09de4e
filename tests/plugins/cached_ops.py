"""What the tests of ``ZooCachedAttention`` and its variants share: shapes, steps, and an op run by its body and by its kernels.

Errors are relative to the largest output: 1e-5 in float32; 2e-3 in float16 and with float8 pools, which are multiplied in
float16; 1.2e-2 in bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime
import torch
from attention_graphs import Shape
from interpreted import exact
from one_op import body_session, cuda_node, limits_of, live, random_pool, run_body, run_kernels, tensor, to8

from zoo.plugins.cached_attention import PLUGINS
from zoo.plugins.cached_attention.cuda import LOWERS
from zoo.runtime import cuda_indices
from zoo.runtime.abi import Batch

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}
SCALES = np.array([0.021, 0.013], np.float32)
OUT_SCALE = 0.011
SMALL = {"prefill_block_m": 64, "prefill_block_n": 16, "decode_block_n": 16, "decode_least": 16}  # many tiles of few tokens


SHAPES = {
    "grouped": Shape(4, 2, 16),
    "multi-query": Shape(9, 1, 8, block_size=8),
    "all-heads": Shape(2, 2, 32, block_size=32),
    "seven": Shape(7, 1, 64, block_size=128),
    "odd-size": Shape(4, 2, 80),
    "window": Shape(4, 2, 16, block_size=8, window=6),
    "window-of-one": Shape(2, 1, 16, window=1),
    "wide-window": Shape(4, 2, 16, window=21),
    "softcap": Shape(4, 1, 16, softcap=1.5),
    "window-softcap": Shape(6, 3, 24, block_size=8, window=19, softcap=2.0),
}
STEPS = {  # new tokens, length after the step
    "prefill": ([13, 2, 17, 3], [13, 2, 40, 44]),
    "decode": ([1, 1, 1, 1], [1, 37, 16, 17]),
    "mixture": ([1, 20, 1, 5, 1], [41, 20, 1, 27, 16]),
}


@functools.cache
def session(op: str, shape: Shape) -> onnxruntime.InferenceSession:
    return body_session(PLUGINS[op], **shape.attributes)


def arrays_of(shape: Shape, batch: Batch, fp8: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 inputs by name, of all variants. With ``fp8`` the pool holds what float8 values stand for.

    Sinks are from far below the largest scores to above them; slopes from 1 to what models have for their flattest heads.
    """
    rng = np.random.default_rng(seed)
    pool = random_pool(rng, live(batch, shape.block_size), shape.kv_heads, shape.size)
    if fp8:
        pool = to8(pool, SCALES).astype(np.float32) * SCALES[:, None, None, None]
    return {
        "q": 2 * rng.standard_normal((1, len(batch.positions), shape.heads * shape.size), np.float32),
        "kv": pool,
        "block_table": batch.block_tables["full"],
        "query_starts": batch.query_starts,
        "kv_lengths": batch.kv_lengths,
        "prefill_tiles": cuda_indices.prefill_tiles(batch, limits_of(batch, shape.block_size)),
        "kv_scale": SCALES,
        "out_scale": np.array(OUT_SCALE, np.float32),
        "sinks": rng.uniform(-3, 6, shape.heads).astype(np.float32),
        "slopes": np.exp2(rng.uniform(-8, 0, shape.heads)).astype(np.float32),
    }


def run(
    op: str, shape: Shape, given: dict[str, np.ndarray], dtype: str = "float32", splits: int = 1, **tuning: int
) -> torch.Tensor:
    """The launches' output, poisoned before."""
    tensors = {name: tensor(array, dtype if name in ("q", "kv", "sinks") else str(array.dtype)) for name, array in given.items()}
    if "Fp8" in op:
        tensors["kv"] = tensor(to8(given["kv"], given["kv_scale"]), "float8e4m3")
    kind = torch.float8_e4m3fn if op.endswith("Out8") else tensors["q"].dtype
    tensors["out"] = torch.full(tensors["q"].shape, float("nan")).to(kind)
    shapes: dict[str, Any] = {name: tuple(value.shape) for name, value in tensors.items()}
    width = shapes["q"][-1]
    shapes |= {"q": (1, "T", width), "out": (1, "T", width), "block_table": ("B", "P"), "prefill_tiles": ("W", 4)}
    node = cuda_node(PLUGINS[op], dtype, shapes, SMALL | tuning, **shape.attributes)
    b, p = given["block_table"].shape
    sizes = {"T": given["q"].shape[1], "B": b, "P": p, "W": len(given["prefill_tiles"]), "S": splits, "J": int(splits > 1)}
    run_kernels(LOWERS[op], node, tensors, sizes)
    return tensors["out"]


def expected(op: str, shape: Shape, given: dict[str, np.ndarray], real: int) -> np.ndarray:
    """The body's output without quantizing it, of the tokens that are not padding."""
    out = run_body(session(op.removesuffix("Out8"), shape), given)["out"]
    assert np.isfinite(out[0, :real]).all()
    return out[0, :real]


def close(got: torch.Tensor, want: np.ndarray, tolerance: float) -> None:
    found = exact(got)[0, : len(want)]
    assert np.isfinite(found).all()
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()
