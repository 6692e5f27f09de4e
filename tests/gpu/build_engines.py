"""Builds the engines that ``check_engines.py`` judges on a GPU: python -m tests.gpu.build_engines FOLDER [HARDWARE [NAME...]]

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
import zoo_cases

from zoo.artifacts.registry import Registry
from zoo.build import build
from zoo.checkpoints.adopt import adopt
from zoo.config import compose, compose_model
from zoo.errors import ZooError

CASES = (
    "llama-grouped", "llama-tied", "llama-three-heads", "llama-llama3-rope", "llama-biases", "mistral-window",
    "mistral-multi-query", "qwen2-biases", "qwen2-window-layers", "qwen3-norms", "gpt2", "gpt2-odd",
)  # fmt: skip
# of tests/zoo_cases: one of each thing that the cases above do not have
ZOO = (
    "bloom-odd", "mpt-plain", "gptoss-yarn", "mixtral-plain", "qwen2moe-plain", "granitemoe-multipliers", "gemma2-windows",
    "gemma3-pattern", "cohere-plain", "glm-plain", "phi3-short", "olmo2-plain", "smollm3-interval", "gpt_neox-parallel",
    "opt-plain", "gptj-plain", "nemotron-plain", "stablelm-parallel",
)  # fmt: skip
LIMITS = ("limits.max_tokens=256", "limits.max_sequences=16", "limits.max_rows=256", "limits.max_context=128")
QUANTS = {"zoo-demo": ("none", "fp8", "fp8-kv"), "llama-grouped": ("none", "fp8-kv"), "qwen3-norms": ("none", "fp8-kv")}


def main() -> int:
    folder, hardware = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "h100-sxm"
    shutil.rmtree(folder, ignore_errors=True)
    registry = Registry(folder / "registry")
    failed = 0
    wanted = sys.argv[3:] or ["zoo-demo", *CASES, *ZOO]
    for name in wanted:
        for quant in QUANTS.get(name, ("none",)):
            options = [f"quant={quant}", f"hardware={hardware}", "compiler=cuda"]
            if name == "zoo-demo":
                limits = ("limits.max_tokens=512", "limits.max_sequences=64", "limits.max_rows=512")
                spec = compose([f"models={name}", *options, *limits])
            else:
                made = folder / "checkpoints" / name.replace("_", "-")
                if name in ZOO and not made.exists():
                    zoo_cases.make_folder(made, zoo_cases.all_cases()[name])
                elif not made.exists():
                    family, changes = families.CASES[name]
                    shutil.copytree(families.make_checkpoint(folder / "made", family, **changes), made)
                spec = compose_model(adopt(made), [*options, *LIMITS])
            try:
                result = build(spec, registry)
            except ZooError as error:  # the others are still worth a visit to the GPU
                print(f"{name}: {error}", flush=True)
                failed += 1
                continue
            print(result.entry.ref, f"{result.seconds:.1f} s", flush=True)
    shutil.rmtree(folder / "made", ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
