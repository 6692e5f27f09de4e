"""docs/adding-a-model.md, followed literally: its YAML is taken from the page, and judged by transformers."""

from __future__ import annotations

import re
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import transformers

from zoo.checkpoints import Checkpoint
from zoo.checkpoints.adopt import add_model
from zoo.config import compose
from zoo.errors import CheckpointError
from zoo.graph_templates import expand

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
YAMLS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)


def jais2(folder: Path, **changes: object) -> Path:
    settings = {
        "vocab_size": 262,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
    }
    torch.manual_seed(0)
    config = transformers.Jais2Config(**(settings | changes))
    model = transformers.Jais2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    conf = tmp_path / "conf"
    (conf / "models" / "families").mkdir(parents=True)
    monkeypatch.setenv("ZOO_CONF", str(conf))
    return conf


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": False, "mlp_bias": False, "head_dim": 20, "tie_word_embeddings": True}]
)
def test_the_family_of_the_page_equals_transformers(conf: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    folder = jais2(tmp_path / "arabic", **changes)
    with pytest.raises(CheckpointError, match="architecture Jais2ForCausalLM is not supported"):
        add_model(folder, "my-jais")
    (conf / "models" / "families" / "jais2.yaml").write_text(next(text for text in YAMLS if "family: jais2" in text))
    add_model(folder, "my-jais")
    model = compose(["models=my-jais"]).model
    assert (model.family, model.norm, model.mlp, model.activation) == ("jais2", "layer", "plain", "relu2")
    plain = families.Plain(expand(model, "float32"), Checkpoint.open(folder).tensors)
    ids = np.random.default_rng(1).integers(0, 262, 20).tolist()
    reference = families.reference_logits(folder, ids)
    assert np.abs(reference).max() > 1
    np.testing.assert_allclose(plain.logits([ids])[0], reference, rtol=0, atol=1e-4)


def test_the_model_of_the_page_composes(conf: Path) -> None:
    text = next(text for text in YAMLS if "name: my-llama" in text)
    (conf / "models" / "my-llama.yaml").write_text(text)
    model = compose(["models=my-llama", "model.hidden_size=1024"]).model
    assert (model.name, model.hidden_size, model.num_layers, model.checkpoint) == ("my-llama", 1024, 22, "")
    (conf / "models" / "wider.yaml").write_text(
        "# @package model\ndefaults: [llama-3.1-8b@_here_, _self_]\nname: wider\nhidden_size: 5120\n"
    )
    wider = compose(["models=wider"]).model
    assert (wider.hidden_size, wider.num_layers, wider.rope.kind) == (5120, 32, "llama3")


def test_the_page_names_every_role() -> None:
    from zoo.checkpoints.roles import roles, split_role
    from zoo.config import list_models

    page = PAGE.read_text()
    used = {split_role(role)[0] for name in list_models() for role, _ in roles(compose([f"models={name}"]).model)}
    assert all(f"`{role}`" in page for role in used), sorted(role for role in used if f"`{role}`" not in page)
