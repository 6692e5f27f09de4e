"""Composed data -> a resolved ``BuildSpec``. Impossible combinations are refused here, with what would be possible."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.config import files
from zoo.errors import ConfigError
from zoo.spec import COMPILERS, DTYPES, BuildSpec, HardwareSpec, Limits, ModelSpec, ParallelSpec, QuantSpec
from zoo.targets import TARGETS

if TYPE_CHECKING:
    from zoo.config.loader import Composed

LINEARS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "lm_head")  # qkv, gate_up: those that are fused
NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")


def compose(overrides: Sequence[str] = (), conf: Path | None = None) -> BuildSpec:
    """One BuildSpec from Hydra overrides, such as ``models=gpt2`` or ``limits.max_tokens=256``.

    Raises ConfigError with file or override, key, what was found and what is allowed. Opens no checkpoint.
    """
    return _compose(list(overrides), files.conf_dirs(conf), conf)


def compose_sweep(overrides: Sequence[str], conf: Path | None = None) -> list[BuildSpec]:
    """One BuildSpec for each combination of comma lists, as ``zoo engines -m hardware=l40s,rtx-4090`` means them."""
    from zoo.config.loader import expand_sweep

    folders = files.conf_dirs(conf)
    return [_compose(chosen, folders, conf) for chosen in expand_sweep(overrides, folders)]


def compose_model(text: str, overrides: Sequence[str] = (), conf: Path | None = None) -> BuildSpec:
    """Compose a model that stands in no conf folder: ``text`` is its YAML, as ``zoo.checkpoints.adopt`` writes it."""
    found = re.search(r"^name: *[\"']?([\w.-]+)", text, re.MULTILINE)
    if not found or not NAME.fullmatch(found[1]):
        raise ConfigError("the model's YAML has no usable name; names are lower case letters, digits, dots and dashes")
    with tempfile.TemporaryDirectory(prefix="zoo-conf-") as folder:
        (Path(folder) / "models").mkdir()
        (Path(folder) / "models" / f"{found[1]}.yaml").write_text(text, encoding="utf-8")
        return _compose([f"models={found[1]}", *overrides], [Path(folder), *files.conf_dirs(conf)], conf)


def _compose(overrides: list[str], folders: list[Path], conf: Path | None) -> BuildSpec:
    from zoo.config.loader import load

    composed = load(overrides, folders)
    data = composed.data
    model = _model(composed)
    quant: QuantSpec = _spec(QuantSpec, composed, "quant")
    hardware: HardwareSpec = _spec(HardwareSpec, composed, "hardware")
    parallel: ParallelSpec = _spec(ParallelSpec, composed, "parallel")
    limits: Limits = _spec(Limits, composed, "limits")
    if parallel.tp > 1 or parallel.pp > 1:
        raise ConfigError(f"parallel {parallel.name!r}: engines over several GPUs are not built yet; use parallel=tp1")
    for role in quant.skip:
        if role not in LINEARS:
            raise ConfigError(f"quant {quant.name!r}: skip names {role!r}; linear roles are {', '.join(LINEARS)}")
    if quant.method not in hardware.quants:
        able = [spec.name for spec in files.hardware_specs(conf) if quant.method in spec.quants]
        raise ConfigError(
            f"quant {quant.name!r} cannot run on hardware {hardware.name!r}"
            f"{f' (SM {hardware.sm // 10}.{hardware.sm % 10})' if hardware.sm else ''}: it runs {', '.join(hardware.quants)}; "
            f"choose quant=none, or hardware that runs {quant.method}: {', '.join(able)}"
        )
    compiler = _compiler(data["compiler"], hardware)
    dtype = _dtype(data["dtype"], model, hardware, compiler)
    if quant.kv_cache != "none" and not TARGETS[compiler].float8_pool:
        able = [name for name, target in TARGETS.items() if target.float8_pool]
        raise ConfigError(
            f"quant {quant.name!r} keeps keys and values as {quant.kv_cache}, which compiler {compiler!r} cannot; choose a quant "
            f"with kv_cache none, such as quant=fp8, or hardware that one of these builds for: {', '.join(able)}"
        )
    if quant.kv_cache != "none" and model.template == "encoder":
        raise ConfigError(
            f"quant {quant.name!r} keeps keys and values as {quant.kv_cache}, but model {model.name!r} is an encoder and has no "
            "cache; choose a quant with kv_cache none, such as quant=fp8"
        )
    cache = "float8e4m3" if quant.kv_cache == "fp8" else dtype
    if not 0 <= data["threads"] <= 1024:
        raise ConfigError(
            f"{composed.origin('threads')}: threads is {data['threads']}; it must be at least 0 (0: all) and at most 1024"
        )
    return BuildSpec(
        model=model,
        quant=quant,
        hardware=hardware,
        parallel=parallel,
        limits=_limits(composed, limits, hardware, compiler, cache).resolve(model),
        compiler=compiler,
        dtype=dtype,
        threads=data["threads"] if hardware.kind == "cpu" else 0,  # a GPU engine has no use for them
        registry=str(files.expand(data["registry"]["path"])) if data["registry"]["path"] else "",
        overrides=tuple(overrides),
    )


def _limits(composed: Composed, limits: Limits, hardware: HardwareSpec, compiler: str, cache: str) -> Limits:
    """Limits that nobody chose, for a target of our own kernels: the hardware's, and pools as large as its memory.

    A session gives its pools what memory is left, so ``max_blocks`` is a bound there and not a size.
    """
    if not TARGETS[compiler].kernels:
        return limits
    unsaid, encoder = Limits(), composed.data["model"]["template"] == "encoder"
    for key, value in hardware.limits.items():
        if encoder and key in ("max_rows", "max_blocks"):
            continue
        if getattr(limits, key) == getattr(unsaid, key) and not composed.origin(f"limits.{key}").startswith("override"):
            limits = dataclasses.replace(limits, **{key: value})
    if not limits.max_blocks and not encoder:
        model = composed.data["model"]
        latent = model["latent"]
        row = latent["kv_rank"] + latent["rope_dim"] if latent["kv_rank"] else model["num_kv_heads"] * model["head_dim"]
        token = model["num_layers"] * 2 * row * (1 if cache == "float8e4m3" else 2)
        blocks = min(hardware.memory // (token * limits.block_size), (1 << 31) - 1)
        context = limits.max_context or model["max_positions"]
        if (blocks - 1) * limits.block_size < context:
            raise ConfigError(
                f"one context of {context} tokens takes {context * token / 1e9:.1f} GB of cache, hardware {hardware.name!r} has "
                f"{hardware.memory / 1e9:.1f} GB; lower limits.max_context, or choose hardware with more memory"
            )
        limits = dataclasses.replace(limits, max_blocks=blocks)
    return limits


def _spec(kind: type, composed: Composed, part: str) -> Any:
    """The frozen spec of a part; what it finds wrong is said with the file, and the overrides, that it came from."""
    data = {key: value for key, value in composed.data[part].items() if key not in ("config", "architectures")}
    if data.get("checkpoint"):
        data["checkpoint"] = str(_checkpoint(composed, str(data["checkpoint"])))
    try:
        return files.to_spec(kind, data, part)
    except ConfigError as error:
        raise ConfigError(f"{composed.source(part)}: {error}") from None


def _model(composed: Composed) -> ModelSpec:
    where = composed.source("model")
    model: ModelSpec = _spec(ModelSpec, composed, "model")
    if not NAME.fullmatch(model.name):
        raise ConfigError(
            f"{where}: model.name is {model.name!r}; names are lower case letters and digits, with dots and dashes inside"
        )
    if model.position == "rope":
        _check_rope(model, where)
    for key in ("window_layers", "rope_layers"):
        if wrong := [layer for layer in getattr(model, key) if not 0 <= layer < model.num_layers]:
            raise ConfigError(f"{where}: model.{key} has {wrong[0]}; layers are 0 to {model.num_layers - 1}")
    if wrong := [layer for layer in model.moe.dense_layers if not 0 <= layer < model.num_layers]:
        raise ConfigError(f"{where}: model.moe.dense_layers has {wrong[0]}; layers are 0 to {model.num_layers - 1}")
    if model.window < 0:
        raise ConfigError(f"{where}: model.window is {model.window}; it must be at least 0 (0: full attention)")
    if model.window_layers and not model.window:
        raise ConfigError(f"{where}: model.window_layers is set but model.window is 0; set both or neither")
    for number, pattern in enumerate(model.tensors.ignored):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{where}: model.tensors.ignored[{number}] is {pattern[:60]!r}, which is no regular expression: {error}"
            ) from None
    if not model.norm_eps > 0:
        raise ConfigError(f"{where}: model.norm_eps is {model.norm_eps}; it must be more than 0")
    return model


def _check_rope(model: ModelSpec, where: str) -> None:
    """What each kind of rotary embedding needs; see RopeSpec."""
    parts = {"rope": model.rope} | ({"local_rope": model.local_rope} if model.local_rope.theta else {})
    for part, rope in parts.items():
        key = f"{where}: model.{part}"
        if rope.theta <= 0 or rope.factor <= 0 or not 0 < rope.fraction <= 1:
            raise ConfigError(f"{key} needs theta > 0, factor > 0 and 0 < fraction <= 1; found {rope}")
        if rope.kind == "llama3" and (rope.original_max_positions < 1 or rope.high_freq_factor <= rope.low_freq_factor):
            raise ConfigError(f"{key} of kind llama3 needs original_max_positions, and high_freq_factor over low_freq_factor")
        if rope.kind in ("yarn", "dynamic", "longrope") and rope.original_max_positions < 2:
            raise ConfigError(
                f"{key} of kind {rope.kind} needs original_max_positions, the context that the model was first trained for; "
                f"found {rope.original_max_positions}"
            )
        if rope.kind in ("yarn", "dynamic") and rope.factor < 1:
            raise ConfigError(f"{key} of kind {rope.kind} needs factor, how much longer the context becomes; found {rope.factor}")
        if rope.kind == "yarn" and (rope.theta <= 1 or not rope.beta_fast >= rope.beta_slow > 0):
            raise ConfigError(f"{key} of kind yarn needs theta over 1 and beta_fast over beta_slow over 0; found {rope}")
        if rope.kind == "dynamic" and model.rotary_dim < 4:
            raise ConfigError(f"{key} of kind dynamic needs four rotated numbers a head at least; here {model.rotary_dim}")
        for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
            factors = getattr(rope, name)
            if len(factors) != model.rotary_dim // 2 or min(factors) <= 0:
                raise ConfigError(
                    f"{key}.{name} has {len(factors)} numbers; kind longrope needs {model.rotary_dim // 2}, one over 0 for each "
                    f"pair of the {model.rotary_dim} rotated numbers of a head"
                )
    if model.rope.by_length and model.local_rope.theta:
        raise ConfigError(
            f"{where}: model.rope of kind {model.rope.kind} does not go with local_rope: all layers read the same row of their "
            "tables, and only one of the two would have a table for each length"
        )


def _checkpoint(composed: Composed, named: str) -> Path:
    """A relative checkpoint is meant from the folder that holds conf, or, in an override, from where the user is."""
    path = files.expand(named)
    if path.is_absolute() or composed.origin("model.checkpoint").startswith("override"):
        return path.absolute()
    file = composed.file_of("model.checkpoint")
    return (file.folder.parent if file else Path.cwd()) / path


def _compiler(chosen: Any, hardware: HardwareSpec) -> str:
    built = {name: _why_not(name, hardware) for name in hardware.compilers}
    able = [name for name, reason in built.items() if not reason]
    if chosen is None:
        if not able:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in built.items())
            raise ConfigError(f"hardware {hardware.name!r}: none of its compilers can build for it: {reasons}")
        return able[0]
    if chosen not in COMPILERS:
        raise ConfigError(f"compiler {chosen!r}: pick one of {', '.join(able)} for hardware {hardware.name!r}")
    if chosen not in able:
        reason = built.get(chosen, "not among the compilers of this hardware")
        raise ConfigError(
            f"compiler {chosen!r} for hardware {hardware.name!r}: {reason}; pick one of {', '.join(able) or 'none'}"
        )
    return str(chosen)


def _why_not(compiler: str, hardware: HardwareSpec) -> str:
    """Why a compiler cannot build for a piece of hardware; empty when it can."""
    target = TARGETS.get(compiler)
    if target is None:
        return "this compiler is not built yet"
    if hardware.kind == "gpu" and hardware.sm not in target.sms:
        sms = ", ".join(f"{sm // 10}.{sm % 10}" for sm in target.sms)
        return f"it builds for SM {sms}, not {hardware.sm // 10}.{hardware.sm % 10}" if sms else "it builds for no GPU"
    if not set(target.dtypes) & set(hardware.dtypes):
        return f"it computes in {', '.join(target.dtypes)}, the hardware in {', '.join(hardware.dtypes)}"
    return ""


def _dtype(chosen: Any, model: ModelSpec, hardware: HardwareSpec, compiler: str) -> str:
    common = [dtype for dtype in hardware.dtypes if dtype in TARGETS[compiler].dtypes]
    if chosen is None:
        return model.dtype if model.dtype in common else common[0]
    if chosen not in common:
        known = "" if chosen in DTYPES else f" (known are {', '.join(DTYPES)})"
        raise ConfigError(
            f"dtype {chosen!r}{known}: compiler {compiler!r} on hardware {hardware.name!r} computes in {', '.join(common)}"
        )
    return str(chosen)
