"""ZooPackedAttention: body, both lowerings and the kernel give what a float64 reference gives, whatever texts share a step.

Errors are relative to the largest output: 1e-5 in float32, 3e-3 in float16 and 2e-2 in bfloat16, which round weights.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import triton
from families import ort_value
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import TORCH
from one_op import body_session, cuda_node, run_body, run_kernels, tensor
from onnx import helper

from zoo.compilers.cuda.aot import compile_kernels
from zoo.compilers.cuda.lowers import LOWERS
from zoo.graph import IR_VERSION, ONNX_TYPES, OPSET
from zoo.plugins import PLUGINS
from zoo.plugins.packed_attention import PLUGIN
from zoo.plugins.packed_attention import cuda as lowering
from zoo.runtime import indices
from zoo.runtime.abi import Batch, EngineLimits

LIMITS = EngineLimits(1 << 16, 4096, 0, 1 << 16, 0, 0)
TOLERANCES = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STEPS = {"mixture": [5, 1, 70, 2, 40], "several-tiles": [300, 3, 129]}


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    size: int
    window: int = 0
    softcap: float = 0.0

    @property
    def attributes(self) -> dict[str, Any]:
        names = {"num_heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.size}
        return {**names, "scale": 0.4, "window": self.window, "softcap": self.softcap}


SHAPES = {
    "all-heads": Shape(2, 2, 16),
    "grouped-odd": Shape(6, 2, 5),
    "window": Shape(3, 3, 8, window=6),
    "window-odd": Shape(2, 1, 20, window=7),
    "window-of-one": Shape(2, 2, 4, window=1),
    "softcap": Shape(3, 1, 7, softcap=1.5),
    "window-softcap": Shape(2, 2, 12, window=90, softcap=2.0),
}


def batch_of(lengths: list[int]) -> Batch:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    empty = starts[:0]
    return Batch(empty, empty, starts, np.diff(starts), {}, empty)


def arrays(shape: Shape, lengths: list[int], seed: int = 0, padding: int = 0) -> dict[str, np.ndarray]:
    rng, tokens = np.random.default_rng(seed), sum(lengths) + padding
    made = {
        name: rng.standard_normal((1, tokens, heads * shape.size), np.float32)
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
    }
    return made | {"query_starts": batch_of(lengths).query_starts}


def expected(shape: Shape, given: dict[str, np.ndarray]) -> np.ndarray:
    """[tokens of all texts, H * D] in float64, text by text."""
    rows = []
    for begin, end in zip(given["query_starts"], given["query_starts"][1:], strict=False):
        length = end - begin
        q, k, v = (
            given[name][0, begin:end].astype(np.float64).reshape(length, heads, shape.size)
            for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
        )
        k, v = (np.repeat(part, shape.heads // shape.kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) * shape.attributes["scale"]
        if shape.softcap:
            scores = shape.softcap * np.tanh(scores / shape.softcap)
        place = np.arange(length)
        if shape.window:
            scores = np.where(np.abs(place[:, None] - place) <= shape.window / 2, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        rows.append(np.einsum("hij,jhd->ihd", weights, v).reshape(length, -1))
    return np.concatenate(rows)


def run_lowered(kind: str, shape: Shape, given: dict[str, np.ndarray], dtype: str = "float32") -> np.ndarray:
    """A lowering, or the body, as the one node of a model in ONNX Runtime: [T, H * D]."""
    lowered = PLUGIN.lowerings.get(kind)
    attrs = PLUGIN.attrs("n", shape.attributes)
    function = lowered.function(attrs) if lowered else PLUGIN.body
    onnx.checker.check_function(function)
    index = lowered.index_inputs if lowered else ()
    kinds = {port.name: (dtype if port.dtype == "T" else port.dtype, port.shape) for port in PLUGIN.inputs}
    kinds |= {one.name: (one.dtype, one.shape) for one in index}

    def info(name: str) -> onnx.ValueInfoProto:
        kind, sizes = kinds[name]
        symbols = [size if isinstance(size, int) else f"{name}.{place}" for place, size in enumerate(sizes)]
        return helper.make_tensor_value_info(name, ONNX_TYPES[kind], symbols)

    names = list(function.input)
    node = helper.make_node(function.name, names, ["out"], domain="zoo", **attrs)
    out = helper.make_tensor_value_info("out", ONNX_TYPES[dtype], [1, "T", "HD"])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("zoo", 1)]
    graph = helper.make_graph([node], "one", [info(name) for name in names], [out])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[function])
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    batch = batch_of(np.diff(given["query_starts"]).tolist())
    feeds = {name: given[name] if name == "query_starts" else given[name].astype(NUMPY[dtype]) for name in given}
    feeds |= {one.name: indices.INDEX_BUILDERS[one.name](batch, LIMITS) for one in index}
    wanted = {one.name for one in session.get_inputs()}
    values = {name: ort_value(np.ascontiguousarray(array)) for name, array in feeds.items() if name in wanted}
    return session.run_with_ort_values(["out"], values)[0].numpy()[0].astype(np.float32)


def run_kernel(shape: Shape, given: dict[str, np.ndarray], dtype: str = "float32", **tuning: int) -> np.ndarray:
    """The launch in Triton's interpreter: [T, H * D]."""
    tokens = given["q"].shape[1]
    shapes: dict[str, Any] = {name: array.shape for name, array in given.items()} | {"out": given["q"].shape}
    node = cuda_node(PLUGIN, dtype, shapes, tuning, **shape.attributes)
    tensors = {name: tensor(array, "int32" if name == "query_starts" else dtype) for name, array in given.items()}
    tensors["out"] = tensor(np.full(given["q"].shape, np.nan, np.float32), dtype)
    run_kernels(lowering.lower, node, tensors, {"T": tokens, "B": len(given["query_starts"]) - 1})
    assert tensors["out"].dtype == TORCH[dtype]
    return tensors["out"].float().numpy()[0]


