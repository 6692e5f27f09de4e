"""Files of a ``cuda`` engine that do not fit each other, this version or the checkpoint: one line of error, and no remains."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from cuda_engines import Made, Traffic, change_plan, compile_engine, copied, open_engine, opened, refused, scales_of, shared
from cuda_on_cpu import Gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from zoo.errors import ArtifactError, CheckpointError, IncompatibleError, ResourceError


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def engine(base: Path, tmp_path: Path) -> Made:
    """A copy that may be damaged."""
    return copied(shared(base, "llama-grouped"), tmp_path / "engine")


def test_damaged_cubins(engine: Made) -> None:
    cubin = next(path for path in sorted((engine.folder / "kernels").iterdir()) if path.name.startswith("decode"))
    good = cubin.read_bytes()
    cubin.unlink()
    cubin.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    refused(ArtifactError, r"decode\S+\.cubin: it is not the cubin that plan\.json was written for; pull or rebuild", engine)
    cubin.unlink()
    refused(ArtifactError, r"decode\S+\.cubin: missing; pull or rebuild the engine", engine)


def test_cubins_that_do_not_load(engine: Made) -> None:
    name = next(name for name in json.loads((engine.folder / "plan.json").read_text())["kernels"] if name.startswith("merge"))
    change_plan(engine, lambda plan: plan["kernels"][name].update(entry="merger"))
    refused(ArtifactError, r"kernel merger is not in its cubin \(named symbol not found\); pull or rebuild", engine)
    for code, kind, match in (
        (209, IncompatibleError, "not for NVIDIA Standin or needs a newer driver"),
        (200, ArtifactError, "cannot be loaded"),
    ):
        gpu = Gpu()
        gpu.fails["cuModuleLoadData"] = code
        refused(kind, match, engine, gpu)


def step_of(plan: dict[str, Any], op: str) -> dict[str, Any]:
    """The first launch of a plan, or the first product."""
    return next(step for step in plan["steps"] if step["op"] == op)


def launch(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: step_of(plan, "launch").update(changes)


def argument(place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: step_of(plan, "launch")["args"].__setitem__(place, value)


PLANS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "schema": (lambda plan: plan.update(schema=99), r"schema is 99; this version reads \d+; rebuild the engine"),
    "kernel": (launch(kernel="gone-123"), r"steps\[0\] launches 'gone-123', which is not among its kernels"),
    "arguments": (launch(args=[]), r"steps\[0\]: gather_rows-\w+ takes \d arguments, not 0"),
    "grid": (launch(grid=[["T", 1, 1]]), r"steps\[0\] has a grid of 1 sides, not 3"),
    "size": (launch(grid=[["T", 0, 1]] * 3), r"steps\[0\] has the size \['T', 0, 1\], not \[symbol"),
    "address": (argument(2, {"arena": 1 << 40}), r"y of gather_rows-\w+ is \{'arena': 1099511627776\}, which is no address"),
    "number": (argument(3, {"float": 1.0}), r"height of gather_rows-\w+ is \{'float': 1\.0\}, which is no i32"),
    "tensor": (argument(0, {"tensor": "embedding"}), "nothing here is meant by the argument .*embedding"),
    "sampling": (lambda plan: plan["sampling"].pop("greedy"), "sampling has no greedy"),
    "file name": (lambda plan: plan["kernels"].update({"../x": {}}), r"a kernel is called '\.\./x'"),
    "product": (
        lambda plan: step_of(plan, "gemm").update(n=256),
        r"steps\[\d\]\.w is to be bfloat16 \[256, 64\], and weights\.json has bfloat16 \[128, 64\]",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_do_not_fit(engine: Made, case: str) -> None:
    change, match = PLANS[case]
    change_plan(engine, change)
    text = refused(ArtifactError, match, engine)
    assert text.startswith("plan.json: ") and text.endswith("rebuild the engine")


@pytest.mark.parametrize("name", ["plan.json", "weights.json"])
def test_no_file_and_no_json(engine: Made, name: str) -> None:
    path = engine.folder / name
    text = path.read_text()
    for content, match in (
        (text[:-9], "malformed"),
        ("[1]", "expected an object"),
        ("\x00", "malformed"),
        ("[" * 10**5, "malformed"),
    ):
        path.write_text(content)
        refused(ArtifactError, rf"{name}: {match}.*; pull or rebuild the engine", engine)
    path.unlink()
    refused(ArtifactError, rf"{name}: missing; pull or rebuild the engine", engine)


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON document lies."""
    if at:
        yield at
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        yield from places(value, (*at, key))


