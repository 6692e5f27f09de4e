"""``LLM`` over a fake session: what goes in, what comes out, several callers at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from fake_session import FakeSession, greedy, limits, params

from zoo import LLM, SamplingParams
from zoo.errors import CheckpointError, NotFoundError, RequestError

VOCAB = 262
CHAT = (
    "{% for m in messages %}<begin>{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}<begin>bot:{% endif %}"
)


class Script(FakeSession):
    """After a prompt of one token it says the script, then ends."""

    script = b""

    def _logits(self, batch: Any, row: int, sequence: int) -> np.ndarray:
        logits = super()._logits(batch, row, sequence)
        said = int(batch.positions[row])
        logits[self.script[said] if said < len(self.script) else families.END] += 100
        return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files: byte i is token i, 256 begins, 257 ends."""
    path = tmp_path_factory.mktemp("tokenizer")
    families._write_tokenizer(path, VOCAB)
    (path / "chat_template.jinja").write_text(CHAT)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 7}))
    return path


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(limits(max_blocks=200, max_context=96), VOCAB, end_bias=0)


@pytest.fixture
def llm(session: FakeSession, folder: Path) -> Iterator[LLM]:
    with LLM.from_session(session, folder) as llm:
        yield llm
        assert not llm.engine.has_work and not llm._inboxes, "a request was left behind"


def scripted(text: str, folder: Path) -> LLM:
    session = Script(limits(max_context=200, max_blocks=300), VOCAB, end_bias=0)
    session.script = text.encode()
    return LLM.from_session(session, folder)


def expected(prompt: list[int], tokens: int) -> list[int]:
    return greedy(prompt, tokens, VOCAB, 0, families.END)


def test_prompts_come_in_every_shape_and_outputs_in_order(llm: LLM) -> None:
    ids = [list(b"def "), list(b"abc")]
    for given in (
        ["def ", "abc"],
        ids,
        [{"prompt": "def "}, {"prompt_token_ids": ids[1]}],
        [np.array(ids[0]), tuple(ids[1])],
    ):
        outputs = llm.generate(given, params(max_tokens=5))
        assert [output.prompt_token_ids for output in outputs] == ids
        assert [output.outputs[0].token_ids for output in outputs] == [expected(prompt, 5) for prompt in ids]
        assert all(output.finished and output.outputs[0].index == 0 for output in outputs)
    for single in ("def ", ids[0], {"prompt": "def "}, np.array(ids[0])):
        [output] = llm.generate(single, params(max_tokens=5))
        assert output.outputs[0].token_ids == expected(ids[0], 5)
    assert llm.generate("def ", params())[0].prompt == "def " and llm.generate(ids[0], params())[0].prompt is None


def test_many_prompts_with_a_set_of_parameters_each(llm: LLM) -> None:
    prompts = [[n, n + 1] for n in range(40)]
    each = [params(max_tokens=1 + n % 9) for n in range(40)]
    outputs = llm.generate(prompts, each, use_progress=True)
    assert [output.outputs[0].token_ids for output in outputs] == [expected(p, 1 + n % 9) for n, p in enumerate(prompts)]
    assert len({output.request_id for output in outputs}) == 40


def test_text_is_what_the_tokenizer_decodes(llm: LLM) -> None:
    for output in llm.generate([[n] for n in range(20)], params(max_tokens=30)):
        [completion] = output.outputs
        shown = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
        assert completion.text == llm.decode(shown)


