"""The narrow server over real HTTP: models, text, token ids, a stream, errors in OpenAI's shape."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zoo.artifacts.registry import Registry
from zoo.build import build
from zoo.config import compose

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("home")
    build(compose(["models=zoo-demo", "hardware=cpu", "limits.max_context=256"]), Registry(home / "registry"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "zoo.cli", "serve", "zoo-demo", "--port", str(port), "--threads", "1"]
    server = subprocess.Popen(command, env={**os.environ, "ZOO_HOME": str(home)}, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, server.stderr and server.stderr.read()
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        assert server.wait(timeout=40) in (0, -15)


def post(base: str, body: Any) -> tuple[int, str]:
    request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_models(base: str) -> None:
    with urllib.request.urlopen(f"{base}/v1/models", timeout=5) as response:
        assert json.load(response)["data"][0]["id"] == "zoo-demo"


def test_a_stream_gives_the_text_of_a_plain_answer(base: str) -> None:
    body = {"model": "zoo-demo", "prompt": ["def ", "class "], "max_tokens": 6, "temperature": 0}
    status, text = post(base, body)
    data = json.loads(text)
    assert status == 200 and data["usage"]["completion_tokens"] == 12 and len(data["choices"]) == 2
    status, stream = post(base, {**body, "prompt": "def ", "stream": True, "stream_options": {"include_usage": True}})
    events = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
    assert status == 200 and events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2]) == data["choices"][0]["text"]
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 6


def test_another_model_is_not_found(base: str) -> None:
    status, text = post(base, {"prompt": "x", "model": "other"})
    error = json.loads(text)["error"]
    assert status == 404 and error["code"] == "model_not_found" and "other" in error["message"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "temprature": 0}, "temprature"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1, 2], "x", 3.5]}, "prompt"),
        ({"prompt": [10**9]}, "token id"),
        ({"prompt": "x", "n": 3, "best_of": 2}, "best_of is 2"),
        ([1, 2], "object"),
    ],
)
def test_bad_bodies_are_refused_in_openai_shape(base: str, body: Any, word: str) -> None:
    status, text = post(base, body)
    error = json.loads(text)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and word in error["message"]


def test_a_client_that_goes_away_takes_nothing_with_it(base: str) -> None:
    host, port = base.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "def ", "max_tokens": 200, "ignore_eos": True, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    status, text = post(base, {"prompt": "def ", "max_tokens": 4})
    assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 4
