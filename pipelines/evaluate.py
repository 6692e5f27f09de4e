"""Perplexity of an engine on a text, through the engine itself: ``python -m pipelines.evaluate FILE [OVERRIDES]``.

    python -m pipelines.evaluate held_out.py models=zoo-demo quant=none
    python -m pipelines.evaluate held_out.py models=zoo-demo quant=fp8
    python -m pipelines.evaluate held_out.py --engine REF [REGISTRY]

Builds (or finds) the CPU engine of the overrides with logits for every row; or takes an engine that is stored, for a GPU too, if
it gives that many rows (limits.max_rows). The text is cut into windows of the engine's context; each window is computed in chunks
of ``TOKENS`` and each token but a window's first is predicted. Prints JSON.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

from zoo import LLM
from zoo.artifacts.registry import Registry, default_root
from zoo.errors import ZooError
from zoo.runtime.abi import Batch, Session

TOKENS = 256


def window_nats(session: Session, tokens: list[int]) -> float:
    """Sum of -log p of every token after the first, in nats, computed as one sequence in chunks."""
    size = session.limits.block_size
    table = np.arange(1, -(-len(tokens) // size) + 1, dtype=np.int32)[None]
    total = 0.0
    for start in range(0, len(tokens) - 1, TOKENS):
        ids = np.array(tokens[start : start + TOKENS], np.int32)
        stop = start + len(ids)
        rows = np.arange(len(ids), dtype=np.int32)
        starts, lengths = np.array([0, len(ids)], np.int32), np.array([stop], np.int32)
        batch = Batch(ids, rows + np.int32(start), starts, lengths, {"full": table[:, : -(-stop // size)]}, rows)
        logits = session.step(batch).logits
        assert logits is not None
        targets = np.array(tokens[start + 1 : stop + 1])
        scores = logits[: len(targets)].astype(np.float64)
        top = scores.max(-1)
        total += float((np.log(np.exp(scores - top[:, None]).sum(-1)) + top - scores[np.arange(len(targets)), targets]).sum())
    return total


def evaluate(text: str, overrides: list[str]) -> dict[str, float | str | int]:
    """Perplexity per token and bits per byte of ``text`` under the CPU engine of some overrides."""
    from zoo.build import build
    from zoo.config import compose

    limits = [f"limits.max_tokens={TOKENS}", f"limits.max_rows={TOKENS}", "limits.max_sequences=1"]
    registry = Registry(default_root())
    entry = build(compose(["hardware=cpu", *overrides, *limits]), registry).entry
    return evaluate_engine(text, entry.ref, registry.root)


def evaluate_engine(text: str, ref: str, root: Path) -> dict[str, float | str | int]:
    """The same under an engine that is stored."""
    with LLM(ref, registry=root) as llm:
        tokens = llm.encode(text, add_special_tokens=False)
        window = llm.limits.max_context
        nats, predicted = 0.0, 0
        for start in range(0, len(tokens) - 1, window - 1):
            part = tokens[start : start + window]
            if len(part) > 1:
                nats += window_nats(llm.engine.session, part)
                predicted += len(part) - 1
        ref = llm.ref
    return {
        "ref": ref,
        "tokens": predicted,
        "perplexity": round(math.exp(nats / predicted), 4),
        "bits_per_byte": round(nats / math.log(2) / len(text.encode()), 4),
    }


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python -m pipelines.evaluate FILE [OVERRIDES | --engine REF [REGISTRY]]")
    given, options = Path(sys.argv[1]).read_text(), sys.argv[2:]
    try:
        if options[:1] == ["--engine"] and len(options) in (2, 3):
            found = evaluate_engine(given, options[1], Path(options[2]) if len(options) == 3 else default_root())
        else:
            found = evaluate(given, options)
        print(json.dumps(found, indent=2))
    except ZooError as error:
        sys.exit(f"evaluate: {error}")
