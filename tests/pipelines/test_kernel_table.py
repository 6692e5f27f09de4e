"""What of the table of kernels needs no GPU: the ceilings' arithmetic, the lines, and which cases there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pipelines.bench import kernel_cases  # noqa: E402
from pipelines.bench.kernel_table import FP8, Ceilings, Row, as_json, micro, table  # noqa: E402

CEILINGS = Ceilings(copied=4e12, read=5e12, bfloat16=500e12, float8e4m3=1000e12)
PROFILE = ROOT / "conf" / "hardware" / "h200-sxm.yaml"


@pytest.mark.parametrize(
    ("row", "seconds", "memory"),
    [
        (Row("reads", "", 1.0, moved=5_000_000), 1e-6, True),
        (Row("copies", "", 1.0, moved=4_000_000, writes=True), 1e-6, True),
        (Row("multiplies", "", 1.0, moved=5, flops=500_000_000), 1e-6, False),
        (Row("multiplies FP8", "", 1.0, moved=5, flops=500_000_000, math=FP8), 0.5e-6, False),
        (Row("mostly reads", "", 1.0, moved=5_000_000, flops=499_000_000), 1e-6, True),
    ],
    ids=lambda value: value.kernel if isinstance(value, Row) else "",
)
def test_the_longer_of_two_times_is_the_bound(row: Row, seconds: float, memory: bool) -> None:
    bound, waits = CEILINGS.bound(row)
    assert bound == pytest.approx(seconds, rel=1e-12) and waits is memory


def test_a_table_says_what_is_reached_in_the_unit_that_binds() -> None:
    rows = [
        Row("decode attention", "64 x 2,048", 134.2e-6, moved=536_870_912),
        Row("FP8 gate_up", "8,192 rows", 2e-3, moved=1_000_000, flops=1_924_145_348_608, math=FP8, beside="by cuBLASLt"),
    ]
    assert table(rows, CEILINGS) == [
        "| kernel | case | reached | of the ceiling |",
        "| --- | --- | --- | --- |",
        "| ceiling | copy | 4.00 TB/s | |",
        "| ceiling | read | 5.00 TB/s | |",
        "| ceiling | bfloat16 products, cuBLASLt | 500 TFLOP/s | |",
        "| ceiling | FP8 products, cuBLASLt | 1,000 TFLOP/s | |",
        "| decode attention | 64 x 2,048 | 134 µs, 4.00 TB/s | 80% |",
        "| FP8 gate_up | 8,192 rows | 2,000 µs, 962 TFLOP/s; by cuBLASLt | 96% |",
    ]
    found = as_json(rows, CEILINGS)
    assert found["ceilings"]["read"] == 5e12
    assert found["rows"][0]["share"] == pytest.approx(107.3741824 / 134.2, rel=1e-12)
    assert found["rows"][1]["beside"] == "by cuBLASLt"


def test_short_times_have_a_decimal() -> None:
    assert [micro(seconds) for seconds in (8.74e-6, 134.4e-6, 4.1236e-3)] == ["8.7 µs", "134 µs", "4,124 µs"]


def test_tuning_is_the_section_of_a_hardware_profile() -> None:
    assert kernel_cases.tuning_of(None) == {}
    tuning = kernel_cases.tuning_of(PROFILE)
    assert tuning["row_warps"] == 16 and tuning["skinny"]["6144x4096.float8e4m3"]["16"] == [16, 64, 128, 4, 4, 6]
    assert kernel_cases.tuning_of(PROFILE.with_name("cpu.yaml")) == {}


def listed(*options: str) -> dict[tuple[str, str], list[str]]:
    """Cases with the names of their kernels. In a process of its own: what it imports of zoo is bare."""
    command = [sys.executable, "-m", "pipelines.bench.kernels", "--list", *options]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    found = {}
    for line in lines:
        kernel, case, names = (part.strip() for part in line.split("|"))
        found[kernel, case] = names.split()
    assert len(found) == len(lines), "a case stands there twice"
    return found


def test_cases_are_those_of_the_docs_and_tuned_kernels_come_on_top() -> None:
    default, tuned = listed(), listed("--tuning", str(PROFILE))
    assert list(default) == list(tuned) and all(tuned[case][: len(names)] == names for case, names in default.items())
    for pool in kernel_cases.POOLS.values():
        assert [case for kernel, case in default if kernel == f"decode attention, {pool}"] == [
            *("64 x 2,048", "256 x 1,024", "512 x 512", "1 x 2,048")
        ]
        assert [case for kernel, case in default if kernel == f"prefill attention, {pool}"] == list(kernel_cases.PREFILL)
    for name, (n, k) in kernel_cases.PRODUCTS.items():
        of_rows = {case: names for (kernel, case), names in default.items() if kernel == f"FP8 {name}, {n} x {k}"}
        assert list(of_rows) == ["1 row", "16 rows", "64 rows", "1,024 rows", "8,192 rows"]
        assert of_rows["1 row"] == of_rows["16 rows"] and len(of_rows["1 row"]) == 1  # one bucket of an engine
        assert not of_rows["1,024 rows"] and not of_rows["8,192 rows"]  # cuBLASLt's
    assert len(default["sampling, greedy", "1,024 rows"]) == 2
    more = {kernel for (kernel, case), names in tuned.items() if len(names) > len(default[kernel, case])}
    assert {"FP8 qkv, 6144 x 4096", "prefill attention, FP8 cache", "add + RMS norm + quantize"} <= more
    assert not any("gated" in kernel or "sampling" in kernel for kernel in more)
