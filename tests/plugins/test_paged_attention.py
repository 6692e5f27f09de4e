"""ZooPagedAttention and its variants: body, loop and padded lowering give what a float64 reference gives, whatever the batch and
the pools hold.

Errors are relative to the largest logit: 1e-5 in float32, 1e-2 in float16.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import numpy as np
import onnx
import pytest
from attention_graphs import VOCAB, attention_graph, attention_spec, logits_of, random_arrays
from families import ort_value
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import Ragged, Traffic, build_spec, engine_limits

from zoo.passes.frame import PassContext
from zoo.passes.lower_attention import LowerAttention
from zoo.passes.paged_attention import InsertPagedAttention
from zoo.plugins.paged_attention import PLUGIN, PLUGINS
from zoo.runtime import indices
from zoo.spec import Limits, ModelSpec
from zoo.targets import TARGETS

BODIES = ("body", "loop", "padded")
LIMITS = Limits(max_tokens=512, max_sequences=8, block_size=4, max_context=200, max_blocks=300)
SHAPES = {
    "grouped": attention_spec(4, 2, 8),
    "multi-query": attention_spec(3, 1, 5),
    "all-heads": attention_spec(2, 2, 6),
    "window": attention_spec(4, 2, 8, window=6),
    "window-of-one": attention_spec(2, 1, 4, window=1),
    "softcap": attention_spec(4, 1, 8, softcap=1.5),
    "window-softcap": attention_spec(6, 3, 7, window=9, softcap=2.0),
    "sinks": attention_spec(4, 2, 8, sinks=True),
    "window-sinks": attention_spec(6, 2, 8, window=5, sinks=True),
    "softcap-sinks": attention_spec(3, 1, 7, softcap=2.0, sinks=True),
    "slopes": attention_spec(6, 2, 8, alibi=True),
    "window-softcap-slopes": attention_spec(4, 4, 5, window=7, softcap=1.5, alibi=True),
}
PLUGIN_OF = {
    name: PLUGINS["ZooPagedAttention" + ("Sinks" if spec.sinks else "Slopes" if spec.position == "alibi" else "")]
    for name, spec in SHAPES.items()
}


def engine(spec: ModelSpec, kind: str, dtype: str = "float32", limits: Limits = LIMITS) -> tuple[Ragged, dict[str, np.ndarray]]:
    """The one-layer model as a ragged graph: with the reference body, or lowered."""
    graph = attention_graph(spec, dtype)
    arrays = random_arrays(graph)
    build = build_spec(spec, limits)
    InsertPagedAttention().apply(graph, PassContext(build, TARGETS["onnxruntime"]))
    if kind != "body":
        target = dataclasses.replace(TARGETS["onnxruntime"], attention=kind)
        LowerAttention().apply(graph, PassContext(build, target))
    weights = {name: array.astype(graph.weights[name].dtype) for name, array in arrays.items() if name in graph.weights}
    return Ragged(graph, weights, engine_limits(build.limits)), arrays


@functools.cache
def cached(shape: str, kind: str) -> tuple[Ragged, dict[str, np.ndarray]]:
    return engine(SHAPES[shape], kind)


def fresh(shape: str, kind: str) -> tuple[Ragged, dict[str, np.ndarray]]:
    """A compiled graph from the cache, its pools full of NaN again."""
    found, arrays = cached(shape, kind)
    for pool in found.pools.values():
        pool[:] = np.nan
    return found, arrays


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape and np.isfinite(got).all()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_chunks_decode_and_mixed_batches(shape: str, kind: str) -> None:
    ragged, arrays = fresh(shape, kind)
    a, b, c = ids(40, 1), ids(33, 2), ids(9, 3)
    want = {name: logits_of(arrays, SHAPES[shape], tokens) for name, tokens in (("a", a), ("b", b), ("c", c))}
    traffic = Traffic(ragged)
    got = traffic.step({"a": a[:11]}, rows=range(11))  # prefill, every row of logits
    assert_close(got, want["a"][:11])
    got = traffic.step({"a": a[11:27]}, rows=range(16))  # a later chunk
    assert_close(got, want["a"][11:27])
    got = traffic.step({"b": b[:5], "a": a[27:28], "c": c[:1]})  # prefill and decode in one batch
    assert_close(got, np.stack([want["b"][4], want["a"][27], want["c"][0]]))
    for step in range(3):  # decode
        got = traffic.step({"c": [c[1 + step]], "a": [a[28 + step]]})
        assert_close(got, np.stack([want["c"][1 + step], want["a"][28 + step]]))
    traffic.release("a")  # its blocks go to b, full of NaN
    got = traffic.step({"b": b[5:33]}, rows=range(28))
    assert_close(got, want["b"][5:33])


@pytest.mark.parametrize("shape", ["grouped", "sinks", "slopes"])
@pytest.mark.parametrize("together", [0, indices.TOGETHER])
def test_decode_in_a_loop_and_all_at_once(together: int, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches of the loop lowering, at every length up to and over block borders, beside neighbours of other lengths."""
    monkeypatch.setattr(indices, "TOGETHER", together)
    ragged, arrays = fresh(shape, "loop")
    texts = {name: ids(24, seed) for seed, name in enumerate("abc")}
    want = {name: logits_of(arrays, SHAPES[shape], tokens) for name, tokens in texts.items()}
    traffic = Traffic(ragged)
    done = {"a": 12, "b": 9, "c": 8}
    traffic.step({name: texts[name][:count] for name, count in done.items()})
    for step in range(12):
        got = traffic.step({name: [texts[name][count + step]] for name, count in done.items()})
        assert_close(got, np.stack([want[name][count + step] for name, count in done.items()]))


