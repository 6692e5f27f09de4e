"""The floor: against loops over every query and key, against figures worked out by hand, and where nothing can be said."""

from __future__ import annotations

import numpy as np
import pytest
from bench_engines import H200, LLAMA_8B, spec_of

from zoo.benchmark.loop import StepNote
from zoo.benchmark.roofline import demand_of, roofline, work_of

TINY = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "mlp": "gated",
    "window": 6,
    "window_layers": [0, 2],
}


def note(new: list[int], lengths: list[int], rows: int) -> StepNote:
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    return StepNote(starts, np.array(lengths, np.int32), rows)


def test_demand_of_llama() -> None:
    demand = demand_of(spec_of(LLAMA_8B))
    assert demand.linears == {"float8e4m3": 6_979_321_856} and demand.head == 128256 * 4096
    assert (demand.head_dtype, demand.kv_dtype, demand.windows) == ("bfloat16", "bfloat16", {0: 32})
    plain = demand_of(spec_of(LLAMA_8B, "none"))
    assert plain.linears == {"bfloat16": 6_979_321_856} and plain.kv_numbers == 2048 and plain.pair_flops == 4 * 4096


def test_skipped_roles_stay_in_the_compute_type() -> None:
    spec = spec_of(TINY)
    spec["quant"]["skip"] = ["lm_head", "gate_up", "o"]
    assert demand_of(spec).linears == {"bfloat16": 3 * 16 * (40 + 40 + 32), "float8e4m3": 3 * 16 * (32 + 16 + 16 + 40)}
    spec["quant"]["skip"] = []
    assert demand_of(spec).head_dtype == "float8e4m3"
    spec["model"] = TINY | {"mlp": "plain"}
    assert demand_of(spec).linears == {"float8e4m3": 3 * 16 * (32 + 16 + 16 + 32 + 40 + 40)}


@pytest.mark.parametrize("seed", range(5))
def test_attention_is_counted_as_loops_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps, moved, pairs = [], [], []
    for _ in range(4):
        new = rng.integers(1, 12, 5).tolist()
        lengths = [n + int(rng.integers(0, 2) * rng.integers(0, 20)) for n in new]
        steps.append(note(new, lengths, 5))
        tokens = seen = 0
        for layer in range(3):
            window = 6 if layer in (0, 2) else 10**9
            for n, length in zip(new, lengths, strict=True):
                keys = set(range(length - n, length))  # written
                for position in range(length - n, length):
                    visible = range(max(0, position - window + 1), position + 1)
                    keys |= set(visible)
                    seen += len(visible)
                tokens += len(keys)
        moved.append(tokens)
        pairs.append(seen)
    work = work_of(demand_of(spec_of(TINY, kv="fp8")), steps)
    assert (work.kv_bytes / (2 * 2 * 8)).tolist() == moved, "one byte a number"
    linear = sum(demand_of(spec_of(TINY)).linears.values())
    wanted = [4 * 4 * 8 * seen + 2 * linear * int(s.query_starts[-1]) for seen, s in zip(pairs, steps, strict=True)]
    assert work.flops["float8e4m3"].tolist() == wanted
    assert work.flops["bfloat16"].tolist() == [2 * 5 * 1600] * 4


def test_one_sequence_reads_the_weights_and_its_context() -> None:
    steps = [note([1], [1000 + place], 1) for place in range(50)]
    found = roofline(spec_of(LLAMA_8B, kv="fp8"), steps, seconds=1.0, tokens=50)
    weights = 6_979_321_856 + 2 * 128256 * 4096
    kv = sum(1000 + place for place in range(50)) * 2048 * 32
    assert found["weight_bytes"] == 50 * weights and found["kv_bytes"] == kv
    assert found["memory_bound_steps"] == 50 and found["reason"] is None
    assert found["floor_s"] == pytest.approx((50 * weights + kv) / 4.8e12, abs=1e-4)
    assert found["fraction"] == pytest.approx(found["floor_s"], abs=1e-4)
    # 4.35 TB/s, as they were measured, give the 540 tokens a second that FACTS has for the weights alone
    assert 4.35e12 / weights == pytest.approx(541, abs=1)


def test_a_long_prompt_computes() -> None:
    found = roofline(spec_of(LLAMA_8B), [note([8192], [8192], 1)], seconds=0.1, tokens=1)
    linear, scores = 2 * 6_979_321_856 * 8192, 32 * 4 * 4096 * 8192 * 8193 // 2
    seconds = linear / 1978.9e12 + (scores + 2 * 128256 * 4096) / 989.4e12
    assert found["memory_bound_steps"] == 0 and found["floor_s"] == pytest.approx(seconds, abs=1e-4)
    assert found["flops"]["float8e4m3"] == linear


def test_a_step_without_logits_reads_no_head() -> None:
    spec = spec_of(LLAMA_8B)
    with_rows, without = (roofline(spec, [note([8], [8], rows)], 1.0, 1)["weight_bytes"] for rows in (1, 0))
    assert with_rows - without == 2 * 128256 * 4096


def test_where_nothing_can_be_said() -> None:
    steps = [note([1], [1], 1)]
    cpu = {"name": "cpu", "kind": "cpu", "bandwidth": 0.0, "flops": {}}
    found = roofline(spec_of(LLAMA_8B, "none", hardware=cpu), steps, 1.0, 1)
    assert found["fraction"] is None and found["reason"] == (
        "the hardware profile cpu states no bandwidth or no FLOP/s for bfloat16"
    )
    assert "does not describe its model" in roofline({}, steps, 1.0, 1)["reason"]
    assert "KeyError" in roofline({"model": {}, "hardware": H200}, steps, 1.0, 1)["reason"]


def test_a_type_without_a_rate_of_its_own_runs_as_the_compute_type() -> None:
    hardware = H200 | {"flops": {"bfloat16": 1e12}}
    found = roofline(spec_of(LLAMA_8B, hardware=hardware), [note([512], [512], 1)], 1.0, 1)
    assert found["flops_per_s"] == {"float8e4m3": 1e12, "bfloat16": 1e12}
