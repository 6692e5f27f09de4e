"""A case on an engine without a model, as JSON, as a table and as an SVG."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from bench_engines import H200, LLAMA_8B, engine_of, spec_of

from zoo.artifacts.machine import Gpu, Machine
from zoo.artifacts.manifest import Abi, EngineManifest
from zoo.benchmark import report
from zoo.benchmark.configuration import configuration, describe, gpu_of, notes
from zoo.benchmark.latency import Latencies
from zoo.benchmark.plot import svg
from zoo.benchmark.workload import Case
from zoo.errors import RequestError

MANIFEST = EngineManifest(
    model="llama",
    version="0123",
    profile="fp8-h200-sxm-cuda-tp1",
    build="",
    made={},
    compiler={"name": "cuda", "version": "triton 3.6.0"},
    spec=spec_of(LLAMA_8B),
    needs={"kind": "gpu", "sm": 90},
    limits={},
    abi=Abi((), (), ()),
)
MACHINE = Machine(8, 1 << 36, (Gpu("NVIDIA L40S", 89, 48 << 30), Gpu("NVIDIA H100", 90, 80 << 30, "580.1", "GPU-1")))
KEYS = {
    *("case", "requests", "input_tokens", "output_tokens", "rate", "seed", "seconds", "steps", "preemptions"),
    *("output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "peak_rss_mb", "peak_gpu_memory_mb"),
    *(f"{name}_ms_{one}" for name in ("ttft", "inter_token", "end_to_end") for one in ("mean", "p50", "p90", "p99")),
    *("queueing_s", "measuring_us_per_step", "energy", "cost", "roofline"),
}


@pytest.mark.parametrize("samples", [False, True])
def test_a_case_as_json(samples: bool) -> None:
    case = Case(10, 7, 12)
    measured = report.measure_case(engine_of(samples), case, MANIFEST, nvml="no GPU")
    data = json.loads(json.dumps(measured.data))
    assert set(data) == KEYS and data["case"] == "10/7/12" and data["rate"] is None
    rounded = 0.5e-4 / data["seconds"] + 1e-3  # seconds are given to a tenth of a millisecond
    assert data["output_tokens_per_s"] == pytest.approx(84 / data["seconds"], rel=rounded)
    assert data["total_tokens_per_s"] == pytest.approx((84 + 120) / data["seconds"], rel=rounded)
    assert data["requests_per_s"] == pytest.approx(12 / data["seconds"], rel=rounded)
    assert 0 < data["ttft_ms_p50"] <= data["ttft_ms_p90"] <= data["ttft_ms_p99"] <= data["end_to_end_ms_p99"]
    assert data["energy"]["joules"] is None and data["energy"]["reason"] == "no GPU"
    assert data["cost"]["usd_an_hour"] == 3.59 and data["cost"]["price_date"] == "2026-03"
    assert data["roofline"]["fraction"] > 0 and data["steps"] >= 7 and data["peak_rss_mb"] > 20
    assert len(measured.latencies.inter_token) == 12 * 6


def test_one_token_a_request_has_no_gaps() -> None:
    data = report.measure_case(engine_of(True), Case(3, 1, 2)).data
    assert data["inter_token_ms_p50"] is None and data["ttft_ms_p50"] == data["end_to_end_ms_p50"]
    assert "no GPU" in data["energy"]["reason"] and "states no price" in data["cost"]["reason"]


def test_a_case_that_does_not_fit_is_refused_before_it_runs() -> None:
    with pytest.raises(
        RequestError, match=r"case 60/5/1: a request of 65 tokens, and this engine holds 64 .* limits.max_context"
    ):
        report.measure_case(engine_of(True), Case(60, 5, 1))


def test_cost() -> None:
    found = report.cost(H200, seconds=10.0, tokens=100_000)
    assert found["usd_per_million_output_tokens"] == pytest.approx(3.59 / 3600 * 10 * 10, abs=1e-4) and found["reason"] is None
    assert report.cost({"name": "mine", "price": 0.0}, 1.0, 1)["reason"] == "the hardware profile mine states no price"


def test_the_gpu_is_the_first_of_the_engine_s_sm() -> None:
    gpu = gpu_of(MACHINE, MANIFEST)
    assert gpu is not None and gpu.name == "NVIDIA H100"
    assert gpu_of(MACHINE, dataclasses.replace(MANIFEST, needs={"kind": "cpu"})) is None
    assert gpu_of(Machine(8, 1), MANIFEST) is None
    described = describe(MACHINE, gpu)
    assert (described["gpu"], described["driver"], "threads" in described) == ("NVIDIA H100", "580.1", False)
    assert describe(MACHINE, None, 3)["threads"] == 3 and describe(MACHINE, None)["threads"] == 8


def test_another_gpu_than_the_profile_s_is_said() -> None:
    configured = {"machine": describe(MACHINE, gpu_of(MACHINE, MANIFEST))}
    assert "h200-sxm with 151 GB, and NVIDIA H100 has 86 GB" in notes(configured, MANIFEST.spec)[0]
    assert notes({"machine": configured["machine"] | {"gpu_memory": H200["memory"]}}, MANIFEST.spec) == []


def test_the_configuration_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.benchmark.configuration.describe_machine", lambda: MACHINE)
    limits = engine_of(True).scheduler.limits
    found = configuration("llama:0123@p", MANIFEST, limits, ["zoo", "bench", "llama", "--plot", "a b.svg"])
    assert found["limits"] == dataclasses.asdict(limits) and found["command"] == "zoo bench llama --plot 'a b.svg'"
    assert (found["quant"], found["kv_cache"], found["hardware"], found["dtype"]) == ("fp8", "none", "h200-sxm", "bfloat16")
    assert found["machine"]["gpu"] == "NVIDIA H100" and {"python", "numpy"} <= set(found["packages"])
    json.dumps(found)


def made(**changes: Any) -> dict[str, Any]:
    data = report.measure_case(engine_of(True), Case(10, 7, 12), MANIFEST, nvml="no GPU").data
    return data | changes


def test_a_table_has_a_column_for_each_case() -> None:
    columns, rows = report.table([made(), made(case="other", rate=2.5)])
    assert columns == ["CASE", "10/7/12", "other"] and all(len(row) == 3 for row in rows)
    labels = [row[0] for row in rows]
    assert "of the roofline" in labels and "J per output token" not in labels
    assert rows[labels.index("requests/s offered")][1:] == ["-", "2.50"]
    assert report.reasons([made(), made()]) == ["no energy: no GPU"]


def test_an_svg_shows_every_case() -> None:
    configured = {"machine": {"cpu": "a <cpu>", "threads": 2}, "dtype": "float32", "date": "today"}
    limit = {"output_tokens_per_s": 200.0, "fraction": 0.5}
    cases = [
        {"case": "1/2/3", "rate": None, "output_tokens_per_s": 100.0, "roofline": limit},
        {"case": "4/1/1", "rate": 2.0, "output_tokens_per_s": 50.0, "roofline": {"output_tokens_per_s": None, "fraction": None}},
    ]
    spread = Latencies(np.linspace(0.1, 0.2, 50), np.concatenate([np.full(500, 0.01), [9.0]]), np.ones(50))
    single = Latencies(np.array([0.5]), np.array([]), np.array([0.5]))
    text = svg({"ref": "m&m@p", "configuration": configured, "cases": cases}, [spread, single])
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    words = [one.text or "" for one in root.iter(f"{name}text")]
    assert "m&m@p" in words and any("a <cpu>" in word for word in words)
    assert "100 (50% of 200)" in words and "50" in words
    assert any("0.20% beyond" in word for word in words) and "between two tokens: none" in words
    boxes = [box for box in root.iter(f"{name}rect") if box.get("height") == "22.0"]
    widths = [float(box.get("width", 0)) for box in boxes if box.get("fill") == "#2f6db3"]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert "nan" not in text and "inf" not in text


def test_an_svg_of_times_that_are_all_alike() -> None:
    configured = {"machine": {"gpu": "g", "cpu": "c"}, "dtype": "d", "date": "today"}
    case = {"case": "1/1/1", "rate": None, "output_tokens_per_s": 1.0, "roofline": {"output_tokens_per_s": None}}
    flat = Latencies(np.zeros(3), np.zeros(3), np.zeros(3))
    ElementTree.fromstring(svg({"ref": "r", "configuration": configured, "cases": [case]}, [flat]))