ODD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    16,
    2**31,
    2**63,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "T",
    "../x",
    [],
    [1],
    [[1]],
    {},
]
GONE = "a field that is gone"


@pytest.fixture(scope="module")
def victim(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return copied(shared(base, "llama-grouped", "fp8-kv"), tmp_path_factory.mktemp("victim") / "engine")


@pytest.mark.parametrize(("name", "examples"), [("plan.json", 120), ("weights.json", 80)])
def test_one_wrong_value_anywhere_is_an_error_or_harmless(victim: Made, name: str, examples: int) -> None:
    """Single mutations of real files: what opens has hurt nothing, what does not says so, and nothing is left behind."""
    path = victim.folder / name
    good = json.loads(path.read_text())
    path.unlink()  # a link to the shared engine's
    everywhere = sorted(places(good), key=str)

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.sampled_from(everywhere), st.sampled_from([*ODD, GONE]) | st.integers() | st.text(max_size=3) | st.floats())
    def mutate(at: tuple[Any, ...], value: Any) -> None:
        data = copy.deepcopy(good)
        parent = data
        for key in at[:-1]:
            parent = parent[key]
        if value == GONE:
            del parent[at[-1]]
        else:
            parent[at[-1]] = value
        path.write_text(json.dumps(data))
        gpu = Gpu()
        try:
            open_engine(victim, gpu).close()
        except (ArtifactError, CheckpointError, ResourceError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        assert gpu.live() == [] and not gpu.blas.things

    mutate()
    path.write_text(json.dumps(good))


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no limit": ({"limits": {}}, "limits are malformed"),
    "a limit of 0": ({"limits": {"block_size": 0}}, r"limits\.block_size is 0"),
    "no block but the reserved one": ({"limits": {"max_blocks": 1}}, r"limits\.max_blocks is 1"),
    "an unknown limit": ({"limits": {"most": 3}}, "limits are malformed"),
    "inputs": ({"inputs": ()}, "its inputs are ; expected token_ids, positions"),
    "index inputs": ({"index_inputs": "other"}, "unknown index inputs token_cells; it was written by another version"),
    "pools": ({"caches": (9, 2, 8, 2)}, r"pool kv\.0 is bfloat16 \[9, 2, 8, 2\]"),
    "a pool's blocks": ({"caches": (9, 2, 4, 2, 16)}, r"pool kv\.0 is bfloat16 \[9, 2, 4, 2, 16\]"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_do_not_fit(engine: Made, case: str) -> None:
    changes, match = MANIFESTS[case]
    abi, limits = engine.manifest.abi, engine.manifest.limits
    if "limits" in changes:
        limits = limits | changes["limits"] if changes["limits"] else {}
    if "inputs" in changes:
        abi = dataclasses.replace(abi, inputs=())
    if "index_inputs" in changes:
        abi = dataclasses.replace(abi, index_inputs=(dataclasses.replace(abi.index_inputs[0], name="token_cells"),))
    if "caches" in changes:
        abi = dataclasses.replace(abi, caches=(dataclasses.replace(abi.caches[0], shape=changes["caches"]),))
    other = dataclasses.replace(engine, manifest=dataclasses.replace(engine.manifest, limits=limits, abi=abi))
    assert refused(ArtifactError, match, other).startswith("engine.json: ")


# checkpoints


def unbound(base: Path, folder: Path, quant: str = "none") -> Made:
    checkpoint = shared(base, "llama-grouped").checkpoint
    return Made(folder, compile_engine(folder, checkpoint, quant, bound=False), checkpoint)


def test_an_engine_without_a_checkpoint(base: Path, tmp_path: Path) -> None:
    made = unbound(base, tmp_path / "engine")
    refused(
        ArtifactError, "the engine was built without a checkpoint; name its folder, as `zoo serve REF --checkpoint FOLDER`", made
    )
    refused(CheckpointError, "found neither model.safetensors", made, checkpoint=tmp_path / "nowhere")
    session = open_engine(made, checkpoint=made.checkpoint)
    prompt = families.prompt(made.checkpoint, 7)
    logits = session.step(Traffic(session).batch({"a": prompt})).logits
    _, _, bound = opened(base, "llama-grouped")
    np.testing.assert_array_equal(logits, Traffic(bound).step({"a": prompt}))
    session.close()


def test_a_checkpoint_of_another_model(base: Path, tmp_path: Path) -> None:
    """All tensors that do not fit are named, those of all layers at once."""
    made = unbound(base, tmp_path / "engine")
    other = families.make_checkpoint(base, "llama", intermediate_size=80, num_hidden_layers=1, attention_bias=True)
    text = refused(CheckpointError, "not the checkpoint of this engine, 12 of 21 tensors do not fit", made, checkpoint=other)
    for part in (
        "model.layers.*.mlp.down_proj.weight is [64, 80], not [64, 96]",
        "model.layers.*.mlp.gate_proj.weight is [80, 64], not [96, 64]",
        "model.layers.1.self_attn.q_proj.weight is missing",
        "give the folder of the model that the engine was built for",
    ):
        assert part.replace("*", "0") in text, text
    gpt2 = families.make_checkpoint(base, *families.CASES["gpt2"][:1])
    text = refused(CheckpointError, "21 of 21 tensors do not fit", made, checkpoint=gpt2)
    assert r"model.layers.*.self_attn.q_proj.weight (2 of them) are missing" in text


def test_fp8_without_scales(base: Path, tmp_path: Path) -> None:
    made = unbound(base, tmp_path / "engine", "fp8-kv")
    folder = tmp_path / "checkpoint"
    shutil.copytree(made.checkpoint, folder)
    text = refused(ArtifactError, r"12 of the engine's 12 scales are missing from scales\.json: ", made, checkpoint=folder)
    assert "layer.*.k_cache (2 of them) are missing" in text
    scales = scales_of(made.checkpoint)
    for value in ("1.0", True, None, 0, -1.0, float("nan"), float("inf"), 10**400):
        (folder / "scales.json").write_text(json.dumps(scales | {"layer.0.o.x": value}))
        refused(ArtifactError, r"scales\.json: the scale 'layer\.0\.o\.x' is .*, not a float32 above 0", made, checkpoint=folder)
    (folder / "scales.json").write_text(json.dumps(scales))
    open_engine(made, checkpoint=folder).close()


def test_a_plan_without_kernels_to_quantize(base: Path, tmp_path: Path) -> None:
    made = copied(shared(base, "llama-grouped", "fp8-kv"), tmp_path / "engine")
    loaders = json.loads((made.folder / "plan.json").read_text())["weight_kernels"]
    change_plan(made, lambda plan: plan["weight_kernels"]["quantize"].pop("float32"))
    refused(ArtifactError, r"plan\.json: it has no kernels to quantize weights of each dtype; pull or rebuild", made)
    change_plan(
        made, lambda plan: plan.update(weight_kernels={"channel_scale": loaders["quantize"], "quantize": loaders["quantize"]})
    )
    refused(ArtifactError, r"plan\.json: quantize-\w+ is no kernel to channel_scale; pull or rebuild the engine", made)


def test_weights_that_are_no_numbers_cannot_be_quantized(base: Path, tmp_path: Path) -> None:
    made = copied(shared(base, "llama-grouped", "fp8-kv"), tmp_path / "engine")
    file = made.folder / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = np.nan
    file.unlink()
    save_file(tensors, file)
    refused(CheckpointError, r"tensor .*model\.layers\.1\.mlp\.up_proj\.weight: holds NaN or infinity, so it cannot be", made)
