"""Whether an engine can serve a request, from numbers that never change: a server checks before it asks the engine."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.errors import RequestError
from zoo.runtime.request import SamplingParams


def check_request(
    prompt_token_ids: Sequence[int], params: SamplingParams, max_length: int, vocab_size: int, has_tokenizer: bool
) -> None:
    """Raise RequestError if not.

    max_length   tokens of one sequence that the engine holds, prompt and continuation together
    """
    params.check()
    length = len(prompt_token_ids)
    if not length:
        raise RequestError("the prompt is empty: give at least one token")
    if length >= max_length:
        raise RequestError(
            f"the prompt has {length} tokens, but this engine holds {max_length} tokens of one sequence, prompt and "
            f"continuation together; give at most {max_length - 1}, or build the engine with a larger limits.max_context"
        )
    named = [
        ("prompt", prompt_token_ids),
        ("logit_bias", params.logit_bias or ()),
        ("stop_token_ids", params.stop_token_ids or ()),
    ]
    for what, tokens in named:
        if min(tokens, default=0) < 0 or max(tokens, default=0) >= vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < vocab_size)
            raise RequestError(f"{what} has token id {wrong}; the model's ids are 0 to {vocab_size - 1}")
    if params.stop_strings and not has_tokenizer:
        raise RequestError("stop needs a tokenizer, and this engine has none; use stop_token_ids")
    if params.grammar is not None and not has_tokenizer:
        raise RequestError("a grammar needs a tokenizer, and this engine has none; leave it out")
    if params.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is not supported yet; leave it out")
