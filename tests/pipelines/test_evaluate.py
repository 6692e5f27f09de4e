"""Perplexity through an engine, in windows and chunks, against transformers' own loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pipelines.evaluate import evaluate  # noqa: E402

FOLDER = ROOT / "checkpoints" / "zoo-demo"
CONTEXT = 300


def test_perplexity_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    text = Path(__file__).read_text() * 2
    found = evaluate(text, ["models=zoo-demo", f"limits.max_context={CONTEXT}", "threads=1"])
    ids = transformers.AutoTokenizer.from_pretrained(FOLDER)(text, add_special_tokens=False)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    nats, count = 0.0, 0
    for start in range(0, len(ids) - 1, CONTEXT - 1):
        part = torch.tensor([ids[start : start + CONTEXT]])
        with torch.no_grad():
            nats += float(model(part, labels=part).loss) * (part.shape[1] - 1)
        count += part.shape[1] - 1
    assert found["tokens"] == count and count > CONTEXT
    assert found["perplexity"] == pytest.approx(float(torch.tensor(nats / count).exp()), rel=1e-4)
