"""Generates with an ONNX Runtime GenAI model, as ``pipelines.bench.genai`` asks. Runs in GenAI's own environment, without zoo.

python genai_worker.py MODEL_FOLDER THREADS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def generator(model: Any, prompts: np.ndarray[Any, Any], total: int) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(prompts), max_length=total, min_length=total, do_sample=False)
    made = og.Generator(model, params)
    made.append_tokens(prompts)
    return made


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    started = time.perf_counter()
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    say(load=time.perf_counter() - started)
    for line in sys.stdin:
        order = json.loads(line)
        prompts = np.array(order["prompts"], np.int32)
        if order["do"] == "prefill":
            started = time.perf_counter()
            made = generator(model, prompts, prompts.shape[1] + 1)
            made.generate_next_token()
            say(seconds=time.perf_counter() - started, tokens=[[int(t)] for t in made.get_next_tokens()])
        else:
            count = order["count"]
            made = generator(model, prompts, prompts.shape[1] + count + 1)
            made.generate_next_token()  # the first token belongs to the prompt's pass
            started = time.perf_counter()
            for _ in range(count):
                made.generate_next_token()
            seconds = time.perf_counter() - started
            sequences = [made.get_sequence(row)[prompts.shape[1] :].tolist() for row in range(len(prompts))]
            say(seconds=seconds, tokens=sequences)
        del made


if __name__ == "__main__":
    main()
