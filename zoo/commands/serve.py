"""``zoo serve``: one engine over HTTP."""

from __future__ import annotations

import argparse
import importlib.util
import json

from zoo.commands.output import stderr
from zoo.errors import UnavailableError


def serve(arguments: argparse.Namespace) -> int:
    """Serve until interrupted. SIGTERM and SIGINT let running requests finish (uvicorn's graceful shutdown)."""
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise UnavailableError("serving needs starlette and uvicorn; install them with `pip install 'engine-zoo[serve]'`")
    import uvicorn

    from zoo.llm import LLM
    from zoo.serving.openai import Server
    from zoo.serving.worker import Worker

    with LLM(arguments.ref, registry=arguments.registry, threads=arguments.threads) as llm:
        worker = Worker(llm.engine)
        app = Server(llm.ref.partition(":")[0], worker, llm.encode, llm.default_params()).app()
        where = f"http://{arguments.host}:{arguments.port}"
        if arguments.host not in ("127.0.0.1", "localhost", "::1"):
            stderr.print(
                f"zoo: {where} is open to other machines, and this server asks for no key", style="yellow", highlight=False
            )
        if arguments.json:
            print(json.dumps({"ref": llm.ref, "url": where}), flush=True)
        stderr.print(f"serving {llm.ref} at {where}/v1", highlight=False)
        try:
            uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning", timeout_graceful_shutdown=30)
        finally:
            worker.close()
    return 0
