"""The text side of a model, read from its tokenizer files: tokenizer.json, tokenizer_config.json, special_tokens_map.json,
chat_template.jinja, generation_config.json. Uses the ``tokenizers`` library; transformers is not needed to serve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from zoo.errors import ArtifactError, RequestError
from zoo.runtime.chat import ChatTemplate
from zoo.runtime.detokenizer import Detokenizer
from zoo.runtime.request import SamplingParams

MAX_TOKENIZER = 256 << 20  # bytes; the largest in use are about 35 MB
MAX_CONFIG = 16 << 20
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# generation_config.json key -> field of SamplingParams, as vLLM reads it
DEFAULTS = {key: key for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no such file. Raises ArtifactError for a file that is too large or not an object."""
    if not path.exists():
        return {}
    if path.stat().st_size > MAX_CONFIG:
        raise ArtifactError(f"{path}: {path.stat().st_size} bytes; at most {MAX_CONFIG} are read")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: holds a {type(data).__name__}; an object is expected")
    return data


class Tokenizer:
    """Encodes prompts, decodes tokens, renders chats.

    Prompts get the special tokens that tokenizer.json's post-processor adds. Truncation and padding that the file asks for
    are training settings and are off.
    """

    def __init__(self, folder: Path) -> None:
        """Read a folder with tokenizer.json; the other files are optional. Raises ArtifactError naming a file that is wrong."""
        path = folder / "tokenizer.json"
        self.folder = folder
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file; this model takes token ids only")
        if path.stat().st_size > MAX_TOKENIZER:
            raise ArtifactError(f"{path}: {path.stat().st_size} bytes; at most {MAX_TOKENIZER} are read")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ArtifactError(f"{path}: not a tokenizer that `tokenizers` {tokenizers.__version__} reads: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = read_json(folder / "tokenizer_config.json")  # a broken one is refused now, not when the first chat comes
        self.detokenizer = Detokenizer(self._tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises RequestError for text that is not Unicode (lone surrogates)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt has a lone surrogate at character {error.start}; give valid Unicode") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids the tokenizer does not have add nothing."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of one token, written as in the vocabulary."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, added ones included. A model's logits may be longer (padding) or shorter."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Name -> token for bos_token, eos_token and the like."""
        return read_special_tokens(self.folder, self._config)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """chat_template.jinja, or else the one in tokenizer_config.json (of several, "default"); None if there is none."""
        return read_template(self.folder, self._config)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt for chat messages; see ``ChatTemplate.render``. Raises RequestError for a model without a template."""
        if self.chat_template is None:
            raise RequestError("this model has no chat template; use generate with a prompt")
        return self.chat_template.render(messages, **options)


def read_special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> token for bos_token, eos_token and the like; tokenizer_config.json goes before special_tokens_map.json."""
    found: dict[str, str] = {}
    for source in (read_json(folder / "special_tokens_map.json"), config):
        for name in NAMED:
            value = source.get(name)
            content = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(content, str):
                found[name] = content
    return found


def read_template(folder: Path, config: Mapping[str, Any] | None = None) -> ChatTemplate | None:
    """chat_template.jinja, or else the one in tokenizer_config.json (of several, "default"); None if there is none.

    config   tokenizer_config.json, where it has been read already
    """
    path = folder / "chat_template.jinja"
    config = read_json(folder / "tokenizer_config.json") if config is None else config
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = named.get("default")
    return ChatTemplate(source, read_special_tokens(folder, config)) if isinstance(source, str) else None


class GenerationConfig:
    """generation_config.json: the model's end tokens, and the sampling values it was tuned with."""

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """Read the file if it is there. The tokenizer's eos_token is an end token too. Raises ArtifactError."""
        self._path = folder / "generation_config.json"
        self._data = read_json(self._path)
        ids = self._data.get("eos_token_id")
        found = set(ids) if isinstance(ids, list) else set() if ids is None else {ids}
        if not all(isinstance(token, int) and token >= 0 for token in found):
            raise ArtifactError(f"{self._path}: eos_token_id is {ids!r}; it must be a token id or a list of them")
        if tokenizer and (eos := tokenizer.special_tokens.get("eos_token")) and (token := tokenizer.token_id(eos)) is not None:
            found.add(token)
        self.end_token_ids: tuple[int, ...] = tuple(sorted(found))

    def default_params(self) -> SamplingParams:
        """What is used when the user gives no parameters: the file's values, and vLLM's defaults for the rest.

        A ``do_sample`` of false means greedy, whatever temperature stands beside it. Raises ArtifactError for a value that is
        out of range.
        """
        given = {field: self._data[key] for key, field in DEFAULTS.items() if self._data.get(key) is not None}
        if self._data.get("do_sample") is False:
            given["temperature"] = 0.0
        try:
            return SamplingParams(**given)
        except RequestError as error:
            raise ArtifactError(f"{self._path}: {error}") from None
