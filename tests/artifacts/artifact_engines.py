"""Small engines for tests of storing, choosing and moving them: a few hundred bytes of files and a true manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from zoo.artifacts.manifest import Abi, CacheAbi, Engine, EngineManifest, TensorAbi
from zoo.spec import digest_of

CPU = {"kind": "cpu", "sm": 0, "memory": 1000, "packages": {"onnxruntime": "1.32.0"}}
GPU = {"kind": "gpu", "sm": 89, "memory": 20_000_000_000, "packages": {"tensorrt_rtx": "1.7.1.116"}}
CHECKPOINT = b"weights that all profiles of a version share " * 40


def make_engine(
    folder: Path,
    *,
    model: str = "tiny",
    seed: str = "a",
    quant: str = "none",
    hardware: str = "cpu",
    memory: int = 0,
    needs: dict[str, Any] | None = None,
    tp: int = 1,
    max_tokens: int = 256,
    plan: bytes = b"plan",
    created: str = "2026-11-23T00:00:00+00:00",
    checkpoint: bytes = CHECKPOINT,
) -> Engine:
    """An engine whose version follows from ``seed`` and whose build follows from everything else but ``plan``."""
    needs = needs or (GPU if hardware != "cpu" else CPU)
    compiler = next(iter(needs["packages"]))
    shared = {"model": {"name": model, "hidden_size": 64, "rope": {"theta": 1e4}}, "seed": seed}
    version = digest_of(shared).removeprefix("sha256:")[:12]
    made = shared | {
        "quant": {"name": quant},
        "hardware": {"name": hardware, "memory": memory},
        "limits": {"max_tokens": max_tokens},
        "compiler": {"name": compiler, "version": "1"},
        "tp": tp,
    }
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "model.onnx": f"graph of {seed} {quant} {hardware}".encode(),
        "engine.plan": plan,
        "checkpoint/model.safetensors": checkpoint,
        "tokenizer/tokenizer.json": b'{"version": "1.0"}',
        "tokenizer/LICENSE": b"Apache License 2.0",
    }
    files = {}
    for name, data in contents.items():
        files[name] = folder / name.replace("/", "-")
        files[name].write_bytes(data)
    digest = "sha256:" + hashlib.sha256(checkpoint).hexdigest()
    manifest = EngineManifest(
        model=model,
        version=version,
        profile=f"{quant}-{hardware}-{compiler}-tp{tp}",
        build=digest_of(made),
        made=made,
        compiler={"name": compiler, "version": "1"},
        spec={
            "model": shared["model"]
            | {"family": "llama", "license": "Apache-2.0", "base_model": "zoo/base", "template": "decoder"},
            "quant": {"name": quant, "method": quant},
            "hardware": {"name": hardware, "memory": memory, "compilers": [compiler]},
            "parallel": {"tp": tp, "pp": 1},
            "dtype": "float32",
        },
        needs=needs,
        limits={"max_tokens": max_tokens},
        abi=Abi(
            (TensorAbi("token_ids", "int32", ("T",)),),
            (TensorAbi("logits", "float32", ("R", 32)),),
            (CacheAbi("kv.0", "float32", (9, 2, 16, 2, 8), "full"),),
        ),
        weights={
            "table": "weights.json",
            "bound": True,
            "files": [{"name": "checkpoint/model.safetensors", "digest": digest, "size": len(checkpoint)}],
        },
        passes=[{"name": "paged_attention", "counts": {"ZooPagedAttention": 2}, "misses": []}],
        plugins={"ZooPagedAttention": "1"},
        created=created,
    )
    return Engine(manifest, files)
