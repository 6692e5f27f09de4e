"""The shape of the house, read from the imports: who may import whom, how long files may be, what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "zoo"
FOUNDATION = {"errors", "spec", "targets", "weights", "artifacts", "resources"}

WING = {"config", "build", "checkpoints"}
# room -> the zoo rooms it may import at module level or inside functions. A room is a module or a package below zoo/.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "targets": set(),
    "resources": {"errors"},
    "modelspec": {"errors"},
    "ropetables": {"errors", "modelspec"},
    "spec": {"errors", "modelspec"},
    "weights": {"errors"},
    "artifacts": {"errors", "spec", "weights", "resources"},
    "config": {"errors", "spec", "targets"},
    "checkpoints": {"errors", "modelspec", "ropetables", "spec", "weights", "config"},
    "graph": {"errors", "weights"},
    "graph_templates": {"errors", "modelspec", "spec", "weights", "graph", "checkpoints"},
    "plugins": {"errors", "weights", "graph"},
    "passes": {"errors", "spec", "targets", "weights", "graph", "plugins"},
    "compilers": FOUNDATION | {"graph", "plugins", "ropetables"},
    "calibration": FOUNDATION | {"ropetables", "graph", "graph_templates", "checkpoints", "passes", "compilers", "runtime"},
    "planning": FOUNDATION | {"graph", "graph_templates", "passes", "compilers", "build"},
    "build": FOUNDATION | {"graph", "graph_templates", "checkpoints", "passes", "plugins", "compilers", "calibration", "config"},
    "runtime": {"errors", "modelspec", "ropetables", "spec", "weights", "artifacts", "resources"},
    "benchmark": {"errors", "spec", "runtime", "artifacts"},
    "tuning": {"errors", "weights", "artifacts", "runtime", "plugins", "compilers"},
    "llm": FOUNDATION | {"runtime", "build"},
    "serving": FOUNDATION | {"runtime", "llm"},
    "commands": FOUNDATION
    | WING
    | {"runtime", "benchmark", "tuning", "planning", "llm", "serving", "compilers", "graph_templates"},
    "cli": {"errors", "commands"},
    "": {"llm", "runtime"},  # zoo/__init__.py
}
# Imports that only happen inside a function, so that one wing starts without the other.
LAZY_ONLY = {("llm", "build"), ("tuning", "compilers")} | {
    ("commands", room)
    for room in ("build", "config", "planning", "llm", "serving", "tuning", "compilers", "graph_templates", "checkpoints")
}
# Third-party packages that only these rooms may import.
OWNED = {
    "hydra": {"config"},
    "omegaconf": {"config"},
    "onnx_graphsurgeon": {"graph", "graph_templates", "passes", "plugins", "compilers", "calibration"},
    "torch": set(),
    "transformers": set(),
    "pickle": set(),
    "httpx": {"artifacts"},
}


def room_of(file: Path) -> str:
    parts = file.relative_to(ZOO).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, at module level) for each import; blocks under ``if TYPE_CHECKING`` count as inside a function."""
    tree = ast.parse(file.read_text())
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative import"
                found.append((child.module or "", top))
                if child.module == "zoo":
                    found.extend((f"zoo.{alias.name}", top) for alias in child.names)
            visit(child, top and not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(tree, True)
    return found


FILES = sorted(ZOO.rglob("*.py"))


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(file) for file in FILES}
    assert rooms <= set(ALLOWED), f"rooms without a rule: {sorted(rooms - set(ALLOWED))}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ZOO).as_posix())
def test_imports_follow_the_table(file: Path) -> None:
    room = room_of(file)
    for module, top in imports(file):
        head, *rest = module.split(".")
        if head == "zoo" and rest:
            other = rest[0]
            if other in ("__version__", room) or (other.startswith("__")):
                continue
            assert other in ALLOWED[room], f"{file.relative_to(ROOT)}: {room or 'zoo'} may not import zoo.{other}"
            assert not (top and (room, other) in LAZY_ONLY), f"{file.relative_to(ROOT)}: import zoo.{other} inside a function"
        elif head in OWNED:
            assert room in OWNED[head], f"{file.relative_to(ROOT)}: only {OWNED[head] or 'nobody'} may import {head}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ZOO).as_posix())
def test_files_stay_readable(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400, f"{file.relative_to(ROOT)}: split it"


def run_without(modules: list[str], code: str) -> None:
    """Run code in a fresh interpreter in which these modules cannot be imported."""
    blocker = (
        "import sys\n"
        f"blocked = {modules!r}\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked: raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    done = subprocess.run([sys.executable, "-c", blocker + code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_serving_needs_no_builder() -> None:
    builder = [
        "hydra",
        "omegaconf",
        "onnx",
        "onnx_graphsurgeon",
        "torch",
        "transformers",
        "safetensors",
        "tensorrt_rtx",
        "tensorrt",
    ]
    run_without(
        builder,
        "import zoo.llm, zoo.runtime.engine, zoo.runtime.sessions, zoo.artifacts.registry, zoo.cli, zoo.commands.generate",
    )


def test_building_needs_no_torch() -> None:
    run_without(["torch", "transformers"], "import zoo.build, zoo.config; zoo.config.compose(['models=zoo-demo'])")


def test_public_surface() -> None:
    import zoo
    from zoo.cli import COMMANDS

    assert sorted(zoo.__all__) == ["LLM", "SamplingParams", "__version__"]
    assert sorted(COMMANDS) == sorted(
        [
            "engines",
            "list",
            "show",
            "diff",
            "pull",
            "push",
            "verify",
            "rm",
            "gc",
            "add",
            "graph",
            "plan",
            "doctor",
            "generate",
            "embed",
            "serve",
            "bench",
            "tune",
        ]
    )
