"""``zoo embed``: the embeddings of texts."""

from __future__ import annotations

import argparse

import numpy as np

from zoo.commands.output import print_json, print_table

SHOWN = 4  # numbers of an embedding in a table


def embed(arguments: argparse.Namespace) -> int:
    """One row a text: its tokens, the head of its embedding, its cosine with the first text. ``--json`` has all numbers."""
    from zoo.llm import LLM

    with LLM(arguments.ref, registry=arguments.registry, threads=arguments.threads, checkpoint=arguments.checkpoint) as llm:
        outputs = llm.embed(arguments.texts, arguments.normalize)
    if arguments.json:
        print_json(
            [
                {
                    "ref": llm.ref,
                    "prompt": output.prompt,
                    "prompt_token_ids": output.prompt_token_ids,
                    "embedding": [float(f"{number:.9g}") for number in output.embedding],  # the shortest that is exact in float32
                }
                for output in outputs
            ]
        )
        return 0
    first = outputs[0].embedding
    rows = []
    for output in outputs:
        vector = output.embedding
        length = float(np.linalg.norm(first) * np.linalg.norm(vector))
        head = ", ".join(f"{number:.4f}" for number in vector[:SHOWN])
        more = f", ... ({len(vector)})" if len(vector) > SHOWN else ""
        cosine = float(first @ vector) / length if length else 0.0
        rows.append((output.prompt, len(output.prompt_token_ids), f"{head}{more}", f"{cosine:.4f}"))
    print_table(("TEXT", "TOKENS", "EMBEDDING", "COSINE"), rows, right=("TOKENS", "COSINE"))
    return 0
