"""The ``zoo`` command. Each command's work is in ``zoo/commands``; imports happen when a command runs, so that serving
starts without the builder and ``zoo list`` without either.

Results go to stdout, logs and progress to stderr. A user's mistake is one message and exit code 1; a broken invariant is
a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from zoo import __version__
from zoo.errors import ZooError

# command -> (module in zoo.commands, function, one line of help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "engines": ("engines", "engines", "compose, expand, rewrite, compile and store engines"),
    "graph": ("engines", "graph", "write the weightless ONNX graph of a model"),
    "plan": ("engines", "plan", "say what an engine would need, without building it"),
    "add": ("engines", "add", "write a model YAML from a Hugging Face folder"),
    "list": ("store", "list_engines", "list stored engines"),
    "show": ("store", "show", "show what one engine is made from"),
    "diff": ("store", "diff", "say how two engines differ, and why"),
    "verify": ("store", "verify", "check every byte of stored engines against its digest"),
    "rm": ("store", "remove", "remove a profile, a version or a model"),
    "gc": ("store", "collect", "delete what no engine refers to"),
    "push": ("store", "push", "copy an engine to an OCI registry"),
    "pull": ("store", "pull", "copy an engine from an OCI registry"),
    "generate": ("generate", "generate", "continue a prompt"),
    "embed": ("embed", "embed", "give the embeddings of texts"),
    "serve": ("serve", "serve", "serve an engine over HTTP with the OpenAI API"),
    "bench": ("bench", "bench", "measure throughput, latency, energy and cost of an engine"),
    "tune": ("tune", "tune", "time variants of an engine's kernels on this GPU, for a hardware profile"),
    "doctor": ("doctor", "doctor", "say what this machine can build and run"),
}


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port; give 0 to 65535")
    return port


def _arguments(name: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="machine-readable rows on stdout")
    add("--registry", metavar="DIR", help="local registry (default: $ZOO_HOME, else the user's data folder)")
    if name in ("engines", "graph", "plan"):
        add("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as models=zoo-demo quant=fp8 hardware=l40s")
    if name == "engines":
        add(
            "-m",
            "--multirun",
            action="store_true",
            help="expand comma lists: hardware=l40s,rtx-4090; a lone + starts another set",
        )
    if name in ("engines", "graph"):
        add("--dump", metavar="DIR", help="write the graph after each phase of rewriting there")
    if name == "graph":
        add("-o", "--output", metavar="FILE", required=True, help="the ONNX file to write")
        add("--plain", action="store_true", help="the plain graph, before any pass")
    if name == "add":
        add("folder", metavar="DIR", help="a folder with config.json and safetensors files")
        add("--name", help="the model's name (default: the folder's)")
        add("--force", action="store_true", help="replace a model of that name")
    if name in ("show", "generate", "embed", "serve", "bench", "tune", "push"):
        add("ref", metavar="REF", help="model[:version][@profile]")
    if name == "verify":
        add("ref", metavar="REF", nargs="?", help="model[:version][@profile]; everything when left out")
    if name == "rm":
        add("ref", metavar="REF", help="model, model:version or model:version@profile")
    if name == "diff":
        add("ref", metavar="REF", help="one engine")
        add("other", metavar="REF", help="the other engine")
    if name == "push":
        add("to", metavar="HOST/NAME", help="where to: host[:port]/path")
    if name == "pull":
        add("ref", metavar="HOST/REF", help="host[:port]/path/model[:version][@profile]")
    if name in ("push", "pull"):
        add("--plain-http", action="store_true", help="speak HTTP to a host that is not this machine")
    if name == "pull":
        add("--all", action="store_true", help="every profile, not just the one that fits this machine")
    if name == "generate":
        add("prompt", metavar="PROMPT")
        add("--max-tokens", type=int, default=64, metavar="N")
        add("--temperature", type=float, help="0 is greedy (default: the model's own)")
        add("--top-p", type=float)
        add("--top-k", type=int)
        add("--seed", type=int)
    if name == "embed":
        add("texts", metavar="TEXT", nargs="+")
        add("--no-normalize", dest="normalize", action="store_false", help="leave embeddings as long as they are")
    if name in ("generate", "embed", "serve", "bench"):
        add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
        add("--checkpoint", metavar="FOLDER", help="of an engine that was built without one: the Hugging Face folder")
    if name == "serve":
        add("--host", default="127.0.0.1")
        add("--port", type=_port, default=8000, metavar="N", help="0 takes a free one")
        add("--api-key", action="append", metavar="KEY", help="ask for it (several: any of them); or set ZOO_API_KEY")
        add("--max-waiting", type=int, default=1024, metavar="N", help="requests that may wait; more get 429 (default: 1024)")
        add("--request-timeout", type=float, metavar="S", help="seconds after which a request ends with an error")
        add("--metrics-prefix", default="zoo", metavar="NAME", help="of /metrics; vllm lets its dashboards carry over")
    if name == "tune":
        add("--seconds", type=float, default=300.0, metavar="N", help="after which no further variant is tried (default: 300)")
        add("--write", metavar="FILE.yaml", help="put the choices into the tuning section of this hardware profile")
    if name == "bench":
        add("--requests", type=int, metavar="N", help="how many (default: 32)")
        add("--input-tokens", type=int, metavar="N", help="of each request (default: 128)")
        add("--output-tokens", type=int, metavar="N", help="of each request (default: 64)")
        add("--cases", metavar="LIST", help="several of these at once, input/output/requests: 128/128/64,1000/1000/32")
        add("--rate", type=float, metavar="R", help="requests a second, as a Poisson process (default: all at once)")
        add("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals")
        add("--plot", metavar="FILE.svg", help="draw throughput, its limit, and latencies")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="zoo", description="Engine Zoo: declarative LLM engines.")
    top.add_argument("--version", action="version", version=f"engine-zoo {__version__}")
    top.add_argument("--verbose", action="store_true", help="log what happens, to stderr")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, _, text) in COMMANDS.items():
        _arguments(name, commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a user's error, 2 for a wrong command line, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, stream=sys.stderr, format="zoo: %(message)s"
    )
    module, function, _ = COMMANDS[arguments.command]
    try:
        result: int | None = getattr(importlib.import_module(f"zoo.commands.{module}"), function)(arguments)
        sys.stdout.flush()
        return result or 0
    except ZooError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zoo: interrupted; nothing was left half-done", file=sys.stderr)
        return 130
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # what is still in stdout's buffer has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `zoo list | head` is no mistake
            print(f"zoo: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
