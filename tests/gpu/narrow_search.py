"""What ``narrow_bench.py`` tries on the GPU, in order: each candidate alone, each in a layer, and combinations of them.

What happens is written to a journal, a JSON object a line, before and after each candidate: a process that ends in the middle is
followed by one that goes on behind it.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_tools import Compiled
from narrow_cases import ROWS, SHAPES, Candidate, Job, baseline
from narrow_chain import CUDA, SETS, Alone, Chain, Runner, random8

from zoo.plugins.skinny_gemm.cuda import Streamed
from zoo.runtime.cuda.driver import Device

AGAIN = 6  # candidates of a shape that are tried beside the best of the others


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def known(self, **wanted: Any) -> dict[str, Any] | None:
        return next((line for line in self.lines if wanted.items() <= line.items()), None)


def measure(work: Path, left: float, found: Mapping[str, Candidate]) -> int:
    """Everything that the journal does not have yet and time allows."""
    until = time.monotonic() + left - 15
    compiled: dict[Job, Compiled] = pickle.loads((work / "cubins").read_bytes())  # the parent's own
    bad = json.loads((work / "bad").read_text())
    journal = Journal(work / "journal")
    usable = [one for key, one in found.items() if key not in bad and all(job in compiled for job in one.jobs)]
    torch.manual_seed(torch.seed())
    torch.zeros(1, device=CUDA)
    runner = Runner(Device(90), compiled)
    journal.add(device=runner.device.name)
    print(f"{runner.device.name}, {runner.device.multiprocessors} multiprocessors", flush=True)
    started = time.monotonic()
    for shape in SHAPES:
        _alone(runner, shape, [one for one in usable if one.shape == shape], journal, until)
    print(f"each alone: {time.monotonic() - started:.0f} s", flush=True)
    right = {(line["done"], line["m"]) for line in journal.lines if "done" in line}
    weights = [{shape: random8(n, k) for shape, (n, k) in SHAPES.items()} for _ in range(SETS)]
    chains = {m: Chain(runner, m, weights) for m in ROWS}
    choices = {m: [one for one in usable if one.fits(m) and (one.key, m) in right] for m in ROWS}
    for m in ROWS:
        _layers(chains[m], choices[m], journal, until)
    print(f"in a layer: {time.monotonic() - started:.0f} s", flush=True)
    for m in ROWS:
        _uniform(chains[m], choices[m], journal, until)
    print(f"alike: {time.monotonic() - started:.0f} s", flush=True)
    for m in ROWS:
        _combine(chains[m], choices[m], journal, until)
    print(f"together: {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _guarded(runner: Runner, work: Callable[[], tuple[float, str]]) -> tuple[float, str]:
    """What ``work`` gives, or its error; where the GPU is lost with it, this raises, too, and the process ends."""
    try:
        return work()
    except Exception as error:  # of a kernel that is tried: the others go on
        torch.cuda.synchronize()
        runner.device.wait(runner.stream)
        return 0.0, f"{type(error).__name__}: {error}"[:300]


def _alone(runner: Runner, shape: str, usable: Sequence[Candidate], journal: Journal, until: float) -> None:
    product: Alone | None = None
    for m in ROWS:
        todo = [one for one in usable if one.fits(m) and not _seen(journal, one, m)]
        if not todo:
            continue
        product = product or Alone(runner, shape)
        product.rows(m)
        for one in todo:
            if time.monotonic() > until:
                return
            journal.add(start=one.key, m=m)
            spent, problem = _guarded(runner, partial(product.measure, one))
            if problem:
                journal.add(wrong=one.key, m=m, why=problem)
            else:
                registers = runner.registers(one.jobs[0])
                journal.add(done=one.key, m=m, us=spent * 1e6, short=product.short * 1e6, registers=registers)


def _seen(journal: Journal, one: Candidate, m: int) -> bool:
    return journal.known(done=one.key, m=m) is not None or journal.known(wrong=one.key, m=m) is not None


def _layers(chain: Chain, usable: Sequence[Candidate], journal: Journal, until: float) -> None:
    """Each candidate beside today's kernels."""
    today = {shape: baseline(shape) for shape in SHAPES}
    spent, problem = _guarded(chain.runner, partial(chain.measure, today))
    if problem:
        journal.add(note=f"today's kernels in a layer, M={chain.m}: {problem}")
        return
    for one in usable:
        if time.monotonic() > until:
            return
        if journal.known(layer=one.key, m=chain.m, round=1) or journal.known(wrong=one.key, m=chain.m):
            continue
        journal.add(start=one.key, m=chain.m)
        spent, problem = _guarded(chain.runner, partial(chain.measure, today | {one.shape: one}))
        if problem:
            journal.add(wrong=one.key, m=chain.m, why=problem)
        else:
            journal.add(layer=one.key, m=chain.m, round=1, us=spent * 1e6)


