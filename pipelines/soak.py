"""Thousands of requests at a server, many of them hostile, and what is left afterwards.

    python -m pipelines.soak [--requests 10000] [--clients 64] [--model zoo-demo] [--seed 0]

Starts `zoo serve` of a CPU engine, and sends, from many clients at once: completions of random lengths, whole and streamed;
streams that are read for a while and dropped; requests whose connection is closed before the answer; bodies that are wrong;
deadlines that are too short; requests with n, seeds and penalties. A greedy request's text must be what the same request gave
when it was alone; the pieces of a stream must join to the text of the whole answer, with as many tokens as usage says. In the
end the cache must be empty, nothing may wait, and the processes' memory must be flat: it is read from /proc at ten points, after
the first tenth.

Prints a table for docs/reliability.md. Exit code 1 when anything was lost, doubled or left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

PROMPTS = ["def main(", "import os\n", "class Tree:", "for i in range(", "return self.", "x = [", "# ", "if not "]
KINDS = {"whole": 30, "stream": 30, "drop": 15, "gone": 8, "bad": 7, "deadline": 5, "many": 5}
LEFT = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
BAD: tuple[bytes, ...] = (
    b"", b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "x", "max_tokens": -1}', b'{"prompt": "x", "temperature": "hot"}',
    b'{"prompt": "' + b"x" * 100_000 + b'"}', b'{"prompt": [999999999]}', b'{"prompt": "x", "nonsense": 1}', b"\xff\xfe\x00",
)  # fmt: skip


class Soak:
    """One run: what was sent, what came back, and what was wrong."""

    def __init__(self, base: str, seed: int) -> None:
        self.base, self.random = base, random.Random(seed)  # noqa: S311
        self.client = httpx.AsyncClient(base_url=base, timeout=120, limits=httpx.Limits(max_connections=None))
        self.expected: dict[tuple[str, int], tuple[str, int]] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.tokens = 0

    async def learn(self) -> None:
        """What each greedy request gives when it is alone."""
        for prompt in PROMPTS:
            for length in (1, 7, 24, 60):
                answer = (await self.client.post("/v1/completions", json=self.body(prompt, length))).json()
                self.expected[prompt, length] = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    def body(self, prompt: str, length: int, **more: Any) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": length, "temperature": 0, **more}

    async def one(self) -> None:
        kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
        prompt, length = self.random.choice(list(self.expected))
        try:
            await getattr(self, kind)(prompt, length)
            self.counts[kind] += 1
        except httpx.HTTPError as error:
            self.wrong.append(f"{kind}: {type(error).__name__}: {error}")

    def compare(self, kind: str, prompt: str, length: int, text: str, tokens: int) -> None:
        self.tokens += tokens
        if (text, tokens) != self.expected[prompt, length]:
            self.wrong.append(f"{kind} {prompt!r} x {length}: {text!r} ({tokens}), alone {self.expected[prompt, length]!r}")

    async def whole(self, prompt: str, length: int) -> None:
        answer = await self.client.post("/v1/completions", json=self.body(prompt, length))
        if answer.status_code == 429:
            self.counts["429"] += 1
            return
        data = answer.json()
        self.compare("whole", prompt, length, data["choices"][0]["text"], data["usage"]["completion_tokens"])

    async def stream(self, prompt: str, length: int, until: int | None = None) -> None:
        body = self.body(prompt, length, stream=True, stream_options={"include_usage": True})
        text, tokens, ends, events = "", -1, 0, 0
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                events += 1
                chunk = json.loads(line[6:])
                if chunk["choices"]:
                    text += chunk["choices"][0]["text"]
                    ends += chunk["choices"][0]["finish_reason"] is not None
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                if until is not None and events >= until:
                    return
        if until is None:
            self.compare("stream", prompt, length, text, tokens)
            if ends != 1:
                self.wrong.append(f"stream {prompt!r} x {length}: {ends} ends")

    async def drop(self, prompt: str, length: int) -> None:
        await self.stream(prompt, max(length, 24), until=self.random.randint(1, 6))

    async def gone(self, prompt: str, length: int) -> None:
        """The connection is closed before the answer can be there."""
        _, writer = await asyncio.open_connection(*self.base.removeprefix("http://").split(":"))
        data = json.dumps(self.body(prompt, 200)).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data[: self.random.choice([len(data), len(data) // 2])])
        await writer.drain()
        await asyncio.sleep(self.random.random() * 0.2)
        writer.close()

    async def bad(self, prompt: str, length: int) -> None:
        answer = await self.client.post("/v1/completions", content=self.random.choice(BAD))
        if answer.status_code != 400 or not answer.json()["error"]["message"]:
            self.wrong.append(f"bad body: {answer.status_code} {answer.text[:200]}")

    async def deadline(self, prompt: str, length: int) -> None:
        answer = await self.client.post("/v1/completions", json=self.body(prompt, 250, ignore_eos=True, timeout=0.02))
        if answer.status_code not in (200, 429, 504):
            self.wrong.append(f"deadline: {answer.status_code} {answer.text[:200]}")

    async def many(self, prompt: str, length: int) -> None:
        body = {"prompt": [prompt, prompt], "n": 2, "max_tokens": length, "temperature": 1, "seed": 5, "presence_penalty": 0.5}
        answer = await self.client.post("/v1/completions", json=body)
        if answer.status_code == 429:
            self.counts["429"] += 1
            return
        texts = [choice["text"] for choice in answer.json()["choices"]]
        self.tokens += answer.json()["usage"]["completion_tokens"]
        if len(texts) != 4 or texts[:2] != texts[2:]:
            self.wrong.append(f"seeded: {texts!r}")

    async def gauges(self) -> dict[str, float]:
        text = (await self.client.get("/metrics")).text
        return {name: float(value) for name, value in re.findall(r"^zoo:(\w+)\{[^}]*\} ([\d.e+-]+)$", text, re.MULTILINE)}


def memory(root: int) -> dict[str, int]:
    """Resident bytes of a process and of those below it, by kind."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        pid, parent = int(fields["Pid"]), int(fields["PPid"])
        if root in (pid, parent) and "VmRSS" in fields:
            found["server" if pid == root else f"child {pid}"] = int(fields["VmRSS"].split()[0]) * 1024
    return found


