"""For GPU machines without the builder's packages: with this folder on PYTHONPATH, rooms whose ``__init__`` needs onnx are bare.

What ``zoo tune`` takes of them are kernels and the ahead-of-time compiler, which need Triton alone. Subprocesses inherit it.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

if importlib.util.find_spec("onnx_graphsurgeon") is None:
    rooms = ["zoo.compilers", "zoo.compilers.cuda", "zoo.plugins"]
    rooms += [f"zoo.plugins.{folder.parent.name}" for folder in sorted((ROOT / "zoo" / "plugins").glob("*/__init__.py"))]
    for name in rooms:
        room = types.ModuleType(name)
        room.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = room
    vars(sys.modules["zoo.plugins.gated_activation"]).update(SILU=0, GELU=1, GELU_TANH=2, RELU=3)
