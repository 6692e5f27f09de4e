"""Products of few rows whose weights are on their way before x is there: right first, then alone and in a layer's chain.

    python3 -m tests.gpu.narrow_bench          on a GPU; some four minutes; all rows go to $OUT/narrow.txt if OUT is set
    python3 -m tests.gpu.narrow_bench --dry    compile everything, say what each kernel takes; no GPU

Every candidate of ``narrow_cases.py`` is compared with float64 on fresh random operands, its output full of NaN, and must give
the same bits when it overlaps its neighbours. What does not compile, is wrong, or ends the process on the GPU is named and left
out.
Timed are CUDA graphs of launches that overlap as an engine's do, weights always cold:

    alone    a chain of one product, each launch with other weights
    layer    qkv, quantize, o, add + norm, gate_up, activation, down, add + norm; one product's kernel exchanged at a time, first
             beside those of today, then beside the best found for the others

Bandwidth is that of the weights, of 4.35 TB/s on an H200.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_tools
from narrow_cases import FP8, MORE, MORE_ROWS, ROWS, SHAPES, Candidate, baseline, build_all, candidates, resources

from zoo.plugins.skinny_gemm.cuda import tiling

BUDGET = 330.0  # seconds of the whole run
QUIET = 45.0  # seconds without a word from the measuring process that mean that it hangs
RESTARTS = 8
SHOWN = 3  # kernels of a shape and a number of rows on the screen
READS = ("cp.async.cg.shared.global", "ld.global.L1::evict_first", "ld.global.cg")  # of weights


def everything() -> dict[str, Candidate]:
    return {one.key: one for shape in SHAPES for one in candidates(shape)}


def dry(found: Iterable[Candidate]) -> int:
    """Compile, and say what a multiprocessor holds; the number of kernels that are not as they should be."""
    wanted = list(found)
    made = build_all([job for one in wanted for job in one.jobs])
    wrong = 0
    for one in wanted:
        (launch,), job = one.launches, one.jobs[0]
        result = made[job]
        if isinstance(result, str):
            print(f"FAIL {one.key}: {result}")
            wrong += 1
            continue
        compiled, ptx = result
        registers, stack = resources(compiled.cubin)
        grid = [side.at({"T": one.tiles.block_m}) for side in launch.grid]
        programs = grid[0] * grid[1] * grid[2]
        threads = 32 * compiled.warps
        resident = min(65536 // (threads * -(-registers // 8) * 8), 2048 // threads, (228 << 10) // (compiled.shared + 1024))
        n, k = SHAPES[one.shape]
        early = min(ptx.index(text) for text in READS if text in ptx) < ptx.index("griddepcontrol.wait")
        problem = "" if early != one.name.startswith("skinny") else " WRONG ORDER"
        problem += " TOO LARGE" if compiled.shared > 227 << 10 or resident < 1 else ""
        wrong += bool(problem)
        print(
            f"{one.key:<78} {registers:4} registers, stack {stack:4}, {compiled.shared >> 10:4} KB, {programs:4} programs of "
            f"{n * k // programs >> 10:4} KB, {resident} fit{problem}"
        )
    print(f"{len(wanted)} candidates, {wrong} wrong")
    return wrong


# --------------------------------------------------------------------------------------------------------------- the parent


def run(quick: bool) -> int:
    started = time.perf_counter()
    found = everything()
    if quick:
        found = dict(list(found.items())[::12]) | {one.key: one for one in map(baseline, SHAPES)}
    work = Path(tempfile.mkdtemp(prefix="narrow-"))
    import narrow_chain

    around = [(one.kernel, 0) for one in narrow_chain.elementwise()]
    made = build_all([job for one in found.values() for job in one.jobs] + around)
    bad = {key: made[one.jobs[0]] for key, one in found.items() if isinstance(made[one.jobs[0]], str)}
    if any(isinstance(made[job], str) for job in around):
        raise SystemExit(f"kernels of the chain do not compile: {[made[job] for job in around]}")
    kept = {job: result[0] for job, result in made.items() if not isinstance(result, str)}
    (work / "cubins").write_bytes(pickle.dumps(kept))
    print(f"{len(kept)} of {len(made)} kernels compiled after {time.perf_counter() - started:.0f} s", flush=True)
    journal = work / "journal"
    journal.touch()
    for _ in range(RESTARTS):
        (work / "bad").write_text(json.dumps(bad))
        left = str(BUDGET - (time.perf_counter() - started))
        command = [sys.executable, "-m", "tests.gpu.narrow_bench", "--measure", str(work), left]
        if watch(subprocess.Popen(command), journal) == 0:
            break
        lines = read(journal)
        last = lines[-1] if lines else {}
        if "start" not in last or last["start"] in bad:
            print(f"the measuring process ended by itself, last at {last}")
            break
        bad[last["start"]] = "ended the process on the GPU"
        print(f"{last['start']} ended the process; the others go on", flush=True)
    lines = read(journal)
    report(found, lines, bad)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if any("layer" in line for line in lines) else 1


def watch(process: subprocess.Popen[bytes], journal: Path) -> int:
    """Its exit code; it is killed when the journal has been quiet for too long."""
    heard, size = time.perf_counter(), -1
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            now = journal.stat().st_size
            if now != size:
                heard, size = time.perf_counter(), now
            elif time.perf_counter() - heard > QUIET:
                process.kill()
                process.wait()
                return -1


def read(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


def report(found: dict[str, Candidate], lines: Sequence[dict[str, Any]], bad: dict[str, Any]) -> None:
    """A table for each shape, by time in the layer; what was left out; lines for a hardware profile."""
    alone = {(line["done"], line["m"]): line for line in lines if "done" in line}
    wrong = {(line["wrong"], line["m"]): line["why"] for line in lines if "wrong" in line}
    layer = {(line["layer"], line["m"]): line for line in lines if "layer" in line and line["round"] == 1}
    name = next((line["device"] for line in lines if "device" in line), "H200")
    peak = next((speed for kind, speed in gpu_tools.PEAKS.items() if kind in name), gpu_tools.PEAKS["H100"])
    full: list[str] = []
    print(f"{name}: us alone, of {peak / 1e12} TB/s, us in a short graph, us of a layer with it, registers, kernel")
    for shape, (n, k) in SHAPES.items():
        for m in ROWS:
            rows = []
            for (key, rows_of), line in alone.items():
                if rows_of == m and found[key].shape == shape:
                    spent, chain = line["us"], layer.get((key, m), {}).get("us", 999.0)
                    mark = " <- today" * (key == baseline(shape).key)
                    part = n * k / spent * 1e6 / peak
                    text = f"{spent:6.2f} {part:4.0%} {line['short']:6.2f} {chain:7.2f} {line['registers']:4}"
                    rows.append((chain, spent, f"{text} {found[key].name}{mark}"))
            rows.sort()
            head = f"{shape} {n}x{k}, M={m}"
            full += [head, *(text for _, _, text in rows), ""]
            fastest = min(rows, key=lambda row: row[1], default=(0, 0, ""))[2]
            short = [text for place, (_, _, text) in enumerate(rows) if place < SHOWN or text == fastest or "today" in text]
            print(head, *short, sep="\n")
    left = [f"{key}: {why}" for key, why in bad.items()] + [f"{key} M={m}: {why}" for (key, m), why in wrong.items()]
    left += [line["note"] for line in lines if "note" in line]
    full += ["left out:", *left]
    print(f"left out: {len(left)}", *left[:10], sep="\n")
    for m in ROWS:
        alike = sorted(
            (line["us"], line["alike"], line["uniform"])
            for line in lines
            if line.get("uniform") and line["m"] == m and not line["why"]
        )
        text_of = [f"M={m}: a layer {us:.1f} us, {name}{', small L1 caches around it' * small}" for us, small, name in alike]
        full += text_of
        print(*text_of[:3], sep="\n")
    for line in lines:
        if "combination" in line:
            read = sum(n * k for n, k in SHAPES.values()) / peak * 1e6
            times = f"{line['today']:.1f} us today ({read / line['today']:.0%}), {line['us']:.1f} us ({read / line['us']:.0%})"
            beside = "kernels around them with small L1 caches" if line["alike"] else line["combination"]
            text = f"M={line['m']}: a layer {times} with {beside}"
            full.append(text)
            print(text)
    suggested = suggestion(found, lines)
    print(suggested)
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "narrow.txt").write_text("\n".join([*full, suggested]) + "\n")


def suggestion(found: dict[str, Candidate], lines: Sequence[dict[str, Any]]) -> str:
    """``tuning.skinny`` for what was best in a layer; bucket 8 by 1 and 8 rows together."""
    times: dict[tuple[int, str, str], float] = {}
    for line in lines:
        if "layer" in line and (line["round"] == 2 or (line["m"], "", line["layer"]) not in times):
            times[line["m"], "", line["layer"]] = line["us"]
    text = ["tuning:", "  skinny:"]
    for shape, (n, k) in SHAPES.items():
        chosen = []
        for most, rows in ((8, (1, 8)), (16, (16,))):
            scores = {
                key: sum(times[m, "", key] for m in rows)
                for key, one in found.items()
                if one.shape == shape and all((m, "", key) in times for m in rows)
            }
            if scores:
                best = found[min(scores, key=lambda key: scores[key])]
                note = f"   # with {best.registers} registers at most" if best.registers else ""
                chosen.append(f'      "{most}": {best.numbers}{note}')
        for most in MORE_ROWS[shape]:
            tiles = MORE.get((shape, most)) or tiling(most, n, k, FP8)
            chosen.append(f'      "{most}": {list(astuple(tiles))}')
        if chosen:
            text += [f'    "{n}x{k}.{FP8}":', *chosen]
    return "\n".join(text)


def main() -> int:
    arguments = sys.argv[1:]
    quick = "--quick" in arguments
    if "--dry" in arguments:
        chosen = [one for key, one in everything().items() if all(word in key for word in arguments if word[0] != "-")]
        return int(dry(chosen[:: 12 if quick else 1]) > 0)
    if "--measure" in arguments:
        import narrow_search

        place = arguments.index("--measure")
        return narrow_search.measure(Path(arguments[place + 1]), float(arguments[place + 2]), everything())
    return run(quick)


if __name__ == "__main__":
    raise SystemExit(main())
