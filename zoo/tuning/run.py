"""Every kernel of one engine that can be tuned, on the GPU at hand, within a time."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError, IncompatibleError, UnavailableError
from zoo.runtime.abi import EngineLimits
from zoo.runtime.cuda.driver import Device
from zoo.tuning.attention import key_of, tune_attention
from zoo.tuning.bench import Bench, Compile
from zoo.tuning.elementwise import tune_norm, tune_rotary
from zoo.tuning.products import cublas, entry, tune_product, winner
from zoo.tuning.section import Section
from zoo.tuning.shapes import Product, Shapes
from zoo.tuning.trial import Outcome, Timing

Report = Callable[[str], None]  # what is being tuned


@dataclass
class Tuned:
    """What was measured: the section for a hardware profile, rows for people, and what there was no time for."""

    gpu: str
    section: Section = field(default_factory=Section)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # variants that gave other results, and why


def check(manifest: EngineManifest) -> None:
    """Raise IncompatibleError or UnavailableError for what cannot be tuned here, before a GPU is touched."""
    compiler = manifest.compiler.get("name")
    if compiler != "cuda":
        raise IncompatibleError(
            f"{manifest.model} {manifest.profile} was built by {compiler}, whose kernels are its own; give an engine of the cuda "
            "compiler"
        )
    if manifest.pooling:
        raise IncompatibleError(
            f"{manifest.model} {manifest.profile} is an encoder's, whose kernels have nothing to choose from yet"
        )
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError(
            "Triton, which compiles the variants, is not installed; install it with "
            "`pip install 'engine-zoo[build,cuda,cuda-build]'`"
        )


def tune(
    folder: Path,
    manifest: EngineManifest,
    ref: str,
    seconds: float,
    report: Report | None = None,
    compile_kernels: Compile | None = None,
) -> Tuned:
    """Measure on the first visible GPU of the engine's SM.

    folder    of the opened engine: its plan is read, its weights are not. Operands are random, which changes no timing
    seconds   after which no further variant is tried; compiling what was begun may take longer

    Raises UnavailableError without a GPU, ArtifactError for a malformed plan.
    """
    compiling = compile_kernels or _compiler()
    tell, deadline = report or (lambda what: None), time.perf_counter() + seconds
    shapes = Shapes(_plan(folder))
    limits = EngineLimits(**manifest.limits)
    device = Device(int(manifest.needs["sm"]))
    try:
        with tempfile.TemporaryDirectory(prefix="zoo-tune-") as work:
            bench = Bench(device, limits, Path(work), compiling)
            try:
                made = Tuned(device.name)
                made.section.comments[()] = [_when(device.name, ref)]
                for outcome in _all(bench, shapes, limits, made, tell, deadline):
                    _note(made, outcome)
            finally:
                bench.close()
    finally:
        device.close()
    return made


def _compiler() -> Compile:
    from zoo.compilers.cuda import aot

    return aot.compile_kernels


def _plan(folder: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / 'plan.json'}: it cannot be read ({error}); pull or rebuild the engine") from None
    return plan


def _when(gpu: str, ref: str) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        triton = f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        triton = "an unknown triton"
    return f"{today}, {gpu}, {triton}: zoo tune {ref}"


def _all(bench: Bench, shapes: Shapes, limits: EngineLimits, made: Tuned, tell: Report, deadline: float) -> Iterator[Outcome]:
    """What weighs most comes first: products, then attention, then the small ones."""
    bounds = {key: int(getattr(limits, key)) for key in vars(limits)}
    for product in shapes.products:
        most = limits.max_rows if product.rows == "R" else limits.max_tokens
        if _late(made, f"product {product.key}", tell, deadline):
            continue
        outcomes: dict[int, Outcome] = {}
        for bucket, outcome in tune_product(bench, product, most, deadline):
            outcomes[bucket] = outcome
            yield outcome
        _add_product(made.section, product, outcomes)
    for name, kernel in (("decode", shapes.decode), ("prefill", shapes.prefill)):
        if (
            kernel is not None
            and not _late(made, name, tell, deadline)
            and (found := tune_attention(bench, kernel, bounds, deadline))
        ):
            yield found
            if found.better:
                key = ("attention", key_of(kernel))
                known = made.section.tables.get("attention", {}).get(key[1], {})
                comments = made.section.comments.get(key, [])
                made.section.add(key, known | dict(found.best.variant.tuning), *comments, figures(found))
    if shapes.rotary is not None and not _late(made, "rotary", tell, deadline):
        yield from _small(made.section, tune_rotary(bench, shapes.rotary, bounds, deadline))
    if shapes.norm is not None and not _late(made, "norm", tell, deadline):
        yield from _small(made.section, tune_norm(bench, shapes.norm, deadline))


def _late(made: Tuned, name: str, tell: Report, deadline: float) -> bool:
    if time.perf_counter() > deadline:
        made.left_out.append(name)
        return True
    tell(name)
    return False


def _small(section: Section, found: Outcome | None) -> Iterator[Outcome]:
    """Values of their own in the section."""
    if found is None:
        return
    yield found
    for name, value in found.best.variant.tuning.items():
        section.add((name,), value, f"{name}, {figures(found)}")


def _add_product(section: Section, product: Product, outcomes: dict[int, Outcome]) -> None:
    if outcomes and (found := entry(product, outcomes)) is not None:
        comments = [figures(outcome, winner(outcome)) for outcome in outcomes.values()]
        section.add(("skinny", product.key), found, *comments)


def figures(found: Outcome, best: Timing | None = None) -> str:
    """An outcome in a line: ``decode ...: 64 x 1024 41.0 us (default 43.2)``."""
    chosen = best or found.best
    library = cublas(found)
    parts = []
    for place, load in enumerate(found.loads):
        others = [("default", found.default)] if found.default is not library else []
        others += [("cuBLASLt", library)] if library is not None else []
        beside = ", ".join(f"{name} {one.seconds[place] * 1e6:.1f}" for name, one in others)
        parts.append(f"{load.name} {chosen.seconds[place] * 1e6:.1f} us ({beside})")
    return f"{found.name}: {'; '.join(parts)}"


def _note(made: Tuned, found: Outcome) -> None:
    """A row for each load of an outcome, and what went wrong."""
    chosen, library = winner(found), cublas(found)
    for place, load in enumerate(found.loads):
        spent = chosen.seconds[place]
        made.rows.append(
            {
                "what": found.name,
                "load": load.name,
                "tried": len(found.timings),
                "best": chosen.variant.label,
                "us": round(spent * 1e6, 2),
                "default_us": round(found.default.seconds[place] * 1e6, 2),
                "cublas_us": round(library.seconds[place] * 1e6, 2) if library else None,
                "tb_per_s": round(load.moved / spent / 1e12, 3),
                "tflop_per_s": round(load.flops / spent / 1e12, 1),
            }
        )
    if not found.complete:
        made.left_out.append(f"some variants of {found.name}")
    made.failed |= {f"{found.name} {one.variant.label}": one.wrong for one in found.timings if one.wrong}
