"""A whole engine tuned on a GPU that is a CPU, and built again with what was found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cuda_engines
import cuda_on_cpu
import families
import pytest

from zoo.artifacts.manifest import EngineManifest
from zoo.compilers.cuda.engine import write_engine
from zoo.errors import ArtifactError, IncompatibleError, UnavailableError
from zoo.plugins.cached_attention import cuda as attention_cuda
from zoo.plugins.skinny_gemm import cuda as skinny
from zoo.spec import BuildSpec
from zoo.tuning import attention, elementwise, products, run, trial
from zoo.tuning.shapes import Product, Shapes, attention_node, rotary_node

Engine = tuple[Path, EngineManifest]


def test_shapes_are_those_of_the_plan(plan: dict[str, Any]) -> None:
    shapes = Shapes(plan)
    assert [one.key for one in shapes.products] == [
        "128x64.float8e4m3", "64x64.float8e4m3", "192x64.float8e4m3", "64x96.float8e4m3", "262x64.bfloat16",
    ]  # fmt: skip
    assert [one.rows for one in shapes.products] == ["T"] * 4 + ["R"]
    assert shapes.prefill and shapes.decode and shapes.rotary and shapes.norm
    assert shapes.decode.count == 2 and attention.key_of(shapes.decode) == "16x2.float8e4m3"


def test_nodes_are_lowered_to_the_plan_s_own_kernels(plan: dict[str, Any], engine: Engine) -> None:
    """What is tuned is what an engine has: without tuning, every kernel is one of the plan's, to the byte of its name."""
    shapes, limits = Shapes(plan), engine[1].limits
    assert shapes.decode and shapes.rotary and shapes.norm
    made = attention_cuda.lower(attention_node(shapes.decode, limits, 90, {}))
    assert {one.kernel.name for one in made} <= set(plan["kernels"])
    assert attention.variants(shapes.decode, limits, 90, True)[0].kernels == [one.kernel for one in made[1:]]
    assert elementwise.rotary_variants(shapes.rotary, limits, 90)[0].kernels[0].name in plan["kernels"]
    assert elementwise.norm_variants(shapes.norm)[0].kernels[0].name in plan["kernels"]
    assert rotary_node(shapes.rotary, limits, 90, {}).op == "ZooRotaryCacheFp8"
    for product in shapes.products:
        for bucket in skinny.BUCKETS:
            first = products.variants(product, bucket, 132)[0]
            # products as narrow as these have no kernel of ours for 64 rows
            assert first.label == ("default" if bucket < 64 else "cuBLASLt"), (product, bucket)
            assert {one.name for one in first.kernels} <= set(plan["kernels"]), (product, bucket)


@pytest.mark.parametrize("broken", [{}, {"steps": [{}], "kernels": {}}, {"steps": 3, "kernels": {}}])
def test_a_malformed_plan_is_said(broken: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"plan\.json is malformed .*; rebuild the engine"):
        Shapes(broken)


def tuned(engine: Engine, seconds: float = 1e9) -> run.Tuned:
    with cuda_on_cpu.gpu_on_cpu() as gpu:
        made = run.tune(*engine, "llama@p", seconds, None, cuda_on_cpu.compile_kernels)
    assert gpu.live() == [], "all memory, streams and modules are given back"
    return made


