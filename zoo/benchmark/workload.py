"""What is asked of an engine: how many requests of which lengths, and when they come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.errors import RequestError

Floats = npt.NDArray[np.float64]
SIZES = ("input_tokens", "output_tokens", "requests")


@dataclass(frozen=True)
class Case:
    """``requests`` prompts of ``input_tokens`` random tokens, each continued by exactly ``output_tokens``, greedily.

    rate   requests a second, arriving as a Poisson process; 0: all of them are queued at once
    seed   of prompts and arrivals
    """

    input_tokens: int
    output_tokens: int
    requests: int
    rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise RequestError(f"case {self}: {name} is {getattr(self, name)}; give at least 1")
        if not 0 <= self.rate < float("inf"):
            raise RequestError(f"case {self}: rate is {self.rate}; give requests a second, or 0 for all at once")
        if self.seed < 0:
            raise RequestError(f"case {self}: seed is {self.seed}; give a whole number from 0 on")

    def __str__(self) -> str:
        return f"{self.input_tokens}/{self.output_tokens}/{self.requests}"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids [requests, input_tokens]."""
        rng = np.random.default_rng(self.seed)
        prompts: list[list[int]] = rng.integers(0, vocab_size, (self.requests, self.input_tokens)).tolist()
        return prompts

    def arrivals(self) -> Floats:
        """When each request comes, in seconds from the first, which comes at 0. [requests], rising."""
        if not self.rate:
            return np.zeros(self.requests)
        gaps = np.random.default_rng([self.seed, 1]).exponential(1 / self.rate, self.requests)
        gaps[0] = 0
        return np.cumsum(gaps)

    def with_load(self, rate: float, seed: int) -> Case:
        """The same lengths under another load."""
        return replace(self, rate=rate, seed=seed)


def parse_cases(text: str) -> list[Case]:
    """``128/128/64,1000/1000/32`` (input/output/requests). RequestError that quotes the part it does not understand."""
    cases = []
    for part in text.split(","):
        numbers: list[Any] = part.strip().split("/")
        if len(numbers) != 3 or not all(number.isdecimal() and number.isascii() for number in numbers):
            raise RequestError(f"case {part.strip()!r}: give input tokens/output tokens/requests, such as 128/128/64")
        cases.append(Case(*map(int, numbers)))
    return cases
