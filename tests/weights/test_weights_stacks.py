"""Stacks of matrices: parts in turns, tiles that stay small however large a matrix is, and files made of them."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from zoo.runtime.cuda.runs import runs_of
from zoo.weights import evaluate
from zoo.weights.bind import materialize, packed_layout, write_packed
from zoo.weights.evaluate import Maker, tiles_of
from zoo.weights.reader import NUMPY, Tensors
from zoo.weights.recipe import Recipe, Weight, concat, every, reshape, slice_, tensor, transpose, weave

X, F, E = 3, 10, 14


@pytest.fixture
def stored(tmp_path: Path) -> Tensors:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((X, F, E)).astype(ml_dtypes.bfloat16) for name in ("gate", "up")}
    arrays |= {f"one.{n}": rng.standard_normal((F, E)).astype(ml_dtypes.bfloat16) for n in range(X)}
    save_file(arrays, tmp_path / "model.safetensors")
    return Tensors.open(tmp_path)


def array(tensors: Tensors, name: str) -> np.ndarray:
    return tensors.array(name).astype(np.float32)


GATE, UP = tensor("gate", (X, F, E)), tensor("up", (X, F, E))
ONES = concat([reshape(tensor(f"one.{n}", (F, E)), (1, F, E)) for n in range(X)], 0)


def recipes(tensors: Tensors) -> dict[str, tuple[Recipe, np.ndarray]]:
    gate, up = array(tensors, "gate"), array(tensors, "up")
    ones = np.stack([array(tensors, f"one.{n}") for n in range(X)])
    turns = np.stack([gate, up], axis=2).reshape(X, 2 * F, E)
    return {
        "in-turns": (weave([GATE, UP], 1), turns),
        "in-turns-along-columns": (weave([GATE, UP], 2), np.stack([gate, up], axis=3).reshape(X, F, 2 * E)),
        "turned-in-turns": (transpose(weave([GATE, UP], 1), (0, 2, 1)), turns.transpose(0, 2, 1)),
        "a-part-of-turns": (slice_(weave([GATE, UP], 1), 1, 3, 8), turns[:, 3:8]),
        "halves-in-turns": (
            weave([slice_(concat([GATE, UP], 1), 1, 0, F), slice_(concat([GATE, UP], 1), 1, F, 2 * F)], 1),
            turns,
        ),
        "side-by-side": (concat([GATE, UP], 1), np.concatenate([gate, up], axis=1)),
        "turned": (transpose(GATE, (0, 2, 1)), gate.transpose(0, 2, 1)),
        "single-tensors": (ONES, ones),
        "single-tensors-turned": (transpose(ONES, (0, 2, 1)), ones.transpose(0, 2, 1)),
    }


@pytest.mark.parametrize("tile", [64, 300, 4 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacks_equal_whole_arrays(
    stored: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tile: int
) -> None:
    """By ``materialize`` and through a packed file, in tiles of a few rows, of a part of a matrix, and in one."""
    monkeypatch.setattr(evaluate, "TILE", tile)
    monkeypatch.setattr(evaluate, "BLOCK", 4)
    wanted = recipes(stored)
    weights = [Weight(name, dtype, recipe) for name, (recipe, _) in wanted.items()]
    write_packed(tmp_path / "packed", weights, stored, {}, align=64)
    layout, total = packed_layout(weights, 64)
    packed = (tmp_path / "packed").read_bytes()
    assert len(packed) == total
    for weight, place in zip(weights, layout, strict=True):
        exact = wanted[weight.name][1].astype(NUMPY[dtype])
        assert weight.shape == exact.shape
        assert np.array_equal(materialize(weight, stored, {}).view(np.uint8), np.ascontiguousarray(exact).view(np.uint8)), (
            weight.name
        )
        assert packed[place.offset : place.offset + place.nbytes] == exact.tobytes(), weight.name


@pytest.mark.parametrize("turned", [False, True])
def test_tiles_of_a_stack_are_small(turned: bool) -> None:
    """Mixtral's experts: 470 MB each in float32."""
    recipe = tensor("experts", (8, 4096, 28672)) if turned else tensor("experts", (8, 28672, 4096))
    weight = Weight("experts", "float32", transpose(recipe, (0, 2, 1)) if turned else recipe)
    boxes = list(tiles_of(weight, Maker(None, {})))
    sizes = [math.prod(part.stop - part.start for part in box) for box in boxes]
    assert max(sizes) * 4 <= evaluate.TILE and sum(sizes) == math.prod(weight.shape)
    assert len(boxes) < 1.1 * sum(sizes) * 4 / evaluate.TILE


def test_turns_taken_apart_and_joined_are_nothing() -> None:
    whole = tensor("gate_up", (X, E, 2 * F))
    parts = [every(whole, 2, number, 2) for number in range(2)]
    assert weave(parts, 2) is whole
    assert weave([transpose(part, (0, 2, 1)) for part in parts], 1) == transpose(whole, (0, 2, 1))
    assert weave(parts[::-1], 2).op == weave(parts, 1).op == "weave"
    assert weave([every(whole, 2, 0, 2), every(tensor("other", whole.shape), 2, 1, 2)], 2).op == "weave"
    recipe = weave([GATE, UP], 1)
    assert Recipe.from_json(recipe.to_json()) == recipe and recipe.to_json()["axis"] == 1


def test_turns_are_no_runs_of_bytes(stored: Tensors) -> None:
    assert runs_of(weave([GATE, UP], 1), stored) is None
    runs = runs_of(ONES, stored)
    assert runs is not None and [run.nbytes for run in runs] == [F * E * 2] * X
