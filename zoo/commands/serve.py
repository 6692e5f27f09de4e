"""``zoo serve``: one engine over HTTP."""

from __future__ import annotations

import argparse
import importlib.util
import json
import socket

from zoo.commands.output import stderr
from zoo.errors import RequestError, UnavailableError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(arguments: argparse.Namespace) -> int:
    """Serve until interrupted. SIGTERM and SIGINT let running requests finish (uvicorn's graceful shutdown)."""
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise UnavailableError("serving needs starlette and uvicorn; install them with `pip install 'engine-zoo[serve]'`")
    import uvicorn

    from zoo.llm import LLM
    from zoo.serving.openai import Server
    from zoo.serving.worker import Worker

    try:
        listener = socket.create_server((arguments.host, arguments.port), family=_family(arguments.host))
    except OSError as error:
        raise RequestError(
            f"cannot listen at {arguments.host}:{arguments.port}: {error.strerror}; choose --host and --port"
        ) from None
    with (
        listener,
        LLM(arguments.ref, registry=arguments.registry, threads=arguments.threads, checkpoint=arguments.checkpoint) as llm,
    ):
        worker = Worker(llm.engine)
        app = Server(llm.ref.partition(":")[0], worker, llm.encode, llm.default_params()).app()
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        where = f"http://{host}:{listener.getsockname()[1]}"
        if arguments.host not in LOOPBACK:
            stderr.print(
                f"zoo: {where} is open to other machines, and this server asks for no key", style="yellow", highlight=False
            )
        if arguments.json:
            print(json.dumps({"ref": llm.ref, "url": where}), flush=True)
        stderr.print(f"serving {llm.ref} at {where}/v1", highlight=False)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            worker.close()
    return 0


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