def close(found: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_body_and_lowerings(shape: Shape, steps: str) -> None:
    given = arrays(shape, STEPS[steps])
    want = expected(shape, given)
    assert np.abs(want).max() > 0.3
    close(run_body(body_session(PLUGIN, **shape.attributes), given)["out"][0], want, TOLERANCES["float32"])
    for kind in PLUGIN.lowerings:
        close(run_lowered(kind, shape, given), want, TOLERANCES["float32"])


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=9),
    window=st.sampled_from([0, 2, 9, 128]),
    seed=st.integers(0, 1 << 16),
)
def test_any_texts(lengths: list[int], window: int, seed: int) -> None:
    shape = Shape(2, 1, 4, window=window)
    given = arrays(shape, lengths, seed)
    want = expected(shape, given)
    for kind in PLUGIN.lowerings:
        close(run_lowered(kind, shape, given), want, TOLERANCES["float32"])


@pytest.mark.parametrize("kind", ["body", "padded"])
def test_half_precision(kind: str) -> None:
    for shape in (SHAPES["window"], SHAPES["softcap"]):
        given = arrays(shape, STEPS["mixture"])
        close(run_lowered(kind, shape, given, "float16"), expected(shape, given), TOLERANCES["float16"])


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in SHAPES), ("window", "float16"), ("softcap", "bfloat16")]
)
def test_kernel(name: str, dtype: str) -> None:
    shape = SHAPES[name]
    given = arrays(shape, STEPS["mixture"], seed=1)
    rounded = given | {name: given[name].astype(NUMPY[dtype]).astype(np.float32) for name in "qkv"}
    close(run_kernel(shape, given, dtype), expected(shape, rounded), TOLERANCES[dtype])


