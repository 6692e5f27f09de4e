"""Roles and recipes against transformers' own parameters, and every tensor problem in one message."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import families
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from zoo.checkpoints import Checkpoint, check_config, check_tensors, fit_names
from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.names import recipe_for, roles, shape_of
from zoo.config import compose, compose_model, list_models
from zoo.errors import CheckpointError, ConfigError
from zoo.spec import ModelSpec
from zoo.weights.bind import materialize
from zoo.weights.recipe import Weight


def weight_of(model: ModelSpec, checkpoint: Checkpoint, role: str, layer: int | None = None) -> np.ndarray:
    return materialize(Weight("w", "float32", recipe_for(model, role, layer)), checkpoint.tensors, {})


@pytest.mark.parametrize("case", ["llama-biases", "qwen2-tied-odd", "qwen3-norms", "gpt2-odd"])
def test_every_weight_is_the_parameter_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes = families.CASES[case]
    folder = families.make_checkpoint(tmp_path, family, **changes)
    model, checkpoint = compose_model(adopt(folder)).model, Checkpoint.open(folder)
    model = fit_names(model, checkpoint.tensors)
    reference = families.reference(folder)
    state = {name: value.numpy() for name, value in reference.state_dict().items()}
    base = "transformer." if family == "gpt2" else "model."
    if family == "gpt2":
        tied = {"embed": "wte.weight", "pos_embed": "wpe.weight", "final_norm": "ln_f.weight", "final_norm.bias": "ln_f.bias"}
        names = {role: base + name for role, name in tied.items()}
    else:
        names = {"embed": base + "embed_tokens.weight", "final_norm": base + "norm.weight"}
    for role, name in names.items():
        assert (weight_of(model, checkpoint, role) == state[name]).all(), role
    head = state["lm_head.weight"]
    assert (weight_of(model, checkpoint, "lm_head") == head.T).all()
    seen = set(names) | {"lm_head"}
    for layer in range(model.num_layers):
        for role, at in roles(model):
            if at != layer:
                continue
            ours = weight_of(model, checkpoint, role, layer)
            assert ours.shape == shape_of(model, role)
            assert (ours == theirs(state, family, model, role, layer)).all(), (role, layer)
            seen.add(role)
    assert seen == {role for role, _ in roles(model)}


def theirs(state: dict[str, np.ndarray], family: str, model: ModelSpec, role: str, layer: int) -> np.ndarray:
    base, _, part = role.partition(".")
    kind = part or "weight"
    if family == "gpt2":
        head = f"transformer.h.{layer}."
        if base in ("q", "k", "v"):
            return np.split(state[f"{head}attn.c_attn.{kind}"], 3, axis=-1)["qkv".index(base)]
        parts = {"norm1": "ln_1", "norm2": "ln_2", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
        return state[f"{head}{parts[base]}.{kind}"]
    head = f"model.layers.{layer}."
    if base in ("norm1", "norm2"):
        return state[head + {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}[base] + ".weight"]
    if base in ("q_norm", "k_norm"):
        return state[f"{head}self_attn.{base}.weight"]
    where = "self_attn" if base in "qkvo" else "mlp"
    value = state[f"{head}{where}.{base}_proj.{kind}"]
    return value.T if kind == "weight" else value


def changed(folder: Path, target: Path, change: dict[str, torch.Tensor | None]) -> Checkpoint:
    """A copy of a checkpoint with tensors replaced, added, or (None) left out."""
    target.mkdir()
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state |= {name: tensor for name, tensor in change.items() if tensor is not None}
    state = {name: tensor for name, tensor in state.items() if change.get(name, tensor) is not None}
    safetensors.torch.save_file(state, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return Checkpoint.open(target)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama")
    model = compose_model(adopt(folder)).model
    attention, mlp = "model.layers.0.self_attn", "model.layers.1.mlp"
    checkpoint = changed(
        folder,
        tmp_path / "bad",
        {
            f"{attention}.q_proj.weight": None,
            f"{mlp}.up_proj.weight": None,
            "model.layers.0.self_attn.q_proj.lora_A": torch.zeros(4, 64),
            f"{attention}.k_proj.bias": torch.zeros(32),
            "model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64),
            "model.norm.weight": torch.zeros(65),
            f"{mlp}.down_proj.weight": torch.zeros(96, 64),
            "model.embed_tokens.weight": torch.zeros(262, 64, dtype=torch.int8),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),  # carried by old exports, read by nobody
        },
    )
    with pytest.raises(CheckpointError) as error:
        check_tensors(model, checkpoint.tensors)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[0] == f"{tmp_path / 'bad'}: the checkpoint does not fit model {model.name!r} (family llama):"
    assert lines[1:] == [
        "2 tensors missing:",
        f"{attention}.q_proj.weight [64, 64]",
        f"{mlp}.up_proj.weight [96, 64]",
        "3 tensors extra:",
        f"{attention}.k_proj.bias [32] (it would be layer.0.k.bias, which the model's options leave out)",
        f"{attention}.q_proj.lora_A [4, 64]",
        "model.layers.2.mlp.up_proj.weight [96, 64]",
        "2 tensors misshapen:",
        f"{mlp}.down_proj.weight: [96, 64], the model says [64, 96]",
        "model.norm.weight: [65], the model says [64]",
        "1 tensors of a dtype that is not read:",
        "model.embed_tokens.weight: int8; expected bfloat16, float16 or float32",
    ]


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    model = compose_model(adopt(folder)).model
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    checkpoint = changed(folder, tmp_path / "both", {"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    check_tensors(model, checkpoint.tensors)
    assert next(recipe_for(model, "lm_head").leaves())["name"] == "model.embed_tokens.weight"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_config_json_calls_tied_but_is_not(family: str, tmp_path: Path) -> None:
    """transformers uses the stored head then, and so does a model that was adopted."""
    folder = families.make_checkpoint(tmp_path, family, tie_word_embeddings=True)
    tied = compose_model(adopt(folder)).model
    assert tied.tie_embeddings
    head = torch.randn(tied.vocab_size, tied.hidden_size)
    checkpoint = changed(folder, tmp_path / "own", {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"holds a lm_head.weight with other numbers.*set model.tie_embeddings=false"):
        check_tensors(tied, checkpoint.tensors)
    made = compose_model(adopt(tmp_path / "own")).model
    assert not made.tie_embeddings
    check_config(made, checkpoint)
    check_tensors(made, checkpoint.tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32).lm_head.weight
    ours = weight_of(fit_names(made, checkpoint.tensors), checkpoint, "lm_head")
    assert (ours == theirs.detach().numpy().T).all() and (ours == head.numpy().T).all()


def test_a_tied_head_in_another_dtype(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "llama", dtype="bfloat16", tie_word_embeddings=True)
    embed = safetensors.torch.load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    wide = embed.float()
    assert compose_model(adopt(changed(folder, tmp_path / "same", {"lm_head.weight": wide}).folder)).model.tie_embeddings
    wide = wide.clone()
    wide[-1, -1] += 1
    assert not compose_model(adopt(changed(folder, tmp_path / "other", {"lm_head.weight": wide}).folder)).model.tie_embeddings


def test_gpt2_is_read_with_and_without_its_prefix(tmp_path: Path) -> None:
    folder = families.make_checkpoint(tmp_path, "gpt2")
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    short = tmp_path / "short"
    short.mkdir()
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    renamed["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)  # the mask that the original export carries
    assert set(renamed) != set(stored)
    safetensors.torch.save_file(renamed, short / "model.safetensors")
    (short / "config.json").write_bytes((folder / "config.json").read_bytes())
    made = []
    for place in (folder, short):
        checkpoint = Checkpoint.open(place)
        model = fit_names(compose_model(adopt(place)).model, checkpoint.tensors)
        made.append([weight_of(model, checkpoint, role, layer) for role, layer in roles(model)])
    assert len(made[0]) == len(made[1]) > 20
    assert all((a == b).all() for a, b in zip(*made, strict=True))


def test_a_role_without_a_name_says_what_is_named() -> None:
    model = compose(["models=llama-3.1-8b"]).model
    with pytest.raises(ConfigError, match=r"tensors.layer has no name for 'q_norm'; it names norm1, norm2, q"):
        recipe_for(dataclasses.replace(model, qk_norm="head"), "q_norm", 0)
    with pytest.raises(ConfigError, match="no weight has the role 'nope'"):
        recipe_for(model, "nope", 0)


@pytest.mark.parametrize("name", list_models())
def test_every_model_has_a_recipe_for_every_role(name: str) -> None:
    model = compose([f"models={name}"]).model
    names = set()
    for role, layer in roles(model):
        recipe = recipe_for(model, role, layer)
        assert recipe.shape == shape_of(model, role)
        names |= {leaf["name"] for leaf in recipe.leaves()}
    assert len(names) > 4 * model.num_layers
