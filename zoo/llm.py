"""``LLM``: a REF or a folder in, tokens out. Names and meanings follow vLLM's LLM API.

with LLM("zoo-demo") as llm:
    print(llm.generate("def main(")[0].outputs[0].text)
    for piece in llm.stream("def main("):
        print(piece.text, end="")
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from zoo.artifacts.registry import Entry, Opened, Registry, default_root
from zoo.artifacts.select import choose, describe_machine
from zoo.errors import CheckpointError, NotFoundError, RequestError
from zoo.runtime.abi import EngineLimits, Session
from zoo.runtime.engine import Engine
from zoo.runtime.request import CompletionOutput, Piece, RequestOutput, SamplingParams
from zoo.runtime.sessions import open_session
from zoo.runtime.tokenizer import GenerationConfig, Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
log = logging.getLogger("zoo")


class LLM:
    """One loaded engine.

    model            a REF, or a Hugging Face folder, which is built on demand and cached in the registry
    quant, hardware  of a folder: what to build, by default "none" and "cpu"; of a REF: only engines built for these
    registry         folder of the registry; by default the user's own
    threads          of a CPU engine; 0: all cores
    limits           of a folder: limits of the build (max_context=2048, max_sequences=8, ...); of a REF: lower limits than
                     the engine's own, for scheduling

    Safe to use from several threads: their requests share the engine's steps. Raises the ZooError of what is wrong.
    """

    def __init__(
        self,
        model: str | Path,
        quant: str | None = None,
        hardware: str | None = None,
        registry: str | Path | None = None,
        threads: int = 0,
        **limits: int,
    ) -> None:
        names = [field.name for field in dataclasses.fields(EngineLimits)]
        if unknown := sorted(set(limits) - set(names)):
            raise RequestError(f"LLM: unknown options {', '.join(unknown)}; limits are {', '.join(names)}")
        root = Path(registry) if registry is not None else default_root()
        store = Registry(root)
        ref: str | Entry = str(model)
        if Path(model).is_absolute() and not (Path(model) / "config.json").is_file():
            raise CheckpointError(f"{model}: there is no config.json; give a Hugging Face folder, or a REF: zoo list shows them")
        if (Path(model) / "config.json").is_file():
            from zoo.build import build_folder

            overrides = tuple(f"limits.{name}={value}" for name, value in limits.items())
            ref, limits = build_folder(Path(model), quant or "none", hardware or "cpu", root, overrides), {}
        elif quant or hardware:
            ref = _select(store, str(model), quant, hardware)
        opened = store.open(ref)
        try:
            session = open_session(opened.folder, opened.manifest, threads)
            try:
                self._start(session, opened.folder / "tokenizer", limits)
            except BaseException:
                session.close()
                raise
        except BaseException:
            opened.close()
            raise
        self.ref = opened.entry.ref
        self._opened: Opened | None = opened

    @classmethod
    def from_session(cls, session: Session, tokenizer_folder: Path | None = None, **limits: int) -> LLM:
        """An LLM over a session that is open already; ``close`` closes it. Without a tokenizer it takes token ids only."""
        llm = cls.__new__(cls)
        llm.ref, llm._opened = "", None
        llm._start(session, tokenizer_folder, limits)
        return llm

    def _start(self, session: Session, folder: Path | None, limits: dict[str, int]) -> None:
        present = folder is not None and (folder / "tokenizer.json").is_file()
        self.tokenizer = Tokenizer(folder) if folder is not None and present else None
        self._generation = GenerationConfig(folder, self.tokenizer) if folder is not None else None
        ends = self._generation.end_token_ids if self._generation else ()
        detokenizer = self.tokenizer.detokenizer if self.tokenizer else None
        self.engine = Engine(session, detokenizer, ends, _lower(session.limits, limits))
        self._lock = threading.Lock()
        self._inboxes: dict[str, deque[Piece]] = {}
        self._count = 0
        self._closed = False

    @property
    def limits(self) -> EngineLimits:
        """What the scheduler keeps to."""
        return self.engine.scheduler.limits

    def default_params(self) -> SamplingParams:
        """What ``generate`` uses when it is given no parameters: the model's generation_config.json over vLLM's defaults."""
        return self._generation.default_params() if self._generation else SamplingParams()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. Raises RequestError if the model came without a tokenizer."""
        return self._need_tokenizer("a text prompt").encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises RequestError if the model came without a tokenizer."""
        return self._need_tokenizer("decode").decode(token_ids, skip_special_tokens)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue prompts, all of them together, and give their outputs in order.

        prompts           a text, a list of token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``; or a list of such
        sampling_params   for all prompts, or one each; None: ``default_params()``

        Raises RequestError, before anything runs, for a prompt or parameter that cannot be served. A request that fails while
        it runs has the finish_reason "error"; the others go on.
        """
        texts, ids = self._prompts(prompts)
        params = self._params(sampling_params, len(ids))
        return self._complete(texts, ids, params, use_progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_progress: bool = False,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one chat (a list of ``{"role": ..., "content": ...}``) or a list of chats, with the model's chat template.

        ``template_options`` (add_generation_prompt, tools, ...) go to the template; see ``ChatTemplate.render``.
        """
        tokenizer = self._need_tokenizer("chat")
        chats: Any = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        texts = [tokenizer.render_chat(chat, **template_options) for chat in chats]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self._complete(list(texts), ids, self._params(sampling_params, len(ids)), use_progress)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Piece]:
        """Continue one prompt, piece by piece: ``.text`` and ``.token_ids`` are what is new, ``.finish_reason`` comes last.

        The pieces' texts joined are the text that ``generate`` gives. Closing the iterator early drops the request. Raises
        RequestError at once for what cannot be served, and from the iterator if the request fails while it runs.
        """
        _, [ids] = self._prompts([prompt])
        [params] = self._params(sampling_params, 1)
        if params.n != 1:
            raise RequestError(f"n is {params.n}; a stream gives one continuation")
        self._check(ids, params)
        return self._stream(ids, params)

    def _stream(self, ids: list[int], params: SamplingParams) -> Iterator[Piece]:
        with closing(self._run({self._new_id(): (ids, params)})) as pieces:
            for piece in pieces:
                if piece.error is not None:
                    raise RequestError(piece.error)
                yield piece

    def close(self) -> None:
        """Drop all requests and free the engine. Calling it twice is allowed."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.engine.close()
                if self._opened is not None:
                    self._opened.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _complete(
        self, texts: list[str | None], ids: list[list[int]], params: list[SamplingParams], progress: bool
    ) -> list[RequestOutput]:
        requests: dict[str, tuple[list[int], SamplingParams]] = {}
        places: dict[str, CompletionOutput] = {}
        outputs = []
        for prompt, tokens, wanted in zip(texts, ids, params, strict=True):
            self._check(tokens, wanted)
            name = self._new_id()
            completions = [CompletionOutput(index) for index in range(wanted.n)]
            outputs.append(RequestOutput(name, prompt, tokens, completions))
            for index, completion in enumerate(completions):
                seed = None if wanted.seed is None else int(wanted.seed) + index
                child = name if wanted.n == 1 else f"{name}-{index}"
                requests[child] = (tokens, dataclasses.replace(wanted, n=1, seed=seed))
                places[child] = completion
        texts_of: dict[str, list[str]] = {name: [] for name in places}
        with closing(self._run(requests)) as pieces:
            for piece in _with_progress(pieces, len(requests)) if progress else pieces:
                texts_of[piece.request_id].append(piece.text)
                _extend(places[piece.request_id], piece)
        for name, completion in places.items():
            completion.text = "".join(texts_of[name])
        return outputs

    def _run(self, requests: Mapping[str, tuple[list[int], SamplingParams]]) -> Generator[Piece]:
        """Pieces of these requests until all have finished. Whoever waits for pieces steps the engine, for all callers."""
        inbox: deque[Piece] = deque()
        try:
            with self._lock:
                self._need_open()
                for name, (ids, params) in requests.items():
                    self.engine.add_request(name, ids, params)
                    self._inboxes[name] = inbox
            left = len(requests)
            while left:
                with self._lock:
                    if not inbox:
                        self._need_open()
                        self._step()
                while inbox:
                    piece = inbox.popleft()
                    left -= piece.finished
                    yield piece
        finally:
            with self._lock:
                for name in requests:
                    self.engine.abort(name)
                    self._inboxes.pop(name, None)

    def _step(self) -> None:
        try:
            for piece in self.engine.step():
                self._inboxes[piece.request_id].append(piece)
        except BaseException as error:
            # The requests of that step are gone. Other callers learn it from their inboxes, this one from the error.
            for name, inbox in self._inboxes.items():
                if name not in self.engine.scheduler:
                    inbox.append(
                        Piece(name, "", [], finish_reason="error", error=f"request {name!r}: the engine failed: {error}")
                    )
            raise

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        self._need_open()
        self.engine.check(ids, params)

    def _need_open(self) -> None:
        if self._closed:
            raise RequestError("this LLM is closed; open another one")

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and this model came without tokenizer.json; use token ids")
        return self.tokenizer

    def _new_id(self) -> str:
        with self._lock:
            self._count += 1
            return str(self._count - 1)

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.default_params()] * count
        if len(given) != count:
            raise RequestError(f"{count} prompts, but {len(given)} sampling_params; give one for all or one each")
        return list(given)

    def _prompts(self, prompts: Any) -> tuple[list[str | None], list[list[int]]]:
        """Texts (None where token ids were given) and token ids."""
        if not isinstance(prompts, str | Mapping | Sequence | np.ndarray):
            raise RequestError(f"prompts are {prompts!r}; give a text, token ids, or a list of them")
        if isinstance(prompts, str | Mapping) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            prompts = [prompts]
        if not len(prompts):
            raise RequestError("there is no prompt: give a text, token ids, or a list of them")
        pairs = [self._prompt(index, prompt) for index, prompt in enumerate(prompts)]
        return [text for text, _ in pairs], [ids for _, ids in pairs]

    def _prompt(self, index: int, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            given = prompt.get("prompt_token_ids")
            prompt = prompt.get("prompt") if given is None else given
        if isinstance(prompt, str):
            ids = self.encode(prompt) if prompt else []
            if not ids:
                raise RequestError(f"prompt {index} is empty: give some text, or token ids")
            return prompt, ids
        if not isinstance(prompt, Iterable):
            raise RequestError(f"prompt {index} is {prompt!r}; it must be a text or a list of token ids")
        tokens = list(prompt)
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise RequestError(f"prompt {index} has {token!r}; token ids are whole numbers")
        if not tokens:
            raise RequestError(f"prompt {index} is empty: give at least one token id")
        return None, [int(token) for token in tokens]


def _extend(completion: CompletionOutput, piece: Piece) -> None:
    completion.token_ids += piece.token_ids
    if piece.logprobs is not None:
        completion.logprobs = (completion.logprobs or []) + piece.logprobs
        gained = sum(entry[token] for entry, token in zip(piece.logprobs, piece.token_ids, strict=True))
        completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + gained
    if piece.finished:
        completion.finish_reason, completion.stop_reason, completion.error = piece.finish_reason, piece.stop_reason, piece.error
        if piece.error is not None:
            log.error(piece.error)


def _with_progress(pieces: Iterable[Piece], requests: int) -> Iterator[Piece]:
    """Pass pieces on beside a progress bar of finished requests, on stderr."""
    from rich.console import Console
    from rich.progress import track

    tokens = 0
    shown = iter(track(range(requests), "generating", console=Console(stderr=True)))
    next(shown, None)
    for piece in pieces:
        tokens += len(piece.token_ids)
        yield piece
        if piece.finished:
            next(shown, None)


def _select(store: Registry, ref: str, quant: str | None, hardware: str | None) -> Entry:
    """The best engine for this machine among those of a REF that were built so."""
    found = [entry for entry in store.entries(ref) if entry.current]
    fitting = [e for e in found if quant in (None, e.get("quant")) and hardware in (None, e.get("hardware"))]
    if not fitting:
        have = ", ".join(entry.profile for entry in found)
        raise NotFoundError(f"REF {ref!r}: no engine with quant={quant or 'any'}, hardware={hardware or 'any'}; there are {have}")
    latest = [entry for entry in fitting if entry.version == fitting[-1].version]
    return choose(latest, describe_machine(), ref)


def _lower(limits: EngineLimits, wanted: Mapping[str, int]) -> EngineLimits:
    for name, value in wanted.items():
        own = getattr(limits, name)
        if not 1 <= value <= own or (name == "block_size" and value != own):
            raise RequestError(f"{name} is {value}, but the engine was built with {own}; build it again to change that")
    return dataclasses.replace(limits, **wanted)
