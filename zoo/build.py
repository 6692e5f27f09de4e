"""The one road from a ``BuildSpec`` to a stored engine.

    check the checkpoint -> name what is made -> already stored? -> expand -> rewrite -> calibrate -> compile -> store

What an engine is made from is written down first, as JSON (``Identity.made``); its digest is the ``build`` that reuse is
keyed on. The part that all profiles of a model share gives the ``version``. Output bytes play no role: two builds of one
TensorRT plan differ, and are the same engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.artifacts.manifest import Engine, EngineManifest
from zoo.artifacts.refs import Ref
from zoo.artifacts.registry import Entry, Registry, default_root
from zoo.checkpoints import Checkpoint, check_config, check_tensors, fit_names
from zoo.compilers import COMPILERS
from zoo.errors import ConfigError, ResourceError, UnavailableError
from zoo.graph import ModelGraph
from zoo.graph_templates import expand
from zoo.passes import run_passes
from zoo.plugins import PLUGINS
from zoo.resources import check_memory
from zoo.spec import BuildSpec, digest_of, to_json
from zoo.targets import TARGETS

Progress = Callable[[str, int, int], None]  # stage, done, total (total 0: unknown)
_CALIBRATED: dict[str, dict[str, float]] = {}

# The files whose change can change an engine. Serving, storage and the command line are not among them.
SOURCES = ("spec.py", "modelspec.py", "ropetables.py", "targets.py", "graph.py", "build.py", "calibration.py")
SOURCE_FOLDERS = ("weights", "checkpoints", "graph_templates", "plugins", "passes", "compilers")


@dataclass(frozen=True)
class Identity:
    """What an engine is made from, and the digests taken over it."""

    made: dict[str, Any]
    version: str  # 12 hex digits: model, checkpoint, zoo sources
    build: str  # sha256:...: everything


@dataclass(frozen=True)
class BuildResult:
    """Where the engine stands, whether this call built it, and how long that took."""

    entry: Entry
    built: bool
    seconds: float


@functools.cache
def sources_digest() -> str:
    """Digest of the sources that engines are made by."""
    root = Path(__file__).parent
    files = [root / name for name in SOURCES]
    for folder in SOURCE_FOLDERS:
        files += sorted((root / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\n{len(file.read_bytes())}\n".encode())
        digest.update(file.read_bytes())
    return "sha256:" + digest.hexdigest()


def open_checkpoint(spec: BuildSpec) -> tuple[BuildSpec, Checkpoint | None]:
    """The model's checkpoint, compared with the spec; None when the spec names none.

    Some exports of one model put a prefix before every tensor name and some do not: the spec comes back with the names
    that this checkpoint uses.
    """
    if not spec.model.checkpoint:
        return spec, None
    checkpoint = Checkpoint.open(Path(spec.model.checkpoint))
    check_config(spec.model, checkpoint)
    model = fit_names(spec.model, checkpoint.tensors)
    check_tensors(model, checkpoint.tensors)
    return dataclasses.replace(spec, model=model), checkpoint


def identify(spec: BuildSpec, checkpoint: Checkpoint | None) -> Identity:
    """Name the engine that a spec makes from a checkpoint, without building it."""
    model = to_json(spec.model)
    del model["checkpoint"]  # the digests say which; the path says only where
    shared = {
        "model": model,
        "checkpoint": checkpoint.digests() if checkpoint else {},
        "zoo": {"sources": sources_digest()},
        "tools": {name: importlib.metadata.version(name) for name in ("onnx", "onnx-graphsurgeon")},
    }
    version = digest_of(shared).removeprefix("sha256:")[:12]
    made = {
        **shared,
        "quant": to_json(spec.quant),
        "hardware": spec.hardware.build_fields(),
        "parallel": to_json(spec.parallel),
        "limits": to_json(spec.limits),
        "dtype": spec.dtype,
        "threads": spec.threads,
        "compiler": {"name": spec.compiler, "version": COMPILERS[spec.compiler].version()},
    }
    if spec.calibrated and checkpoint:
        from zoo.calibration import text_digest

        made["calibration"] = text_digest()
    return Identity(made, version, digest_of(made))


def rewrite(spec: BuildSpec, dump: Path | None = None) -> ModelGraph:
    """Expand a spec's model and rewrite it for its target. Reads no weights."""
    graph = expand(spec.model, spec.dtype, spec.limits.max_context)
    return run_passes(graph, spec, TARGETS[spec.compiler], dump)


def build(
    spec: BuildSpec, registry: Registry | None = None, progress: Progress | None = None, dump: Path | None = None
) -> BuildResult:
    """Build and store the engine of a spec, or find it stored.

    Raises ZooError with what to do: a checkpoint that does not fit, a compiler that is not here, too little memory or
    disk. Nothing is left behind then. Two calls for one engine at once: the second waits and finds it.
    """
    report = progress or (lambda stage, done, total: None)
    registry = registry or Registry(Path(spec.registry) if spec.registry else default_root())
    report("check", 0, 0)
    spec, checkpoint = open_checkpoint(spec)
    identity = identify(spec, checkpoint)
    if found := _stored(registry, spec, identity):
        return BuildResult(found, False, 0.0)
    compiler = COMPILERS[spec.compiler]
    if reason := compiler.supports(spec.hardware):
        raise ConfigError(f"compiler {spec.compiler!r} does not build for hardware {spec.hardware.name!r}: {reason}")
    if reason := compiler.available():
        raise UnavailableError(f"compiler {spec.compiler!r} is not available here: {reason}")
    with registry.building(identity.build):
        if found := _stored(registry, spec, identity):
            return BuildResult(found, False, 0.0)
        started = time.perf_counter()
        with _workdir(registry.root) as work:
            engine = _make(spec, identity, checkpoint, work, report, dump)
            engine.manifest = dataclasses.replace(engine.manifest, seconds=round(time.perf_counter() - started, 3))
            report("store", 0, 0)
            entry = registry.store(engine)
        return BuildResult(entry, True, time.perf_counter() - started)


