"""Chat templates in a process of their own, with a limit on time and memory: a template is a program that came with a checkpoint.

Jinja's sandbox keeps a template from files and Python; it does not keep it from looping for hours or building gigabytes. So a
worker process renders, and one that takes too long is killed and replaced. The messages are data of the request and travel as
JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from zoo.errors import RequestError, ZooError

SECONDS = 2.0
MEMORY = 1 << 30  # bytes of address space beyond what the worker starts with
MAX_PROMPT = 16 << 20  # characters of a rendered prompt


class Templates:
    """Renders chats with one tokenizer folder's template. One at a time: templates take microseconds to milliseconds."""

    def __init__(self, folder: Path | None, seconds: float = SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._lock = asyncio.Lock()
        self._process: Any = None
        self._pipe: Connection | None = None

    async def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt. Raises RequestError for what the template refuses, and for one that takes too long."""
        async with self._lock:
            return await asyncio.get_running_loop().run_in_executor(None, self._render, messages, options)

    def _render(self, messages: Sequence[Mapping[str, Any]], options: dict[str, Any]) -> str:
        pipe = self._started()
        try:
            pipe.send((list(messages), options))
            if not pipe.poll(self._seconds):
                raise RequestError(f"the model's chat template took more than {self._seconds:g} s with these messages")
            good, text = pipe.recv()
        except (EOFError, OSError):
            self.close()
            raise RequestError("the model's chat template ended its process: too much memory, or too deep") from None
        except RequestError:
            self.close()
            raise
        if not good:
            raise RequestError(text)
        rendered: str = text
        return rendered

    def _started(self) -> Connection:
        if self._process is None or not self._process.is_alive() or self._pipe is None:
            self.close()
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, self._folder), name="zoo-templates", daemon=True)
            self._process.start()
            theirs.close()
            if not self._pipe.poll(60):  # imports, not the template
                raise RequestError("the process for chat templates does not start")
            self._pipe.recv()
        return self._pipe

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def _work(pipe: Connection, folder: Path | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from zoo.runtime.tokenizer import read_template

    template: Any = None
    problem = "this model has no chat template; use /v1/completions"
    with contextlib.suppress(EOFError, OSError):
        try:
            template = read_template(folder) if folder else None
        except ZooError as error:
            problem = str(error)
        with contextlib.suppress(ValueError, OSError):  # not every system lets itself be limited
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, resource.RLIM_INFINITY))
        pipe.send("started")
        while True:
            messages, options = pipe.recv()
            try:
                if template is None:
                    raise RequestError(problem)
                text = template.render(messages, **options)
                if len(text) > MAX_PROMPT:
                    raise RequestError(f"the chat template wrote {len(text)} characters; at most {MAX_PROMPT} are taken")
                pipe.send((True, text))
            except (ZooError, MemoryError, RecursionError) as error:
                pipe.send((False, str(error) or f"the model's chat template fails: {type(error).__name__}"))


def _address_space() -> int:
    """Bytes of address space that this process has."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 4 << 30