@pytest.mark.parametrize("lengths", [[37], [5, 1, 50, 2], [66, 3], [1] * 9], ids=str)
def test_tiles_do_not_matter(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and 128 rows, blocks of other sizes, starts of texts looked up four at a time."""
    for shape in (Shape(2, 1, 5), Shape(1, 1, 12, window=20, softcap=2.0)):
        given = arrays(shape, lengths, seed=2)
        want = expected(shape, given)
        for rows, columns, starts in ((16, 32, 4), (128, 16, 128)):
            monkeypatch.setattr(lowering, "STARTS", starts)
            close(run_kernel(shape, given, packed_block_m=rows, packed_block_n=columns), want, TOLERANCES["float32"])


def test_padding_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the last text, of NaN, and texts without tokens, as a padded step has them."""
    shape = SHAPES["all-heads"]
    given = arrays(shape, [5, 30], padding=9)
    for name in "qkv":
        given[name][:, 35:] = np.nan
    want = expected(shape, given)
    given["query_starts"] = np.array([0, 5, 35, 35, 35], np.int32)
    close(run_kernel(shape, given)[:35], want, TOLERANCES["float32"])
    given = {name: np.nan_to_num(array) for name, array in given.items()}
    close(run_lowered("body", shape, given)[:35], want, TOLERANCES["float32"])


@pytest.mark.parametrize("kind", ["loop", "padded", "kernel"])
@pytest.mark.parametrize("shape", ["all-heads", "window"])
def test_one_texts_nan_stays_its_own(kind: str, shape: str) -> None:
    lengths = [6, 4, 30]
    given = arrays(SHAPES[shape], lengths)
    want = expected(SHAPES[shape], given)
    for name in "qkv":
        given[name][:, 6:10] = np.nan
    found = run_kernel(SHAPES[shape], given) if kind == "kernel" else run_lowered(kind, SHAPES[shape], given)
    lost = np.isnan(found).any(axis=1)
    assert lost.tolist() == [6 <= row < 10 for row in range(40)]
    close(found[~lost], want[~lost], TOLERANCES["float32"])


def test_nothing_is_made_for_all_tokens_with_all_tokens() -> None:
    """40,000 tokens in short texts: their square would take 6.4 GB for each head."""
    shape, lengths = Shape(1, 1, 4, window=6), [16] * 2500
    given = arrays(shape, lengths)
    want = expected(shape, given)
    for one in (shape, Shape(1, 1, 4)):
        found = run_lowered("loop", one, given)
        close(found, want if one is shape else expected(one, given), TOLERANCES["float32"])


def test_tiles_of_texts() -> None:
    batch = batch_of([3, 600, 256])
    tiles = indices.text_tiles(batch, LIMITS)
    assert tiles.dtype == np.int64 and tiles.tolist() == [
        [0, 3, 0, 3],
        [3, 203, 3, 603],
        [203, 403, 3, 603],
        [403, 603, 3, 603],
        [603, 859, 603, 859],
    ]
    narrow = indices.window_tiles(batch, LIMITS)
    assert (narrow[:, 1] - narrow[:, 0]).max() <= indices.WINDOW_TILE and (narrow[1:, 0] == narrow[:-1, 1]).all()
    assert narrow[0, 0] == 0 and narrow[-1, 1] == 859 and (narrow[:, 1] > narrow[:, 0]).all()


def test_the_tests_notice_a_wrong_window() -> None:
    shape = SHAPES["window"]
    given = arrays(shape, STEPS["mixture"])
    wrong = expected(Shape(3, 3, 8, window=8), given)
    for found in (run_lowered("loop", shape, given), run_lowered("padded", shape, given), run_kernel(shape, given)):
        assert np.abs(found - wrong).max() > 1e-2 * np.abs(wrong).max()


def test_the_contract() -> None:
    assert PLUGINS["ZooPackedAttention"] is PLUGIN and LOWERS["ZooPackedAttention"] is lowering.lower
    assert [port.name for port in PLUGIN.inputs] == ["q", "k", "v", "query_starts"]
    ops = [node.op_type for node in PLUGIN.lowerings["padded"].function(PLUGIN.attrs("n", SHAPES["window"].attributes)).node]
    assert (
        "Loop" not in ops and "Softcap" in PLUGIN.lowerings["loop"].function(PLUGIN.attrs("n", SHAPES["softcap"].attributes)).name
    )


def test_what_a_hopper_gpu_is_given(tmp_path: Path) -> None:
    """Compiled ahead of time for SM 9.0: tensor cores by warp groups, 16 bytes a load, and no register spilled."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    kernels = []
    for shape in (Shape(12, 12, 64),):
        width = shape.heads * shape.size
        shapes: dict[str, Any] = dict.fromkeys(("q", "k", "v", "out"), (1, "T", width)) | {"query_starts": ("B+1",)}
        kernels += [one.kernel for one in lowering.lower(cuda_node(PLUGIN, "bfloat16", shapes, {}, **shape.attributes))]
    compile_kernels(kernels, 90, tmp_path)
    for kernel in kernels:
        command = [tools / "nvdisasm", "-c", tmp_path / f"{kernel.name}.cubin"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "HGMMA" in code and "STL" not in code
        assert code.count("LDGSTS.E.BYPASS.128") >= 2 * 64 * 64 * 2 // 16 // 128  # keys and values of a block, before it is used
