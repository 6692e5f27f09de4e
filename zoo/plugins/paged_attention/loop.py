"""``ZooPagedAttention`` and its variants for ONNX Runtime on a CPU: one Loop iteration per tile of a sequence's queries.

Nothing is allocated for all tokens at once: an iteration gathers the blocks of one sequence and holds its scores
[K, L * G, N], L at most ``zoo.runtime.indices.TILE`` queries. What was measured on two cores, 16 layers of 32/8 heads of 64:

- FusedMatMul with transBatchB multiplies by gathered blocks [N, K, D] as they lie: no transposed copy of a context.
  Attention as one op would copy keys and values twice more.
- Blocks are gathered whole (2 x faster than token by token). What a block holds behind its sequence's last token must not
  reach the sums, so the one ScatterND that writes the new tokens also writes zeros there: at most block_size - 1 rows a
  sequence, in the block that its newest token makes its own. Masking gathered values instead copies all of them.
- What only the Loop needs stands beside it in the else branch of the If, so that a decode step launches none of it.
- An iteration costs some 25 node launches, which short contexts feel. A step in which every sequence has one token and
  contexts are short takes the other branch of an If: contexts gathered token by token into [N, B, K, D], N the longest,
  and all sequences multiplied at once. Layers with a window or a soft cap always loop.
- A sink is one more column of scores, cut off behind the softmax. The two copies are a tenth more time for prompts of 240
  tokens and 32 heads; a factor from ReduceLogSumExp instead of them was half as much again.
- Slopes multiply distances that are minus infinity where nothing is seen, which is mask and bias in one. That is why they are
  to be more than 0.

Index inputs: pool_writes [S, 2, 3] (new tokens, then the zeros), pool_blanks [8] (pads T rows to S), context_blocks [2, C, 2]
(block of each context, for keys and for values), row_positions [T], work_items [W, 7], decode_step [], decode_keys and
decode_values [N, B, 3], decode_bias [B, N] (see ``zoo.runtime.indices``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import onnx

from zoo.graph import IndexInput
from zoo.plugins.contract import Lowering
from zoo.plugins.paged_attention.body import FRESH, SINKS, SIZES, SLOPES, VARIANTS, function

WRITES = ("pool_writes", "pool_blanks")
INDEX = (*WRITES, "context_blocks", "row_positions", "work_items", "decode_step", "decode_keys", "decode_values", "decode_bias")
QKV = ("q", "k", "v", "kv")

WRITE = """
  written = Pad (fresh, pool_blanks)
  kv_out = ScatterND (kv, pool_writes, written)
"""

# shapes of constants only: ONNX Runtime folds them
SHAPES = """
  split_shape = Concat <axis = 0> (rest_d, Kd, Gd, Dd)
  rows_shape = Concat <axis = 0> (Kd, rest_d, Dd)
  context_shape = Concat <axis = 0> (rest_d, Kd, Dd)
  mixed_shape = Concat <axis = 0> (Kd, rest_d, Gd, Dd)
  out_shape = Concat <axis = 0> (one_d, rest_d, HDd)
"""

# rows [T * G, 1] the position of each query; columns [longest context]
PREPARE = """
  ones = Constant <value_ints = [1, 1, 1, 1, 1]> ()
  columns_of_item = Concat <axis = 0> (Gd, Gd, ones)
  items = Mul (work_items, columns_of_item)
  items_shape = Shape (work_items)
  count = Gather (items_shape, zero)

  position_col = Unsqueeze (row_positions, one_d)
  repeat = Concat <axis = 0> (one_d, Gd)
  repeated = Expand (position_col, repeat)
  column_shape = Concat <axis = 0> (rest_d, one_d)
  rows = Reshape (repeated, column_shape)
  most = ReduceMax <keepdims = 0> (work_items, zero_d)
  widest = Constant <value_int = 5> ()
  longest = Gather (most, widest)
  columns = Range (zero, longest, one)

  key_blocks = Gather (context_blocks, zero)
  value_blocks = Gather (context_blocks, one)
  nought = Constant <value_float = 0.0> ()
  minus = Constant <value_float = -inf> ()
  nothing = SequenceEmpty <dtype = 1> ()
  {window}
"""

WINDOW_PREPARE = """
  window = Constant <value_int: int = @window> ()
  window_d = Reshape (window, one_d)
  rows_before = Sub (rows, window_d)
  reach = Sub (window_d, one_d)
  block_size = Constant <value_int: int = @block_size> ()
  BSd = Reshape (block_size, one_d)