@pytest.mark.parametrize("kind", BODIES)
def test_rows_may_repeat_and_come_in_any_order(kind: str) -> None:
    ragged, arrays = fresh("grouped", kind)
    a = ids(6)
    want = logits_of(arrays, SHAPES["grouped"], a)
    got = Traffic(ragged).step({"a": a}, rows=[5, 0, 5, 2])
    assert_close(got, want[[5, 0, 5, 2]])


@pytest.mark.parametrize("kind", BODIES)
def test_no_rows_fill_the_cache_and_whole_blocks_are_whole(kind: str) -> None:
    """A chunk whose logits nobody wants, and sequences that end where a block ends."""
    ragged, arrays = fresh("grouped", kind)
    a = ids(12)
    assert LIMITS.block_size == 4
    traffic = Traffic(ragged)
    assert traffic.step({"a": a[:8], "b": a[:4]}, rows=[]).shape == (0, VOCAB)
    got = traffic.step({"a": a[8:], "b": a[4:8]})
    assert_close(got, logits_of(arrays, SHAPES["grouped"], a)[[11, 7]])


@pytest.mark.parametrize("kind", BODIES)
def test_padding_tokens_change_nothing(kind: str) -> None:
    """The last sequence of a captured step: positions 0, a table row of 0, kv_length 1."""
    ragged, arrays = fresh("window", kind)
    a, b = ids(13, 1), ids(7, 2)
    traffic = Traffic(ragged)
    got = traffic.step({"a": a[:12], "b": b}, padding=5)
    assert_close(got, np.stack([logits_of(arrays, SHAPES["window"], t)[-1] for t in (a[:12], b)]))
    got = traffic.step({"a": a[12:]}, padding=1)
    assert_close(got, logits_of(arrays, SHAPES["window"], a)[-1:])


@pytest.mark.parametrize("kind", BODIES)
def test_a_sequence_of_nan_does_not_reach_its_neighbours(kind: str) -> None:
    """Token 7 is made NaN: the sequence that has it is lost, the ones beside it are not."""
    ragged, arrays = engine(SHAPES["grouped"], kind)
    for role in "qkv":
        poisoned = arrays[f"embed.{role}"].copy()
        poisoned[7] = np.nan
        ragged.weights[f"embed.{role}"] = ort_value(poisoned)
    good, bad = [t for t in ids(30, 4) if t != 7], [3, 7, 7, 7, 7, 2]
    want = logits_of(arrays, SHAPES["grouped"], good)
    traffic = Traffic(ragged)
    first = traffic.step({"bad": bad, "good": good[:9]})
    assert np.isnan(first[0]).all()
    assert_close(first[1:], want[8:9])
    traffic.release("bad")
    assert_close(traffic.step({"good": good[9:]}), want[-1:])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    steps=st.lists(st.lists(st.integers(0, 13), min_size=4, max_size=4).filter(any), min_size=1, max_size=4),
    tile=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_any_traffic_gives_the_same_numbers(shape: str, steps: list[list[int]], tile: int, seed: int) -> None:
    """Up to four sequences take any number of tokens in every step; all rows are compared."""
    tokens = {name: ids(60, seed + n) for n, name in enumerate("abcd")}
    before, indices.TILE = indices.TILE, tile
    try:
        for kind in BODIES:
            ragged, arrays = fresh(shape, kind)
            traffic = Traffic(ragged, seed)
            done = dict.fromkeys(tokens, 0)
            for step in steps:
                taken = {name: tokens[name][done[name] : done[name] + n] for name, n in zip(tokens, step, strict=True) if n}
                got = traffic.step(taken, rows=range(sum(map(len, taken.values()))))
                want = [
                    logits_of(arrays, SHAPES[shape], tokens[name][: done[name] + len(t)])[done[name] :]
                    for name, t in taken.items()
                ]
                assert_close(got, np.concatenate(want))
                for name, t in taken.items():
                    done[name] += len(t)
    finally:
        indices.TILE = before


def test_prompts_longer_than_a_tile() -> None:
    ragged, arrays = fresh("window-softcap", "loop")
    a = ids(170)
    assert len(a) > 2 * indices.TILE
    got = Traffic(ragged).step({"a": a, "b": a[:70]}, rows=range(240))
    want = logits_of(arrays, SHAPES["window-softcap"], a)
    assert_close(got, np.concatenate([want, want[:70]]))


