"""Measure the demo checkpoint on held-out files, beside xz and a byte 5-gram model; prints a table.

    python -m pipelines.demo.evaluate                      # some minutes on two CPU cores
    python -m pipelines.demo.evaluate --full --json FILE   # also xz primed and validation; and write the numbers

Bits per byte: all bits needed for the held-out texts over their UTF-8 bytes. The model and the 5-gram score each file
alone. `xz -9e` packs all held-out files as one stream; primed, it packs the training files before them, and the size of
the packed training files is taken off. Perplexities are by token. Weights are the stored bf16 ones, run in float32.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.demo import corpus
from pipelines.demo.ngram import ByteNgram
from pipelines.demo.scoring import total_nats
from pipelines.demo.tokenizer import CHECKPOINT

NGRAM_ORDER = 5
TRAIN_SAMPLE = 60  # every sixtieth training file
TEST_SUITES = ("test/", "/test/", "/tests/", "/idle_test/")


def texts_of(documents: Sequence[corpus.Document]) -> list[bytes]:
    """UTF-8 bytes of each document."""
    return [document.text.encode() for document in documents]


def packed_size(texts: Sequence[bytes]) -> int:
    """Bytes of the joined texts as `xz -9e` packs them."""
    return len(lzma.compress(b"".join(texts), preset=9 | lzma.PRESET_EXTREME))


def is_test(document: corpus.Document) -> bool:
    """Whether a file belongs to a test suite."""
    return document.path.startswith(TEST_SUITES[0]) or any(part in document.path for part in TEST_SUITES[1:])


class Scorer:
    """The checkpoint as transformers loads it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def score(self, documents: Sequence[corpus.Document]) -> dict[str, float]:
        """Bits per byte and token perplexity of some files."""
        encoded = self.tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)
        ids = encoded["input_ids"]
        nats = total_nats(lambda batch: self.model(batch).logits, ids, batch=2)
        size, tokens = sum(map(len, texts_of(documents))), sum(map(len, ids))
        return {
            "files": len(documents),
            "bytes": size,
            "tokens": tokens,
            "bits_per_byte": nats / math.log(2) / size,
            "perplexity": math.exp(nats / tokens),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; exit with 1 when the model does not beat the others on held-out files."""
    parser = argparse.ArgumentParser(description="Bits per byte of the demo checkpoint, xz and a byte 5-gram model.")
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--full", action="store_true", help="also measure xz primed, and the validation files")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    splits = corpus.load()
    heldout, train = texts_of(splits["heldout"]), texts_of(splits["train"])
    size = sum(map(len, heldout))

    others = {
        "xz -9e": 8 * packed_size(heldout) / size,
        f"byte {NGRAM_ORDER}-gram": ByteNgram(train, NGRAM_ORDER).bits(heldout) / size,
    }
    if options.full:
        others["xz -9e, primed"] = 8 * (packed_size(train + heldout) - packed_size(train)) / size
    for name, bits in others.items():
        print(f"{name:24} {bits:.3f} bits per byte", flush=True)

    scorer = Scorer(options.model)
    parts = {
        "held-out library": [document for document in splits["heldout"] if not is_test(document)],
        "held-out tests": [document for document in splits["heldout"] if is_test(document)],
        "train (sample)": splits["train"][::TRAIN_SAMPLE],
    }
    if options.full:
        parts["validation"] = splits["validation"]
    scores = {}
    for name, documents in parts.items():
        scores[name] = scorer.score(documents)
        if name == "held-out tests":
            scores["held-out"] = join(scores["held-out library"], scores["held-out tests"])
    for name, score in scores.items():
        print(f"{name:24} {score['bits_per_byte']:.3f} bits per byte, perplexity {score['perplexity']:.3f}", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"others_bits_per_byte": others, "model": scores}, indent=1) + "\n")
    return 0 if scores["held-out"]["bits_per_byte"] < min(others.values()) else 1


def join(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Score of two sets of files together."""
    sums = {key: first[key] + second[key] for key in ("files", "bytes", "tokens")}
    bits = sum(part["bits_per_byte"] * part["bytes"] for part in (first, second))
    return {
        **sums,
        "bits_per_byte": bits / sums["bytes"],
        "perplexity": math.exp(bits * math.log(2) / sums["tokens"]),
    }


if __name__ == "__main__":
    sys.exit(main())
