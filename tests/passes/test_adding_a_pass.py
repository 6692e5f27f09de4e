"""docs/adding-a-pass.md, tried literally: its pass and its test run as they are printed."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from zoo.passes.frame import PHASES

DOC = Path(__file__).parents[2] / "docs" / "adding-a-pass.md"


def block(name: str) -> str:
    """The Python that stands under a file's name."""
    found = re.search(rf"`{re.escape(name)}`:\n\n```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found, f"{DOC.name} prints no {name}"
    return found[1]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The document's test module, with its pass importable."""
    modules = {}
    for name, path in (("zoo.passes.swish", "zoo/passes/swish.py"), ("test_swish", "tests/passes/test_swish.py")):
        modules[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
        exec(compile(block(path), f"{DOC.name}:{path}", "exec"), modules[name].__dict__)
    return modules["test_swish"]


def test_the_printed_pass_passes_its_printed_tests(printed: ModuleType) -> None:
    tests = {name: test for name, test in vars(printed).items() if name.startswith("test_") and inspect.isfunction(test)}
    assert len(tests) == 5
    for test in tests.values():
        test()


def test_the_printed_phases_are_the_real_ones() -> None:
    assert tuple(re.findall(r"^\| ([a-z ]+) \|", DOC.read_text(), re.MULTILINE)[1:]) == PHASES
