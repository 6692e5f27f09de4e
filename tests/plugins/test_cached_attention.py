"""ZooCachedAttention, Fp8 and Out8: bodies against ZooPagedAttention's, kernels against the bodies, whatever pools hold.

Tolerances are those of ``cached_ops``. Sinks and slopes are in test_cached_attention_variants.py.
"""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import triton
from attention_graphs import Shape
from cached_ops import OUT_SCALE, SCALES, SHAPES, STEPS, TOLERANCES, arrays_of, close, expected, run, session
from interpreted import assert_rounds_to8, exact, round8
from one_op import FLOAT8, body_session, cuda_node, live, ragged, random_pool, run_body, tensor

from zoo.compilers.cuda.aot import compile_kernels
from zoo.plugins.cached_attention import PLUGINS, op_name
from zoo.plugins.cached_attention import cuda as lowering
from zoo.plugins.cached_attention.cuda import LOWERS, lower
from zoo.plugins.paged_attention import PLUGIN as PAGED
from zoo.plugins.paged_attention.body import VARIANTS
from zoo.runtime import cuda_indices

PLAIN = tuple(op_name(fp8, out8) for fp8 in (False, True) for out8 in (False, True))  # those without sinks and slopes


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bodies_are_that_of_paged_attention(shape: Shape) -> None:
    """Bit for bit, on a pool that ZooPagedAttention has written."""
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=3, padding=2)
    given = arrays_of(shape, batch, False)
    rng = np.random.default_rng(7)
    real = len(batch.positions) - 2
    width = shape.kv_heads * shape.size
    given |= {name: rng.standard_normal((1, len(batch.positions), width), np.float32) for name in ("k", "v")}
    given["kv"] = random_pool(rng, live(batch, shape.block_size, before=True), shape.kv_heads, shape.size)
    whole = run_body(body_session(PAGED, **shape.attributes), given)
    given["kv"] = whole["kv_out"]
    for op in PLAIN:
        got = run_body(session(op, shape), given)["out"][0, :real]
        want = whole["out"][0, :real]
        assert np.isfinite(want).all()
        if op.endswith("Out8"):
            want = round8(want, OUT_SCALE)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("step", ["prefill", "decode"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels(shape: Shape, step: str) -> None:
    """In float32, with contexts in one part and in up to three."""
    batch = ragged(*STEPS[step], shape.block_size, seed=1)
    given = arrays_of(shape, batch, False)
    want = expected("ZooCachedAttention", shape, given, len(batch.positions))
    for splits in (1, 3) if step == "decode" else (1,):
        close(run("ZooCachedAttention", shape, given, splits=splits), want, TOLERANCES["float32"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("grouped", "multi-query", "odd-size", "window-softcap")])
def test_kernels_in_half_precision(shape: Shape, dtype: str) -> None:
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=2, padding=1)
    given = arrays_of(shape, batch, False)
    rounded = given | {name: exact(tensor(given[name], dtype)).astype(np.float32) for name in ("q", "kv")}
    want = expected("ZooCachedAttention", shape, rounded, len(batch.positions) - 1)
    close(run("ZooCachedAttention", shape, given, dtype, splits=2), want, TOLERANCES[dtype])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_with_a_float8_pool(shape: Shape) -> None:
    """Queries are large, and every other one is too large for float16; keys are small."""
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=4, padding=1)
    given = arrays_of(shape, batch, True)
    given["q"][:, ::2] *= 1e6
    scales = SCALES * np.array([1e-6, 1], np.float32)
    given["kv"][:, 0] *= 1e-6
    dtype = "bfloat16" if shape.window else "float32"
    rounded = given | {"q": exact(tensor(given["q"], dtype)).astype(np.float32)}
    want = expected("ZooCachedAttentionFp8", shape, rounded, len(batch.positions) - 1)
    got = run("ZooCachedAttentionFp8", shape, given | {"kv_scale": scales}, dtype, splits=3)
    close(got, want, max(TOLERANCES["float16"], TOLERANCES[dtype]))


