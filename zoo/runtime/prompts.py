"""What a caller may give as prompts and parameters, turned into token ids and one ``SamplingParams`` each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from zoo.errors import RequestError
from zoo.runtime.request import SamplingParams

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]


def read_params(given: Any, count: int, default: Callable[[], SamplingParams]) -> list[SamplingParams]:
    """``count`` parameters from one for all, a list with one each, or None. RequestError for anything else."""
    if given is None or isinstance(given, SamplingParams):
        return [given or default()] * count
    if not isinstance(given, list | tuple):
        raise RequestError(f"sampling_params are {given!r}; give a SamplingParams, a list with one for each prompt, or None")
    if len(given) != count:
        raise RequestError(f"{count} prompts, but {len(given)} sampling_params; give one for all or one each")
    for index, one in enumerate(given):
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params[{index}] is {one!r}; it must be a SamplingParams")
    return list(given)


def read_prompts(prompts: Any, encode: Callable[[str], list[int]]) -> tuple[list[str | None], list[list[int]]]:
    """Texts (None where token ids were given) and token ids of one prompt or a list of them.

    Raises RequestError for what is no prompt and for empty ones.
    """
    if not isinstance(prompts, str | Mapping | Sequence | np.ndarray):
        raise RequestError(f"prompts are {prompts!r}; give a text, token ids, or a list of them")
    if isinstance(prompts, str | Mapping) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        prompts = [prompts]
    if not len(prompts):
        raise RequestError("there is no prompt: give a text, token ids, or a list of them")
    pairs = [_prompt(index, prompt, encode) for index, prompt in enumerate(prompts)]
    return [text for text, _ in pairs], [ids for _, ids in pairs]


def _prompt(index: int, prompt: Any, encode: Callable[[str], list[int]]) -> tuple[str | None, list[int]]:
    if isinstance(prompt, Mapping):
        given = prompt.get("prompt_token_ids")
        prompt = prompt.get("prompt") if given is None else given
    if isinstance(prompt, str):
        ids = encode(prompt) if prompt else []
        if not ids:
            raise RequestError(f"prompt {index} is empty: give some text, or token ids")
        return prompt, ids
    if not isinstance(prompt, Iterable):
        raise RequestError(f"prompt {index} is {prompt!r}; it must be a text or a list of token ids")
    tokens = list(prompt)
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise RequestError(f"prompt {index} has {token!r}; token ids are whole numbers")
    if not tokens:
        raise RequestError(f"prompt {index} is empty: give at least one token id")
    return None, [int(token) for token in tokens]
