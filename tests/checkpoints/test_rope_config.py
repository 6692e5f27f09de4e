"""Rotary settings of config.json: what transformers makes of the same keys, and its logits on each side of a threshold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers

from zoo import ropetables
from zoo.checkpoints import Checkpoint
from zoo.checkpoints.adopt import adopt
from zoo.checkpoints.families import read
from zoo.config import compose_model
from zoo.errors import CheckpointError
from zoo.graph_templates import expand

# A family that has nothing but what this file asks for, each architecture a way of reading rotary settings.
TRIAL = """
family: trial
tensors: {model: {}, layer: {}}
config:
  num_layers: num_hidden_layers
  head_dim: [head_dim, hidden_size / num_attention_heads]
  max_positions: max_position_embeddings
architectures:
  Plain:
    model_type: trial
    defaults: {max_position_embeddings: 2048, rope_theta: 10000.0}
  Phi3:
    model_type: phi3
    defaults: {original_max_position_embeddings: 4096, partial_rotary_factor: 1.0, max_position_embeddings: 4096}
  Yarned:
    model_type: gpt_oss
    defaults:
      rope_theta: 150000.0
      max_position_embeddings: 131072
      rope_parameters:
        {rope_type: yarn, factor: 32.0, beta_fast: 32.0, beta_slow: 1.0, truncate: false,
         original_max_position_embeddings: 4096}
  NeoX:
    model_type: gpt_neox
    defaults: {rotary_pct: 0.25, rotary_emb_base: 10000, max_position_embeddings: 2048}
  Half:
    model_type: phi
    defaults: {partial_rotary_factor: 0.5, max_position_embeddings: 2048}
  Absolute:
    model_type: gptj
    defaults: {rotary_dim: 64, max_position_embeddings: 2048}
  Gemma3:
    model_type: gemma3_text
    defaults:
      {rope_theta: 1000000.0, rope_local_base_freq: 10000.0, sliding_window: 4096, sliding_window_pattern: 6,
       max_position_embeddings: 131072}
    window: layer_types
  ModernBert:
    model_type: modernbert
    defaults:
      {global_rope_theta: 160000.0, local_rope_theta: 10000.0, local_attention: 128, global_attn_every_n_layers: 3,
       max_position_embeddings: 8192}
    config: {window: local_attention / 2 + 1}
    window: layer_types
  Said:
    model_type: said
    defaults: {max_position_embeddings: 64, settings: {base: 500.0, pairs: true}}
    config: {rope.theta: settings.base, rope.interleaved: settings.pairs, rope.fraction: 4 * part / hidden_size}
    must: {rope_parameters.note: null}
