"""``zoo serve``: one engine over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import socket
from pathlib import Path
from typing import Any

from zoo.commands.output import stderr
from zoo.errors import RequestError, UnavailableError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NEEDS = ("starlette", "uvicorn", "pydantic", "prometheus_client")
DRAIN = 30  # seconds that running requests have to finish in
MAX_HEADERS = 64 << 10  # bytes of a request's line and headers


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT: then nothing new is taken, and what runs has DRAIN seconds to finish."""
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise UnavailableError(
            f"serving needs {', '.join(missing)}; install what is missing with `pip install 'engine-zoo[serve]'`"
        )
    keys = [key for key in (arguments.api_key or os.environ.get("ZOO_API_KEY", "").split(",")) if key]
    try:
        listener = socket.create_server((arguments.host, arguments.port), family=_family(arguments.host))
    except OSError as error:
        raise RequestError(
            f"cannot listen at {arguments.host}:{arguments.port}: {error.strerror}; choose --host and --port"
        ) from None
    with listener:
        asyncio.run(_serve(arguments, listener, keys))
    return 0


async def _serve(arguments: argparse.Namespace, listener: socket.socket, keys: list[str]) -> None:
    import uvicorn

    from zoo.serving.app import application
    from zoo.serving.client import EngineClient, NotReady
    from zoo.serving.frontend import Frontend
    from zoo.serving.host import EngineOptions
    from zoo.serving.metrics import Metrics
    from zoo.serving.templates import Templates

    registry = Path(arguments.registry) if arguments.registry else None
    checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else None
    engine = EngineClient(EngineOptions(arguments.ref, registry, arguments.threads, checkpoint), arguments.max_waiting)
    templates = None

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            engine.draining = True  # /ready says so, and requests on connections that are open already are refused
            super().handle_exit(sig, frame)

    try:
        try:
            facts = await engine.start()
        except NotReady as error:
            raise UnavailableError(str(error)) from None
        templates = Templates(facts.tokenizer_folder)
        metrics = Metrics(facts.ref.partition(":")[0], lambda: engine.gauges, arguments.metrics_prefix)
        engine.observer = metrics
        front = Frontend(engine, facts, metrics, templates, arguments.request_timeout)
        _announce(arguments, facts.ref, listener, bool(keys))
        config = uvicorn.Config(
            application(front, keys),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=DRAIN,
            http="h11",
            h11_max_incomplete_event_size=MAX_HEADERS,
            server_header=False,
        )
        await Server(config).serve(sockets=[listener])
    finally:
        if templates:
            templates.close()
        await engine.close()


def _announce(arguments: argparse.Namespace, ref: str, listener: socket.socket, keys: bool) -> None:
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    where = f"http://{host}:{listener.getsockname()[1]}"
    if arguments.host not in LOOPBACK and not keys:
        stderr.print(
            f"zoo: {where} is open to other machines and asks for no key; set --api-key or ZOO_API_KEY",
            style="yellow",
            highlight=False,
        )
    if arguments.json:
        print(json.dumps({"ref": ref, "url": where}), flush=True)
    stderr.print(f"serving {ref} at {where}/v1", highlight=False)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
