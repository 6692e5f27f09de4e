"""A real registry (Debian's docker-registry) on a free port, and a proxy in front of it that can misbehave on demand."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

USER, PASSWORD = "builder", "correct horse"


def need(*programs: str) -> None:
    """Skip when a program is missing; in CI (ZOO_CI=1) that is a failure, so that nothing is left untested unseen."""
    if missing := [program for program in programs if not shutil.which(program)]:
        message = f"not installed: {', '.join(missing)} (Debian: docker-registry, skopeo, apache2-utils)"
        if os.environ.get("ZOO_CI") == "1":
            pytest.fail(message)
        pytest.skip(message)


@dataclass
class RealRegistry:
    """A running docker-registry."""

    host: str
    storage: Path

    def blob(self, digest: str) -> Path:
        """Where the server keeps a blob."""
        name = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


@contextmanager
def running_registry(login: bool) -> Iterator[RealRegistry]:
    """Start docker-registry with file storage, in memory where there is such a folder; stop it in the end.

    ``login``: it knows one user. Checking a password takes it 15 ms a request, so most tests do without.
    """
    need("docker-registry", "htpasswd")
    folder = Path(tempfile.mkdtemp(prefix="zoo-registry-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    users = subprocess.run(["htpasswd", "-Bbn", "-C", "4", USER, PASSWORD], capture_output=True, text=True, check=True).stdout
    (folder / "htpasswd").write_text(users)
    (folder / "config.yml").write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/storage}}}}\n"
        f"http: {{addr: '{host}'}}\n" + (f"auth: {{htpasswd: {{realm: zoo, path: {folder}/htpasswd}}}}\n" if login else "")
    )
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{host}/", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        yield RealRegistry(host, folder / "storage")
    finally:
        server.terminate()
        server.wait(10)
        shutil.rmtree(folder)


@dataclass
class Request:
    """What the proxy saw. ``number`` counts requests of this method to this path."""

    method: str
    path: str
    headers: dict[str, str]
    number: int


@dataclass
class Fault:
    """What to do instead of passing a request on: answer with a status, or cut the connection after some bytes."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_answer: int = -1  # bytes of the answer's body that get through
    cut_request: int = -1  # bytes of the request's body that get through
    lose_answer: bool = False  # the registry does it, and nobody hears of it


class QuietServer(ThreadingHTTPServer):
    """Says nothing of connections that clients drop: tests drop many."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Proxy:
    """An HTTP proxy for one registry. ``fault`` decides for each request; ``seen`` keeps them all."""

    def __init__(self, upstream: str) -> None:
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.seen: list[Request] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                number = sum(one.method == self.command and one.path == self.path for one in proxy.seen) + 1
                request = Request(self.command, self.path, dict(self.headers), number)
                proxy.seen.append(request)
                fault = proxy.fault(request) or Fault()
                length = int(self.headers.get("Content-Length", 0))
                if fault.status:
                    self.rfile.read(length)
                    self.send_response(fault.status)
                    for key, value in (fault.headers | {"Content-Length": str(len(fault.body))}).items():
                        self.send_header(key, value)
                    self.end_headers()
                    self.wfile.write(fault.body)
                    return
                body = self.rfile.read(length if fault.cut_request < 0 else min(length, fault.cut_request))
                connection = http.client.HTTPConnection(upstream, timeout=30)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for key, value in self.headers.items():
                    connection.putheader(key, value)
                connection.endheaders(body)
                if fault.cut_request >= 0:
                    connection.close()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                if fault.lose_answer:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in ("content-length", "transfer-encoding", "date", "connection"):
                        self.send_header(key, value)
                if self.command == "HEAD":
                    self.send_header("Content-Length", answer.headers.get("Content-Length", "0"))
                    self.end_headers()
                    return
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault.cut_answer >= 0:
                    self.wfile.write(data[: fault.cut_answer])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.wfile.write(data)

            do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = handle_any

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def count(self, method: str, part: str) -> int:
        """How many requests of a method had a text in their path."""
        return sum(one.method == method and part in one.path for one in self.seen)