def test_n_continuations_use_seeds_in_a_row(llm: LLM) -> None:
    [output] = llm.generate([[5]], SamplingParams(n=3, seed=40, max_tokens=8))
    assert [c.index for c in output.outputs] == [0, 1, 2] and output.finished
    for index, completion in enumerate(output.outputs):
        [alone] = llm.generate([[5]], SamplingParams(seed=40 + index, max_tokens=8))
        assert completion.token_ids == alone.outputs[0].token_ids
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_logprobs_come_one_dict_a_token(llm: LLM) -> None:
    completion = llm.generate([[5]], params(max_tokens=6, logprobs=2, ignore_eos=True))[0].outputs[0]
    assert completion.logprobs is not None and completion.cumulative_logprob is not None
    assert len(completion.logprobs) == 6
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(entry) == 2 and max(entry, key=lambda t: entry[t]) == token
    total = sum(entry[token] for token, entry in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize(
    ("stop", "include", "text", "reason"),
    [
        (["END"], False, "one two é🎉 ", "END"),
        (["END"], True, "one two é🎉 END", "END"),
        (["🎉 E", "END"], False, "one two é", "🎉 E"),
        ("ne t", False, "o", "ne t"),
        (["o", "one"], False, "", "o"),
        (["never"], False, "one two é🎉 END and more", None),
        (["more "], False, "one two é🎉 END and more", None),
    ],
)
def test_stop_strings_end_text_in_generate_and_stream(
    folder: Path, stop: Any, include: bool, text: str, reason: str | None
) -> None:
    wanted = params(max_tokens=None, stop=stop, include_stop_str_in_output=include)
    with scripted("one two é🎉 END and more", folder) as llm:
        completion = llm.generate([[256]], wanted)[0].outputs[0]
        assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", reason)
        pieces = list(llm.stream([256], wanted))
        assert "".join(piece.text for piece in pieces) == text
        assert [token for piece in pieces for token in piece.token_ids] == completion.token_ids
        assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", reason)


def test_stream_gives_whole_characters_and_flushes_half_ones(folder: Path) -> None:
    with scripted("a🎉é", folder) as llm:
        assert [piece.text for piece in llm.stream([256], params(max_tokens=None))] == ["a", "", "", "", "🎉", "", "é", ""]
        cut = list(llm.stream([256], params(max_tokens=3)))
        assert [piece.text for piece in cut] == ["a", "", "\ufffd"] and cut[-1].finish_reason == "length"
        assert llm.generate([[256]], params(max_tokens=3))[0].outputs[0].text == "a\ufffd" == llm.decode([97, *"🎉".encode()[:2]])


def test_min_tokens_holds_stop_strings_off(folder: Path) -> None:
    with scripted("xxSTOPyySTOPzz", folder) as llm:
        completion = llm.generate([[256]], params(max_tokens=None, stop="STOP", min_tokens=7))[0].outputs[0]
        assert completion.text == "xxSTOPyy"


def test_end_token_is_in_the_ids_and_not_in_the_text(folder: Path) -> None:
    with scripted("hi", folder) as llm:
        shown = params(max_tokens=None, skip_special_tokens=False)
        completion = llm.generate([[256]], shown)[0].outputs[0]
        assert (completion.text, completion.token_ids) == ("hi", [*b"hi", families.END])
        kept = params(max_tokens=None, skip_special_tokens=False, include_stop_str_in_output=True)
        assert llm.generate([[256]], kept)[0].outputs[0].text == "hi<end>"


def test_defaults_come_from_generation_config(llm: LLM) -> None:
    assert llm.default_params() == SamplingParams(temperature=0.0, max_tokens=7)
    assert llm.generate([[5]])[0].outputs[0].token_ids == expected([5], 7)
    bare = LLM.from_session(FakeSession(limits()))
    assert bare.default_params() == SamplingParams()


def test_chat_renders_the_template(llm: LLM) -> None:
    chat = [{"role": "user", "content": "hé"}]
    ids = [256, *"user:hé".encode(), 256, *b"bot:"]
    [output] = llm.chat(chat, params(max_tokens=4))
    assert output.prompt == "<begin>user:hé<begin>bot:" and output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == expected(ids, 4)
    assert [o.prompt_token_ids for o in llm.chat([chat, chat], params(max_tokens=1))] == [ids, ids]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 0 is empty"),
        ([""], "prompt 0 is empty"),
        (["ok", ""], "prompt 1 is empty"),
        ([], "no prompt"),
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        (None, "prompts are None"),
        (3, "prompts are 3"),
        ([None], "prompt 0 is None"),
        ([[1.5]], "prompt 0 has 1.5; token ids are whole numbers"),
        ([[True]], "prompt 0 has True"),
        ([{"text": "x"}], "prompt 0 is None"),
        ([[1], [300]], "token id 300; the model's ids are 0 to 261"),
        ([[1], [1] * 96], "the prompt has 96 tokens.*at most 95"),
        (["x" * 200], "the prompt has 200 tokens"),
        ([["a"]], "prompt 0 has 'a'"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(llm: LLM, session: FakeSession, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params())
    assert not session.batches


def test_bad_parameters_are_refused(llm: LLM, session: FakeSession) -> None:
    with pytest.raises(RequestError, match="max_tokens is 0"):
        llm.generate("x", params(max_tokens=0))
    with pytest.raises(RequestError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["x", "y"], [params()])
    with pytest.raises(RequestError, match="n is 2"):
        llm.stream("x", params(n=2))
    with pytest.raises(RequestError, match="empty"):  # at the call, not at the first piece
        llm.stream("")
    assert not session.batches


def test_without_a_tokenizer_token_ids_work_and_text_is_refused() -> None:
    llm = LLM.from_session(FakeSession(limits()))
    assert llm.generate([[3, 4]], params(max_tokens=3))[0].outputs[0].text == ""
    for attempt in (lambda: llm.generate("x"), lambda: llm.chat([{"role": "user", "content": "x"}]), lambda: llm.decode([1])):
        with pytest.raises(RequestError, match="needs a tokenizer"):
            attempt()


def test_limits_can_be_lowered_and_not_raised(session: FakeSession) -> None:
    llm = LLM.from_session(session, None, max_sequences=2, max_tokens=8)
    llm.generate([[n] for n in range(6)], params(max_tokens=3))
    assert max(len(batch.kv_lengths) for batch in session.batches) == 2
    with pytest.raises(RequestError, match="max_sequences is 9, but the engine was built with 8"):
        LLM.from_session(session, None, max_sequences=9)
    with pytest.raises(RequestError, match="block_size"):
        LLM.from_session(session, None, block_size=2)


def test_streams_interleave_and_an_abandoned_one_gives_its_blocks_back(llm: LLM) -> None:
    first, second = llm.stream([5], params(max_tokens=12)), llm.stream([6], params(max_tokens=12))
    tokens: list[list[int]] = [[], []]
    for a, b in zip(first, second, strict=False):
        tokens[0] += a.token_ids
        tokens[1] += b.token_ids
    assert tokens == [expected([5], 12)[: len(tokens[0])], expected([6], 12)[: len(tokens[1])]]
    third = llm.stream([7], params(max_tokens=50, ignore_eos=True))
    next(third)
    assert llm.generate([[8]], params(max_tokens=4))[0].outputs[0].token_ids == expected([8], 4)
    for stream in (first, second, third):
        stream.close()  # type: ignore[attr-defined]
    assert llm.engine.scheduler.blocks.used_blocks == 0


def test_threads_share_the_engine(llm: LLM, session: FakeSession) -> None:
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = llm.generate([[index, 9]], params(max_tokens=25, ignore_eos=True))[0].outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {index: greedy([index, 9], 25, VOCAB, 0, None) for index in range(6)}


def test_nan_fails_one_output_and_raises_from_a_stream(llm: LLM, session: FakeSession) -> None:
    session.poisoned = {5: 3}
    good, bad = llm.generate([[6], [5]], params(max_tokens=6, ignore_eos=True))
    assert good.outputs[0].token_ids == greedy([6], 6, VOCAB, 0, None)
    assert bad.outputs[0].finish_reason == "error" and "nan" in str(bad.outputs[0].error) and len(bad.outputs[0].token_ids) == 2
    with pytest.raises(RequestError, match="nan"):
        list(llm.stream([5], params(max_tokens=6, ignore_eos=True)))


def test_failing_step_is_an_error_output_of_its_requests(llm: LLM, session: FakeSession) -> None:
    waiting = llm.stream([5], params(max_tokens=20, ignore_eos=True))
    next(waiting)
    session.fail_next = RuntimeError("power cut")
    [failed] = llm.generate([[6]], params())
    assert failed.finished and failed.outputs[0].finish_reason == "error" and failed.outputs[0].token_ids == []
    assert "the engine failed: power cut" in str(failed.outputs[0].error)
    with pytest.raises(RequestError, match="power cut"):
        list(waiting)
    assert llm.generate([[6]], params(max_tokens=2))[0].outputs[0].token_ids == expected([6], 2)


def test_requests_outside_the_failed_step_go_on(folder: Path) -> None:
    session = FakeSession(limits(max_sequences=1, max_rows=1), VOCAB, end_bias=0)
    session.fail_next = RuntimeError("power cut")
    with LLM.from_session(session, folder) as llm:
        first, second = llm.generate([[5], [6]], params(max_tokens=3, ignore_eos=True))
    assert first.outputs[0].finish_reason == "error"
    assert second.outputs[0].token_ids == greedy([6], 3, VOCAB, 0, None)


def test_interrupt_reaches_every_caller(llm: LLM, session: FakeSession) -> None:
    waiting = llm.stream([5], params(max_tokens=20, ignore_eos=True))
    next(waiting)
    session.fail_next = KeyboardInterrupt("now")  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[6]], params())
    with pytest.raises(RequestError, match="the engine failed: now"):
        list(waiting)
    assert llm.generate([[6]], params(max_tokens=2))[0].outputs[0].token_ids == expected([6], 2)


