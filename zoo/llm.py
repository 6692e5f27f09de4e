"""``LLM``: a REF or a folder in, tokens out, or of an encoder embeddings. Names and meanings follow vLLM's LLM API.

with LLM("zoo-demo") as llm:
    print(llm.generate("def main(")[0].outputs[0].text)
    for piece in llm.stream("def main("):
        print(piece.text, end="")
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from zoo.artifacts.refs import Ref
from zoo.artifacts.registry import Entry, Opened, Registry, default_root
from zoo.artifacts.select import Needs, choose, describe_machine, why_not
from zoo.errors import ArtifactError, CheckpointError, IncompatibleError, NotFoundError, RequestError
from zoo.runtime.abi import EngineLimits, Session
from zoo.runtime.embedding import Embedder, EmbeddingOutput, EncoderSession, encoder_session
from zoo.runtime.engine import Engine
from zoo.runtime.grammar import Grammars
from zoo.runtime.progress import with_progress
from zoo.runtime.prompts import Prompt, read_params, read_prompts
from zoo.runtime.request import CompletionOutput, Piece, RequestOutput, SamplingParams, unfold
from zoo.runtime.sessions import check_threads, open_encoder, open_session
from zoo.runtime.tokenizer import GenerationConfig, Tokenizer
from zoo.spec import BuildSpec

log = logging.getLogger("zoo")


class LLM:
    """One loaded engine.

    model            a REF, or a Hugging Face folder, which is built on demand and cached in the registry. A Path, and a text
                     with a slash, is a folder; a bare name is the REF of a stored model if there is one, else a folder:
                     "gqa" is the stored model, "./gqa" the folder beside it
    quant, hardware  of a folder: what to build, by default "none" and "cpu"; of a REF: only engines built for these
    registry         folder of the registry; by default the user's own
    threads          of a CPU engine, at most 4 for each core; 0: all cores
    checkpoint       of an engine that was built without one: the Hugging Face folder it is served with
    limits           of a folder: limits of the build (max_context=2048, max_sequences=8, ...); of a REF: lower limits than
                     the engine's own, for scheduling; with fewer max_blocks less of the KV pools is ever touched

    Safe to use from several threads: their requests share the engine's steps. Raises the ZooError of what is wrong.
    """

    def __init__(
        self,
        model: str | Path,
        quant: str | None = None,
        hardware: str | None = None,
        registry: str | Path | None = None,
        threads: int = 0,
        checkpoint: str | Path | None = None,
        **limits: int,
    ) -> None:
        _check_options(model, threads, limits)
        root = Path(registry) if registry is not None else default_root()
        store = Registry(root)
        ref: str | Entry = str(model)
        if _is_folder(model, store):
            from zoo.build import build_folder

            overrides = tuple(f"limits.{name}={value}" for name, value in limits.items())
            ref, limits = build_folder(Path(model), quant or "none", hardware or "cpu", root, overrides, _check_machine), {}
        elif quant or hardware:
            ref = _select(store, str(model), quant, hardware)
        opened = store.open(ref)
        try:
            folder = Path(checkpoint) if checkpoint is not None else None
            session: Session | EncoderSession
            if opened.manifest.pooling:
                session = open_encoder(opened.folder, opened.manifest, threads, folder)
            else:
                session = open_session(opened.folder, opened.manifest, threads, limits.get("max_blocks", 0), folder)
            try:
                self._start(session, folder or opened.folder / "tokenizer", limits)
            except BaseException:
                session.close()
                raise
        except BaseException:
            opened.close()
            raise
        self.ref = opened.entry.ref
        self._opened: Opened | None = opened

    @classmethod
    def from_session(cls, session: Session | EncoderSession, tokenizer_folder: Path | None = None, **limits: int) -> LLM:
        """An LLM over a session that is open already; ``close`` closes it. Without a tokenizer it takes token ids only."""
        llm = cls.__new__(cls)
        llm.ref, llm._opened = "", None
        llm._start(session, tokenizer_folder, limits)
        return llm

    def _start(self, session: Session | EncoderSession, folder: Path | None, limits: dict[str, int]) -> None:
        present = folder is not None and (folder / "tokenizer.json").is_file()
        self.tokenizer = Tokenizer(folder) if folder is not None and present else None
        self._generation = GenerationConfig(folder, self.tokenizer) if folder is not None else None
        ends = self._generation.end_token_ids if self._generation else ()
        detokenizer = self.tokenizer.detokenizer if self.tokenizer else None
        lower, encoder = _lower(session.limits, limits), encoder_session(session)
        file = folder / "tokenizer.json" if folder is not None and present else None
        grammars = functools.partial(Grammars, file, session.vocab_size, ends) if file is not None and not encoder else None
        self._runner = (
            Embedder(encoder, lower) if encoder else Engine(cast(Session, session), detokenizer, ends, lower, grammars=grammars)
        )
        self._lock = threading.Lock()
        self._inboxes: dict[str, deque[Piece]] = {}
        self._count = 0
        self._closed = False

    @property
    def engine(self) -> Engine:
        """The loop that generates. RequestError for an encoder, which has none."""
        if isinstance(self._runner, Embedder):
            raise RequestError(
                f"{self.ref or 'this model'} is an encoder: it generates nothing; use LLM.embed, or `zoo embed REF TEXT ...`"
            )
        return self._runner

    @property
    def limits(self) -> EngineLimits:
        """What a step keeps to. An encoder has no rows and no blocks: theirs are 0."""
        return self._runner.limits if isinstance(self._runner, Embedder) else self._runner.scheduler.limits

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
        _ = self.engine  # an encoder is told so before its prompt is looked at
        texts, ids = read_prompts(prompts, self.encode)
        params = read_params(sampling_params, len(ids), self.default_params)
        return self._complete(texts, ids, params, use_progress)

    def embed(self, prompts: Prompt | Sequence[Prompt], normalize: bool = True) -> list[EmbeddingOutput]:
        """The embeddings of prompts, in order: ``.embedding`` [E] float32, ``.prompt_token_ids``. For encoders.

        prompts     as of ``generate``; texts get the special tokens that the model's tokenizer adds
        normalize   give vectors of length 1, so that their products are cosines

        Raises RequestError, before anything runs, for a prompt that is too long or empty, and for a model that is no encoder.
        """
        if not isinstance(self._runner, Embedder):
            raise RequestError(
                f"{self.ref or 'this model'} is a decoder: it gives no embeddings; use LLM.generate, or embed with an encoder"
            )
        self._need_open()
        texts, ids = read_prompts(prompts, self.encode)
        found = self._runner.embed(ids, normalize)
        return [EmbeddingOutput(*one) for one in zip(texts, ids, found, strict=True)]

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
        _ = self.engine
        tokenizer = self._need_tokenizer("chat")
        chats: Any = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        texts = [tokenizer.render_chat(chat, **template_options) for chat in chats]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self._complete(list(texts), ids, read_params(sampling_params, len(ids), self.default_params), use_progress)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Piece]:
        """Continue one prompt, piece by piece: ``.text`` and ``.token_ids`` are what is new, ``.finish_reason`` comes last.

        The pieces' texts joined are the text that ``generate`` gives. Closing the iterator early drops the request. Raises
        RequestError at once for what cannot be served, and from the iterator if the request fails while it runs.
        """
        _ = self.engine
        _, [ids] = read_prompts([prompt], self.encode)
        [params] = read_params(sampling_params, 1, self.default_params)
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
                self._runner.close()
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
            for index, (completion, one) in enumerate(zip(completions, unfold(wanted, wanted.n), strict=True)):
                child = name if wanted.n == 1 else f"{name}-{index}"
                requests[child] = (tokens, one)
                places[child] = completion
        texts_of: dict[str, list[str]] = {name: [] for name in places}
        with closing(self._run(requests)) as pieces:
            for piece in with_progress(pieces, len(requests)) if progress else pieces:
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
            while left > 0:
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
                if piece.finished:  # what goes wrong later is not this request's
                    del self._inboxes[piece.request_id]
        except BaseException as error:
            # A bug or an interrupt (what a session raises comes as pieces). The requests of that step are gone: other
            # callers learn it from their inboxes, this one from the error.
            for name in [name for name in self._inboxes if name not in self.engine.scheduler]:
                failed = f"request {name!r}: the engine failed: {error}"
                self._inboxes.pop(name).append(Piece(name, "", [], finish_reason="error", error=failed))
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


def _check_options(model: object, threads: int, limits: Mapping[str, object]) -> None:
    """Raise RequestError for arguments that cannot mean anything, before a file is read."""
    if not isinstance(model, str | Path) or not str(model):
        raise RequestError(f"LLM: the model is {model!r}; give a REF (zoo list shows them) or a Hugging Face folder")
    names = [field.name for field in dataclasses.fields(EngineLimits)]
    if unknown := sorted(set(limits) - set(names)):
        raise RequestError(f"LLM: unknown options {', '.join(unknown)}; limits are {', '.join(names)}")
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise RequestError(f"LLM: {name} is {value!r}; it must be a whole number")
    check_threads(threads)


def _is_folder(model: str | Path, store: Registry) -> bool:
    """Whether a folder is meant, one with a config.json; else a REF. CheckpointError for a folder without a model."""
    folder = Path(model)
    named = isinstance(model, Path) or folder.is_absolute() or "/" in model
    if not named:
        with contextlib.suppress(ArtifactError):
            if store.layout(Ref.parse(str(model)).model).exists():
                return False
    if (folder / "config.json").is_file():
        return True
    if named or folder.is_dir():
        what = "this folder has no config.json" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"{model}: {what}; give a Hugging Face folder, or the REF of a stored model: zoo list shows them")
    return False


def _check_machine(spec: BuildSpec) -> None:
    """Raise IncompatibleError before a folder is built for hardware that this machine could not run it on."""
    name = spec.hardware.name
    if reason := why_not(Needs(spec.hardware.kind, spec.hardware.sm), describe_machine()):
        raise IncompatibleError(
            f"an engine for hardware {name!r} cannot run here: {reason}. To build it for another machine, `zoo add` the folder "
            f"and run `zoo engines models=NAME hardware={name}`"
        )


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
