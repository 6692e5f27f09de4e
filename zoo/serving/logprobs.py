"""Log-probabilities in the two shapes that OpenAI's API has for them.

A token's text is what the tokenizer writes for it alone; bytes are of that text, and null where the token is only a part of a
character.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Decode = Callable[[list[int]], str]
PART = "\N{REPLACEMENT CHARACTER}"
Scores = Mapping[int, float] | None  # token id -> log-probability; None for a prompt's first token


def completion_logprobs(
    tokens: Sequence[int], scores: Sequence[Scores], most: int, decode: Decode, offset: int = 0
) -> dict[str, Any]:
    """The lists of /v1/completions. ``offset`` is where the first token's text begins in the choice's text."""
    texts, values, tops, offsets = [], [], [], []
    for token, of in zip(tokens, scores, strict=True):
        text = decode([token])
        texts.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if of is None else _finite(of[token]))
        tops.append(None if of is None else {decode([one]): _finite(value) for one, value in _best(of, most)})
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(tokens: Sequence[int], scores: Sequence[Mapping[int, float]], most: int, decode: Decode) -> dict[str, Any]:
    """The content of /v1/chat/completions."""
    content = []
    for token, of in zip(tokens, scores, strict=True):
        tops = [_entry(one, value, decode) for one, value in _best(of, most)]
        content.append({**_entry(token, of[token], decode), "top_logprobs": tops})
    return {"content": content, "refusal": None}


def _entry(token: int, value: float, decode: Decode) -> dict[str, Any]:
    text = decode([token])
    return {"token": text, "logprob": _finite(value), "bytes": None if PART in text else list(text.encode())}


def _best(of: Mapping[int, float], most: int) -> list[tuple[int, float]]:
    return sorted(of.items(), key=lambda item: (-item[1], item[0]))[:most]


def _finite(value: float) -> float:
    """JSON has no infinity; OpenAI uses -9999.0 for what cannot be."""
    return max(value, -9999.0)
