"""Streaming text against tokenizers' own decode of the whole."""

from __future__ import annotations

import json
import random
import time
from functools import cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from zoo.runtime.detokenizer import ALPHABET, RUN_LIMIT, ByteStream, Detokenizer, FallbackStream, WindowStream

CORPUS = [
    "the quick brown fox",
    "def main(self, value):\n    return value + 1",
    "héllo wörld ñandú",
    "日本語のテキスト",
    "🎉🚀 party 👩‍👩‍👧",
    "  two  spaces",
]


@cache
def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=sorted(ALPHABET), special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens(["<spécial>", "<other>"])  # é stands for a byte: decode breaks it, and so must we
    tokenizer.add_tokens(["two words", AddedToken("→added", normalized=False)])
    return tokenizer


def fallback(prefix: bool, strip: bool) -> tokenizers.Tokenizer:
    """The Llama 2 and Mistral decoder (strip) and Gemma's (no strip), over byte tokens and a few words."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    for word in ("▁the", "▁qu", "ick", "é", "日本", "ef", "▁▁", "<0x", "<0xZZ>"):
        for character in word:
            vocab.setdefault(character, len(vocab))
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                merges.append((word[: end - 1], word[end - 1]))
                vocab[word[:end]] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@cache
def metaspace() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level(),
    "llama": fallback(True, True),
    "gemma": fallback(False, False),
    "metaspace": metaspace(),
}
STREAMS = {"byte-level": ByteStream, "llama": FallbackStream, "gemma": FallbackStream, "metaspace": WindowStream}
every = pytest.mark.parametrize("name", TOKENIZERS)
exact = pytest.mark.parametrize("name", ["byte-level", "llama", "gemma"])


def pieces(name: str, tokens: list[int], skip: bool = True) -> list[str]:
    stream = Detokenizer(TOKENIZERS[name]).stream(skip)
    assert isinstance(stream, STREAMS[name])
    return [*[stream.push(token) for token in tokens], stream.finish()]


def whole(name: str, tokens: list[int], skip: bool = True) -> str:
    text: str = TOKENIZERS[name].decode(tokens, skip_special_tokens=skip)
    return text


texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n🎉é日\u200d👩ﬁ\ufffd▁")), max_size=40)


@every
@settings(max_examples=150, deadline=None)
@given(text=texts, skip=st.booleans())
@example(text="🎉" * 40, skip=True)
@example(text=" leading and  double", skip=True)
def test_pieces_of_any_text_make_what_decode_makes(name: str, text: str, skip: bool) -> None:
    tokens = TOKENIZERS[name].encode(text).ids
    assert "".join(pieces(name, tokens, skip)) == whole(name, tokens, skip)


@exact
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_no_piece_has_half_a_character(name: str, text: str) -> None:
    """Of text without U+FFFD, no piece has one."""
    text = text.replace("\ufffd", "").replace("<unk>", "")
    assert "\ufffd" not in "".join(pieces(name, TOKENIZERS[name].encode(text).ids))


@exact
@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_any_tokens_make_what_decode_makes(name: str, data: st.DataObject, skip: bool) -> None:
    """Random ids: broken UTF-8, special and added tokens anywhere, ids that do not exist. Runs of bytes stay below the limit."""
    size = TOKENIZERS[name].get_vocab_size()
    likely = ("<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "ð", "Ł", "İ", "ī")  # bytes of an emoji, so that some runs are whole
    ids = [found for text in likely if (found := TOKENIZERS[name].token_to_id(text)) is not None]
    token = st.one_of(st.integers(0, size + 2), st.sampled_from(ids))
    tokens = data.draw(st.lists(token, max_size=RUN_LIMIT - 1))
    assert "".join(pieces(name, tokens, skip)) == whole(name, tokens, skip)


@exact
@settings(max_examples=100, deadline=None)
@given(text=texts, cut=st.integers(0, 60))
def test_cut_anywhere_as_max_tokens_does(name: str, text: str, cut: int) -> None:
    tokens = TOKENIZERS[name].encode(text).ids[:cut]
    if name == "byte-level" or len(tokens) < RUN_LIMIT:
        assert "".join(pieces(name, tokens)) == whole(name, tokens)


def test_characters_come_as_soon_as_they_are_complete() -> None:
    tokens = TOKENIZERS["byte-level"].encode("a🦜b").ids
    given_out = pieces("byte-level", tokens)
    assert [piece for piece in given_out if piece] == ["a", "🦜", "b"]
    assert len(given_out) > 5 and given_out[-2:] == ["b", ""], "the parrot takes several tokens and comes with its last"


def test_byte_runs_are_given_when_they_end_or_grow_long() -> None:
    tokenizer = TOKENIZERS["llama"]
    parrot = tokenizer.encode("🦜").ids[1:]
    assert len(parrot) == 4
    given_out = pieces("llama", [*parrot, tokenizer.token_to_id("ick")])
    assert given_out == ["", "", "", "", "🦜ick", ""]
    long = pieces("llama", parrot * 100)
    assert "".join(long) == "🦜" * 100
    assert max(map(len, long)) <= RUN_LIMIT // 4 + 1, "held for no longer than the limit"
    # The one deviation, as documented: characters given out of a long run stay when the run fails later.
    broken = pieces("llama", [*parrot * 20, parrot[0], tokenizer.token_to_id("ick")])
    assert "".join(broken).startswith("🦜" * (RUN_LIMIT // 4)) and whole("llama", [*parrot * 20, parrot[0]]) == "\ufffd" * 81


def test_window_stream_gives_up_on_text_that_never_completes() -> None:
    """A decoder that is none of the known ones, and tokens that are never a character: work stays bounded."""
    tokenizer = fallback(False, False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " "), decoders.Fuse()])
    stream = Detokenizer(tokenizer).stream()
    assert isinstance(stream, WindowStream)
    byte = tokenizer.token_to_id("<0x9F>")
    for _ in range(200):
        stream.push(byte)
        assert len(stream._before) + len(stream._since) <= 64


@pytest.mark.parametrize("name", TOKENIZERS)
def test_work_per_token_does_not_grow(name: str) -> None:
    """The last tenth of a long stream takes no longer than the first, within a factor of 4 for a noisy machine."""
    rng = random.Random(0)
    tokens = [rng.randrange(3, TOKENIZERS[name].get_vocab_size()) for _ in range(20_000)]
    stream = Detokenizer(TOKENIZERS[name]).stream()
    for token in tokens[:200]:
        stream.push(token)

    def seconds(part: list[int]) -> float:
        start = time.perf_counter()
        for token in part:
            stream.push(token)
        return time.perf_counter() - start

    parts = [seconds(tokens[at : at + 2000]) for at in range(0, 20_000, 2000)]
    assert min(parts[-3:]) < 4 * max(parts[:3])


def test_alphabet_is_the_one_of_the_library() -> None:
    assert sorted(ALPHABET) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(ALPHABET.values()) == list(range(256))


def test_streams_of_one_detokenizer_do_not_mix() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    maker = Detokenizer(tokenizer)
    first, second = maker.stream(), maker.stream()
    left, right = tokenizer.encode("🦜 left").ids, tokenizer.encode("🎉 right").ids
    text = ["", ""]
    for a, b in zip(left, right, strict=False):
        text[0] += first.push(a)
        text[1] += second.push(b)
    text[0] += "".join(map(first.push, left[len(right) :])) + first.finish()
    text[1] += "".join(map(second.push, right[len(left) :])) + second.finish()
    assert text == ["🦜 left", "🎉 right"]


def test_special_tokens_are_left_out_or_kept() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    tokens = [tokenizer.token_to_id("<|end|>"), *tokenizer.encode("x").ids, tokenizer.token_to_id("<other>")]
    assert "".join(pieces("byte-level", tokens)) == "x"
    assert "".join(pieces("byte-level", tokens, skip=False)) == "<|end|>x<other>" == whole("byte-level", tokens, False)
    assert json.loads(tokenizer.decoder.__getstate__())["type"] == "ByteLevel"