def test_closed_is_closed(session: FakeSession) -> None:
    llm = LLM.from_session(session)
    stream = llm.stream([5], params(max_tokens=20))
    next(stream)
    llm.close()
    llm.close()
    assert session.closed
    for attempt in (lambda: llm.generate([[5]], params()), lambda: llm.stream([5], params()), lambda: next(stream)):
        with pytest.raises(RequestError, match="closed"):
            attempt()


def test_seeds_wrap_around(llm: LLM) -> None:
    [two] = llm.generate([[5]], params(temperature=1.0, n=2, seed=2**64 - 1, max_tokens=8))
    [zero] = llm.generate([[5]], params(temperature=1.0, seed=0, max_tokens=8))
    assert two.outputs[1].token_ids == zero.outputs[0].token_ids


@pytest.mark.parametrize("given", [{"max_tokens": 1}, [None], [{"max_tokens": 1}], "greedy", 5])
def test_parameters_of_another_type_are_refused(llm: LLM, given: Any) -> None:
    with pytest.raises(RequestError, match=r"sampling_params(\[0\])? (is|are) .*SamplingParams"):
        llm.generate([5, 6], given)
    with pytest.raises(RequestError, match="SamplingParams"):
        llm.stream([5, 6], given)


def test_folder_without_a_model_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Empty").mkdir()
    monkeypatch.chdir(tmp_path)
    registry = tmp_path / "registry"
    for model in (tmp_path, tmp_path / "Empty", "Empty", "./Empty", Path("Empty"), "."):
        with pytest.raises(CheckpointError, match=r"this folder has no config\.json"):
            LLM(model, registry=registry)
    for model in ("./other", Path("other"), str(tmp_path / "other")):
        with pytest.raises(CheckpointError, match="there is no such folder"):
            LLM(model, registry=registry)
    with pytest.raises(NotFoundError, match="no model 'other'"):
        LLM("other", registry=registry)


@pytest.mark.parametrize("model", [None, 5, b"gqa", "", ["gqa"]])
def test_models_of_another_type_are_refused(model: Any) -> None:
    with pytest.raises(RequestError, match=r"the model is .*give a REF"):
        LLM(model)


@pytest.mark.parametrize("threads", [-1, 1_000_000, "x", None, 1.0, True])
def test_threads_out_of_range_are_refused_first(threads: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"threads is .*from 0 \(all cores\)"):
        LLM(tmp_path, threads=threads)


@pytest.mark.parametrize("value", ["9", None, 1.5, True])
def test_limits_of_another_type_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=r"max_blocks is .* must be a whole number"):
        LLM("zoo-demo", max_blocks=value)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown options max_model_len; limits are max_tokens"):
        LLM("zoo-demo", max_model_len=5)
