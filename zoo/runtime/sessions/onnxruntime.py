"""Sessions on ONNX Runtime: weights carried out into a temporary file, pools updated in place, logits out.

T tokens, B sequences, P blocks a sequence, R rows of logits; pools are [blocks, 2, block_size, kv_heads, head_dim].

Opening writes ``weights.bin`` from the recipes and the checkpoint's files into a private folder beside a link to
``model.onnx``, lets ONNX Runtime map it, and deletes the folder. ONNX Runtime packs each matrix into memory of its own and
unmaps what it has packed, so that the weights are held once. The embedding table stays mapped; the deleted file lives
until the session is closed.

Measured on two cores, float32: packing, the default, is worth a factor of two at four rows and is what takes memory of its
own. Between two parallel sections the other threads spin for a while before they sleep; ONNX Runtime's default is long
enough to take half of the machine from others, and from this session itself when it does not have the cores alone (decode
of a 0.28 G-parameter model beside a busy process: 98 ms a step, 53 ms when they spin for 20 us, the same 45 ms for either on
an idle machine). Huge pages: ``hugepages.py``. Memory arena, patterns, optimization level and the allocator of initializers
change nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from zoo.artifacts.locks import Lock
from zoo.artifacts.machine import describe_machine
from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError, EngineError, IncompatibleError, ResourceError, ZooError
from zoo.resources import check_disk, check_memory, size_text
from zoo.runtime.abi import Batch, EngineLimits, Int32, StepResult
from zoo.runtime.indices import INDEX_BUILDERS
from zoo.runtime.sessions import check_threads, hugepages, most_threads
from zoo.spec import digest_of
from zoo.weights.bind import packed_layout, write_packed
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight

NAME = ".session-"
SPIN = "20"  # microseconds that a thread without work waits before it sleeps
SPARE = 300_000_000  # bytes of memory a session takes beside its weights


class OrtSession:
    """One engine on this machine's CPU. ``threads`` 0: as the engine was built for, or every core of this process.

    ``blocks``: how many blocks of the pools steps will name; 0: all. Pools are as large as the engine was built for, but
    a block takes memory only when it is used. ``fill`` is for tests: a value that the pools start with, NaN for one;
    without it their contents are undefined.
    Raises RequestError for threads out of range, ResourceError when memory or disk are short, ArtifactError when the
    engine's files do not fit each other, CheckpointError when the checkpoint does not fit the recipes. Nothing is left on
    the disk in any case.
    """

    def __init__(
        self, folder: Path, manifest: EngineManifest, threads: int = 0, fill: float | None = None, blocks: int = 0
    ) -> None:
        self.limits = _limits(manifest)
        self.rope_tables = manifest.abi.rope_tables
        self.vocab_size = _vocab_size(manifest)
        check_threads(threads)
        self.threads = threads or _built_threads(manifest) or len(os.sched_getaffinity(0))
        self._abi = manifest.abi
        table, weights = _table(folder)
        _check_pools(manifest, self.limits, min(blocks or self.limits.max_blocks, self.limits.max_blocks))
        check_memory(table["size"] + SPARE, f"running {manifest.model} {manifest.profile}")
        self._pools = {cache.name: _pool(cache.shape, fill) for cache in self._abi.caches}
        self._session: Any = _load(folder, table, weights, self.threads)
        hugepages.collapse()
        self._binding = self._session.io_binding()
        for name, pool in self._pools.items():
            place = ("cpu", 0, np.float32, pool.shape, pool.ctypes.data)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(name.replace("kv.", "kv_out."), *place)

    def step(self, batch: Batch) -> StepResult:
        """Run one batch; logits [R, vocab] are a new array. R may be 0: the caches are filled and no logits are made.

        Raises ResourceError when memory ran out, EngineError when ONNX Runtime failed otherwise.
        """
        assert self._session is not None, "the session is closed"
        rows = len(batch.logit_rows)
        self._check(batch)
        binding = self._binding
        try:
            for tensor in self._abi.inputs:
                binding.bind_cpu_input(tensor.name, _data(batch, tensor.name))
            for tensor in self._abi.index_inputs:
                binding.bind_cpu_input(tensor.name, INDEX_BUILDERS[tensor.name](batch, self.limits))
            logits = np.empty((rows, self.vocab_size), np.float32)
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self._session.run_with_iobinding(binding)
        except AssertionError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise _step_error(error, len(batch.token_ids)) from error
        return StepResult(logits=logits)

    def close(self) -> None:
        """Free weights and pools. Calling it twice is allowed."""
        self._binding = self._session = None
        self._pools = {}

    def _check(self, batch: Batch) -> None:
        """The scheduler keeps the limits; a batch that breaks them is a bug."""
        limits, tokens, sequences = self.limits, len(batch.token_ids), len(batch.kv_lengths)
        assert 0 < tokens <= limits.max_tokens, f"{tokens} tokens in a step, the engine takes {limits.max_tokens}"
        assert 0 < sequences <= limits.max_sequences, f"{sequences} sequences in a step, the engine takes {limits.max_sequences}"
        assert len(batch.logit_rows) <= limits.max_rows, f"{len(batch.logit_rows)} rows, the engine takes {limits.max_rows}"
        assert batch.query_starts[0] == 0 and batch.query_starts[-1] == tokens and len(batch.query_starts) == sequences + 1
        assert batch.token_ids.min() >= 0 and batch.token_ids.max() < self.vocab_size, "a token id outside the vocabulary"
        for table in batch.block_tables.values():
            assert table.shape[0] == sequences and table.min() >= 0 and table.max() < limits.max_blocks, (
                "a block outside the pool"
            )


def _data(batch: Batch, name: str) -> Int32:
    """The batch's array for an input of the ABI."""
    array: Int32 = batch.block_tables[name.removeprefix("block_table.")] if "." in name else getattr(batch, name)
    assert array.dtype == np.int32, f"{name} is {array.dtype}, the ABI says int32"
    return array


