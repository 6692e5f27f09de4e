"""Runs ragged graphs in ONNX Runtime as an engine would, with the most hostile pools that the contract allows.

Pools start full of NaN, blocks are handed out in random order, and after every step whatever the contract leaves undefined
(block 0, places behind a sequence's last token, blocks that nobody owns) is filled with NaN again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from families import ort_value

from zoo.graph import ModelGraph
from zoo.runtime.abi import Batch, EngineLimits
from zoo.runtime.indices import INDEX_BUILDERS
from zoo.spec import BuildSpec, HardwareSpec, Limits, ModelSpec, ParallelSpec, QuantSpec
from zoo.weights.reader import NUMPY


def build_spec(model: ModelSpec, limits: Limits | None = None, compiler: str = "onnxruntime", quant: str = "none") -> BuildSpec:
    """A BuildSpec for passes: float32, on a CPU unless the compiler is for GPUs."""
    limits = (limits or Limits(max_tokens=64, max_sequences=8, block_size=4, max_context=64)).resolve(model)
    hardware = HardwareSpec("cpu", "cpu") if compiler == "onnxruntime" else HardwareSpec("gpu", "gpu", sm=89, memory=1 << 34)
    return BuildSpec(model, QuantSpec(quant, quant), hardware, ParallelSpec(), limits, compiler, "float32")


class Ragged:
    """A ragged graph in ONNX Runtime on one thread; weights and pools are fed as inputs."""

    def __init__(self, graph: ModelGraph, weights: Mapping[str, np.ndarray], limits: EngineLimits) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        model = graph.to_onnx()
        onnx.checker.check_model(model, full_check=True)
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.wanted = {given.name for given in self.session.get_inputs()}
        self.weights = {name: ort_value(array) for name, array in weights.items() if name in self.wanted}
        self.limits, self.index_inputs = limits, graph.index_inputs
        self.pools = {
            variable.name: np.full(variable.shape, np.nan, NUMPY[graph.dtype])
            for variable in graph.data_inputs
            if variable.name.startswith("kv.")
        }

    def feeds(self, batch: Batch) -> dict[str, onnxruntime.OrtValue]:
        """Everything that the session takes for one step: batch, index inputs, pools, weights."""
        feeds = {
            "token_ids": batch.token_ids,
            "positions": batch.positions,
            "query_starts": batch.query_starts,
            "kv_lengths": batch.kv_lengths,
            "block_table.full": batch.block_tables["full"],
            "logit_rows": batch.logit_rows,
            **self.pools,
        }
        for extra in self.index_inputs:
            feeds[extra.name] = INDEX_BUILDERS[extra.name](batch, self.limits)
            assert feeds[extra.name].dtype == NUMPY[extra.dtype] and feeds[extra.name].ndim == len(extra.shape)
        return self.weights | {name: ort_value(array) for name, array in feeds.items() if name in self.wanted}

    def step(self, batch: Batch) -> np.ndarray:
        """Logits [R, V] of one batch; the pools keep what was written."""
        names = ["logits", *(name.replace("kv.", "kv_out.") for name in self.pools)]
        logits, *pools = self.session.run_with_ort_values(names, self.feeds(batch))
        self.pools = {name: pool.numpy().copy() for name, pool in zip(self.pools, pools, strict=True)}
        return logits.numpy()


class Traffic:
    """Sequences and the blocks they own. ``step`` runs any number of new tokens of each through a Ragged graph."""

    def __init__(self, engine: Ragged, seed: int = 0) -> None:
        self.engine, self.size = engine, engine.limits.block_size
        self.free = list(np.random.default_rng(seed).permutation(np.arange(1, engine.limits.max_blocks)))
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}

    def batch(self, new: Mapping[str, Sequence[int]], rows: Sequence[int] | None = None, padding: int = 0) -> Batch:
        """The batch that gives each named sequence its new tokens, and blocks where they need them.

        rows     the rows whose logits are wanted; default: each sequence's last
        padding  tokens of one more, last sequence, as a captured step has it
        """
        ids: list[int] = []
        positions: list[int] = []
        starts, lengths = [0], []
        for name, added in new.items():
            done = self.tokens.setdefault(name, [])
            positions += range(len(done), len(done) + len(added))
            done += added
            ids += added
            owned = self.blocks.setdefault(name, [])
            while len(owned) * self.size < len(done):
                owned.append(int(self.free.pop()))
            starts.append(len(ids))
            lengths.append(len(done))
        width = max(len(self.blocks[name]) for name in new) + 1
        table = [self.blocks[name] + [0] * (width - len(self.blocks[name])) for name in new]
        wanted = list(np.array(starts[1:]) - 1) if rows is None else list(rows)
        if padding:
            ids, positions = ids + [0] * padding, positions + [0] * padding
            starts, lengths, table = [*starts, len(ids)], [*lengths, 1], [*table, [0] * width]
        arrays = [np.array(values, np.int32) for values in (ids, positions, starts, lengths)]
        return Batch(*arrays, {"full": np.array(table, np.int32)}, np.array(wanted, np.int32))

    def step(self, new: Mapping[str, Sequence[int]], rows: Sequence[int] | None = None, padding: int = 0) -> np.ndarray:
        """Logits of one step; afterwards everything undefined in the pools is NaN."""
        logits = self.engine.step(self.batch(new, rows, padding))
        self.poison()
        return logits

    def poison(self) -> None:
        """Fill what the contract leaves undefined with NaN."""
        for pool in self.engine.pools.values():
            defined = np.zeros((pool.shape[0], self.size), bool)
            for name, blocks in self.blocks.items():
                place = np.arange(len(self.tokens[name]))
                defined[np.array(blocks)[place // self.size], place % self.size] = True
            pool.transpose(0, 2, 1, 3, 4)[~defined] = np.nan

    def release(self, name: str) -> None:
        """Give a sequence's blocks back; the next owner finds NaN in them."""
        self.free += self.blocks.pop(name)
        del self.tokens[name]
        self.poison()


def engine_limits(limits: Limits) -> EngineLimits:
    """The limits a session has, from a build's resolved ones."""
    return EngineLimits(
        limits.max_tokens, limits.max_sequences, limits.max_rows, limits.max_context, limits.max_blocks, limits.block_size
    )
