"""Tiny random checkpoints of every architecture, made by transformers from configs that stand here, one file a kind.

A case is a transformers model type and what its config says. Every parameter is random, norm weights and biases too: a graph that
forgets one of them must not pass. The judge is transformers itself, through ``zoo add``: tests/end_to_end/test_zoo.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

BEGIN, END = 256, 257


@dataclass(frozen=True)
class Case:
    """One tiny model.

    kind      transformers' model_type
    config    keys of its config, beside a vocabulary of 262 and no padding token
    repack    changes the folder that transformers wrote into the form of an architecture that it does not have
    past      token count of a prompt that goes past the case's threshold (window, rotary scaling)
    attention which of transformers' attentions is the reference
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    repack: Callable[[Path], None] | None = None
    past: int = 40
    auto: str = "AutoModelForCausalLM"
    attention: str = "eager"


def random_model(case: Case, seed: int = 0) -> transformers.PreTrainedModel:
    """A float32 model with every parameter random."""
    settings = {"vocab_size": 262, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": None} | case.config
    config = transformers.AutoConfig.for_model(case.kind, **settings)
    model = getattr(transformers, case.auto).from_config(config, attn_implementation=case.attention)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias") or name.endswith("sinks"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1 or "norm" in name.rpartition(".")[0].rpartition(".")[2]:  # a norm's weight
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.2 / math.sqrt(min(parameter.shape[-2:]))))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def make_folder(folder: Path, case: Case, seed: int = 0) -> Path:
    """The case's checkpoint as transformers saves it, then repacked."""
    model = random_model(case, seed)
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    if case.repack:
        case.repack(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None takes one away."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data.pop(key, None)
        if value is not None:
            data[key] = value
    path.write_text(json.dumps(data))


def all_cases() -> dict[str, Case]:
    """Every case by name: the family's name, a dash, what is particular."""
    from zoo_cases import classic, llama_like, moe, parallel, scaled

    cases: dict[str, Case] = {}
    for module in (llama_like, scaled, parallel, classic, moe):
        assert not set(cases) & set(module.CASES)
        cases |= module.CASES
    return cases


def about(folder: Path, record_property: Callable[[str, Any], None]) -> None:
    """Enter a folder's architecture into the test report, from which docs/models.md is made."""
    record_property("architecture", json.loads((folder / "config.json").read_text())["architectures"][0])
