"""Plans of small models: which products leave their scales to a reader, what they have for few rows, and where it lies."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import cuda_engines
import families
import pytest
import triton

from zoo.compilers.cuda import plan as module
from zoo.compilers.cuda.aot import compile_kernels, from_json, to_json
from zoo.compilers.cuda.plan import Gemm, Plan, Planner, gemm_json, launch_json
from zoo.errors import CompileError
from zoo.plugins.kernels import Launch, Scratch, fixed
from zoo.plugins.sampling import cuda as sampling
from zoo.plugins.skinny_gemm.cuda import COUNTERS

SCALED = {"rotary_cache", "add_rms_norm_fp8", "gated_activation_fp8", "binary"}


def planned(folder: Path, case: str, quant: str, dtype: str = "bfloat16", **tuning: Any) -> Plan:
    family, overrides = families.CASES[case]
    build = cuda_engines.build_spec(families.spec(families.make_checkpoint(folder, family, **overrides)), quant, dtype=dtype)
    return Planner(cuda_engines.rewritten(build), build, tuning).run()


def gemms(plan: Plan) -> list[Gemm]:
    return [step for step in plan.steps if isinstance(step, Gemm)]


def readers(plan: Plan) -> dict[str, tuple[str, bool, tuple[Any, ...]]]:
    """y of each GEMM -> function, SCALED and arguments of the launch behind it that reads it."""
    found = {}
    for place, step in enumerate(plan.steps):
        if isinstance(step, Gemm):
            behind = [one for one in plan.steps[place + 1 :] if isinstance(one, Launch) and step.y in one.args]
            if behind:
                kernel = behind[0].kernel
                scaled = bool(dict(kernel.constants).get("SCALED", False))
                found[step.y] = kernel.source.partition(":")[2], scaled, behind[0].args
    return found


def test_whoever_reads_a_float8_product_scales_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, "llama-grouped", "fp8-kv")
    *layers, head = gemms(plan)
    assert len(layers) == 8 and not head.deferred and head.dtype == "bfloat16" and head.out == "float32"
    behind = readers(plan)
    assert {name for name, *_ in behind.values()} == SCALED
    for gemm in layers:
        _, scaled, args = behind[gemm.y]
        assert gemm.deferred and scaled and gemm.w_scale in args
        for few in gemm.small:
            assert gemm.x_scale in few.launches[0].args and gemm.w_scale not in few.launches[0].args


@pytest.mark.parametrize(
    ("case", "quant", "more"),
    [
        ("llama-grouped", "fp8-kv", {"dtype": "float16"}),  # which would not hold the sums
        ("llama-grouped", "fp8-kv", {"deferred": False}),
        ("llama-biases", "fp8", {}),  # a bias is added in between
        ("llama-grouped", "none", {}),
    ],
)
def test_products_that_are_whole(tmp_path: Path, case: str, quant: str, more: dict[str, Any]) -> None:
    plan = planned(tmp_path, case, quant, **more)
    fp8 = [gemm for gemm in gemms(plan) if gemm.dtype == "float8e4m3"]
    assert bool(fp8) == (quant != "none")
    whole = [gemm for gemm in fp8 if not gemm.deferred]
    assert whole and len(whole) == len(fp8) if fp8 and case == "llama-grouped" else not fp8 or whole
    for gemm in whole:
        assert not readers(plan)[gemm.y][1] and all(gemm.w_scale in one.args for one in gemm.launches)


def test_few_rows_have_launches_and_scratch_of_their_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, "llama-grouped", "fp8-kv", skinny={"64x96": {"16": [16, 64, 32, 3, 4, 3]}})
    for gemm in gemms(plan):
        split = (gemm.n, gemm.k) == (64, 96)
        data = json.loads(json.dumps(gemm_json(gemm, plan)))
        assert [one["most"] for one in data["small"]] == ([16] if split else [16, 32])
        assert data["counters"] == (1 if split else 0) and data["deferred"] == gemm.deferred
        assert all(one.kernel.name in plan.kernels for one in gemm.launches)
        for one in data["small"]:
            (launch,) = one["launches"]
            assert launch["op"] == "launch" and launch["overlap"] and launch["args"][-1] == {"size": [gemm.rows.symbol, 1, 1]}
            assert ({"tensor": COUNTERS} in launch["args"]) == split
        if split:
            (launch,) = data["small"][0]["launches"]
            parts = next(arg for arg in gemm.launches[0].args if isinstance(arg, Scratch))
            start, end = plan.places[parts.name], plan.places[parts.name] + parts.size.at({})
            assert {"arena": start} in launch["args"] and end <= plan.arena and parts.size.at({}) == 3 * 16 * 64 * 4
            # what is alive meanwhile lies elsewhere
            assert not any(start <= plan.places[name] < end for name in (gemm.x, gemm.y))


def test_few_kernels(tmp_path: Path) -> None:
    """Layers share theirs: a product of each shape for each number of rows."""
    plan = planned(tmp_path, "llama-grouped", "fp8-kv")
    skinny = [kernel for kernel in plan.kernels.values() if kernel.source.endswith(":skinny_gemm")]
    assert len(skinny) == 2 * len({(gemm.n, gemm.k) for gemm in gemms(plan)}) == 10


def test_weights_that_lie_the_other_way_are_left_to_cublas(tmp_path: Path) -> None:
    plan = planned(tmp_path, "gpt2", "none")
    assert {gemm.stored for gemm in gemms(plan)} == {"in_out", "out_in"}
    assert all(bool(gemm.small) == (gemm.stored == "out_in") for gemm in gemms(plan))


def test_overlap_can_be_switched_off(tmp_path: Path) -> None:
    for overlap in (True, False):
        plan = planned(tmp_path, "llama-grouped", "none", overlap=overlap)
        for step in plan.steps:
            for launch in [step] if isinstance(step, Launch) else step.launches:
                assert launch.kernel.overlaps and launch_json(launch, plan)["overlap"] == overlap
    chooser = sampling.launches(300)["greedy"][0]
    assert not chooser.kernel.overlaps and not launch_json(chooser, Plan())["overlap"]


def test_every_reader_in_the_table_has_a_lowering() -> None:
    assert set(module.SCALED_INPUTS) <= set(module.LOWERS)


def test_nothing_is_written_and_only_weights_are_read_before_inputs_are_there(tmp_path: Path) -> None:
    """In the machine code of SM 9.0: what stands before the wait for the kernels before (ACQBULK)."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    one = {"16": [16, 64, 32, 2, 4, 3]}
    shapes = {f"{gemm.n}x{gemm.k}": one for gemm in gemms(planned(tmp_path / "shapes", "qwen3-norms", "fp8-kv"))}
    plan = planned(tmp_path, "qwen3-norms", "fp8-kv", skinny=shapes)
    compile_kernels(list(plan.kernels.values()), 90, tmp_path)
    early = set()
    for name, kernel in plan.kernels.items():
        command = [tools / "nvdisasm", "-c", tmp_path / f"{name}.cubin"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        before, wait, behind = code.partition("ACQBULK")
        late = kernel.source.endswith(":skinny_gemm")  # lets the next kernel come only when it has read its weights
        assert wait and "ACQBULK" not in behind and "PREEXIT" in (behind if late else before)
        assert "EXIT ;" not in before.replace("PREEXIT", "")
        assert not re.search(r"\b(STG|LDGSTS|ATOMG?|RED|STL|BAR|LDL)\b", before), name
        if re.search(r"\bLDG\b", before):
            early.add(kernel.source.partition(":")[2])
    assert early == {"skinny_gemm", "rms_norm_fp8", "add_rms_norm_fp8", "gated_activation_fp8"}


def test_a_kernel_that_claims_to_wait_and_does_not_is_refused(tmp_path: Path) -> None:
    (kernel,) = [one.kernel for one in sampling.launches(300)["greedy"][1:]]
    assert from_json(json.loads(json.dumps(to_json(kernel)))) == kernel
    compile_kernels([kernel], 90, tmp_path)
    claims = dataclasses.replace(kernel, overlaps=True)
    assert from_json(json.loads(json.dumps(to_json(claims)))) == claims and claims.name == kernel.name
    with pytest.raises(CompileError, match=r"kernels:greedy_combine does not wait for its inputs by itself"):
        compile_kernels([claims], 90, tmp_path)
    assert fixed(3).at({}) == 3
