"""ZooCachedAttentionSinks and ...Slopes: bodies against numpy, transformers and ZooPagedAttention's, kernels against the bodies.

Tolerances are those of ``cached_ops``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from attention_graphs import Shape
from cached_ops import OUT_SCALE, SCALES, SHAPES, TOLERANCES, arrays_of, close, expected, run, session
from interpreted import exact, round8
from one_op import body_session, cuda_node, live, ragged, random_pool, run_body, tensor
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from zoo.compilers.cuda.aot import compile_kernels
from zoo.plugins.cached_attention import PLUGINS
from zoo.plugins.cached_attention import cuda as lowering
from zoo.plugins.cached_attention.cuda import LOWERS, lower
from zoo.plugins.paged_attention import PLUGINS as PAGED
from zoo.plugins.paged_attention import variant_of
from zoo.runtime.abi import Batch
from zoo.weights.alibi import alibi_slopes

KINDS = {"Sinks": "sinks", "Slopes": "slopes"}
STEPS = {  # new tokens, length after the step
    "prefill": ([9, 3], [9, 40]),
    "decode": ([1, 1, 1], [1, 37, 17]),
    "mixture": ([1, 7, 1], [41, 20, 16]),
}
FEW = [SHAPES[name] for name in ("multi-query", "window-softcap")]


def reference(shape: Shape, batch: Batch, given: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """[T, H * D] in float64, token by token, from what the contract says."""
    sinks = given["sinks"].astype(np.float64) if kind == "Sinks" else np.full(shape.heads, -np.inf)
    slopes = given["slopes"].astype(np.float64) if kind == "Slopes" else np.zeros(shape.heads)
    out = np.zeros((len(batch.positions), shape.heads, shape.size))
    for row, (position, b) in enumerate(
        zip(batch.positions, np.repeat(np.arange(len(batch.kv_lengths)), np.diff(batch.query_starts)), strict=True)
    ):
        seen = np.arange(max(0, position - shape.window + 1) if shape.window else 0, position + 1)
        block = batch.block_tables["full"][b][seen // shape.block_size]
        k, v = (given["kv"][block, one, seen % shape.block_size].astype(np.float64) for one in (0, 1))
        for head in range(shape.heads):
            group = head // (shape.heads // shape.kv_heads)
            q = given["q"][0, row].reshape(shape.heads, shape.size)[head].astype(np.float64)
            score = k[:, group] @ q * shape.size**-0.5
            if shape.softcap:
                score = shape.softcap * np.tanh(score / shape.softcap)
            score += slopes[head] * (seen - position)
            largest = max(score.max(), sinks[head])
            weight = np.exp(score - largest)
            out[row, head] = weight @ v[:, group] / (weight.sum() + np.exp(sinks[head] - largest))
    return out.reshape(len(out), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bodies(shape: Shape, kind: str) -> None:
    """Within 1e-5 of numpy; and bit for bit ZooPagedAttention's, on a pool that it has written."""
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=3, padding=2)
    given = arrays_of(shape, batch, False)
    rng = np.random.default_rng(7)
    real, width = len(batch.positions) - 2, shape.kv_heads * shape.size
    given |= {name: rng.standard_normal((1, len(batch.positions), width), np.float32) for name in ("k", "v")}
    given["kv"] = random_pool(rng, live(batch, shape.block_size, before=True), shape.kv_heads, shape.size)
    whole = run_body(body_session(PAGED[f"ZooPagedAttention{kind}"], **shape.attributes), given)
    given["kv"] = whole["kv_out"]
    want = reference(shape, batch, given, kind)[:real]
    assert np.abs(whole["out"][0, :real] - want).max() <= 1e-5 * np.abs(want).max()
    for op in PLUGINS:
        if variant_of(op) == kind:
            rounded = round8(whole["out"][0, :real], OUT_SCALE) if op.endswith("Out8") else whole["out"][0, :real]
            np.testing.assert_array_equal(run_body(session(op, shape), given)["out"][0, :real], rounded)


