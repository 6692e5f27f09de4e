"""Calibration against activations that hooks in transformers see, and on the demo model for what FP8 costs there."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from zoo import calibration
from zoo.calibration import PROBE, calibrate, calibrate_checkpoint, default_text, observed, text_digest, unbound_scales
from zoo.checkpoints import Checkpoint
from zoo.errors import CheckpointError, ConfigError
from zoo.graph_templates import expand
from zoo.passes.frame import run
from zoo.passes.fuse_linears import FuseLinears
from zoo.passes.quantize_fp8 import QuantizeFp8
from zoo.spec import BuildSpec, HardwareSpec, Limits, ParallelSpec, QuantSpec
from zoo.targets import TARGETS
from zoo.weights.reader import Tensors

DEMO = Path(__file__).parents[2] / "checkpoints" / "zoo-demo"
READERS = {  # the module whose input an activation is, by the activation's role
    "qkv": ("q_proj", "c_attn"),
    "o": ("o_proj", "attn.c_proj"),
    "gate_up": ("gate_proj",),
    "up": ("c_fc",),
    "down": ("down_proj", "mlp.c_proj"),
    "lm_head": ("lm_head",),
}


@pytest.fixture(scope="module", params=["llama-biases", "qwen3-norms", "mistral-window", "gpt2-odd"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = families.CASES[request.param]
    return families.make_checkpoint(tmp_path_factory.mktemp("checkpoints"), family, **overrides)


def quantized(model, skip: tuple[str, ...] = ("lm_head",)):
    """The plain graph as an FP8 build rewrites it."""
    build = BuildSpec(
        model=model,
        quant=QuantSpec("fp8", "fp8", skip),
        hardware=HardwareSpec("cpu", "cpu"),
        parallel=ParallelSpec(),
        limits=Limits().resolve(model),
        compiler="onnxruntime",
        dtype="float32",
    )
    return run([FuseLinears(), QuantizeFp8()], expand(model, "float32"), build, TARGETS["onnxruntime"])


def hooked_peaks(folder: Path, chunks: list[list[int]]) -> dict[str, float]:
    """max|x| of every linear layer's input, as transformers computes it."""
    model, peaks, handles = families.reference(folder), {}, []

    def watch(name: str):
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            peaks[name] = max(peaks.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for name, module in model.named_modules():
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        for role, ends in READERS.items():
            if name.endswith(ends):
                handles.append(
                    module.register_forward_pre_hook(watch(f"{role}.x" if layer is None else f"layer.{layer}.{role}.x"))
                )
    with torch.no_grad():
        for chunk in chunks:
            model(torch.tensor([chunk]))
    for handle in handles:
        handle.remove()
    return peaks


def test_scales_are_the_peaks_that_transformers_sees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CHUNK", 24)
    ids = families.prompt(folder, 61, seed=3)  # two whole chunks and a rest
    with Tensors.open(folder) as tensors:
        scales = calibrate(families.spec(folder), tensors, ids)
    peaks = hooked_peaks(folder, [ids[:24], ids[24:48], ids[48:]])
    assert set(scales) == set(peaks)
    for name, peak in peaks.items():
        assert scales[name] == pytest.approx(peak / 448, rel=1e-5), name


def test_the_same_text_gives_the_same_scales(folder: Path) -> None:
    ids = families.prompt(folder, 30)
    with Tensors.open(folder) as tensors:
        assert calibrate(families.spec(folder), tensors, ids) == calibrate(families.spec(folder), tensors, ids)


@pytest.mark.parametrize("skip", [(), ("lm_head",), ("q", "lm_head"), ("gate_up",), ("up", "o")])
def test_every_scale_that_the_pass_asks_for_is_measured(folder: Path, skip: tuple[str, ...]) -> None:
    model = families.spec(folder)
    measured = {variable.name for variable in observed(expand(model, "float32")).graph.outputs} - {PROBE}
    asked = set(unbound_scales(quantized(model, skip)))
    assert asked and asked <= measured
    if not skip:
        assert asked == measured


def test_nothing_is_computed_behind_the_last_linear_input(folder: Path) -> None:
    model = families.spec(folder)
    graph = observed(expand(model, "float32"))
    assert "lm_head" not in graph.weights and [v.name for v in graph.data_inputs] == ["token_ids", "positions"]
    assert {v.name for v in graph.graph.inputs} == {"token_ids", "positions", *graph.weights}


def test_progress_counts_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CHUNK", 16)
    seen: list[tuple[str, int, int]] = []
    with Tensors.open(folder) as tensors:
        calibrate(families.spec(folder), tensors, families.prompt(folder, 40), lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "calibrate"] == [("calibrate", done, 40) for done in (0, 16, 32)]


def test_a_channel_of_zeros_gets_the_scale_one(tmp_path: Path) -> None:
    """Up to the first down projection everything may be zero: a scale of 0 would divide by zero."""
    folder = tmp_path / "zeros"
    shutil.copytree(families.make_checkpoint(tmp_path, "llama"), folder)
    weights = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with Tensors.open(folder) as tensors:
        scales = calibrate(families.spec(folder), tensors, families.prompt(folder, 8))
        assert scales["layer.0.down.x"] == scales["layer.1.down.x"] == 1.0 and scales["layer.1.qkv.x"] != 1.0
        logits = families.Plain(quantized(families.spec(folder)), tensors, scales).logits([families.prompt(folder, 8)])
    assert np.isfinite(logits).all()


def test_bad_requests_say_what_to_do(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama")
    model = families.spec(folder)
    with Tensors.open(folder) as tensors:
        with pytest.raises(ConfigError, match=r"at least one; raise quant\.calibration_tokens"):
            calibrate(model, tensors, [])
        with pytest.raises(ConfigError, match=r"token id 262; model .* knows 0 to 261"):
            calibrate(model, tensors, [1, 262])
        with pytest.raises(ConfigError, match="token id -1"):
            calibrate(model, tensors, [-1, 3])
    for tokens in (0, -5):
        with pytest.raises(ConfigError, match=rf"quant\.calibration_tokens is {tokens}; it must be at least 1"):
            calibrate_checkpoint(model, Checkpoint.open(folder), tokens)


@pytest.mark.parametrize(
    ("name", "index"),
    [("model.layers.1.input_layernorm.weight", (3,)), ("model.embed_tokens.weight", (77, 5)), ("model.norm.weight", (0,))],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_found(tmp_path: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Also where a single token among many meets them, and in the very last norm."""
    folder = tmp_path / "bad"
    shutil.copytree(families.make_checkpoint(tmp_path, "llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][index] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with Tensors.open(folder) as tensors, pytest.raises(CheckpointError, match=r"not finite at .*x; check the weights"):
        calibrate(families.spec(folder), tensors, [3] * 20 + [77] + [3] * 20)


def test_a_checkpoint_brings_its_own_tokenizer(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama")
    model, checkpoint = families.spec(folder), Checkpoint.open(folder)
    ids = list(default_text().encode()[:100])  # the test tokenizer's tokens are bytes
    assert calibrate_checkpoint(model, checkpoint, 100) == calibrate(model, checkpoint.tensors, ids)
    assert calibrate_checkpoint(model, checkpoint, 50) != calibrate_checkpoint(model, checkpoint, 100)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*quant=none"):
        calibrate_checkpoint(model, Checkpoint.open(bare), 100)


def test_the_default_text_is_long_enough_and_has_a_digest() -> None:
    tokens = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(default_text()).ids
    assert len(tokens) >= QuantSpec("fp8", "fp8").calibration_tokens
    assert text_digest() == "sha256:" + hashlib.sha256(default_text().encode()).hexdigest()


def test_fp8_costs_the_demo_model_little() -> None:
    """Calibrated on the first thousand tokens of the text, judged on others: loss, greedy choices and logits, bounds stated."""
    model = families.spec(DEMO)
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(default_text()).ids
    text = ids[2048:2400]
    with Tensors.open(DEMO) as tensors:
        scales = calibrate(model, tensors, ids[:1024])
        plain = families.Plain(expand(model, "float32"), tensors).logits([text])[0]
        fp8 = families.Plain(quantized(model), tensors, scales).logits([text])[0]

    def loss(logits: np.ndarray) -> float:
        return float(torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]), torch.tensor(text[1:])))

    assert loss(fp8) == pytest.approx(loss(plain), rel=0.01)
    assert (fp8.argmax(1) == plain.argmax(1)).mean() > 0.95
    assert 0.005 < np.linalg.norm(fp8 - plain) / np.linalg.norm(plain) < 0.06


def test_names_of_unbound_scales_need_no_checkpoint(tmp_path: Path) -> None:
    model = dataclasses.replace(families.spec(families.make_checkpoint(tmp_path, "llama")), checkpoint="", name="shapes")
    assert unbound_scales(quantized(model))[:4] == ["layer.0.down.x", "layer.0.gate_up.x", "layer.0.o.x", "layer.0.qkv.x"]
    assert unbound_scales(expand(model, "float32")) == []


def test_scales_of_a_cache_are_those_of_keys_and_values(tmp_path: Path) -> None:
    """transformers' own cache holds the keys and values that attention reads: rotated, grouped heads not repeated."""
    folder = families.make_checkpoint(tmp_path, "llama")
    ids = families.prompt(folder, 24)
    with Tensors.open(folder) as tensors:
        scales = calibrate(families.spec(folder), tensors, ids, cache=True)
        plain = calibrate(families.spec(folder), tensors, ids)
    assert {name: scales[name] for name in plain} == plain
    model = families.reference(folder)
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    for number, layer in enumerate(cache.layers):
        for role, tensor in (("k", layer.keys), ("v", layer.values)):
            assert scales[f"layer.{number}.{role}_cache"] == pytest.approx(float(tensor.abs().max()) / 448, rel=1e-5)
