"""Random steps through engines, without torch, for a memory checker to watch:

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m tests.gpu.sanitize FOLDER [NAME...]

FOLDER is what ``build_engines.py`` made.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tests.gpu.feeding import Feeder
from zoo.artifacts.registry import Registry
from zoo.llm import LLM
from zoo.runtime.request import SamplingParams
from zoo.runtime.sessions.cuda import CudaSession


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    registry = Registry(folder / "registry")
    rng = np.random.default_rng()
    for entry in registry.entries():
        if not entry.current or (names and entry.model not in names):
            continue
        with registry.open(entry.ref) as opened:
            session = CudaSession(opened.folder, opened.manifest, fill=0xFF, blocks=1 + 64 * 8)
            most = min(session.limits.max_context, 90)
            prompts = [rng.integers(0, session.vocab_size, int(rng.integers(1, most))).tolist() for _ in range(6)]
            finite = all(np.isfinite(rows).all() for rows in Feeder(session, rng).run(prompts))
            with LLM.from_session(session) as llm:
                params = [SamplingParams(max_tokens=4, temperature=t, top_k=k, top_p=p, seed=1) for t, k, p in
                          ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 20, 0.9), (1.2, 0, 0.95))]  # fmt: skip
                outputs = llm.generate(prompts[:4], params)
                adjusted = SamplingParams(max_tokens=4, min_tokens=4, repetition_penalty=1.5, frequency_penalty=0.5,
                                          logit_bias={5: 2.0}, stop_token_ids=[7])  # fmt: skip
                outputs += llm.generate(prompts, adjusted)
            assert finite and all(out.outputs[0].error is None for out in outputs), entry.ref
            print("ran", entry.ref, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
