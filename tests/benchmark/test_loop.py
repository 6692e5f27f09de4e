"""The run, on sessions without a model: what is noted is what the engine did, and nothing of it stays behind."""

from __future__ import annotations

import time

import numpy as np
import pytest
from bench_engines import engine_of
from fake_session import params

from zoo.benchmark.latency import Latencies, latencies, summary
from zoo.benchmark.loop import Recording, noted_steps, run
from zoo.benchmark.workload import Case
from zoo.errors import RequestError

CASE = Case(10, 7, 12)


@pytest.mark.parametrize("samples", [False, True])
def test_notes_are_what_was_run(samples: bool) -> None:
    engine = engine_of(samples)
    recording = run(engine, CASE.prompts(50), params(max_tokens=7, ignore_eos=True), CASE.arrivals())
    assert recording.tokens == 12 * 7 and recording.preemptions == 0
    got = np.bincount([one for step in recording.receivers for one in step], minlength=12)
    assert got.tolist() == [7] * 12
    # each token is computed once, but for the last of each request, which nobody continues
    assert sum(int(note.query_starts[-1]) for note in recording.steps) == 12 * (10 + 7 - 1)
    assert sum(note.rows for note in recording.steps) == 12 * 7
    assert all(len(note.kv_lengths) == len(note.query_starts) - 1 for note in recording.steps)
    assert recording.times == sorted(recording.times) and recording.seconds == recording.times[-1]
    assert 0 < recording.noting + recording.queueing < recording.seconds
    assert not engine.has_work and not {"step", "submit"} & set(vars(engine.session)), "the session is as it was"


def test_batches_are_noted_as_the_session_got_them() -> None:
    engine = engine_of(False)
    recording = run(engine, CASE.prompts(50), params(max_tokens=7, ignore_eos=True), CASE.arrivals())
    given = engine.session.batches  # type: ignore[attr-defined]
    assert len(given) == len(recording.steps)
    for batch, note in zip(given, recording.steps, strict=True):
        assert (batch.kv_lengths == note.kv_lengths).all() and (batch.query_starts == note.query_starts).all()


def test_preemptions_are_those_of_this_run() -> None:
    engine = engine_of(True, max_blocks=12)
    prompts = Case(20, 20, 4).prompts(50)
    for _ in range(2):
        recording = run(engine, prompts, params(max_tokens=20, ignore_eos=True), np.zeros(4))
        assert recording.preemptions > 0 and recording.tokens == 80
    assert engine.scheduler.preemptions > recording.preemptions


def test_requests_come_when_they_are_due() -> None:
    engine = engine_of(False)
    due = np.array([0.0, 0.02, 0.15])
    began = time.perf_counter()
    recording = run(engine, Case(4, 2, 3).prompts(50), params(max_tokens=2, ignore_eos=True), due)
    assert time.perf_counter() - began >= 0.15
    first = {one: when for step, when in reversed(list(zip(recording.receivers, recording.times, strict=True))) for one in step}
    assert all(first[place] >= when for place, when in enumerate(due))
    assert first[0] < 0.15, "the first one did not wait for the last"


def test_the_session_is_let_go_when_the_run_fails() -> None:
    engine = engine_of(True)
    engine.session.fail_result = RuntimeError("out of luck")  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="out of luck"):
        run(engine, CASE.prompts(50), params(max_tokens=7, ignore_eos=True), CASE.arrivals())
    assert not {"step", "submit"} & set(vars(engine.session))


def test_a_refused_request_is_said() -> None:
    with pytest.raises(RequestError, match="token id 99"):
        run(engine_of(True), [[99]], params(max_tokens=2), np.zeros(1))


def test_progress_is_reported_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.benchmark.loop.REPORT_EVERY", 0.0)
    seen: list[int] = []
    recording = run(engine_of(True), CASE.prompts(50), params(max_tokens=7, ignore_eos=True), CASE.arrivals(), seen.append)
    assert seen == sorted(seen) and seen[-1] == recording.tokens and len(seen) == len(recording.times)


def test_noting_is_undone() -> None:
    session = engine_of(True).session
    with noted_steps(session) as notes:
        assert "submit" in vars(session) and notes == []
    assert "submit" not in vars(session)


def test_latencies_by_hand() -> None:
    recording = Recording(
        due=np.array([0.0, 0.5, 1.0]), times=[1.0, 1.25, 2.0, 4.0], receivers=[[0], [1, 0], [], [0, 2, 1]], seconds=4.0
    )
    found = latencies(recording)
    assert found.ttft.tolist() == [1.0, 0.75, 3.0]
    assert sorted(found.inter_token.tolist()) == [0.25, 2.75, 2.75]
    assert found.end_to_end.tolist() == [4.0, 3.5, 3.0]


def test_a_summary_in_milliseconds() -> None:
    found = summary("x_ms", np.arange(1, 102) / 1000)
    assert found == {"x_ms_mean": 51.0, "x_ms_p50": 51.0, "x_ms_p90": 91.0, "x_ms_p99": 100.0}
    assert set(summary("x_ms", np.array([])).values()) == {None}


def test_latencies_of_a_run_fit_together() -> None:
    recording = run(engine_of(True), CASE.prompts(50), params(max_tokens=7, ignore_eos=True), CASE.arrivals())
    found: Latencies = latencies(recording)
    assert len(found.ttft) == len(found.end_to_end) == 12 and len(found.inter_token) == 12 * 6
    assert (found.ttft > 0).all() and (found.inter_token >= 0).all()
    assert found.inter_token.sum() == pytest.approx((found.end_to_end - found.ttft).sum())
    assert found.end_to_end.max() == pytest.approx(recording.seconds)
