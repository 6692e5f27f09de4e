"""Recipes that move no bytes: which runs of bytes in which files they are, if they are whole runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zoo.weights.evaluate import Maker
from zoo.weights.reader import NUMPY, Tensors
from zoo.weights.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """Consecutive bytes of a file, which hold values of ``dtype``."""

    path: Path
    offset: int
    nbytes: int
    dtype: str


def runs_of(recipe: Recipe, tensors: Tensors | None) -> tuple[Run, ...] | None:
    """The runs that, laid end to end, are a recipe's value in C order; None when values have to be moved or made.

    Raises CheckpointError for a tensor that is missing or has another shape than the recipe says.
    """
    match recipe.op:
        case "tensor":
            Maker(tensors, {}).whole_view(recipe)  # what is wrong with a tensor is said in one place
            assert tensors is not None
            entry = tensors.entry(recipe["name"])
            return (Run(tensors.file_of(recipe["name"]), entry.start, entry.nbytes, entry.dtype),)
        case "reshape":
            return runs_of(recipe.inputs[0], tensors)
        case "transpose":
            shape = recipe.inputs[0].shape
            kept = [axis for axis in recipe["perm"] if shape[axis] != 1]
            return runs_of(recipe.inputs[0], tensors) if kept == sorted(kept) else None
        case "concat":
            axis = recipe["axis"] % len(recipe.shape)
            if math.prod(recipe.shape[:axis]) != 1:
                return None
            parts = [runs_of(child, tensors) for child in recipe.inputs]
            joined = tuple(run for part in parts if part is not None for run in part)
            return None if None in parts else joined
        case "slice":
            (child,) = recipe.inputs
            axis, start, stop = recipe["axis"] % len(child.shape), recipe["start"], recipe["stop"]
            if math.prod(child.shape[:axis]) != 1:
                return None
            runs = runs_of(child, tensors)
            if not runs or any(run.dtype != runs[0].dtype for run in runs):
                return None
            inner = math.prod(child.shape[axis + 1 :]) * NUMPY[runs[0].dtype].itemsize
            return tuple(cut_runs(runs, start * inner, (stop - start) * inner))
    return None


def cut_runs(runs: Sequence[Run], start: int, nbytes: int) -> list[Run]:
    """Bytes ``start`` to ``start + nbytes`` of runs laid end to end."""
    parts, at = [], 0
    for run in runs:
        first, last = max(start - at, 0), min(start + nbytes - at, run.nbytes)
        if first < last:
            parts.append(replace(run, offset=run.offset + first, nbytes=last - first))
        at += run.nbytes
    assert sum(part.nbytes for part in parts) == nbytes, f"{nbytes} bytes from {start} of {at}"
    return parts
