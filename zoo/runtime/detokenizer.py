"""Token ids to text, one token at a time, without ever giving half a character.

The texts of a stream joined are ``tokenizer.decode`` of all its tokens. What a token adds depends on the tokenizer's decoder:

    ByteLevel (GPT-2, Llama 3, Qwen)     a token is some bytes; an incremental UTF-8 decoder holds an incomplete character back
    ByteFallback (SentencePiece: Llama 2, Mistral, Gemma)
                                         a token is text, or one byte <0xF0>. tokenizers decodes a run of byte tokens as a whole,
                                         every byte to U+FFFD if the run is not UTF-8, so the run is held back until it ends or
                                         has failed. Complete characters of a run of RUN_LIMIT bytes are given at once: there,
                                         should the run fail later, they stay instead of turning into U+FFFD
    anything else                        the tokens since the last text are decoded together with those before it; what that
                                         adds is given unless it ends in U+FFFD. Decoders that rewrite earlier text (WordPiece
                                         clean-up) cannot be streamed exactly

Bytes that cannot become a character are U+FFFD. Work per token does not grow with the stream, and the first two, which
nearly every model has, look a token up in a table instead of decoding it.
"""

from __future__ import annotations

import codecs
import json
from typing import Any, Protocol

import tokenizers

RUN_LIMIT = 48  # bytes: 12 emoji
WINDOW_LIMIT = 32  # tokens
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
NOTHING = -1  # the piece of an id that is no token: it does not even end a run of bytes


class TextStream(Protocol):
    """The text of one continuation."""

    def push(self, token: int) -> str:
        """The text that has become complete with this token; often empty in the middle of a character."""
        ...

    def finish(self) -> str:
        """What was held back. The stream takes no more tokens."""
        ...


class Detokenizer:
    """Makes text streams for one tokenizer; they share its table of pieces."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | int] = {}
        decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
        self._byte_level = decoder.get("type") == "ByteLevel"
        self._fallback = _fallback_rules(decoder)

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A new stream."""
        skipped = self._special if skip_special_tokens else frozenset()
        if self._byte_level:
            return ByteStream(self._tokenizer, self._bytes, skipped)
        if self._fallback:
            return FallbackStream(self._tokenizer, self._pieces, skipped, *self._fallback)
        return WindowStream(self._tokenizer, skip_special_tokens)


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (Radford et al. 2019): printable ones for themselves,
    the others, in order, from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


class ByteStream:
    """Tokens that are bytes written in the byte-level alphabet; a token outside it (an added one) is its own UTF-8."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, pieces: dict[int, bytes], skipped: frozenset[int]) -> None:
        self._tokenizer, self._pieces, self._skipped = tokenizer, pieces, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        piece = self._pieces.get(token)
        if piece is None:
            text = self._tokenizer.id_to_token(token) or ""
            known = all(character in ALPHABET for character in text)
            piece = bytes(ALPHABET[character] for character in text) if known else text.encode()
            self._pieces[token] = piece
        return self._decoder.decode(piece)

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


def _fallback_rules(decoder: dict[str, Any]) -> tuple[list[tuple[str, str]], str, int] | None:
    """(replacements, character, count): for ``Replace* ByteFallback Fuse [Strip at the start]``; None for another decoder."""
    steps = list(decoder.get("decoders", ()))
    replaced = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replaced.append((step["pattern"]["String"], step["content"]))
    if [step["type"] for step in steps[:2]] != ["ByteFallback", "Fuse"]:
        return None
    match steps[2:]:
        case []:
            return replaced, "", 0
        case [{"type": "Strip", "content": content, "start": start, "stop": 0}]:
            return replaced, content, start
    return None


class FallbackStream:
    """Tokens that are text or single bytes; at most ``strip`` characters ``lead`` are dropped from the start of the text."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        pieces: dict[int, str | int],
        skipped: frozenset[int],
        replaced: list[tuple[str, str]],
        lead: str,
        strip: int,
    ) -> None:
        self._tokenizer, self._pieces, self._skipped = tokenizer, pieces, skipped
        self._replaced, self._lead, self._strip = replaced, lead, strip
        self._run = bytearray()
        self._broken = False  # the run has failed, and so will each of its further bytes

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(token)
        if piece == NOTHING:
            return ""
        return self._stripped(self._byte(piece) if isinstance(piece, int) else self._end_run() + piece)

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _piece(self, token: int) -> str | int:
        text: str | None = self._tokenizer.id_to_token(token)
        if text is None:
            return NOTHING
        for old, new in self._replaced:
            text = text.replace(old, new)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return int(text[3:5], 16)
            except ValueError:
                pass
        return text

    def _byte(self, byte: int) -> str:
        if self._broken:
            return UNKNOWN
        self._run.append(byte)
        try:
            text, used = codecs.utf_8_decode(self._run, "strict", False)
        except UnicodeDecodeError:
            lost, self._broken = len(self._run), True
            self._run.clear()
            return UNKNOWN * lost
        if len(self._run) < RUN_LIMIT:
            return ""
        del self._run[:used]
        return text

    def _end_run(self) -> str:
        self._broken = False
        if not self._run:
            return ""
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = UNKNOWN * len(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(self._lead):
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class WindowStream:
    """Any decoder: the tokens that gave the last text, and those since then, are decoded again with each new one."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._before: list[int] = []
        self._since: list[int] = []

    def push(self, token: int) -> str:
        self._since.append(token)
        return self._take(wait=len(self._since) < WINDOW_LIMIT)

    def finish(self) -> str:
        return self._take(wait=False)

    def _take(self, wait: bool) -> str:
        old = self._decode(self._before)
        new = self._decode(self._before + self._since)
        if wait and (len(new) <= len(old) or new.endswith(UNKNOWN)):
            return ""
        self._before, self._since = self._since, []
        return new[len(old) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
        return text
