"""The text side of a model against transformers reading the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from zoo.errors import ArtifactError, RequestError
from zoo.runtime.request import SamplingParams
from zoo.runtime.tokenizer import GenerationConfig, Tokenizer

CHATML = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- "\\n" + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA2 = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}
{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}
"""
FANCY = """{%- set ns = namespace(seen=0) -%}
{%- macro show(value) -%}<{{ value | tojson(indent=2) }}>{%- endmacro -%}
{{ strftime_now("%Y") }} {{ flavour | default("plain") }}
{% for message in messages if message.role != "tool" %}
  {%- if message.content is string %}{{ message.content }}
  {%- else %}{% for part in message.content %}{{ part.text }};{% endfor %}{% endif %}
  {%- if message.reasoning_content is defined %}[{{ message.reasoning_content }}]{% endif %}
  {%- set ns.seen = ns.seen + 1 %}
  {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{{ ns.seen }} {{ show({"a": "<é&>", "b": [1, none, true]}) }} {{ messages[0] | length }} {{ dict(x=1).x }}
"""
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <there> & 'you'"}],
    "turns": [
        {"role": "user", "content": "  padded \n"},
        {"role": "assistant", "content": "é🎉"},
        {"role": "user", "content": "{{ not a template }}"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<b>é</b>", "parameters": {"type": "object"}}}]


def make(folder: Path, *, template: str | None = None, bos: bool = True, **config: Any) -> Path:
    """A folder with a small byte-level tokenizer; with ``bos``, its post-processor begins prompts with <s>."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["def main(self): return the value of it"] * 5,
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def judge(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("text", ["def main(", "</s> inside <s>", "é🎉\n\n  x", "a" * 100])
def test_prompts_are_encoded_as_transformers_does(tmp_path: Path, bos: bool, text: str) -> None:
    folder = make(tmp_path, bos=bos)
    tokenizer, wanted = Tokenizer(folder), judge(folder)
    assert tokenizer.encode(text) == wanted(text, truncation=False)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == wanted(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer.encode(text)
    assert (ids[0] == 0) == bos
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == wanted.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [CHATML, LLAMA2, FANCY], ids=["chatml", "llama2", "fancy"])
@pytest.mark.parametrize("opened", [True, False])
def test_chats_are_rendered_as_transformers_does(tmp_path: Path, template: str, chat: str, opened: bool) -> None:
    folder = make(tmp_path, template=template)
    options: dict[str, Any] = {"add_generation_prompt": opened, "tools": TOOLS, "flavour": "mint"}
    found = Tokenizer(folder).render_chat(CHATS[chat], **options)
    assert found == judge(folder).apply_chat_template(CHATS[chat], tokenize=False, **options)
    assert found.strip()


def test_rich_messages_are_rendered_as_transformers_does(tmp_path: Path) -> None:
    folder = make(tmp_path, template=FANCY)
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "part one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "x", "reasoning": "because"},
        {"role": "tool", "content": "ignored"},
    ]
    assert Tokenizer(folder).render_chat(chat) == judge(folder).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_templates_in_the_config_and_named_templates(tmp_path: Path) -> None:
    chat = CHATS["one"]
    plain = make(tmp_path / "plain", chat_template=CHATML)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": CHATML}]
    several = make(tmp_path / "several", chat_template=named)
    both = make(tmp_path / "both", template="file {{ messages[0].content }}", chat_template=CHATML)
    for folder in (plain, several, both):
        assert Tokenizer(folder).render_chat(chat) == judge(folder).apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(make(tmp_path / "none")).render_chat(chat)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no thanks') }}",
        "{{ undefined_thing.field }}",
        "{% if %}",
    ],
)
def test_hostile_and_broken_templates_are_refused(tmp_path: Path, source: str) -> None:
    tokenizer = Tokenizer(make(tmp_path, template=source))
    with pytest.raises(RequestError, match="chat template"):
        tokenizer.render_chat(CHATS["one"])


def test_messages_that_are_none_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make(tmp_path, template=CHATML))
    for chat in ([], ["hello"], [{"content": "x"}], [{"role": "user", "content": open}]):
        with pytest.raises(RequestError):
            tokenizer.render_chat(chat)  # type: ignore[arg-type]


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        Tokenizer(make(tmp_path)).encode("ab\ud800")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b"\xff\xfe", b'{"model": {"type": "Nonsense"}}'])
def test_broken_tokenizer_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(tmp_path)


def test_missing_tokenizer_and_broken_configs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        Tokenizer(tmp_path)
    folder = make(tmp_path)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json: holds a list"):
        Tokenizer(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"generation_config\.json: not JSON"):
        GenerationConfig(folder)


@pytest.mark.parametrize(
    ("given", "ends"),
    [({}, (1,)), ({"eos_token_id": 3}, (1, 3)), ({"eos_token_id": [3, 1, 7]}, (1, 3, 7)), ({"eos_token_id": None}, (1,))],
)
def test_end_tokens_are_the_files_and_the_tokenizers(tmp_path: Path, given: dict[str, Any], ends: tuple[int, ...]) -> None:
    folder = make(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(given))
    assert GenerationConfig(folder, Tokenizer(folder)).end_token_ids == ends


def test_default_sampling_values(tmp_path: Path) -> None:
    assert GenerationConfig(tmp_path).default_params() == SamplingParams()
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "max_new_tokens": 99}))
    assert GenerationConfig(tmp_path).default_params() == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=99)
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1, "min_p": 0.05, "top_k": 50}))
    params = GenerationConfig(tmp_path).default_params()
    assert params == SamplingParams(temperature=0.0, repetition_penalty=1.1, min_p=0.05, top_k=50)
    path.write_text(json.dumps({"top_p": 7}))
    with pytest.raises(ArtifactError, match=r"generation_config\.json: top_p is 7"):
        GenerationConfig(tmp_path).default_params()
    path.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ArtifactError, match="eos_token_id"):
        GenerationConfig(tmp_path)