def _limits(manifest: EngineManifest) -> EngineLimits:
    try:
        return EngineLimits(**{key: int(value) for key, value in manifest.limits.items()})
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"engine.json: limits are malformed ({error}); rebuild the engine") from None


def _vocab_size(manifest: EngineManifest) -> int:
    for output in manifest.abi.outputs:
        if output.name == "logits" and len(output.shape) == 2 and isinstance(output.shape[1], int):
            return output.shape[1]
    raise ArtifactError("engine.json: no output logits [R, vocab]; rebuild the engine")


def _built_threads(manifest: EngineManifest) -> int:
    """The threads that the engine was built for, as far as this machine gives them; 0: all cores."""
    try:
        return max(0, min(int(manifest.spec.get("threads") or 0), most_threads()))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"engine.json: threads are malformed ({error}); rebuild the engine") from None


def _check_pools(manifest: EngineManifest, limits: EngineLimits, blocks: int) -> None:
    """Refuse pools that this machine could never fill. They take memory as sequences grow, so what is free now counts less."""
    memory = describe_machine().memory
    block = sum(4 * prod(cache.shape[1:]) for cache in manifest.abi.caches)
    if block * blocks > memory:
        raise ResourceError(
            f"running {manifest.model} {manifest.profile}: KV pools of max_blocks={blocks} need {size_text(block * blocks)} and "
            f"this machine has {size_text(memory)} of memory; build it with limits.max_blocks={max(2, memory // 2 // block)} "
            "or less, or give LLM(..., max_blocks=N) to use fewer of its blocks"
        )


def _pool(shape: tuple[int, ...], fill: float | None) -> np.ndarray[Any, Any]:
    """A pool takes memory when it is written to, block by block: the system gives pages on first touch."""
    try:
        return np.empty(shape, np.float32) if fill is None else np.full(shape, fill, np.float32)
    except (MemoryError, ValueError) as error:  # ValueError: more than an array can have
        raise ResourceError(
            f"the system does not give {size_text(4 * prod(shape))} for a KV pool of {shape[0]} blocks ({error}); build the "
            "engine with a smaller limits.max_blocks"
        ) from None


def _step_error(error: Exception, tokens: int) -> ZooError:
    """What ONNX Runtime raised in a step, as the user may read it."""
    if isinstance(error, MemoryError) or "alloc" in str(error):
        return ResourceError(
            f"not enough memory for a step of {tokens} tokens ({error}); lower max_tokens or max_sequences, or use a machine "
            "with more"
        )
    return EngineError(f"onnxruntime failed in a step of {tokens} tokens: {error}")


