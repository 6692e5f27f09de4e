"""The language in which a family says where its numbers come from: expressions over the keys of a config.json.

    sum      = product (("+" | "-") product)*
    product  = signed (("*" | "/") signed)*
    signed   = ("-" | "not") signed | power
    power    = atom ("**" signed)?
    atom     = number | "true" | "false" | key | "(" sum ")"
    key      = word ("." word)*

Nothing is evaluated but this. A key that is not there (``ABSENT``) makes the whole expression absent. Where a whole number is
wanted, ``/`` must come out whole; elsewhere it is true division.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from zoo.errors import ConfigError

ABSENT: Any = object()
MOST = 1 << 60  # of any number in an expression
DEEPEST = 32  # parentheses and signs inside each other
LONGEST = 400  # characters of an expression
TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*(?:\.\w+)*)|(\*\*|[-+*/()]))")

Look = Callable[[str], Any]


class Unfit(Exception):
    """What config.json has does not fit an expression; the message says which."""


@dataclass(frozen=True)
class Node:
    """One operation: ``number``, ``key``, ``not``, ``neg``, or one of ``+ - * / **``; ``text`` is how it was written."""

    op: str
    text: str
    value: Any = None
    parts: tuple[Node, ...] = ()

    def keys(self) -> Iterator[str]:
        """Every key that is read."""
        if self.op == "key":
            yield self.value
        for part in self.parts:
            yield from part.keys()


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Node:
    """An expression. ConfigError says what cannot be read and what could be."""
    try:
        return _Parser(text).parse()
    except Unfit as error:
        raise ConfigError(
            f"family config: {shown(text)} cannot be read ({error}); write a key of config.json, a number, or both with "
            "+ - * / ** not and parentheses, such as 'hidden_size / num_attention_heads' or 'scalar ** -0.5'"
        ) from None


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, where it ends
        at, end = 0, len(text.rstrip())
        if end > LONGEST:
            raise Unfit(f"{end} characters; at most {LONGEST}")
        while at < end:
            found = TOKEN.match(text, at)
            if not found:
                raise Unfit(f"at {text[at:].strip()[:20]!r}")
            assert found.lastindex is not None
            self.tokens.append((("number", "key", "op")[found.lastindex - 1], found[found.lastindex], found.end()))
            at = found.end()

    def parse(self) -> Node:
        node = self.sum()
        if self.place < len(self.tokens):
            raise Unfit(f"at {self.tokens[self.place][1]!r}")
        return node

    def peek(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    def next(self) -> tuple[str, str]:
        if self.place >= len(self.tokens):
            raise Unfit("it ends too early" if self.tokens else "it is empty")
        self.place += 1
        return self.tokens[self.place - 1][:2]

    def made(self, op: str, begin: int, *parts: Node) -> Node:
        """A node, with the text from the token ``begin`` to here."""
        start = self.tokens[begin - 1][2] if begin else 0
        return Node(op, self.text[start : self.tokens[self.place - 1][2]].strip(), None, parts)

    def sum(self) -> Node:
        return self.chain(("+", "-"), self.product)

    def product(self) -> Node:
        return self.chain(("*", "/"), self.signed)

    def chain(self, ops: tuple[str, ...], operand: Callable[[], Node]) -> Node:
        begin, node = self.place, operand()
        while self.peek() in ops:
            op = self.next()[1]
            node = self.made(op, begin, node, operand())
        return node

    def signed(self) -> Node:
        begin = self.place
        if self.peek() not in ("-", "not"):
            return self.power()
        op = {"-": "neg"}.get(self.next()[1], "not")
        return self.made(op, begin, self.deeper(self.signed))

    def power(self) -> Node:
        begin, node = self.place, self.atom()
        if self.peek() != "**":
            return node
        self.next()
        exponent = self.deeper(self.signed)
        if next(exponent.keys(), None) is not None:
            raise Unfit(f"the exponent {exponent.text!r} must be a number")
        return self.made("**", begin, node, exponent)

    def atom(self) -> Node:
        kind, text = self.next()
        if kind == "number":
            return Node("number", text, float(text) if re.search(r"[.eE]", text) else int(text))
        if kind == "key" and text not in ("not", "true", "false"):
            return Node("key", text, text)
        if text in ("true", "false"):
            return Node("number", text, text == "true")
        if text != "(":
            raise Unfit(f"at {text!r}")
        node = self.deeper(self.sum)
        if self.next()[1] != ")":
            raise Unfit("a parenthesis is not closed")
        return node

    def deeper(self, inner: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unfit("nested too deeply")
        node = inner()
        self.depth -= 1
        return node


def evaluate(node: Node, look: Look, whole: bool) -> Any:
    """The value of an expression, or ``ABSENT``. ``whole``: a whole number is wanted. Unfit says what does not fit."""
    if node.op == "number":
        return node.value
    if node.op == "key":
        return look(node.value)
    values = [evaluate(part, look, whole) for part in node.parts]
    if any(value is ABSENT for value in values):
        return ABSENT
    if node.op == "not":
        if not isinstance(values[0], bool):
            raise Unfit(f"{node.parts[0].text} is {shown(values[0])}; it must be true or false")
        return not values[0]
    for part, value in zip(node.parts, values, strict=True):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= MOST:  # NaN neither
            raise Unfit(f"{part.text} is {shown(value)}; in {node.text!r} it must be a number")
    return -values[0] if node.op == "neg" else _calculate(node, values[0], values[1], whole)


def _calculate(node: Node, left: Any, right: Any, whole: bool) -> Any:
    match node.op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            if not right:
                raise Unfit(f"{node.text}: {node.parts[1].text} is 0")
            if not whole:
                return left / right
            if left % right:
                raise Unfit(f"{node.text} is {left} / {right}, which is no whole number")
            return left // right
        case _:
            small = isinstance(left, int) and isinstance(right, int) and 0 <= right <= 8
            try:
                made = left**right if small else float(left) ** right
            except (ZeroDivisionError, OverflowError):
                made = math.nan
            if isinstance(made, complex) or not abs(made) <= MOST:
                raise Unfit(f"{node.text} is {left} ** {right}, which is no number of use")
            return made


def first(source: Any, look: Look, whole: bool) -> Any:
    """The first of a family's sources that is there, or ``ABSENT``: expressions, or values as they are."""
    for one in listed(source):
        value = evaluate(parse(one), look, whole) if isinstance(one, str) else one
        if value is not ABSENT:
            return value
    return ABSENT


def keys_of(source: Any) -> Iterator[str]:
    """Every key of config.json that a source reads."""
    for one in listed(source):
        if isinstance(one, str):
            yield from parse(one).keys()


def check_source(source: Any, where: str) -> None:
    """ConfigError unless a source is an expression, a value, or a list of these."""
    for one in listed(source):
        if isinstance(one, str):
            parse(one)
        elif not isinstance(one, bool | int | float):
            raise ConfigError(
                f"{where} is {shown(one)}; it must be a key of config.json, an expression, a number or a list of these"
            )


def fits(found: Any, wanted: Any) -> bool:
    """Whether a value of config.json (``ABSENT`` and None are the same) is the wanted one, or one of a wanted list."""
    if isinstance(wanted, list):
        return any(found == one if isinstance(one, list) else fits(found, one) for one in wanted)
    if found is ABSENT or found is None or wanted is None:
        return wanted is None and (found is ABSENT or found is None)
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)


def listed(source: Any) -> list[Any]:
    """One source or several, as a list."""
    return source if isinstance(source, list) else [source]


def shown(value: Any) -> str:
    """A value for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
