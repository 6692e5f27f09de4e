"""Answers that follow a grammar: JSON, a JSON schema, a regular expression, through llguidance.

Chosen over xgrammar because that one needs torch and transformers to serve; docs/serving.md has both side by side. A grammar is
compiled once and kept; each request walks a copy of it. Before a token is chosen its row of logits is masked; where the answer
is complete the mask leaves the model's end tokens alone. Grammars come from clients: their size and what one step may cost are
limited here, and the time of compiling by whoever compiles (``zoo.serving.templates``).

V vocabulary of the model's logits.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.errors import RequestError, UnavailableError

KINDS = ("json", "json_schema", "regex")
MAX_SOURCE = 64 << 10  # characters of a schema or an expression
KEPT = 64  # compiled grammars
# What a grammar may cost: states of its lexer, items of one parser row, fuel of building the lexer and of one step.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": True,
    "verbose_errors": False,
}
JSON: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,16}"}  # room for indentation, none for blanks without end


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: ``json`` any JSON object, ``json_schema`` what the schema allows, ``regex`` a match as a whole."""

    kind: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"grammar is of kind {self.kind!r}; pick one of {', '.join(KINDS)}")
        if len(self.source) > MAX_SOURCE:
            raise RequestError(f"the grammar has {len(self.source)} characters; at most {MAX_SOURCE} are taken")


class Walk:
    """One request's way through its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab = matcher, vocab_size
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)

    def mask(self, scores: npt.NDArray[np.float32]) -> None:
        """Set what the grammar does not allow next to minus infinity, in place. scores: [V]."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab, bitorder="little")
        scores[allowed == 0] = -np.inf

    def take(self, token: int) -> str:
        """Go on by a token; "" or what is wrong."""
        if self._matcher.consume_token(token):
            return ""
        return f"the grammar stopped the answer: {self._matcher.get_error() or 'a token that it does not allow'}"


class Grammars:
    """Compiles grammars for one tokenizer. Slow to make (it builds a trie of all tokens), so made when first needed."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, end_tokens: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise UnavailableError(
                "grammars need llguidance; install it with `pip install 'engine-zoo[grammar]'`, or leave response_format out"
            ) from None
        self._library, self._vocab = llguidance, vocab_size
        ends = list(end_tokens) or None
        self._tokenizer = llguidance.LLTokenizer(str(tokenizer_file), n_vocab=vocab_size, eos_token=ends)
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()

    def compile(self, grammar: Grammar) -> Walk:
        """The beginning of a grammar. Raises RequestError for one that is wrong or too large."""
        if grammar not in self._kept:
            self._kept[grammar] = self._compiled(grammar)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return Walk(self._kept[grammar].deep_copy(), self._vocab)

    def _compiled(self, grammar: Grammar) -> Any:
        make = self._library.LLMatcher
        try:
            if grammar.kind == "regex":
                text = make.grammar_from_regex(grammar.source)
            else:
                schema = {"type": "object"} if grammar.kind == "json" else json.loads(grammar.source)
                text = make.grammar_from_json_schema(schema, overrides=JSON)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the {grammar.kind} of response_format is wrong: {str(error)[:300]}") from None
        matcher = make(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise RequestError(f"the {grammar.kind} of response_format cannot be followed: {matcher.get_error()[:300]}")
        return matcher
