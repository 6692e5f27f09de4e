"""Sessions of the ``cuda`` target: a launch plan, its kernels and cuBLASLt on one GPU; tokens are sampled there, too.

A step is one copy of inputs, a list of launches, and one copy of token ids back. Steps in which every sequence has one token
are captured as CUDA graphs, padded to a bucket of sequences; others are launched as they come, which costs the host a
millisecond or two beside a GPU step of many. ``submit`` queues a step and returns: results are waited for by their tickets.

T tokens, B sequences, P blocks a sequence, R rows of logits, V vocabulary; pools are [blocks, 2, block_size, kv_heads, head_dim].
"""

from __future__ import annotations

import contextlib
import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from zoo.artifacts.manifest import EngineManifest
from zoo.errors import ArtifactError, RequestError, ResourceError, ZooError
from zoo.resources import size_text
from zoo.runtime.abi import SLOT_SHIFT, Adjusting, Batch, Sampling, StepResult
from zoo.runtime.cuda.driver import Array, Device
from zoo.runtime.cuda.loading import SLOTS, SPARE, load_engine, pool_block
from zoo.runtime.cuda.steps import Step, captured_size, captured_step, eager_step, power_of_two
from zoo.runtime.indices import GROUP
from zoo.weights.reader import NUMPY

GRAPHS = 256  # captured steps that are kept: each takes a few hundred kilobytes of GPU memory


