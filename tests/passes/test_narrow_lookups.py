"""narrow_lookups: before and expected, what must not match and why, twice, the same numbers, and files that hold more."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import families
import numpy as np
import pytest
from linear_graphs import from_text, nodes_of
from safetensors.numpy import load_file, save_file

from zoo.artifacts.registry import Registry
from zoo.build import build, open_checkpoint
from zoo.checkpoints.adopt import adopt
from zoo.compilers.onnxruntime import run_reference
from zoo.config import compose_model
from zoo.graph_templates import expand
from zoo.passes.narrow_lookups import NarrowLookups, narrow_lookups
from zoo.runtime.sessions import open_session
from zoo.spec import ModelSpec
from zoo.targets import TARGETS
from zoo.weights.bind import NUMPY, materialize
from zoo.weights.reader import Tensors
from zoo.weights.recipe import Weight, tensor, transpose

BEFORE = """
agraph (int64[1,S] ids, float[9,8] w.embed, float[9,8] w.both, float[9,8] x) => (float[1,S,8] y, float[1,S,8] z, float[1,S,8] w) {
  y = Gather <axis = 0> (w.embed, ids)
  z = Gather <axis = 0> (w.both, ids)
  u = Gather <axis = 0> (x, ids)
  w = Add(u, w.both)
}
"""


def start():
    graph = from_text(BEFORE)
    for name in ("w.embed", "w.both"):
        graph.replace_weight(graph.variable(name), Weight(name, "float32", tensor(name, (9, 8))))
    return graph


def test_before_and_expected() -> None:
    graph = start()
    report = narrow_lookups(graph, "bfloat16")
    assert report.counts == {"tables": 1}
    assert nodes_of(graph)[:2] == [
        ("Gather", "y", ["w.embed", "ids"], ["y.stored"]),
        ("Cast", "y.widen", ["y.stored"], ["y"]),
    ]
    assert graph.weights["w.embed"] == Weight("w.embed", "bfloat16", tensor("w.embed", (9, 8)))


def test_misses_say_why() -> None:
    graph = start()
    graph.replace_weight(graph.variable("w.embed"), Weight("w.embed", "float32", transpose(tensor("t", (8, 9)), (1, 0))))
    report = narrow_lookups(graph, "bfloat16")
    assert [(miss.where, miss.reason) for miss in report.misses] == [
        ("y", "w.embed is computed, not read as it is stored"),
        ("z", "2 nodes read w.both"),
    ]
    assert not report.changed and graph.weights["w.both"].dtype == "float32"


def test_twice_changes_nothing() -> None:
    graph = start()
    narrow_lookups(graph, "bfloat16")
    before = nodes_of(graph)
    assert not narrow_lookups(graph, "bfloat16").changed and nodes_of(graph) == before


def test_only_where_it_widens(tmp_path: Path) -> None:
    build = compose_model(adopt(stored_as(tmp_path, "llama", "bfloat16")), ["quant=none", "hardware=cpu"])
    wide = dataclasses.replace(build, model=dataclasses.replace(build.model, dtype="float32"))
    cases = [(build, "onnxruntime"), (build, "tensorrt_rtx"), (wide, "onnxruntime")]
    assert [NarrowLookups().wanted(spec, TARGETS[target]) for spec, target in cases] == [True, False, False]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_numbers(tmp_path: Path, family: str) -> None:
    """Exactly: widening rounds nothing."""
    folder = stored_as(tmp_path, family, "bfloat16")
    graphs = [expand(adopt_model(folder), "float32") for _ in range(2)]
    assert narrow_lookups(graphs[1], "bfloat16").counts == {"tables": 1 + (family == "gpt2")}
    ids = np.array([families.prompt(folder, 12)], np.int64)
    feeds = {"token_ids": ids, "positions": np.arange(12)[None]}
    with Tensors.open(folder) as tensors:
        made = [
            run_reference(graph, feeds, {w.name: materialize(w, tensors, {}) for w in graph.weights.values()})["logits"]
            for graph in graphs
        ]
    assert (made[0] == made[1]).all()


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_a_table_is_kept_as_the_file_holds_it(tmp_path: Path, stored: str) -> None:
    """Also where the model is said to be narrower than its file is."""
    spec = compose_model(adopt(stored_as(tmp_path, "llama", stored)), ["quant=none", "hardware=cpu"])
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, dtype="bfloat16"))
    registry = Registry(tmp_path / "registry")
    with registry.open(build(spec, registry).entry.ref) as opened:
        rows = json.loads((opened.folder / "weights.json").read_text())["weights"]
        session = open_session(opened.folder, opened.manifest, 1)
    assert [row["dtype"] for row in rows if row["name"] == "embed"] == [stored]
    session.close()


def adopt_model(folder: Path) -> ModelSpec:
    return open_checkpoint(compose_model(adopt(folder), ["quant=none", "hardware=cpu"]))[0].model


def stored_as(folder: Path, family: str, dtype: str) -> Path:
    """A random checkpoint whose file holds another dtype."""
    made = folder / "checkpoint"
    shutil.copytree(families.make_checkpoint(folder, family), made)
    arrays = load_file(made / "model.safetensors")
    save_file({name: array.astype(NUMPY[dtype]) for name, array in arrays.items()}, made / "model.safetensors")
    return made