def test_bodies_are_attention_of_transformers() -> None:
    """gpt-oss's own function for sinks, MPT's own biases for slopes: one prompt, within 1e-5."""
    shape, kinds = SHAPES["grouped"], {}
    batch = ragged([11], [11], shape.block_size, seed=8)
    given = arrays_of(shape, batch, False)
    rows, blocks = np.arange(11), batch.block_tables["full"][0]
    k, v = (given["kv"][blocks[rows // shape.block_size], one, rows % shape.block_size] for one in (0, 1))
    q, k, v = (torch.from_numpy(x.reshape(1, 11, -1, shape.size)).transpose(1, 2) for x in (given["q"], k, v))
    causal = torch.full((11, 11), float("-inf")).triu(1)
    module = SimpleNamespace(
        num_key_value_groups=shape.heads // shape.kv_heads, sinks=torch.from_numpy(given["sinks"]), training=False
    )
    kinds["Sinks"], _ = modeling_gpt_oss.eager_attention_forward(module, q, k, v, causal[None, None], shape.size**-0.5)
    biases = build_mpt_alibi_tensor(shape.heads, 11) + causal
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, biases[None], enable_gqa=True)
    kinds["Slopes"] = mixed.transpose(1, 2)
    given["slopes"] = alibi_slopes((shape.heads,), {"heads": shape.heads, "rule": "mpt"})
    for kind, want in kinds.items():
        got = expected(f"ZooCachedAttention{kind}", shape, given, 11)
        np.testing.assert_allclose(got, want.reshape(11, -1).numpy(), rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["prefill", "decode"])
@pytest.mark.parametrize("shape", FEW, ids=["multi-query", "window-softcap"])
def test_kernels(shape: Shape, step: str, kind: str) -> None:
    """In float32, with contexts in one part and in up to three: a sink counts once."""
    batch = ragged(*STEPS[step], shape.block_size, seed=1)
    given, op = arrays_of(shape, batch, False), f"ZooCachedAttention{kind}"
    want = expected(op, shape, given, len(batch.positions))
    for splits in (1, 3) if step == "decode" else (1,):
        close(run(op, shape, given, splits=splits), want, TOLERANCES["float32"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kernels_in_half_precision(dtype: str, kind: str) -> None:
    """Sinks have the compute type, slopes are float32."""
    shape, op = SHAPES["grouped"], f"ZooCachedAttention{kind}"
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=2, padding=1)
    given = arrays_of(shape, batch, False)
    rounded = given | {name: exact(tensor(given[name], dtype)).astype(np.float32) for name in ("q", "kv", "sinks")}
    want = expected(op, shape, rounded, len(batch.positions) - 1)
    close(run(op, shape, given, dtype, splits=2), want, TOLERANCES[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", FEW, ids=["multi-query", "window-softcap"])
def test_kernels_with_a_float8_pool(shape: Shape, kind: str) -> None:
    """Queries are large, and every other one is too large for float16; keys are small."""
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=4, padding=1)
    given, op = arrays_of(shape, batch, True), f"ZooCachedAttention{kind}Fp8"
    given["q"][:, ::2] *= 1e6
    given["kv"][:, 0] *= 1e-6
    want = expected(op, shape, given, len(batch.positions) - 1)
    scales = SCALES * np.array([1e-6, 1], np.float32)
    close(run(op, shape, given | {"kv_scale": scales}, splits=3), want, TOLERANCES["float16"])


@pytest.mark.parametrize("op", ["ZooCachedAttentionSinksOut8", "ZooCachedAttentionSlopesFp8Out8"])
def test_quantized_outputs_whatever_tiles_and_parts(op: str) -> None:
    """A value near the middle of two float8 values may fall to either."""
    shape = SHAPES["wide-window"]
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=5)
    given = arrays_of(shape, batch, "Fp8" in op)
    want = expected(op, shape, given, len(batch.positions))
    margin = (2e-3 if "Fp8" in op else 1e-5) * np.abs(want).max()
    low, high = round8(want - margin, OUT_SCALE), round8(want + margin, OUT_SCALE)
    for splits, tuning in ((1, {}), (5, {"prefill_block_m": 32, "prefill_block_n": 32, "decode_least": 32})):
        got = exact(run(op, shape, given, splits=splits, **tuning))[0]
        assert ((got >= low) & (got <= high)).all() and np.abs(got).max() < 448


def test_sinks_far_from_the_scores() -> None:
    """So far above that nothing is left, and so far below that nothing changes, in one part and in several."""
    shape, op = SHAPES["grouped"], "ZooCachedAttentionSinks"
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=6)
    given = arrays_of(shape, batch, False) | {"sinks": np.array([1e4, -1e4, 60, -60], np.float32)}
    want = expected(op, shape, given, len(batch.positions))
    plain = expected("ZooCachedAttention", shape, given, len(batch.positions))
    heads = [slice(head * shape.size, (head + 1) * shape.size) for head in range(4)]
    assert not want[:, heads[0]].any() and 0 < np.abs(want[:, heads[2]]).max() < 1e-10
    np.testing.assert_allclose(want[:, heads[1]], plain[:, heads[1]], rtol=1e-6, atol=1e-6)
    for splits in (1, 3):
        got = exact(run(op, shape, given, splits=splits))[0]
        for head in heads:  # each by itself, lest the large ones hide the small
            np.testing.assert_allclose(got[:, head], want[:, head], rtol=0, atol=1e-5 * np.abs(want[:, head]).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_tests_notice_one_head_s_number(kind: str) -> None:
    shape, op = SHAPES["grouped"], f"ZooCachedAttention{kind}"
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=11)
    given = arrays_of(shape, batch, False)
    got = exact(run(op, shape, given, splits=2))[0]
    for head in range(shape.heads):
        moved = given[KINDS[kind]].copy()
        moved[head] *= 1.1
        wrong = expected(op, shape, given | {KINDS[kind]: moved}, len(got))
        assert np.abs(got - wrong).max() > 10 * TOLERANCES["float32"] * np.abs(wrong).max()


def test_plain_kernels_have_no_argument_for_them() -> None:
    """What a model without these options runs has a constant in its place; a merge has no use for slopes."""
    shape = SHAPES["grouped"]
    shapes: dict[str, Any] = {port.name: port.shape for op in PLUGINS for port in PLUGINS[op].inputs} | {"out": (1, "T", 64)}
    for op in PLUGINS:
        node = cuda_node(PLUGINS[op], "bfloat16", shapes, {}, **shape.attributes)
        kind = variant_of(op)
        found = [dict(one.kernel.args).get("extra") for one in lower(node)]
        assert found == {"": [None] * 3, "Sinks": ["*bf16"] * 3, "Slopes": ["*fp32", "*fp32", None]}[kind]
        for one in lower(node):
            constants, has = dict(one.kernel.constants), "extra" in dict(one.kernel.args)
            assert (constants["EXTRA"], constants.get("extra")) == ((KINDS[kind], None) if has else ("", 0))
        assert LOWERS[op] is lower
    assert set(lowering.VARIANTS.values()) - {""} == set(KINDS.values())


def test_what_a_hopper_gpu_is_given(tmp_path: Path) -> None:
    """One of each, compiled ahead of time for SM 9.0: tensor cores as without, and no register spilled."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    shape = Shape(8, 2, 32)
    shapes: dict[str, Any] = {port.name: port.shape for op in PLUGINS for port in PLUGINS[op].inputs}
    shapes |= {"q": (1, "T", 256), "out": (1, "T", 256), "kv": ("blocks", 2, 16, 2, 32)}
    sinks, slopes = (
        [one.kernel for one in lower(cuda_node(PLUGINS[f"ZooCachedAttention{kind}"], "bfloat16", shapes, {}, **shape.attributes))]
        for kind in KINDS
    )
    made = {sinks[0]: "HGMMA", slopes[1]: "HMMA", sinks[2]: ""}  # prefill, decode, merge
    compile_kernels(list(made), 90, tmp_path)
    for kernel, instruction in made.items():
        command = [tools / "nvdisasm", "-c", tmp_path / f"{kernel.name}.cubin"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STL" not in code and instruction in code