"""
SIZES = {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 4}
LISTS = {"short_factor": [1.0 + i for i in range(32)], "long_factor": [4.0 + 2 * i for i in range(32)]}


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "models" / "families").mkdir(parents=True)
    (tmp_path / "conf" / "models" / "families" / "trial.yaml").write_text(TRIAL)
    monkeypatch.setenv("ZOO_CONF", str(tmp_path / "conf"))


def meaning(architecture: str, **config: Any) -> dict[str, Any]:
    return read({**SIZES, **config}, "trial", architecture, "config.json")


def theirs(config_class: str, **config: Any) -> Any:
    """What transformers makes of a config.json."""
    return getattr(transformers, config_class)(**json.loads(json.dumps({**SIZES, **config})))


NAMES = {
    "kind": "rope_type", "theta": "rope_theta", "factor": "factor", "original_max_positions": "original_max_position_embeddings",
    "fraction": "partial_rotary_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate",
    "mscale": "mscale", "mscale_all_dim": "mscale_all_dim", "attention_factor": "attention_factor",
    "short_factor": "short_factor", "long_factor": "long_factor", "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}  # fmt: skip


def same(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    """Our keys and values are those of a standardized ``rope_parameters``, no more and no fewer."""
    expected = {ours_: reference[name] for ours_, name in NAMES.items() if reference.get(name) is not None}
    if expected.get("fraction") == 1:
        del expected["fraction"]
    assert ours == expected


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}
FLAT: list[tuple[str, str, dict[str, Any]]] = [
    ("Plain", "LlamaConfig", {"rope_scaling": YARN, "rope_theta": 5e5}),
    ("Plain", "LlamaConfig", {"rope_scaling": {"type": "yarn", "factor": 8}}),
    ("Plain", "LlamaConfig", {"rope_parameters": {**YARN, "rope_theta": 1e6, "truncate": False, "beta_fast": 9, "beta_slow": 2}}),
    ("Plain", "LlamaConfig", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "attention_factor": 1.5}}),
    ("Yarned", "GptOssConfig", {}),
    ("Yarned", "GptOssConfig", {"rope_scaling": {**YARN, "truncate": False}, "rope_theta": 9e4}),
    ("Yarned", "GptOssConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
    ("NeoX", "GPTNeoXConfig", {}),
    ("NeoX", "GPTNeoXConfig", {"rotary_pct": 1.0, "rotary_emb_base": 5000}),
    ("NeoX", "GPTNeoXConfig", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}),
    ("Half", "PhiConfig", {}),
    ("Half", "PhiConfig", {"partial_rotary_factor": 0.25, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("Half", "PhiConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.75}}),
    ("Phi3", "Phi3Config", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, **LISTS, "attention_factor": 1.1}}),
    ("Phi3", "Phi3Config", {"partial_rotary_factor": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "config_class", "change"), FLAT, ids=range(len(FLAT)))
def test_one_rotation_for_all_layers(trial: None, architecture: str, config_class: str, change: dict[str, Any]) -> None:
    if "short_factor" in change.get("rope_parameters", {}):  # transformers wants it inside as well
        change = {**change, "original_max_position_embeddings": 1024}
        change["rope_parameters"] = change["rope_parameters"] | {"original_max_position_embeddings": 77}
    ours = meaning(architecture, **change)
    same(ours["rope"], theirs(config_class, **change).rope_parameters)
    assert "local_rope" not in ours


def test_longrope_of_phi_3(trial: None) -> None:
    """The original context stands beside the factors and says what the factor is; the first releases had names of their own."""
    for kind in ("longrope", "su", "yarn"):
        config = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
        made = meaning("Phi3", **config, rope_scaling={"type": kind, **LISTS}, rope_theta=10000.0)
        assert made["rope"] == {"kind": "longrope", "theta": 10000.0, "factor": 32.0, "original_max_positions": 4096, **LISTS}
        assert made["max_positions"] == 131072
    reference = theirs(
        "Phi3Config",
        **config,
        rope_parameters={"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 4096},
    )
    module = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding(reference)
    spec = families.RopeSpec("longrope", **{k: v for k, v in made["rope"].items() if k in ("factor", "original_max_positions")})
    assert ropetables.attention_factor(spec) == pytest.approx(module.attention_scaling, rel=1e-12)


def test_a_missing_factor_of_yarn_is_the_quotient_of_the_contexts(trial: None) -> None:
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    assert meaning("Plain", rope_parameters=yarn)["rope"]["factor"] == 4.0


def test_a_dynamic_kind_has_more_positions_than_config_json_says(trial: None) -> None:
    made = meaning("Plain", rope_scaling={"type": "dynamic", "factor": 4.0})
    assert made["rope"] == {"kind": "dynamic", "theta": 1e4, "factor": 4.0, "original_max_positions": 2048}
    assert made["max_positions"] == 8192


def test_an_absolute_part_of_heads(trial: None) -> None:
    assert meaning("Absolute", head_dim=256)["rope"]["fraction"] == 0.25
    assert meaning("Absolute", head_dim=256, rotary_dim=96)["rope"]["fraction"] == 0.375
    assert "fraction" not in meaning("Absolute", head_dim=256, rotary_dim=None)["rope"]
    assert "fraction" not in meaning("Absolute", head_dim=64)["rope"]
    with pytest.raises(CheckpointError, match="rotary_dim is 'x'; it must be a number over 0"):
        meaning("Absolute", rotary_dim="x")


def test_only_an_architecture_with_such_a_default_rotates_parts(trial: None) -> None:
    for change in ({"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        with pytest.raises(CheckpointError, match=r"is 0\.5; this architecture rotates whole heads, so only 1 is supported"):
            meaning("Plain", **change)
    assert "fraction" not in meaning("Plain", partial_rotary_factor=1.0)["rope"]


NESTED: list[tuple[str, str, dict[str, Any]]] = [
    ("Gemma3", "Gemma3TextConfig", {}),
    ("Gemma3", "Gemma3TextConfig", {"rope_theta": 2e6, "rope_local_base_freq": 5e3}),
    ("Gemma3", "Gemma3TextConfig", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    (
        "Gemma3",
        "Gemma3TextConfig",
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 7e5,
                    "factor": 4.0,
                    "original_max_position_embeddings": 512,
                },
                "sliding_attention": {"rope_type": "linear", "rope_theta": 3e4, "factor": 2.0},
            }
        },
    ),
    ("Gemma3", "Gemma3TextConfig", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 3.0}}}),
    ("ModernBert", "ModernBertConfig", {}),
    ("ModernBert", "ModernBertConfig", {"global_rope_theta": 5e4, "local_rope_theta": 2e4}),
]


@pytest.mark.parametrize(("architecture", "config_class", "change"), NESTED, ids=range(len(NESTED)))
def test_layers_with_a_window_rotate_their_own_way(
    trial: None, architecture: str, config_class: str, change: dict[str, Any]
) -> None:
    ours, reference = meaning(architecture, **change), theirs(config_class, **change)
    same(ours["rope"], reference.rope_parameters["full_attention"])
    same(ours["local_rope"], reference.rope_parameters["sliding_attention"])
    assert ours["window_layers"] == [i for i, kind in enumerate(reference.layer_types) if kind == "sliding_attention"]


def test_two_rotations_that_are_one(trial: None) -> None:
    alike = {"rope_type": "default", "rope_theta": 5e3}
    assert "local_rope" not in meaning("Gemma3", rope_parameters={"full_attention": alike, "sliding_attention": dict(alike)})
    assert "local_rope" not in meaning("Gemma3", sliding_window=None)
    made = meaning("Plain", rope_parameters={"full_attention": alike, "sliding_attention": dict(alike)})
    assert made["rope"] == {"kind": "default", "theta": 5e3}
    with pytest.raises(
        CheckpointError, match="has full_attention and sliding_attention, but this architecture rotates all layers"
    ):
        meaning("Plain", rope_parameters={"full_attention": alike, "sliding_attention": alike | {"rope_theta": 1e4}})


def test_two_rotations_of_other_parts_of_a_head_are_refused(trial: None) -> None:
    halves = {
        "full_attention": {"rope_type": "default"},
        "sliding_attention": {"rope_type": "default", "partial_rotary_factor": 0.5},
    }
    with pytest.raises(CheckpointError, match="partial_rotary_factor differs between layers"):
        meaning("Gemma3", rope_parameters=halves)


def test_what_a_family_says_otherwise(trial: None) -> None:
    made = meaning("Said", part=16)
    assert made["rope"] == {"kind": "default", "theta": 500.0, "interleaved": True, "fraction": 0.25}
    assert meaning("Said", part=16, settings={"base": 9, "pairs": False})["rope"]["theta"] == 9.0
    with pytest.raises(CheckpointError, match=r"rope_parameters\.note is 1; only null is supported"):
        meaning("Said", part=16, rope_parameters={"rope_type": "default", "note": 1})
    with pytest.raises(CheckpointError, match="rope_parameters: other of kind default is not understood"):
        meaning("Said", part=16, rope_parameters={"rope_type": "default", "other": 1})


# The judge of tables: logits of one forward of transformers, on each side of the threshold.


def rows_for(folder: Path, ids: list[int], context: int = 0) -> tuple[Any, int]:
    """The model of a folder, and where the rotary table of a sequence of this length begins."""
    model = compose_model(adopt(folder)).model
    made = ropetables.tables(model.rope, model.max_positions, context)
    return model, next(table.first_row for table in made if table.length >= len(ids))


def logits(plain: families.Plain, ids: list[int], first_row: int) -> np.ndarray:
    """Logits of the plain graph, whose ``positions`` are rows of its tables."""
    feeds = {
        "token_ids": families.ort_value(np.array([ids], np.int64)),
        "positions": families.ort_value(np.arange(first_row, first_row + len(ids), dtype=np.int64)[None]),
    }
    return plain.session.run_with_ort_values(["logits"], plain.weights | feeds)[0].numpy()[0]


def compare(folder: Path, lengths: list[int], context: int = 0) -> set[int]:
    """The plain graph equals transformers for prompts of these lengths; gives the rows at which their tables begin."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    plain, seen = None, set()
    for length in lengths:
        ids = np.random.default_rng(length).integers(0, 256, length).tolist()
        model, first_row = rows_for(folder, ids, context)
        plain = plain or families.Plain(expand(model, "float32", context), Checkpoint.open(folder).tensors)
        with torch.no_grad():
            expected = reference(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        np.testing.assert_allclose(logits(plain, ids, first_row), expected, rtol=0, atol=1e-4)
        seen.add(first_row)
        if first_row:  # and the table matters
            assert np.abs(logits(plain, ids, 0) - expected).max() > 1e-2
    return seen


def phi3(folder: Path, fraction: float) -> Path:
    pairs = int(16 * fraction) // 2
    config = transformers.Phi3Config(
        vocab_size=262,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        pad_token_id=None,
        partial_rotary_factor=fraction,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [1.5 + i for i in range(pairs)],
        },
    )
    torch.manual_seed(3)
    model = transformers.Phi3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fraction", [1.0, 0.75])
def test_longrope_on_both_sides_of_the_threshold(tmp_path: Path, fraction: float) -> None:
    assert compare(phi3(tmp_path / "phi3", fraction), [15, 16, 17, 40, 64]) == {0, 16}


def test_longrope_in_a_short_context_has_the_short_factors_only(tmp_path: Path) -> None:
    assert compare(phi3(tmp_path / "phi3", 1.0), [9, 16], context=16) == {0}


def test_dynamic_at_each_of_its_lengths(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = families.make_checkpoint(tmp_path, "llama", max_position_embeddings=16, rope_parameters=rope)
    made = ropetables.tables(compose_model(adopt(folder)).model.rope, 64)
    assert len(made) > 4
    assert compare(folder, [7, 16, *(table.length for table in made[1:])]) == {table.first_row for table in made}


def test_yarn_and_its_numbers_through_a_whole_model(tmp_path: Path) -> None:
    for more in ({}, {"attention_factor": 0.8}, {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 4, "truncate": False}):
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32, **more}
        compare(families.make_checkpoint(tmp_path, "llama", rope_parameters=rope), [50])
