"""Judges ``cuda`` engines by transformers on the same GPU: python -m tests.gpu.check_engines FOLDER [NAME...]

FOLDER is what ``build_engines.py`` made. For every engine, with pools and activations that start as NaN:

    logits    sequences of random lengths, fed in random pieces (prefill, chunks, decode, mixed in one step), teacher-forced.
              Their error against float32 transformers is compared with that of transformers in bfloat16
    greedy    generation through the engine loop, sampled on the GPU; each token is the float32 model's own, or within the
              measured error of it
    adjusted  requests with penalties, logit_bias and min_tokens: each token is the one that the host's sampler chooses from the
              same logits, and captured, overlapped steps give the same tokens

Needs torch and transformers beside what serving needs. Exit status 1 if something is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.gpu.adjusted import check_adjusted
from tests.gpu.feeding import Feeder
from zoo.artifacts.registry import Registry
from zoo.llm import LLM
from zoo.runtime.request import SamplingParams
from zoo.runtime.sessions.cuda import CudaSession

NOISE = 1.6  # times the error of transformers in bfloat16 that an unquantized engine may have, plus FLOOR
FLOOR = 2e-3  # of the largest logit
FP8_NOISE = 0.25  # relative error of FP8 logits of random models, against float32


def reference(folder: Path, dtype: torch.dtype) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.cuda().eval()


def logits_of(model: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    with torch.no_grad():
        return [model(torch.tensor([ids], device="cuda")).logits[0].float().cpu().numpy() for ids in prompts]


def relative(got: list[np.ndarray], want: list[np.ndarray]) -> tuple[float, float]:
    """(RMS error over RMS, largest error over largest value) of all rows."""
    a, b = np.concatenate(got), np.concatenate(want)
    if not np.isfinite(a).all():
        return float("inf"), float("inf")
    return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean())), float(np.abs(a - b).max() / np.abs(b).max())


def check(registry: Path, ref: str, checkpoint: Path, seed: int) -> bool:
    rng = np.random.default_rng(seed)
    exact, same = reference(checkpoint, torch.float32), reference(checkpoint, torch.bfloat16)
    with Registry(registry).open(ref) as opened:
        session = CudaSession(opened.folder, opened.manifest, fill=0xFF, blocks=1 + 64 * 16)
        vocabulary, quant = session.vocab_size, opened.manifest.spec["quant"]
        most = min(session.limits.max_context, 200)
        prompts = [rng.integers(0, vocabulary, int(rng.integers(1, most))).tolist() for _ in range(12)]
        want, noise = logits_of(exact, prompts), logits_of(same, prompts)
        got = Feeder(session, rng).run(prompts)
        error, worst = relative(got, want)
        floor, _ = relative(noise, want)
        plain = quant["method"] == "none"
        good = error <= (NOISE * floor + FLOOR if plain else FP8_NOISE)
        llm = LLM.from_session(session)
        starts = [rng.integers(0, vocabulary, int(rng.integers(1, most - 40))).tolist() for _ in range(12)]
        outputs = llm.generate(starts, SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True))
        texts = [ids + list(out.outputs[0].token_ids) for ids, out in zip(starts, outputs, strict=True)]
        gaps, equal, total = [0.0], 0, 0
        spread = worst * max(float(np.abs(row).max()) for row in want)
        for ids, text, logits in zip(starts, texts, logits_of(exact, texts), strict=True):
            for place in range(len(ids), len(text)):
                row = logits[place - 1]
                gaps.append(float(row.max() - row[text[place]]))
                equal += int(row.argmax()) == text[place]
                total += 1
        near = max(gaps) <= 2 * spread
        judged, problems = check_adjusted(session, starts[: session.limits.max_sequences], 24)
        llm.close()
    right = good and near and not problems
    print(
        f"{'ok  ' if right else 'FAIL'} {ref:<46} error {error:.2e} (transformers bfloat16 {floor:.2e}), "
        f"greedy {equal}/{total} equal, largest gap {max(gaps):.3f} of {2 * spread:.3f}; "
        f"{judged} adjusted tokens, {len(problems)} wrong",
        *problems[:5],
        sep="\n     ",
        flush=True,
    )
    return right


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    failed = 0
    entries = [entry for entry in Registry(folder / "registry").entries() if entry.current]
    seed = int.from_bytes(np.random.default_rng().bytes(4), "little")
    print("seed", seed)
    for entry in entries:
        if not names or entry.model in names:
            try:
                own = Path(__file__).parents[2] / "checkpoints" / entry.model
                made = own if own.is_dir() else folder / "checkpoints" / entry.model
                failed += not check(folder / "registry", entry.ref, made, seed)
            except Exception as error:  # every engine is to be judged
                import traceback

                traceback.print_exc()
                print(f"FAIL {entry.ref}: {error!r}", flush=True)
                failed += 1
    print(f"{failed} of {len(entries)} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
