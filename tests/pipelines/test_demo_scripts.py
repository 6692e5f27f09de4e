"""The scripts that judge the demo model: what counts as parsing, what is scored, and that the n-gram is a distribution."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pipelines.demo import ngram, parse_rate, scoring  # noqa: E402
from pipelines.demo.prompts import PROMPTS  # noqa: E402


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("    return 1\n", "parses"),
        ("    return 1\n    if x:\n", "parses"),  # the block without a body is dropped
        ("    return (1,\n", "nothing complete"),
        ("    return 1", "nothing complete"),  # its line never ends
        ("    return 1\n)\n    pass\n", "wrong syntax"),
        ("    return 1\nx = = 2\n", "wrong syntax"),  # an earlier cut would parse, and does not count
        ("\n\n", "nothing complete"),
    ],
)
def test_what_counts_as_parsing(completion: str, verdict: str) -> None:
    assert parse_rate.judge("def f(x):\n", completion) == verdict


def test_a_hundred_prompts_are_fixed() -> None:
    prompts = json.loads(PROMPTS.read_text())
    assert len(prompts) == 100 and len({prompt["prompt"] for prompt in prompts}) == 100
    splits = json.loads((ROOT / "pipelines" / "demo" / "splits.json").read_text())
    held_out = json.dumps(splits)
    assert all(prompt["file"] in held_out for prompt in prompts)


@pytest.mark.parametrize(("length", "context", "overlap"), [(10, 4, 2), (1, 8, 2), (8, 8, 4), (9, 8, 4), (100, 16, 5)])
def test_every_position_is_scored_once(length: int, context: int, overlap: int) -> None:
    scored = []
    for start, end, first in scoring.windows(length, context, overlap):
        assert start <= first < end <= start + context
        scored += range(first, end)
    assert scored == list(range(length))


def test_the_5_gram_gives_every_context_a_distribution() -> None:
    rng = random.Random(0)
    model = ngram.ByteNgram([bytes(rng.choices(b"abcd \n", k=400)) for _ in range(5)], order=5)
    for context in (b"", b"a", b"abca", b"zzzz", b"d \na"):
        total = sum(2.0 ** -(model.bits([context + bytes([byte])]) - model.bits([context])) for byte in range(256))
        assert math.isclose(total, 1.0, rel_tol=1e-9), context
