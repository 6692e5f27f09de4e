"""Expressions over keys of a config.json: what they give, what they refuse, and that nothing else is evaluated."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from zoo.checkpoints.config_language import ABSENT, Unfit, check_source, evaluate, first, fits, keys_of, parse
from zoo.errors import ConfigError

CONFIG: dict[str, Any] = {
    "hidden": 4096,
    "heads": 32,
    "odd": 4097,
    "scalar": 256,
    "dim": 20.5,
    "no_bias": True,
    "use_bias": False,
    "name": "gelu",
    "zero": 0,
    "nested": {"inner": {"deep": 3}, "flag": True},
    "huge": 10**30,
    "list": [1],
}


def look(key: str) -> Any:
    value: Any = CONFIG
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def whole(text: str) -> Any:
    return evaluate(parse(text), look, whole=True)


def real(text: str) -> Any:
    return evaluate(parse(text), look, whole=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hidden", 4096),
        ("name", "gelu"),
        ("no_bias", True),
        ("nested.inner.deep", 3),
        ("list", [1]),
        ("4 * hidden", 16384),
        ("hidden / heads", 128),
        ("4 * hidden / heads", 512),
        ("hidden / heads / 2", 64),
        ("hidden + heads", 4128),
        ("hidden - heads - 1", 4063),
        ("hidden - (heads - 1)", 4065),
        ("heads + 2 * 3", 38),
        ("(heads + 2) * 3", 102),
        ("heads * heads", 1024),
        ("2 ** 3 * heads", 256),
        ("heads ** 2", 1024),
        ("-heads + 40", 8),
        ("7", 7),
        (" 7 ", 7),
        ("true", True),
        ("not no_bias", False),
        ("not not no_bias", True),
        ("not nested.flag", False),
        ("missing", ABSENT),
        ("nested.inner.missing", ABSENT),
        ("nested.inner.deep.deeper", ABSENT),
        ("2 * missing", ABSENT),
        ("not missing", ABSENT),
        ("hidden / zero * missing", None),
    ],
)
def test_values(text: str, value: Any) -> None:
    if value is None:
        with pytest.raises(Unfit, match="hidden / zero: zero is 0"):
            whole(text)
        return
    found = whole(text)
    assert found is value if value is ABSENT else (found == value and type(found) is type(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("scalar ** -0.5", 1 / 16),
        ("hidden ** 0.5", 64.0),
        ("1 / heads", 1 / 32),
        ("odd / heads", 4097 / 32),
        ("2 ** -1", 0.5),
        ("-2 ** 2", -4),
        ("scalar ** -0.5 * 2", 1 / 8),
        ("2 * scalar ** 0.5 ** 2", 8.0),
        ("1.5e2 + 0.5", 150.5),
        ("dim * 2", 41.0),
        ("(heads + 4) ** 0.5", 6.0),
        ("12 / heads ** 0.5", 12 / math.sqrt(32)),
    ],
)
def test_real_numbers(text: str, value: float) -> None:
    assert real(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("odd / heads", "odd / heads is 4097 / 32, which is no whole number"),
        ("4 * odd / heads", "4 * odd / heads is 16388 / 32, which is no whole number"),
        ("2 * name", "name is 'gelu'; in '2 * name' it must be a number"),
        ("hidden * no_bias", "no_bias is True; in 'hidden * no_bias' it must be a number"),
        ("(hidden + 1) / zero", "(hidden + 1) / zero: zero is 0"),
        ("1 + huge", "it must be a number"),
        ("list + 1", "list is [1]"),
        ("not name", "name is 'gelu'; it must be true or false"),
        ("not zero", "zero is 0; it must be true or false"),
        ("zero ** -0.5", "zero ** -0.5 is 0 ** -0.5, which is no number of use"),
        ("hidden ** 999999999", "no number of use"),
        ("(zero - 1) ** 0.5", "no number of use"),
        ("hidden ** 8", "no number of use"),
    ],
)
def test_what_does_not_fit(text: str, message: str) -> None:
    with pytest.raises(Unfit) as error:
        whole(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "a b", "a +", "* a", "a ** b", "a ** (b + 1)", "(a", "a)", "a..b", "a.", "a // b", "a % 2", "a if b", "a, b",
        "f(a)", "a[0]", "'a'", "a == b", "not", "a not", "1a", "a and b", "__import__('os')", "a;b", "a\n+", "lambda: 0", "é",
        "(" * 40 + "a" + ")" * 40, "-" * 40 + "a", "not " * 80 + "a", "2 ** 2 ** a", "a" + "+a" * 300_000,
    ],
)  # fmt: skip
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match=r"family config: .* cannot be read \(.*\); write a key of config\.json, a number"):
        parse(text)


def test_the_first_that_is_there() -> None:
    assert first(["missing", "hidden / heads", "hidden"], look, whole=True) == 128
    assert first(["missing", 0], look, whole=True) == 0
    assert first(0.25, look, whole=False) == 0.25
    assert first([True], look, whole=True) is True
    assert first(["missing", "2 * missing"], look, whole=True) is ABSENT
    with pytest.raises(Unfit):  # an error is no reason to go on to the next
        first(["odd / heads", "hidden"], look, whole=True)
    assert sorted(keys_of(["a.b / c", 4, "(d + e) ** 0.5 - -f", "not g"])) == ["a.b", "c", "d", "e", "f", "g"]


def test_sources_of_another_kind_are_refused() -> None:
    for good in ("a", 3, 0.5, False, ["a", 3]):
        check_source(good, "x")
    for bad in (None, {"a": 1}, ["a", None], [["a"]]):
        with pytest.raises(ConfigError, match=r"moe\.size is .*; it must be a key of config\.json, an expression, a number or"):
            check_source(bad, "moe.size")


@pytest.mark.parametrize(
    ("found", "wanted", "fit"),
    [
        (True, True, True), (1, True, False), (True, 1, False), (0, False, False), (2, 2.0, True), ("a", "a", True),
        (ABSENT, None, True), (None, None, True), (ABSENT, False, False), (False, None, False), (0, None, False),
        (2, [1, 2], True), (ABSENT, [None, 2], True), (3, [None, 2], False), ([1, 2], [[1, 2]], True), ({}, [], False),
    ],
)  # fmt: skip
def test_comparing(found: Any, wanted: Any, fit: bool) -> None:
    assert fits(found, wanted) is fit


def test_numbers_of_json_that_are_none() -> None:
    for text in ("NaN", "Infinity", "-Infinity", "1e400"):
        with pytest.raises(Unfit):
            evaluate(parse("2 * n"), {"n": json.loads(text)}.__getitem__, whole=False)