def _stored(registry: Registry, spec: BuildSpec, identity: Identity) -> Entry | None:
    """The engine if it is stored, made what its names mean: going back to earlier settings goes back to their engine."""
    found = registry.find_build(spec.model.name, identity.version, identity.build)
    if found and not (found.current and registry.version(Ref.parse(spec.model.name)) == found.version):
        registry.promote(found)
        found = registry.find_build(spec.model.name, identity.version, identity.build)
    return found


def _make(
    spec: BuildSpec, identity: Identity, checkpoint: Checkpoint | None, work: Path, report: Progress, dump: Path | None
) -> Engine:
    report("expand and rewrite", 0, 0)
    graph = rewrite(spec, dump)
    compiler = COMPILERS[spec.compiler]
    check_memory(compiler.predict(graph, spec)["build_ram"], f"building {spec.model.name} {spec.profile}")
    scales = _scales(spec, checkpoint, identity, report)
    report("compile", 0, 0)
    tensors = checkpoint.tensors if checkpoint else None
    compiled = compiler.compile(graph, spec, tensors, scales, work, report)
    files = dict(compiled.files)
    weights = dict(compiled.weights)
    if scales:
        (work / "scales.json").write_text(json.dumps(scales, indent=1, sort_keys=True))
        files["scales.json"] = work / "scales.json"
    if checkpoint:
        digests = checkpoint.digests()
        if weights.get("table"):  # recipes: the checkpoint's own files travel with them
            files |= {f"checkpoint/{file.name}": file for file in checkpoint.weight_files}
            weights["files"] = [
                {"name": f"checkpoint/{file.name}", "digest": digests[file.name], "size": file.stat().st_size}
                for file in checkpoint.weight_files
            ]
        files |= {f"tokenizer/{file.name}": file for file in checkpoint.tokenizer_files}
    used = {node.op for node in graph.graph.nodes if node.domain == "zoo"}
    manifest = EngineManifest(
        model=spec.model.name,
        version=identity.version,
        profile=spec.profile,
        build=identity.build,
        made=identity.made,
        compiler=identity.made["compiler"],
        spec={
            "model": identity.made["model"],
            **{key: to_json(getattr(spec, key)) for key in ("quant", "hardware", "parallel", "limits")},
            "dtype": spec.dtype,
            "threads": spec.threads,
        },
        needs={"kind": spec.hardware.kind, "sm": spec.hardware.sm, "memory": spec.hardware.memory, **compiled.needs},
        limits=_limits(spec),
        abi=compiled.abi,
        weights={"bound": checkpoint is not None, **weights},
        passes=[dataclasses.asdict(one) for one in graph.reports],
        plugins={op: plugin.version for op, plugin in PLUGINS.items() if op in used or op in _rewritten(graph)},
        pooling=spec.model.pooling if spec.model.template == "encoder" else "",
        scratch=compiled.scratch,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return Engine(manifest, files)


def _limits(spec: BuildSpec) -> dict[str, int]:
    """The limits that an engine has: one without a cache has none of blocks and rows of logits."""
    limits = {key: int(value) for key, value in to_json(spec.limits).items()}
    if spec.model.template == "encoder":
        limits = {key: limits[key] for key in ("max_tokens", "max_sequences", "max_context")}
    return limits


def _rewritten(graph: ModelGraph) -> set[str]:
    """Zoo ops that the passes put in, also where a lowering has replaced them since."""
    return {kind for report in graph.reports for kind, count in report.counts.items() if count}


def _scales(spec: BuildSpec, checkpoint: Checkpoint | None, identity: Identity, report: Progress) -> dict[str, float]:
    """The activation scales of a quantized engine. They depend on the model and the text only, so the profiles built by
    one process share them."""
    if not spec.calibrated or not checkpoint:
        return {}
    from zoo.calibration import calibrate_checkpoint

    tokens, cache = spec.quant.calibration_tokens, spec.quant.kv_cache != "none"
    key = f"{identity.version} {tokens} {cache} {identity.made['calibration']}"
    if key not in _CALIBRATED:
        _CALIBRATED[key] = calibrate_checkpoint(spec.model, checkpoint, tokens, report, cache)
    return dict(_CALIBRATED[key])


@contextlib.contextmanager
def _workdir(root: Path) -> Iterator[Path]:
    """A folder for compiler output, beside the registry so that storing it is a rename away; removed in every case."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=".build-", dir=root))
    except OSError as error:
        raise ResourceError(f"the registry {root} cannot be written: {error.strerror}; set ZOO_HOME to another folder") from None
    try:
        yield path
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"the disk of {root} is full; nothing was stored. Free some (`zoo gc` removes what nothing refers to) or "
            "set ZOO_HOME to another disk"
        ) from None
    finally:
        shutil.rmtree(path, ignore_errors=True)


def build_folder(
    folder: Path,
    quant: str = "none",
    hardware: str = "cpu",
    registry: Path | None = None,
    overrides: tuple[str, ...] = (),
    check: Callable[[BuildSpec], None] | None = None,
) -> str:
    """Build an engine straight from a Hugging Face folder, as ``LLM("/a/folder")`` does. Gives the full REF.

    ``check`` sees what would be built before anything is, and may raise.
    """
    from zoo.checkpoints.adopt import adopt
    from zoo.config import compose_model

    spec = compose_model(adopt(folder), [f"quant={quant}", f"hardware={hardware}", *overrides])
    if check:
        check(spec)
    entry = build(spec, Registry(registry) if registry else None).entry
    return entry.ref
