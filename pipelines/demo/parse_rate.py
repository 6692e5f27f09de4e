"""How many of the 100 fixed held-out prompts the demo model continues into complete lines of valid Python.

    python -m pipelines.demo.parse_rate                    # transformers, greedy, 128 new tokens
    python -m pipelines.demo.parse_rate --backend zoo      # the same through zoo.LLM

The criterion. Generated text is appended to the prompt, which ends with a line end, and everything after the last line
end is dropped: what is left are complete lines. They pass if
  1. no complete line is wrong: Python's parser accepts them all, or says that the input is legal so far and unfinished
     (an open bracket, an open string, a block without a body);
  2. if unfinished, dropping complete lines from the end, and nothing else, leaves text that `ast.parse` accepts;
  3. at least one generated line that is not blank is still there.
Nothing is ever inserted, and an error anywhere in the complete lines fails the prompt even if an earlier cut parses.
Valid is not the same as sensible: this counts syntax alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.demo.prompts import PROMPTS
from pipelines.demo.tokenizer import CHECKPOINT

ALLOW_INCOMPLETE_INPUT = 0x4000  # the compile() flag that codeop uses: "incomplete input" instead of a misleading error
Complete = Callable[[list[str], int], list[str]]


def state(text: str) -> str:
    """`valid`, `unfinished` (legal so far) or `wrong`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "<text>", "exec", ast.PyCF_ONLY_AST | ALLOW_INCOMPLETE_INPUT, dont_inherit=True)
    except SyntaxError as error:
        return "unfinished" if str(error.msg).startswith("incomplete input") else "wrong"
    except ValueError:  # a null character
        return "wrong"
    return "valid"


def judge(prompt: str, completion: str) -> str:
    """`parses`, or why not: `wrong syntax`, `nothing complete`."""
    if not prompt.endswith("\n"):
        raise ValueError("a prompt must end with a line end")
    lines = completion[: completion.rfind("\n") + 1].splitlines(keepends=True)
    found = state(prompt + "".join(lines))
    if found == "wrong":
        return "wrong syntax"
    while found == "unfinished" and lines:
        lines.pop()
        found = state(prompt + "".join(lines))
    if found != "valid" or not "".join(lines).strip():
        return "nothing complete"
    ast.parse(prompt + "".join(lines))
    return "parses"


def with_transformers(folder: Path) -> Complete:
    """Greedy completion by transformers in float32, in batches padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def complete(prompts: list[str], max_tokens: int) -> list[str]:
        texts: list[str] = []
        for i in range(0, len(prompts), 25):
            batch = tokenizer(prompts[i : i + 25], return_tensors="pt", padding=True)
            output = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False, temperature=None, top_p=None)
            new = output[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    return complete


def with_zoo(reference: str) -> Complete:
    """Greedy completion by this project's own runtime; `reference` is an engine's REF or a checkpoint folder."""
    from zoo import LLM, SamplingParams

    llm = LLM(reference)

    def complete(prompts: list[str], max_tokens: int) -> list[str]:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
        return [output.outputs[0].text for output in outputs]

    return complete


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdicts and the rate; exit with 1 when fewer than half of the prompts parse."""
    parser = argparse.ArgumentParser(description="Share of held-out prompts continued into valid Python.")
    parser.add_argument("--backend", choices=("transformers", "zoo"), default="transformers")
    parser.add_argument("--model", help="folder, or for zoo a REF (default: the demo checkpoint)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--show", action="store_true", help="print every continuation")
    options = parser.parse_args(arguments)
    prompts = json.loads(PROMPTS.read_text())
    if options.backend == "zoo":
        complete = with_zoo(options.model or "zoo-demo")
    else:
        complete = with_transformers(Path(options.model or CHECKPOINT))
    completions = complete([prompt["prompt"] for prompt in prompts], options.max_tokens)
    verdicts: Counter[tuple[str, str]] = Counter()
    for prompt, completion in zip(prompts, completions, strict=True):
        verdict = judge(prompt["prompt"], completion)
        verdicts[prompt["kind"], verdict] += 1
        if options.show:
            print(f"=== {prompt['file']}: {verdict}\n{prompt['prompt']}>>>\n{completion}")
    for (kind, verdict), count in sorted(verdicts.items()):
        print(f"{kind}: {count} {verdict}")
    parsed = sum(count for (_, verdict), count in verdicts.items() if verdict == "parses")
    print(f"{parsed} of {len(prompts)} continuations parse ({options.backend}, greedy, {options.max_tokens} tokens)")
    return 0 if 2 * parsed >= len(prompts) else 1


if __name__ == "__main__":
    sys.exit(main())
