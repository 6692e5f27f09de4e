"""Builds the engines that ``check_engines.py`` judges on a GPU: python -m tests.gpu.build_engines FOLDER [HARDWARE]

Needs no GPU. FOLDER gets ``registry`` (engines with their checkpoints) and ``checkpoints`` (random ones, for transformers).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["TRITON_INTERPRET"] = "0"

import families

from zoo.artifacts.registry import Registry
from zoo.build import build
from zoo.checkpoints.adopt import adopt
from zoo.config import compose, compose_model

CASES = (
    "llama-grouped", "llama-tied", "llama-three-heads", "llama-llama3-rope", "llama-biases", "mistral-window",
    "mistral-multi-query", "qwen2-biases", "qwen2-window-layers", "qwen3-norms", "gpt2", "gpt2-odd",
)  # fmt: skip
LIMITS = ("limits.max_tokens=256", "limits.max_sequences=16", "limits.max_rows=256", "limits.max_context=128")
QUANTS = {"zoo-demo": ("none", "fp8", "fp8-kv"), "llama-grouped": ("none", "fp8-kv"), "qwen3-norms": ("none", "fp8-kv")}


def main() -> int:
    folder, hardware = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "h100-sxm"
    shutil.rmtree(folder, ignore_errors=True)
    registry = Registry(folder / "registry")
    for name in ("zoo-demo", *CASES):
        for quant in QUANTS.get(name, ("none",)):
            options = [f"quant={quant}", f"hardware={hardware}", "compiler=cuda"]
            if name == "zoo-demo":
                limits = ("limits.max_tokens=512", "limits.max_sequences=64", "limits.max_rows=512")
                spec = compose([f"models={name}", *options, *limits])
            else:
                made = folder / "checkpoints" / name
                if not made.exists():
                    family, changes = families.CASES[name]
                    shutil.copytree(families.make_checkpoint(folder / "made", family, **changes), made)
                spec = compose_model(adopt(made), [*options, *LIMITS])
            result = build(spec, registry)
            print(result.entry.ref, f"{result.seconds:.1f} s", flush=True)
    shutil.rmtree(folder / "made", ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