@pytest.mark.parametrize("op", ["ZooCachedAttentionOut8", "ZooCachedAttentionFp8Out8"])
def test_quantized_outputs(op: str) -> None:
    shape = SHAPES["grouped"]
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=5)
    given = arrays_of(shape, batch, "Fp8" in op)
    want = expected(op, shape, given, len(batch.positions))
    noise = 1e-5 if op == "ZooCachedAttentionOut8" else 2e-3
    for splits in (1, 3):
        got = exact(run(op, shape, given, splits=splits))[0]
        margin = noise * np.abs(want).max()
        low, high = round8(want - margin, OUT_SCALE), round8(want + margin, OUT_SCALE)
        assert ((got >= low) & (got <= high)).all() and np.abs(got).max() < 448
        if op == "ZooCachedAttentionOut8":
            assert_rounds_to8(got, want.astype(np.float64), OUT_SCALE, 1e-5, 1e-6)


@pytest.mark.parametrize("op", PLAIN)
def test_tiles_and_parts_do_not_matter(op: str) -> None:
    """Other tile sizes, long tiles over several programs, more parts than positions, and scratch that is short of slots."""
    shape = SHAPES["wide-window" if op.endswith("Out8") else "grouped"]
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=6)
    given = arrays_of(shape, batch, "Fp8" in op)
    want = expected(op, shape, given, len(batch.positions))
    for splits, tuning in (
        (8, {}),
        (2, {"prefill_block_m": 64, "prefill_block_n": 32, "decode_block_n": 32, "decode_least": 32}),
        (5, {"prefill_block_m": 32, "prefill_block_n": 64, "decode_block_n": 16, "decode_least": 48}),
    ):
        got = exact(run(op, shape, given, splits=splits, **tuning))[0]
        if op.endswith("Out8"):
            got = got * OUT_SCALE
        assert np.abs(got - want).max() <= (0.07 if op.endswith("Out8") else 2e-3) * np.abs(want).max()


def test_sequences_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of eight queries, whose rows are shared by two programs; the last tile of a sequence is not full."""
    for module in (lowering, cuda_indices):
        monkeypatch.setattr(module, "TILE", 8)
    shape = SHAPES["window-softcap"]
    batch = ragged([20, 1, 17], [31, 5, 17], shape.block_size, seed=12)
    given = arrays_of(shape, batch, False)
    assert len(given["prefill_tiles"]) == 6
    want = expected("ZooCachedAttention", shape, given, 38)
    close(run("ZooCachedAttention", shape, given, prefill_block_m=8), want, TOLERANCES["float32"])


def test_parts_are_no_more_than_scratch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split number that was asked for fewer sequences than the step has: kernels make fewer parts, not wrong ones."""
    shape = SHAPES["grouped"]
    batch = ragged(*STEPS["decode"], shape.block_size, seed=8)
    given = arrays_of(shape, batch, False)
    want = expected("ZooCachedAttention", shape, given, 5)
    for programs in (1, 20, 22):  # one slot, two parts for each of five sequences, the same with one to spare
        monkeypatch.setattr(lowering, "PROGRAMS", programs)
        close(run("ZooCachedAttention", shape, given, splits=9), want, TOLERANCES["float32"])


def test_sequences_without_tokens_are_passed_over() -> None:
    """Captured steps are padded with sequences that have no tokens; tiles may be padded with tiles that have no queries."""
    shape = SHAPES["grouped"]
    batch = ragged([1, 4], [33, 20], shape.block_size, seed=9)
    given = arrays_of(shape, batch, False)
    want = expected("ZooCachedAttention", shape, given, 5)
    padded = given | {
        "block_table": np.concatenate([given["block_table"], np.zeros((3, given["block_table"].shape[1]), np.int32)]),
        "query_starts": np.concatenate([given["query_starts"], np.full(3, 5, np.int32)]),
        "kv_lengths": np.concatenate([given["kv_lengths"], np.ones(3, np.int32)]),
        "prefill_tiles": np.concatenate([given["prefill_tiles"], np.zeros((2, 4), np.int32)]),
    }
    for splits in (1, 2):
        close(run("ZooCachedAttention", shape, padded, splits=splits), want, TOLERANCES["float32"])


