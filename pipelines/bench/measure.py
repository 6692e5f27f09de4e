"""Time and peak memory of child processes, and workers that are asked one thing after another.

Memory is reported twice: ``rss`` counts every resident page, pages of mapped files too, which the system can take back at
any time; ``anonymous`` counts what the process alone holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL = 0.01  # seconds between two looks at a process


@dataclass(frozen=True)
class Measured:
    """What one process took. Sizes in bytes."""

    seconds: float
    rss: int
    anonymous: int


class Watcher:
    """Looks at a process and its descendants until it is told to stop; keeps the largest sums it saw."""

    def __init__(self, pid: int) -> None:
        self.pid, self.rss, self.anonymous = pid, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            rss = anonymous = 0
            for pid in family(self.pid):
                status = read_status(pid)
                rss += status.get("VmRSS", 0)
                anonymous += status.get("RssAnon", 0)
            self.rss, self.anonymous = max(self.rss, rss), max(self.anonymous, anonymous)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def read_status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes; empty when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines) if rest.endswith(" kB")}


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            threads = list(Path(f"/proc/{parent}/task").iterdir())
            for thread in threads:
                found.extend(int(child) for child in (thread / "children").read_text().split())
        except OSError:
            continue
    return found


def run(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> Measured:
    """Run a command to its end; its output goes into ``log``. CalledProcessError with the log's end when it fails."""
    with log.open("wb") as out:
        started = time.perf_counter()
        process = subprocess.Popen(list(command), stdout=out, stderr=subprocess.STDOUT, env=os.environ | (env or {}))
        watcher = Watcher(process.pid)
        code = process.wait()
        seconds = time.perf_counter() - started
        watcher.stop()
    if code:
        raise subprocess.CalledProcessError(code, list(command), output=log.read_text(errors="replace")[-3000:])
    return Measured(seconds, watcher.rss, watcher.anonymous)


class Worker:
    """A child that reads a JSON line {"do": ..., ...} and answers with one. Memory is watched from its start."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | (env or {}),
        )
        self._watcher = Watcher(self._process.pid)
        self.ready = self._answer()

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print on stdout, too
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"worker {self._process.args} ended with {self._process.wait()}; see {self._log.name}")

    @property
    def peak(self) -> Measured:
        return Measured(0.0, self._watcher.rss, self._watcher.anonymous)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)
        self._watcher.stop()
        self._log.close()