"""

# of_rows [K, T * G, 1]: the sink or slope of each row's head
PER_ROW = """
  grouped_shape = Concat <axis = 0> (Kd, one_d, Gd, one_d)
  grouped = Reshape ({given}, grouped_shape)
  token_count = Shape <start = 1, end = 2> (q)
  spread_shape = Concat <axis = 0> (one_d, token_count, one_d, one_d)
  spread = Expand (grouped, spread_shape)
  of_rows_shape = Concat <axis = 0> (Kd, rest_d, one_d)
  of_rows = Reshape (spread, of_rows_shape)
"""

# A windowed tile begins at the block of the first position that its first query sees.
WINDOW_TRIM = """
    earliest = Sub (first_position, reach)
    earliest_seen = Max (earliest, zero_d)
    skipped = Div (earliest_seen, BSd)
    from_block = Add (block_start, skipped)
    from_column = Mul (skipped, BSd)
"""

# queries [K, T * G, D], scaled
TILE_LOOP = """
  factor = Constant <value_float: float = @scale> ()
  q_scaled = Mul (q, factor)
  {divide}
  q_split = Reshape ({scaled}, split_shape)
  q_by_head = Transpose <perm = [1, 0, 2, 3]> (q_split)
  queries = Reshape (q_by_head, rows_shape)
  pieces = Loop (count, , nothing) <body = tile
    (int64 i, bool going, seq(float[A, M, E]) done) => (bool still_going, seq(float[A, M, E]) more) {{
    still_going = Identity (going)
    item = Gather (items, i)
    start, stop, block_start, block_stop, length, padded, first_position = Split <num_outputs = 7> (item)
    {trim}
    query = Slice (queries, start, stop, one_d)
    key_index = Slice (key_blocks, {from_block}, block_stop)
    key_pages = GatherND (kv_out, key_index)
    keys = Reshape (key_pages, context_shape)
    raw = com.microsoft.FusedMatMul <transB = 1, transBatchB = 1> (query, keys)
    {softcap}
    row = Slice (rows, start, stop)
    column = Slice (columns, {from_column}, padded)
    causal = GreaterOrEqual (row, column)
    {window}
    {bias}
    masked = Add ({score}, bias)
    {weight}
    value_index = Slice (value_blocks, {from_block}, block_stop)
    value_pages = GatherND (kv_out, value_index)
    values = Reshape (value_pages, context_shape)
    mixed = com.microsoft.FusedMatMul <transBatchB = 1> (weight, values)
    more = SequenceInsert (done, mixed)
  }}>
  mixed_rows = ConcatFromSequence <axis = 1> (pieces)
  mixed_split = Reshape (mixed_rows, mixed_shape)
  mixed_by_token = Transpose <perm = [1, 0, 2, 3]> (mixed_split)
  {out} = Reshape (mixed_by_token, out_shape)
"""

BIAS = "bias = Where ({visible}, nought, minus)"

BIAS_SLOPES = """
    apart = Sub (column, row)
    apart_float = Cast <to = 1> (apart)
    seen_apart = Where ({visible}, apart_float, minus)
    of_row = Slice (of_rows, start, stop, one_d)
    bias = Mul (seen_apart, of_row)
"""

WEIGHT = "weight = Softmax <axis = -1> (masked)"

WEIGHT_SINKS = """
    of_row = Slice (of_rows, start, stop, one_d)
    with_sink = Concat <axis = -1> (masked, of_row)
    weight_and_sink = Softmax <axis = -1> (with_sink)
    weight = Slice (weight_and_sink, zero_d, rest_d, rest_d)
"""

# scores [B, K, G, N]; ONNX Runtime shares the nodes before the If between layers, where they read the same inputs
TOGETHER = """
  middle = Constant <value_ints = [1, 2]> ()
  decode_mask = Unsqueeze (decode_bias, middle)
  {prepare}
  out = If (decode_step) <
    then_branch = together () => (float[U, B, HD] out_together) {{
      d_query = Reshape (q, split_shape)
      d_keys = GatherND (kv_out, decode_keys)
      d_raw = com.microsoft.FusedMatMul <transB = 1, transBatchB = 1, alpha: float = @scale> (d_query, d_keys)
      {masked} = Add (d_raw, decode_mask)
      {bias}
      {weight}
      d_values = GatherND (kv_out, decode_values)
      d_mixed = com.microsoft.FusedMatMul <transBatchB = 1> (d_weight, d_values)
      out_together = Reshape (d_mixed, out_shape)
    }},
    else_branch = one_by_one () => (float[U, B, HD] out_apart) {{ {tiles} }}
  >