@pytest.mark.parametrize("shape", ["grouped", "window-softcap", "window-sinks", "slopes"])
def test_padded_lowering_in_half_precision(shape: str) -> None:
    """The bytes that a GPU compiler gets, in the compute type it gets."""
    ragged, arrays = engine(SHAPES[shape], "padded", "float16")
    a, b = ids(30, 1), ids(8, 2)
    want_a, want_b = (logits_of(arrays, SHAPES[shape], t) for t in (a, b))
    traffic = Traffic(ragged)
    assert_close(traffic.step({"a": a[:20], "b": b}), np.stack([want_a[19], want_b[7]]), 1e-2)
    assert_close(traffic.step({"a": a[20:]}, rows=range(10)), want_a[20:], 1e-2)


def test_the_tests_notice_a_wrong_window() -> None:
    """The judge is sharp: one position more is far outside the tolerance."""
    ragged, arrays = fresh("window", "loop")
    a = ids(20)
    got = Traffic(ragged).step({"a": a})
    wrong = logits_of(arrays, dataclasses.replace(SHAPES["window"], window=7), a)[-1:]
    assert np.abs(got - wrong).max() > 1e-2 * np.abs(wrong).max()


@pytest.mark.parametrize("shape", ["sinks", "slopes"])
def test_the_tests_notice_wrong_sinks_and_slopes(shape: str) -> None:
    """So is it for one head's number moved by a tenth."""
    ragged, arrays = fresh(shape, "loop")
    a, name = ids(20), "layer.0.sinks" if shape == "sinks" else "alibi.slopes"
    got = Traffic(ragged).step({"a": a})
    for head in range(SHAPES[shape].num_heads):
        moved = arrays[name].copy()
        moved[head] += 0.1
        wrong = logits_of(arrays | {name: moved}, SHAPES[shape], a)[-1:]
        assert np.abs(got - wrong).max() > 1e-4 * np.abs(wrong).max()


@pytest.mark.parametrize("kind", BODIES)
def test_sinks_far_from_the_scores(kind: str) -> None:
    """So far below that they take nothing, and so far above that nothing is left; nothing overflows."""
    ragged, arrays = engine(SHAPES["sinks"], kind)
    a = ids(11)
    for sinks in (np.array([-1e4, 0, -300, 80]), np.array([300, -1e4, 1e4, 80])):
        given = arrays | {"layer.0.sinks": sinks.astype(np.float32)}
        ragged.weights["layer.0.sinks"] = ort_value(given["layer.0.sinks"])
        traffic = Traffic(ragged)
        want = logits_of(given, SHAPES["sinks"], a)
        assert_close(traffic.step({"a": a[:8]}, rows=range(8)), want[:8])
        for step in range(8, 11):
            assert_close(traffic.step({"a": a[step : step + 1]}), want[step : step + 1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["loop", "padded"])
def test_functions_are_valid_and_named_for_what_they_are(shape: str, name: str) -> None:
    spec = SHAPES[shape]
    attrs = {"window": spec.window, "softcap": spec.softcap}
    lowering = PLUGIN_OF[shape].lowerings[name]
    function = lowering.function(attrs)
    onnx.checker.check_function(function)
    assert ("Window" in function.name, "Softcap" in function.name) == (spec.window > 0, spec.softcap > 0)
    assert ("Sinks" in function.name, "Slopes" in function.name) == (spec.sinks, spec.position == "alibi")
    assert list(function.input) == list(lowering.inputs) and list(function.output) == ["out", "kv_out"]
    assert [n.op_type for n in function.node].count("ScatterND") == 1
    scatter = next(n for n in function.node if n.op_type == "ScatterND")
    assert (scatter.input[0], scatter.output[0]) == ("kv", "kv_out")


@pytest.mark.parametrize("option", ["none", "sinks", "alibi"])
def test_a_step_does_not_copy_the_pool(option: str) -> None:
    """With the pool bound to both sides, the quickest decode step is far below what copying 256 MB takes (25 ms and more)."""
    spec = attention_spec(4, 4, 64, sinks=option == "sinks", alibi=option == "alibi")
    limits = Limits(max_tokens=8, max_sequences=1, block_size=16, max_context=64, max_blocks=8192)
    ragged, _ = engine(spec, "loop", limits=limits)
    pool = ort_value(ragged.pools["kv.0"])
    assert pool.numpy().nbytes == 1 << 28
    traffic = Traffic(ragged)
    ragged.pools.clear()
    seconds = []
    for token in ids(12):
        batch = traffic.batch({"a": [token]})
        binding = ragged.session.io_binding()
        feeds = {name: value for name, value in ragged.feeds(batch).items() if name != "kv.0"}
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_input("kv.0", pool)
        binding.bind_ortvalue_output("kv_out.0", pool)
        binding.bind_output("logits", "cpu")
        start = time.perf_counter()
        ragged.session.run_with_iobinding(binding)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def test_index_inputs_have_builders_and_are_those_of_the_plain_op() -> None:
    for plugin in PLUGINS.values():
        for name, lowering in plugin.lowerings.items():
            assert {extra.name for extra in lowering.index_inputs} <= set(indices.INDEX_BUILDERS)
            assert lowering.index_inputs == PLUGIN.lowerings[name].index_inputs