async def run(arguments: argparse.Namespace, base: str, pid: int) -> int:
    soak = Soak(base, arguments.seed)
    await soak.learn()
    left, readings, started = arguments.requests, [], time.monotonic()

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            if left % max(arguments.requests // 10, 1) == 0:
                readings.append(memory(pid))
            await soak.one()

    await asyncio.gather(*(client() for _ in range(arguments.clients)))
    seconds = time.monotonic() - started
    for _ in range(100):
        gauges = await soak.gauges()
        if not gauges["num_requests_running"] and not gauges["num_requests_waiting"]:
            break
        await asyncio.sleep(0.1)
    last = memory(pid)
    for name in LEFT:
        if gauges[name]:
            soak.wrong.append(f"{name} is {gauges[name]} when nothing runs")
    growth = {name: last[name] - readings[1][name] for name in last if len(readings) > 1 and name in readings[1]}
    rows = {
        "requests": f"{arguments.requests:,} by {arguments.clients} clients in {seconds:.0f} s",
        "of them": ", ".join(f"{count:,} {kind}" for kind, count in sorted(soak.counts.items())),
        "tokens of answers": f"{soak.tokens:,}",
        "preemptions": f"{gauges['num_preemptions_total']:.0f}",
        "lost, doubled, wrong": str(len(soak.wrong)),
        "left: cache, running, waiting": ", ".join(f"{gauges[name]:g}" for name in LEFT),
    }
    for name, grown in growth.items():
        rows[f"memory, {name}"] = f"{last[name] / 1e6:.0f} MB, {grown / 1e6:+.1f} MB since the first tenth"
    print("| what | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items()), sep="\n")
    for line in soak.wrong[:20]:
        print(line, file=sys.stderr)
    await soak.client.aclose()
    return 1 if soak.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", default="zoo-demo")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "zoo.cli", "serve", arguments.model, "--port", "0", "--json"]
    subprocess.run(
        [sys.executable, "-m", "zoo.cli", "engines", f"models={arguments.model}", "hardware=cpu", "--json"],
        stdout=subprocess.DEVNULL,
    )
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        line = server.stdout.readline()
        if not line:
            return server.wait(60) or 1  # it said why
        base = json.loads(line)["url"]
        return asyncio.run(run(arguments, base, server.pid))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    raise SystemExit(main())