"""


TOGETHER_WEIGHT = "d_weight = Softmax <axis = -1> (d_masked)"

TOGETHER_WEIGHT_SINKS = """
      d_sink_shape = Concat <axis = 0> (one_d, Kd, Gd, one_d)
      d_sinks = Reshape (sinks, d_sink_shape)
      d_count = Shape <start = 0, end = 1> (d_masked)
      d_column_shape = Concat <axis = 0> (d_count, one_d, one_d, one_d)
      d_column = Expand (d_sinks, d_column_shape)
      d_with_sink = Concat <axis = -1> (d_masked, d_column)
      d_weight_and_sink = Softmax <axis = -1> (d_with_sink)
      d_weight = Slice (d_weight_and_sink, zero_d, rest_d, rest_d)
"""

# [T, K, G, N]; N is 0 unless this branch is taken, and T is B if it is
TOGETHER_SLOPES = """
  d_slope_shape = Concat <axis = 0> (Kd, Gd, one_d)
  d_slopes = Reshape (slopes, d_slope_shape)
  d_longest = Shape <start = 1, end = 2> (decode_bias)
  d_count = Squeeze (d_longest)
  d_columns = Range (zero, d_count, one)
  d_positions = Unsqueeze (row_positions, one_d)
  d_apart = Sub (d_columns, d_positions)
  d_apart_float = Cast <to = 1> (d_apart)
  d_apart_row = Unsqueeze (d_apart_float, middle)
  d_bias = Mul (d_apart_row, d_slopes)
"""


def loop(attrs: Mapping[str, Any], variant: str = "") -> onnx.FunctionProto:
    """The function for one node's attributes: windows, soft caps, sinks and slopes cost nothing where there are none.

    float32 only.
    """
    window, softcap = attrs["window"] > 0, attrs["softcap"] > 0
    sinks, slopes = variant == SINKS, variant == SLOPES
    op = "ZooPagedAttentionLoop" + "Window" * window + "Softcap" * softcap + variant
    together = not (window or softcap)
    visible = "inside" if window else "causal"
    prepare = PREPARE.format(window=WINDOW_PREPARE if window else "")
    prepare += PER_ROW.format(given=VARIANTS[variant][0]) if variant else ""
    tiles = prepare + TILE_LOOP.format(
        divide="cap = Constant <value_float: float = @softcap> ()\n  q_small = Div (q_scaled, cap)" if softcap else "",
        scaled="q_small" if softcap else "q_scaled",
        trim=WINDOW_TRIM if window else "",
        from_block="from_block" if window else "block_start",
        from_column="from_column" if window else "zero_d",
        softcap="bent = Tanh (raw)\n    capped = Mul (bent, cap)" if softcap else "",
        score="capped" if softcap else "raw",
        window="row_before = Slice (rows_before, start, stop)\n    near = Less (row_before, column)\n"
        "    inside = And (causal, near)"
        if window
        else "",
        bias=(BIAS_SLOPES if slopes else BIAS).format(visible=visible),
        weight=WEIGHT_SINKS if sinks else WEIGHT,
        out="out_apart" if together else "out",
    )
    steps = tiles
    if together:
        steps = TOGETHER.format(
            prepare=TOGETHER_SLOPES if slopes else "",
            masked="d_seen" if slopes else "d_masked",
            bias="d_masked = Add (d_seen, d_bias)" if slopes else "",
            weight=TOGETHER_WEIGHT_SINKS if sinks else TOGETHER_WEIGHT,
            tiles=tiles,
        )
    inputs = (*QKV, *VARIANTS[variant], *INDEX)
    return function(op, inputs, SIZES + FRESH + WRITE + SHAPES + steps, ', "com.microsoft" : 1')


def loop_lowering(variant: str = "") -> Lowering:
    """The lowering of one variant. Index inputs are the same for all."""
    return Lowering(
        name="loop",
        inputs=(*QKV, *VARIANTS[variant], *INDEX),
        function=partial(loop, variant=variant),
        index_inputs=(
            IndexInput("pool_writes", "int64", ("S", 2, 3)),
            IndexInput("pool_blanks", "int64", (8,)),
            IndexInput("context_blocks", "int64", (2, "C", 2)),
            IndexInput("row_positions", "int64", ("T",)),
            IndexInput("work_items", "int64", ("W", 7)),
            IndexInput("decode_step", "bool", ()),
            IndexInput("decode_keys", "int64", ("N", "B", 3)),
            IndexInput("decode_values", "int64", ("N", "B", 3)),
            IndexInput("decode_bias", "float32", ("B", "N")),
        ),
        domains=("com.microsoft",),
    )