def test_one_sequences_nan_stays_its_own() -> None:
    shape = SHAPES["grouped"]
    batch = ragged([1, 6, 1], [20, 6, 35], shape.block_size, seed=10)
    for op in ("ZooCachedAttention", "ZooCachedAttentionFp8"):
        given = arrays_of(shape, batch, "Fp8" in op)
        want = expected(op, shape, given, 8)
        given["kv"][batch.block_tables["full"][1, 0], 1, 2, 0, 0] = np.nan
        got = exact(run(op, shape, given, splits=2))[0]
        lost = np.isnan(got).any(axis=1)  # perhaps its earlier queries, too, which share a tile with it
        assert lost[3:].tolist() == [True, True, True, True, False] and not lost[0]
        assert np.abs(got - want)[~lost].max() <= 2e-3 * np.abs(want).max()


def test_the_tests_notice_a_wrong_window() -> None:
    shape = SHAPES["window"]
    batch = ragged(*STEPS["mixture"], shape.block_size, seed=11)
    given = arrays_of(shape, batch, False)
    got = exact(run("ZooCachedAttention", shape, given))[0]
    wrong = expected("ZooCachedAttention", dataclasses.replace(shape, window=7), given, len(got))
    assert np.abs(got - wrong).max() > 1e-2 * np.abs(wrong).max()


@pytest.mark.parametrize("op", PLUGINS)
def test_contracts(op: str) -> None:
    plugin = PLUGINS[op]
    onnx.checker.check_function(plugin.body)
    names = [port.name for port in plugin.inputs]
    assert ("kv_scale" in names, "out_scale" in names) == ("Fp8" in op, op.endswith("Out8"))
    assert ("sinks" in names, "slopes" in names) == ("Sinks" in op, "Slopes" in op)
    assert [node.op_type for node in plugin.body.node].count("ScatterND") == 0
    assert op in LOWERS and plugin.attributes == PAGED.attributes


def test_names_and_numbers_that_both_wings_know() -> None:
    assert {op_name(cache, out, kind) for cache in (False, True) for out in (False, True) for kind in VARIANTS} == set(PLUGINS)
    assert set(PLUGINS) == set(LOWERS)
    assert lowering.TILE == cuda_indices.TILE
    assert cuda_indices.WANTED <= lowering.PROGRAMS  # then no part that was asked for is left out
    assert FLOAT8(448) == 448


def test_launches_take_a_tables_width_from_the_step_or_from_its_shape() -> None:
    shape = SHAPES["grouped"]
    shapes: dict[str, Any] = {port.name: port.shape for port in PLUGINS["ZooCachedAttention"].inputs} | {"out": (1, "T", 64)}
    for width, want in (("P", {"P": 9}), (9, {})):
        shapes["block_table"] = ("B", width)
        node = cuda_node(PLUGINS["ZooCachedAttention"], "bfloat16", shapes, {}, **shape.attributes)
        for one in lower(node)[:2]:
            place = [name for name, _ in one.kernel.args].index("table_width")
            assert one.args[place].at(want) == 9  # type: ignore[union-attr]


def test_what_a_hopper_gpu_is_given(tmp_path: Path) -> None:
    """Compiled ahead of time for SM 9.0: tensor cores by warp groups for prefill, 16 bytes a load, float8 converted by twos.

    No register is spilled. Decode converts each float8 once: 2 * BLOCK_N * D values, by twos, over 128 threads.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    shape = Shape(32, 8, 128)
    shapes: dict[str, Any] = {port.name: port.shape for port in PLUGINS["ZooCachedAttentionFp8"].inputs}
    shapes |= {"q": (1, "T", 4096), "out": (1, "T", 4096), "kv": ("blocks", 2, 16, 8, 128)}
    for op in ("ZooCachedAttention", "ZooCachedAttentionFp8"):
        prefill, decode, merge = lower(cuda_node(PLUGINS[op], "bfloat16", shapes, {}, **shape.attributes))
        compile_kernels([one.kernel for one in (prefill, decode, merge)], 90, tmp_path)
        code = {}
        for one in (prefill, decode, merge):
            command = [tools / "nvdisasm", "-c", tmp_path / f"{one.kernel.name}.cubin"]
            code[one] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert "STL" not in code[one]
        assert "HGMMA" in code[prefill] and "HMMA" in code[decode]
        loads = 2 * 128 * 128 * (1 if "Fp8" in op else 2) // 16 // 128
        assert code[decode].count("LDGSTS.E.BYPASS.128") >= loads and "LDS.U8" not in code[decode]
        if "Fp8" in op:
            assert code[decode].count("F2FP.F16.E4M3.UNPACK_B") == 2 * 128 * 128 // 2 // 128