def _uniform(chain: Chain, usable: Sequence[Candidate], journal: Journal, until: float) -> None:
    """All products by streams that are alike: what each alone does to today's neighbours says nothing of that."""
    kinds: dict[tuple[Any, ...], dict[str, Candidate]] = {}
    for one in usable:
        t = one.tiles
        if isinstance(t, Streamed) and t.tiles == 1:
            kind = (t.block_n, t.block_k, t.num_warps, t.num_stages, t.signal, t.bring > 0, t.bypass, one.registers)
            kinds.setdefault(kind, {}).setdefault(one.shape, one)
    today = {shape: baseline(shape) for shape in SHAPES}
    for chosen in [one for one in kinds.values() if {"qkv", "o", "down"} <= one.keys()]:
        for all_of_it in (True, False):
            name = f"{'all' if all_of_it else 'all but gate_up'} as {chosen['o'].name}"
            picked = chosen if all_of_it else today | {shape: one for shape, one in chosen.items() if shape != "gate_up"}
            if time.monotonic() > until or len(picked) < len(SHAPES) or journal.known(uniform=name, m=chain.m):
                continue
            journal.add(start=chosen["o"].key, m=chain.m)
            for alike in (False, True):
                spent, problem = _guarded(chain.runner, partial(chain.measure, picked, 5, alike))
                keys = {shape: one.key for shape, one in picked.items()}
                journal.add(uniform=name, m=chain.m, alike=alike, us=spent * 1e6, why=problem, keys=keys)


def _combine(chain: Chain, usable: Sequence[Candidate], journal: Journal, until: float) -> None:
    """The best candidates of each shape beside the best of the others."""
    if journal.known(combined=chain.m):
        return
    first = {(line["layer"], line["m"]): line["us"] for line in journal.lines if line.get("round") == 1}
    today = {shape: baseline(shape) for shape in SHAPES}
    known = {one.key: one for one in usable} | {one.key: one for one in today.values()}
    order = {shape: _order(first, [one for one in usable if one.shape == shape], chain.m) for shape in SHAPES}
    best = {shape: next(iter(order[shape]), today[shape]) for shape in SHAPES}
    starts = [(chosen, alike) for chosen in (today, best) for alike in (False, True)]
    uniform = [line for line in journal.lines if "uniform" in line and line["m"] == chain.m and not line["why"]]
    for line in sorted(uniform, key=lambda line: float(line["us"]))[:2]:
        starts.append(({shape: known[key] for shape, key in line["keys"].items()}, line["alike"]))
    tried = [(chain.measure(chosen, 9, alike), place) for place, (chosen, alike) in enumerate(starts)]
    best, alike = starts[min((spent, place) for (spent, problem), place in tried if not problem)[1]]
    best = dict(best)
    for shape in SHAPES:
        times = {}
        for one in {one.key: one for one in (*order[shape], today[shape], best[shape])}.values():
            if time.monotonic() > until:
                break
            journal.add(start=one.key, m=chain.m)
            spent, problem = _guarded(chain.runner, partial(chain.measure, best | {shape: one}, 9, alike))
            if not problem:
                times[one.key] = spent
                journal.add(layer=one.key, m=chain.m, round=2, us=spent * 1e6)
        if times:
            best[shape] = known[min(times, key=lambda key: times[key])]
    names = "; ".join(f"{shape} {one.name}" for shape, one in best.items())
    for alike in (False, True):
        usual, fastest = (min(chain.measure(chosen, 9, alike)[0] for _ in range(3)) for chosen in (today, best))
        journal.add(combination=names, m=chain.m, alike=alike, today=usual * 1e6, us=fastest * 1e6)
    journal.add(combined=chain.m)


def _order(first: Mapping[tuple[str, int], float], usable: Sequence[Candidate], m: int) -> list[Candidate]:
    """The fastest for M rows, and for all numbers of rows that share a kernel."""
    together = [one for one in ROWS if (one <= 8) == (m <= 8)]
    own = sorted((one for one in usable if (one.key, m) in first), key=lambda one: first[one.key, m])
    shared = [one for one in own if all((one.key, rows) in first for rows in together)]
    shared.sort(key=lambda one: sum(first[one.key, rows] for rows in together))
    return list({one.key: one for one in (*own[:AGAIN], *shared[:AGAIN])}.values())
