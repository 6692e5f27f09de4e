"""What a session needs to know of a request whose logits it adjusts before a token is chosen: penalties, logit_bias, min_tokens.

The meaning is ``zoo.runtime.sampler.Chooser``'s, number for number. A slot of the session holds, in words of 32 bits,

    [ header 0 .. HEADER | entries, two words each, at most LISTED of them | counts, one for each of the V tokens ]

    header   repetition, presence and frequency penalty as float32; the prompt's length; min_tokens; how many entries there are
    entry    a token id, whose sign bit is set if the token is banned until min_tokens; the bias added to its logit, as float32
    count    IN_PROMPT, if the prompt has the token, plus how often the continuation has it

Header and entries are a request's ``words``; counts are the session's own. Kernels are compiled with this layout
(``zoo.plugins.adjusting.cuda``): whoever changes it lets engines be rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from zoo.runtime.abi import Int32
from zoo.runtime.request import SamplingParams

HEADER = 8
LISTED = 512  # a request with more biases and end tokens is the host's
IN_PROMPT = 1 << 30
BANNED = 1 << 31
MOST = (1 << 31) - 1


@dataclass(frozen=True)
class Adjustment:
    """How a request's logits are adjusted.

    words         header and entries
    listed_until  while the request knows fewer tokens than this, its entries matter; 0: they never do
    counts        it has penalties, so its tokens are to be counted
    """

    words: Int32
    listed_until: int
    counts: bool


def penalizes(params: SamplingParams) -> bool:
    """Whether logits depend on the tokens that a sequence has already."""
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


def adjustment_of(
    params: SamplingParams, prompt_length: int, limit: int, end_tokens: Iterable[int], vocab_size: int
) -> Adjustment | None:
    """The adjustment that parameters ask for; None if a slot does not hold it. ``limit``: known tokens never exceed it."""
    bias = dict(params.logit_bias or {})
    banned = {token for token in end_tokens if token < vocab_size} if params.min_tokens else set()
    tokens = sorted(bias.keys() | banned)
    if len(tokens) > LISTED:
        return None
    words = np.zeros(HEADER + 2 * len(tokens), np.int32)
    floats, ids = words.view(np.float32), words[HEADER::2].view(np.uint32)
    floats[:3] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    words[3:6] = prompt_length, min(params.min_tokens, MOST), len(tokens)
    ids[:] = [token | (BANNED if token in banned else 0) for token in tokens]
    floats[HEADER + 1 :: 2] = [bias.get(token, 0.0) for token in tokens]
    until = limit if bias else min(limit, prompt_length + params.min_tokens) if banned else 0
    return Adjustment(words, until, penalizes(params))


def slot_words(vocab_size: int) -> int:
    """Words of a slot, so many that every slot begins at a multiple of 256 bytes."""
    return -(-(counts_at() + vocab_size) // 64) * 64


def counts_at() -> int:
    """Which word of a slot is the count of token 0."""
    return HEADER + 2 * LISTED
