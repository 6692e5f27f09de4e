"""``ZooPackedAttention`` for ONNX Runtime on a CPU: one Loop iteration per tile of a text's queries, an Attention node in each.

Nothing is allocated for all tokens with all tokens: an iteration holds the scores of one tile, [H, L, N], L at most
``zoo.runtime.indices.TEXT_TILE`` queries, or ``WINDOW_TILE`` where a window cuts the keys to those near the tile. A text of no
more tokens is one tile. Without a window nothing is masked. An iteration launches a dozen nodes.

Measured on one core, 12 heads of 64, float32, least CPU time of ten: 64 texts of 8 to 40 tokens take 7 ms. Padded to the longest
they take 19, in groups of like lengths multiplied by FusedMatMul 17, because multiplying by strided heads costs more than the
launches saved. com.microsoft's MultiHeadAttention takes 8, and for one text of 2,048 tokens 216 ms where this takes 259; but
it knows neither grouped heads nor windows. A window of 128 over that text takes 32 ms by its tiles of 64, 66 by tiles of 256.

Index inputs: text_tiles [W, 4] and window_tiles [V, 4] (see ``zoo.runtime.indices``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from zoo.graph import IndexInput
from zoo.plugins.contract import Lowering
from zoo.plugins.packed_attention.body import function

QKV = ("q", "k", "v")
INDEX = ("text_tiles", "window_tiles")

TILES = """
  tile_count = Shape <start = 0, end = 1> ({tiles})
  count = Squeeze (tile_count)
  nothing = SequenceEmpty <dtype = 1> ()
  {prepare}
  pieces = Loop (count, , nothing) <body = tile
    (int64 i, bool going, seq(float[A, M, E]) done) => (bool still_going, seq(float[A, M, E]) more) {{
    still_going = Identity (going)
    item = Gather ({tiles}, i)
    start, stop, {first}, {last} = Split <num_outputs = 4> (item)
    {trim}
    queries = Slice (q, start, stop, one_d)
    keys = Slice (k, first, last, one_d)
    values = Slice (v, first, last, one_d)
    {mask}
    mixed = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @kv_heads, scale: float = @scale{softcap}>
      (queries, keys, values{masked})
    more = SequenceInsert (done, mixed)
  }}>
  out = ConcatFromSequence <axis = 1> (pieces)
"""

PREPARE = """
  window = Constant <value_int: int = @window> ()
  window_d = Reshape (window, one_d)
  half = Div (window_d, two_d)
  token_count = Shape <start = 1, end = 2> (q)
  tokens = Squeeze (token_count)
  rows = Range (zero, tokens, one)
"""

# A tile's keys begin and end half a window before and behind it, or where its text does.
TRIM = """
    early = Sub (start, half)
    first = Max (early, text_first)
    late = Add (stop, half)
    last = Min (late, text_last)
"""

MASK = """
    row = Slice (rows, start, stop)
    row_col = Unsqueeze (row, one_d)
    column = Slice (rows, first, last)
    signed = Sub (row_col, column)
    apart = Abs (signed)
    near = LessOrEqual (apart, half)
"""


def loop(attrs: Mapping[str, Any]) -> onnx.FunctionProto:
    """The function for one node's attributes: windows and soft caps cost nothing where there are none. float32 only."""
    window, softcap = attrs["window"] > 0, attrs["softcap"] > 0
    op = "ZooPackedAttentionLoop" + "Window" * window + "Softcap" * softcap
    text = TILES.format(
        tiles="window_tiles" if window else "text_tiles",
        prepare=PREPARE if window else "",
        first="text_first" if window else "first",
        last="text_last" if window else "last",
        trim=TRIM if window else "",
        mask=MASK if window else "",
        masked=", near" if window else "",
        softcap=", softcap: float = @softcap" if softcap else "",
    )
    return function(op, (*QKV, *INDEX), text)


def loop_lowering() -> Lowering:
    """The lowering, its index inputs included."""
    return Lowering(
        name="loop",
        inputs=(*QKV, *INDEX),
        function=loop,
        index_inputs=(IndexInput("text_tiles", "int64", ("W", 4)), IndexInput("window_tiles", "int64", ("V", 4))),
    )