class CudaSession:
    """One engine on the first visible GPU of its SM.

    ``checkpoint``: folder of an engine that was built without one. ``blocks``: how many blocks of the pools the caller will
    use, block 0 included; 0: as many as the engine was built for, or as the GPU has memory left. ``fill`` is for tests: a byte
    that pools and the arena start with.

    Raises UnavailableError without GPU, driver or packages, IncompatibleError for another GPU, ArtifactError for files that
    do not fit each other, ResourceError when memory is short, CheckpointError when the checkpoint does not fit, RequestError
    for a number of blocks that no pool has. ``step`` may be called from another thread than the one that opened it, but from
    one at a time.
    """

    samples = True

    def __init__(
        self, folder: Path, manifest: EngineManifest, checkpoint: Path | None = None, blocks: int = 0, fill: int | None = None
    ) -> None:
        if isinstance(blocks, bool) or not isinstance(blocks, int | np.integer) or blocks < 0 or blocks == 1:
            raise RequestError(
                f"max_blocks is {blocks!r}; block 0 is reserved, so give 2 or more, or 0 for as many as the GPU has memory for"
            )
        if not (sm := manifest.needs.get("sm")):
            raise ArtifactError("engine.json: needs has no sm, which a cuda engine is for; rebuild the engine")
        self._device = Device(int(sm))
        self._open = True
        try:
            self._setup(folder, manifest, checkpoint, int(blocks), fill)
        except BaseException:
            self.close()
            raise

    def _setup(self, folder: Path, manifest: EngineManifest, checkpoint: Path | None, blocks: int, fill: int | None) -> None:
        device = self._device
        self._stream = device.stream()
        engine = self._engine = load_engine(device, self._stream, folder, manifest, checkpoint, blocks)
        self.vocab_size = engine.vocab_size
        count = self._place_pools(manifest, blocks, fill)
        self.limits = dataclasses.replace(engine.limits, max_blocks=count)
        self.rope_tables = manifest.abi.rope_tables
        if fill is not None:
            device.fill(engine.arena, fill, engine.arena_size, self._stream)
        engine.link()
        self._width = -(-self.limits.max_context // self.limits.block_size)
        self._named = 0  # rows of the last step whose tokens the next one may name
        rows = self.limits.max_rows
        self._ids = [device.pinned(4 * rows).view(np.int32) for _ in range(SLOTS)]
        self._logits: list[Array | None] = [None] * SLOTS
        self._done = [device.event() for _ in range(SLOTS)]
        self._graphs: dict[tuple[Any, ...], int] = {}
        self._next = 0
        device.wait(self._stream)

    def _place_pools(self, manifest: EngineManifest, blocks: int, fill: int | None) -> int:
        """Give the pools what memory is left, up to what is wanted; the number of blocks."""
        limits, block = self._engine.limits, pool_block(manifest)
        free = max(0, self._device.memory()[0] - SPARE)
        wanted = min(blocks or limits.max_blocks, limits.max_blocks)
        count = min(wanted, free // block)
        least = wanted if blocks else min(wanted, 1 + -(-limits.max_context // limits.block_size))
        if count < least:
            way = "give max_blocks" if blocks else "build the engine with limits.max_context"
            number = count if blocks else (count - 1) * limits.block_size
            raise ResourceError(
                f"{self._device.name} has {size_text(free)} left beside the weights; KV pools of {least} blocks need "
                f"{size_text(least * block)}, {size_text(least * block - free)} more: "
                + (f"{way}={number} or less, or " if count > 1 else "")
                + "use a GPU with more memory"
            )
        for cache in manifest.abi.caches:
            size = count * prod(cache.shape[1:]) * NUMPY[cache.dtype].itemsize
            place = self._engine.addresses[cache.name] = self._device.allocate(size, f"the KV pool {cache.name}")
            if fill is not None:
                self._device.fill(place, fill, size, self._stream)
        return count

    def step(self, batch: Batch) -> StepResult:
        """Run one batch; logits [R, vocab] float32. R may be 0."""
        return self.submit(batch).result()

    def reserve(self, slots: int) -> bool:
        """Whether there is room for so many slots; see ``zoo.runtime.abi.SamplingSession``."""
        return self._engine.adjusts and self._engine.slots.reserve(slots, self._stream)

    def submit(self, batch: Batch, sampling: Sampling | None = None) -> Ticket:
        """Queue a step; see ``zoo.runtime.abi.SamplingSession``."""
        assert self._open, "the session is closed"
        self._check(batch, sampling)
        device, slot = self._device, self._next
        device.use()
        self._next = (slot + 1) % SLOTS
        device.wait_event(self._done[slot])
        self._named = 0
        size = captured_size(batch, self.limits)
        if size:
            step = captured_step(batch, sampling, self.limits, self._engine, size)
        else:
            step = eager_step(batch, sampling, self.limits, self._engine)
        self._engine.inputs.send(slot, step.arrays, self._stream)
        if sampling is not None and sampling.adjusting is not None:
            self._engine.slots.start(slot, sampling.adjusting.started, self._stream)
        if size:
            self._replay(step)
        else:
            self._launch(step)
        ticket = self._collect(slot, len(batch.logit_rows), sampling)
        device.record(self._done[slot], self._stream)
        self._named = len(batch.logit_rows) if sampling is not None else 0
        return ticket

    def _launch(self, step: Step) -> None:
        engine = self._engine
        numbers = engine.symbols.set(step.sizes)
        engine.programs["resolve"].run(numbers, self._stream)
        engine.programs["graph"].run(numbers, self._stream)
        for name in (*step.adjusting, step.chooser):
            if name:
                engine.programs[name].run(numbers, self._stream)

    def _replay(self, step: Step) -> None:
        """The captured graph of a step's sizes; the first such step is launched as it is, and captured for the next.

        A graph that the GPU has no memory for is done without, and so are those beyond ``GRAPHS``.
        """
        key = step.key
        graph = self._graphs.get(key)
        if graph:
            try:
                self._device.replay(graph, self._stream)
                return
            except ResourceError:
                self._graphs[key] = graph = 0
        self._launch(step)
        if graph is None and len(self._graphs) < GRAPHS:
            try:
                self._graphs[key] = self._device.capture(self._stream, lambda: self._launch(step))
            except ResourceError:
                self._graphs[key] = 0

    def _collect(self, slot: int, rows: int, sampling: Sampling | None) -> Ticket:
        """Queue the copies of what the host wants: token ids, or rows of logits."""
        wanted = range(rows) if sampling is None else sampling.host_rows.tolist()
        logits = self._room(slot, len(wanted)) if len(wanted) else None
        row = 4 * self.vocab_size
        if sampling is None and logits is not None:
            self._device.fetch(logits, self._engine.logits, self._stream)
        elif logits is not None:
            for place, index in enumerate(wanted):
                self._device.fetch(logits[place], self._engine.logits + index * row, self._stream)
        ids = None
        if sampling is not None:
            ids = self._ids[slot][:rows]
            self._device.fetch(ids, self._engine.addresses["sampled"], self._stream)
        return Ticket(self._device, self._done[slot], logits, ids)

    def _room(self, slot: int, rows: int) -> Array:
        """Pinned memory for rows of logits [rows, V], made larger as needed."""
        have = self._logits[slot]
        if have is None or len(have) < rows:
            self._logits[slot] = None
            if have is not None:
                self._device.free(have.ctypes.data)
            most = min(power_of_two(rows), max(rows, self.limits.max_rows))  # as many as the next few steps may want
            have = self._device.pinned(4 * most * self.vocab_size).view(np.float32).reshape(most, -1)
            self._logits[slot] = have
        return have[:rows]

    def close(self) -> None:
        """Free everything once the steps under way are over. Calling it twice is allowed."""
        if not self._open:
            return
        self._open = False
        if hasattr(self, "_engine"):
            with contextlib.suppress(ZooError):  # of a GPU that went wrong, which gives nothing back by itself
                self._engine.close()
        self._device.close()

    def _check(self, batch: Batch, sampling: Sampling | None) -> None:
        """The scheduler keeps the limits; a batch that breaks them is a bug, and kernels would write beyond their tensors."""
        limits, ids, rows = self.limits, batch.token_ids, batch.logit_rows
        tokens, sequences = len(ids), len(batch.kv_lengths)
        assert 0 < tokens <= limits.max_tokens, f"{tokens} tokens in a step, the engine takes {limits.max_tokens}"
        assert 0 < sequences <= limits.max_sequences, f"{sequences} sequences in a step, the engine takes {limits.max_sequences}"
        assert len(rows) <= limits.max_rows, f"{len(rows)} rows, the engine takes {limits.max_rows}"
        assert len(batch.positions) == tokens and len(batch.query_starts) == sequences + 1, "arrays of different lengths"
        assert batch.query_starts[0] == 0 and batch.query_starts[-1] == tokens, "query_starts does not end at the last token"
        assert ids.max() < self.vocab_size, "a token id outside the vocabulary"
        assert ids.min() >= -self._named, "a token id that names no row of the step before"
        assert not len(rows) or (rows.min() >= 0 and rows.max() < tokens), "a row outside the step"
        assert batch.kv_lengths.max() <= limits.max_context, "a sequence beyond the engine's context"
        table = batch.block_tables[GROUP]
        assert table.shape[0] == sequences and table.min() >= 0 and table.max() < limits.max_blocks, "a block outside the pool"
        assert table.shape[1] <= self._width, f"{table.shape[1]} blocks a sequence, the engine takes {self._width}"
        assert batch.kv_lengths.max() <= table.shape[1] * limits.block_size, "a sequence beyond its blocks"
        for array in (ids, batch.positions, batch.query_starts, batch.kv_lengths, rows, table):
            assert array.dtype == np.int32, f"an array of {array.dtype}, the ABI says int32"
        assert sampling is None or len(sampling.rows) == len(rows), "sampling records for another number of rows"
        if sampling is not None and sampling.adjusting is not None:
            self._check_slots(sampling.rows["flags"] >> SLOT_SHIFT, sampling.adjusting, sequences)

    def _check_slots(self, rows: Array, adjusting: Adjusting, sequences: int) -> None:
        made = self._engine.slots.made
        assert rows.min(initial=0) >= 0 and rows.max(initial=0) <= made, "a row with a slot that nobody reserved"
        assert all(0 < slot <= made for slot, _ in adjusting.started), "a slot begins that nobody reserved"
        if (counted := adjusting.counted) is not None:
            assert counted.dtype == np.int32 and counted.shape == (sequences,), "slots of other sequences"
            assert counted.min() >= 0 and counted.max() <= made, "a sequence with a slot that nobody reserved"


class Ticket:
    """A step under way."""

    def __init__(self, device: Device, done: int, logits: Array | None, ids: Array | None) -> None:
        self._device, self._done, self._logits, self._ids = device, done, logits, ids

    def result(self) -> StepResult:
        """Wait for the step; its arrays are valid until the next but one ``submit``."""
        self._device.wait_event(self._done)
        return StepResult(logits=self._logits, token_ids=self._ids)
