"""Score documents with a causal model: the total surprise, in nats, of their tokens.

Each document begins with the end-of-text token, which is read and not scored. A document longer than the context is cut
into windows that overlap, so that every scored token past the first window still sees `overlap` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.demo.tokenizer import CONTEXT, END_OF_TEXT_ID

OVERLAP = 512
IGNORED = -100


def windows(length: int, context: int, overlap: int) -> list[tuple[int, int, int]]:
    """(start, end, first position to score) of the windows over `length` inputs; each position is scored once."""
    spans = []
    scored = 0
    while scored < length:
        start = max(0, scored - overlap)
        end = min(start + context, length)
        spans.append((start, end, scored))
        scored = end
    return spans


@torch.inference_mode()
def total_nats(
    logits_of: Callable[[Tensor], Tensor],
    documents: Sequence[Sequence[int]],
    *,
    context: int = CONTEXT,
    overlap: int = OVERLAP,
    batch: int = 4,
    device: str = "cpu",
) -> float:
    """Summed negative log-likelihood of all tokens of all documents.

    `logits_of` maps ids [B, T] to logits [B, T, V].
    """
    rows = []
    for document in documents:
        ids = [END_OF_TEXT_ID, *document]
        for start, end, first in windows(len(document), context, overlap):
            rows.append((ids[start:end], [IGNORED] * (first - start) + ids[first + 1 : end + 1]))
    rows.sort(key=lambda row: len(row[0]))
    total = 0.0
    for i in range(0, len(rows), batch):
        chosen = rows[i : i + batch]
        width = max(len(row[0]) for row in chosen)
        inputs = torch.tensor([ids + [END_OF_TEXT_ID] * (width - len(ids)) for ids, _ in chosen], device=device)
        targets = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in chosen], device=device)
        logits = logits_of(inputs).float().flatten(0, 1)
        total += F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
    return total
