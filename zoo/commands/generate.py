"""``zoo generate``: continue a prompt, streaming to the terminal."""

from __future__ import annotations

import argparse
import dataclasses

from zoo.commands.output import print_json


def generate(arguments: argparse.Namespace) -> int:
    """Stream the continuation to stdout; with ``--json``, one object when it is complete."""
    from zoo.llm import LLM

    with LLM(arguments.ref, registry=arguments.registry, threads=arguments.threads, checkpoint=arguments.checkpoint) as llm:
        wanted = {key: getattr(arguments, key) for key in ("temperature", "top_p", "top_k", "seed")}
        params = dataclasses.replace(
            llm.default_params(), max_tokens=arguments.max_tokens, **{k: v for k, v in wanted.items() if v is not None}
        )
        if arguments.json:
            output = llm.generate([arguments.prompt], params)[0]
            first = output.outputs[0]
            print_json(
                {
                    "ref": llm.ref,
                    "prompt": arguments.prompt,
                    "text": first.text,
                    "token_ids": list(first.token_ids),
                    "finish_reason": first.finish_reason,
                    **({"error": first.error} if first.error else {}),
                }
            )
            return 1 if first.error else 0
        pieces = llm.stream(arguments.prompt, params)  # refuses a bad request before anything is printed
        print(arguments.prompt, end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
    return 0