def _table(folder: Path) -> tuple[dict[str, Any], list[Weight]]:
    """weights.json, with its layout compared with the one its recipes give."""
    try:
        table = json.loads((folder / "weights.json").read_bytes())
        weights = [Weight.from_json(row) for row in table["weights"]]
        found = [(row["offset"], row["nbytes"]) for row in table["weights"]]
        size, file = table["size"], table["file"]
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: weights.json is missing; rebuild or pull the engine again") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{folder / 'weights.json'}: malformed ({error}); rebuild the engine") from None
    try:
        layout, expected = packed_layout(weights)
    except KeyError as error:
        raise ArtifactError(f"{folder / 'weights.json'}: unknown dtype {error}; rebuild the engine") from None
    if found != [(packed.offset, packed.nbytes) for packed in layout] or size != expected or file != Path(str(file)).name:
        raise ArtifactError(f"{folder / 'weights.json'}: offsets do not follow from the recipes; rebuild the engine")
    return table, weights


def _load(folder: Path, table: dict[str, Any], weights: list[Weight], threads: int) -> Any:
    """Write the packed weights beside the model, load it, and delete the files: mappings outlive their names."""
    if not (folder / "model.onnx").is_file():
        raise ArtifactError(f"{folder}: model.onnx is missing; rebuild or pull the engine again")
    with _private_folder(folder, int(table["size"])) as private, _open_tensors(folder, weights) as tensors:
        try:
            _link(folder / "model.onnx", private / "model.onnx")
            write_packed(private / table["file"], weights, tensors, _scales(folder))
            if tensors:
                tensors.close()
            session = _create(private / "model.onnx", threads)
        except OSError as error:
            raise ResourceError(f"writing the engine's weights to {private}: {error.strerror}") from error
        except MemoryError as error:
            raise ResourceError(
                f"not enough memory to load the engine's {size_text(int(table['size']))} of weights ({error}); "
                "use a machine with more"
            ) from error
    if session.get_modelmeta().custom_metadata_map.get("zoo.weights") != digest_of(table):
        raise ArtifactError(f"{folder}: model.onnx was compiled with another weights.json; rebuild or pull the engine again")
    return session


def _create(path: Path, threads: int) -> Any:
    """An InferenceSession with the few options that matter here."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise IncompatibleError("the engine needs onnxruntime; install it with `pip install 'engine-zoo[cpu]'`") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN)
    options.enable_mem_pattern = False  # patterns are kept for each combination of shapes, and here every step has its own
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except ZooError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        if "alloc" in str(error):
            raise ResourceError(f"not enough memory to load the engine: {error}") from error
        raise ArtifactError(f"onnxruntime {ort.__version__} cannot load the engine: {error}") from error


@contextlib.contextmanager
def _private_folder(folder: Path, size: int) -> Iterator[Path]:
    """A folder of our own inside the engine's, or where that cannot be written, among temporary files. Always removed.

    A lock inside says that its owner lives; folders of owners that were killed are removed on the way.
    """
    root = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    for old in root.glob(f"{NAME}*"):
        stale = Lock(old / "lock")
        if (old / "lock").exists() and stale.acquire(wait=False):
            shutil.rmtree(old, ignore_errors=True)
            stale.release()
    check_disk(size, root, "the engine's weights in its compute type")
    private = Path(tempfile.mkdtemp(prefix=NAME, dir=root))
    try:
        with Lock(private / "lock"):
            yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextlib.contextmanager
def _open_tensors(folder: Path, weights: list[Weight]) -> Iterator[Tensors | None]:
    """The checkpoint files that came with the engine; None when no weight reads any."""
    if not any(True for weight in weights for _ in weight.recipe.leaves("tensor")):
        yield None
        return
    files = sorted((folder / "checkpoint").glob("*.safetensors"))
    if not files:
        raise ArtifactError(
            f"{folder}: the engine holds recipes and no checkpoint came with it; build it with model.checkpoint=FOLDER"
        )
    with Tensors.from_files(files) as tensors:
        yield tensors


def _scales(folder: Path) -> dict[str, float]:
    path = folder / "scales.json"
    try:
        data = json.loads(path.read_bytes()) if path.exists() else {}
        return {str(name): float(value) for name, value in data.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: malformed ({error}); rebuild the engine") from None


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