def test_all_kernels_are_tried_and_right(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant runs over real operands; where the first after the default is the fastest, it is what the section says."""

    def seconds(self: Any) -> list[float]:
        label = self.timing.variant.label
        return [2.0 if label == "default" else 3.0 if label == "cuBLASLt" else 1.0] * len(self._loads)

    monkeypatch.setattr(trial._Trial, "seconds", seconds)
    made = tuned(engine)
    assert made.failed == {} and made.left_out == [] and made.gpu == "NVIDIA Standin"
    assert {row["what"].split()[0] for row in made.rows} == {
        *(one.key for one in Shapes(json.loads((engine[0] / "plan.json").read_text())).products), "decode", "prefill", "rotary",
        "rows",
    }  # fmt: skip
    data = made.section.data
    assert data["attention"] == {
        "16x2.float8e4m3": {
            "decode_block_n": 64, "decode_warps": 4, "decode_stages": 3,
            "prefill_block_m": 64, "prefill_block_n": 32, "prefill_warps": 4, "prefill_stages": 2,
        }
    }  # fmt: skip
    assert set(data["skinny"]) == {row["what"].split()[0] for row in made.rows if "x" in row["what"].split()[0]}
    assert all(set(one) == {"16", "32", "64"} for one in data["skinny"].values())
    assert data["rotary_warps"] == 4 and data["row_warps"] == 2
    assert "zoo tune llama@p" in made.section.text() and "cuBLASLt 3000000.0" in made.section.text()


def test_an_engine_that_is_built_again_has_what_was_found(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial._Trial, "seconds", lambda self: [1.0 + (self.timing.variant.label == "default")] * len(self._loads))
    monkeypatch.setattr(products, "winner", lambda outcome: outcome.timings[-1])
    found = tuned(engine).section.data
    family, overrides = families.CASES["llama-grouped"]
    spec = families.spec(families.make_checkpoint(tmp_path, family, **overrides))
    build: BuildSpec = cuda_engines.build_spec(spec, "fp8-kv")
    build = dataclasses.replace(build, hardware=dataclasses.replace(build.hardware, tuning=found))
    monkeypatch.setattr("zoo.compilers.cuda.engine.compile_kernels", cuda_on_cpu.compile_kernels)
    (tmp_path / "again").mkdir()
    write_engine(cuda_engines.rewritten(build), build, tmp_path / "again", lambda *_: None)
    again = json.loads((tmp_path / "again" / "plan.json").read_text())
    shapes = Shapes(again)
    assert shapes.decode and shapes.decode.constants["BLOCK_N"] == found["attention"]["16x2.float8e4m3"]["decode_block_n"]
    for step in (one for one in again["steps"] if one["op"] == "gemm"):
        wanted = found["skinny"][f"{step['n']}x{step['k']}.{step['dtype']}"]
        assert [str(one["most"]) for one in step["small"]] == list(wanted)
        for one in step["small"]:
            constants = dict(again["kernels"][one["launches"][0]["kernel"]]["constants"])
            names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS")
            assert [constants[name] for name in names] == wanted[str(one["most"])][:4]


def test_where_cublas_wins_no_further_bucket_is_tried(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(self: Any) -> list[float]:
        slow = len(self._loads) == 1  # of the second bucket on
        return [1.0 if (self.timing.variant.label == "cuBLASLt") == slow else 2.0] * len(self._loads)

    monkeypatch.setattr(trial._Trial, "seconds", seconds)
    made = tuned(engine)
    assert all(set(one) == {"16"} for one in made.section.data["skinny"].values())
    assert {row["best"] for row in made.rows if "M<=32" in row["what"]} == {"cuBLASLt"}


def test_defaults_that_are_best_say_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial._Trial, "seconds", lambda self: [2.0 - (self.timing.variant.label == "default")] * len(self._loads))
    made = tuned(engine)
    assert made.section.data == {} and len(made.rows) > 10 and all(row["best"] == "default" for row in made.rows)


def test_time_that_runs_out_within_a_product(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of the first bucket is timed, and nothing else: the section has nothing to say."""
    late = iter([0.0, 0.0] + [2.0] * 1000)
    monkeypatch.setattr("time.perf_counter", lambda: next(late))
    made = tuned(engine, seconds=1)
    assert [row["what"] for row in made.rows] == ["128x64.float8e4m3 M<=16"] * 2 and made.rows[0]["cublas_us"] is None
    assert made.section.data == {} and made.left_out[0] == "some variants of 128x64.float8e4m3 M<=16"


def test_a_shape_without_a_kernel_is_passed_over(engine: Engine) -> None:
    assert list(products.tune_product(None, Product(64, 20, "bfloat16", "bfloat16", "T"), 64, 1e9)) == []  # type: ignore[arg-type]
    assert list(products.tune_product(None, Product(64, 64, "float32", "float32", "T"), 64, 1e9)) == []  # type: ignore[arg-type]


def test_no_time_is_said(engine: Engine) -> None:
    made = tuned(engine, seconds=0)
    assert made.rows == [] and made.section.data == {}
    assert made.left_out[0] == "product 128x64.float8e4m3" and made.left_out[-2:] == ["rotary", "norm"]


def test_loads_keep_to_the_engine_s_limits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.runtime.abi import EngineLimits

    limits = EngineLimits(max_tokens=64, max_sequences=4, max_rows=4, max_context=100, max_blocks=9, block_size=16)
    assert attention.fitting({"a": [(1, 50)] * 3, "b": [(1, 50)] * 5, "c": [(70, 90)]}, limits) == {"a": [(1, 50)] * 3}
    assert attention.fitting({"a": [(2048, 2048)]}, limits) == {"64 of 100": [(64, 100)]}
    assert elementwise.token_counts(limits) == [16]


def test_what_cannot_be_tuned_is_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = dataclasses.replace(engine[1], compiler={"name": "onnxruntime", "version": "1"})
    with pytest.raises(IncompatibleError, match=r"was built by onnxruntime.*give an engine of the cuda compiler"):
        run.check(cpu)
    run.check(engine[1])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="Triton, which compiles the variants, is not installed"):
        run.check(engine[1])


def test_an_unreadable_plan_is_said(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"plan\.json: it cannot be read"):
        run.tune(tmp_path, engine[1], "x", 1.0)


def test_attention_takes_the_choices_of_its_shape() -> None:
    own = {"attention": {"128x4.float8e4m3": {"decode_block_n": 32}}, "decode_warps": 8, "decode_block_n": 64}
    chosen = attention_cuda._choices(128, 4, True, own)
    assert (chosen["decode_block_n"], chosen["decode_warps"]) == (32, 8)
    assert attention_cuda._choices(128, 4, False, own)["decode_block_n"] == 64
    assert attention_cuda._choices(128, 8, True, {"attention": own["attention"]}) == attention_cuda._choices(128, 8, True, {})
