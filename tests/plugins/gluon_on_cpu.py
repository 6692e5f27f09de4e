"""Carries out a Gluon kernel in Triton's interpreter, which knows no Gluon: layouts are left out, all else is Triton's.

Copies into shared memory arrive when ``wait_group`` says so, and a place that is read before, or copied into before it was read,
is an error. ``EVENTS`` holds what the last program did, in order.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import triton
import triton.experimental
import triton.language as tl

EVENTS: list[str] = []


class Slot:
    """One buffer of a ring."""

    def __init__(self) -> None:
        self.words: Any = None
        self.state = "free"  # free -> asked -> there -> free

    def load(self, layout: Any) -> Any:
        assert self.state == "there", f"a buffer is read that is {self.state}"
        self.state = "free"
        return self.words


class Ring:
    def __init__(self, stages: int) -> None:
        self.slots = [Slot() for _ in range(stages)]

    def index(self, stage: Any) -> Slot:
        return self.slots[stage if isinstance(stage, int) else int(stage.handle.data.item())]


class Copies:
    """``async_copy``: groups of copies that end in order."""

    def __init__(self) -> None:
        self.open: list[Slot] = []
        self.groups: list[list[Slot]] = []

    def async_copy_global_to_shared(self, slot: Slot, places: Any) -> None:
        assert slot.state == "free", f"a buffer is overwritten that is {slot.state}"
        EVENTS.append("weights")
        slot.words, slot.state = tl.load(places), "asked"
        self.open.append(slot)

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for slot in self.groups.pop(0):
                slot.state = "there"


def _load(places: Any, **options: Any) -> Any:
    words = places.dtype.scalar.element_ty == tl.int32
    EVENTS.append(("x" if "other" in options else "weights") if words else "scales")
    return tl.load(places, **options)


def _store(places: Any, values: Any, mask: Any) -> None:
    EVENTS.append("y")
    tl.store(places, values, mask=mask)


def _late(name: str) -> Any:
    """What Triton has by that name when it is called, which the interpreter changes."""
    return lambda *args: getattr(tl, name)(*args)


def _language(warps: int) -> types.ModuleType:
    gl: Any = types.ModuleType("gluon_language")
    for name in ("float32", "float8e4nv", "int8", "int32", "int64", "pointer_type"):
        setattr(gl, name, getattr(tl, name))
    for name in ("join", "minimum", "permute", "program_id", "reshape", "static_assert", "static_range", "sum"):
        setattr(gl, name, _late(name))
    for name in ("BlockedLayout", "DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout"):
        setattr(gl, name, lambda *_, **__: None)
    gl.SwizzledSharedLayout = gl.SliceLayout
    gl.num_warps = lambda: warps
    gl.arange = lambda start, end, layout: tl.arange(start, end)
    gl.full = lambda shape, value, dtype, layout: tl.full(shape, value, dtype)
    gl.zeros = lambda shape, dtype, layout: tl.zeros(shape, dtype)
    gl.convert_layout = lambda values, layout, assert_trivial: values
    gl.where = lambda condition, yes, no: yes if condition else no
    gl.allocate_shared_memory = lambda dtype, shape, layout: Ring(shape[0])
    gl.inline_asm_elementwise = lambda *_: EVENTS.append("bring")
    gl.load, gl.store = _load, _store
    return gl


def module(path: str, warps: int) -> Any:
    """The module of Gluon kernels in ``path``, for so many warps, to run in the interpreter."""
    gluon: Any = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.constexpr_function, gluon.language = triton.jit, lambda function: function, _language(warps)
    ampere: Any = types.ModuleType("ampere")
    ampere.async_copy, ampere.mma_v2 = Copies(), _late("dot")
    cuda: Any = types.ModuleType("cuda")
    cuda.gdc_wait = lambda: EVENTS.append("wait")
    cuda.gdc_launch_dependents = lambda: EVENTS.append("start")
    stand_ins = {
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gluon.language,
        "triton.experimental.gluon.language.nvidia.ampere": ampere,
        "triton.language.extra.cuda": cuda,
    }
    spec = importlib.util.spec_from_file_location(f"on_cpu_{Path(path).stem}", path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    made.__dict__["tl"] = tl  # the interpreter wants to see it
    with mock.patch.dict(sys.modules, stand_ins), mock.patch.object(triton.experimental, "gluon", gluon, create=True):
        spec.loader.exec_module(made)
    return made
