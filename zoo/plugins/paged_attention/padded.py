"""``ZooPagedAttention`` and its variants for compilers without loops: queries padded to [B, L], each context gathered once a
sequence.

Only gathers, one ScatterND and one Attention, so that TensorRT-RTX can compile it. Every tensor is [B, L, ...] or
[B, N, ...] with N = P * block_size: nothing is tokens x context except the attention mask, [B, L, N] of bools, or with sinks or
slopes [B, H, L, N] of the compute type. Built by TensorRT-RTX, attention to such a mask takes 0.7 of the scratch that it takes
step by step, and 1.6 times that of the plain op (16 heads, 512 tokens, contexts of 200).

Shape legend: T tokens, B sequences, L the longest query of the step, P blocks, N positions, H = K * G heads, D head size.

Index inputs: pool_slots [T, 2, 3], query_rows [B, L] (which row of the batch is query l of sequence b; spare places read row
0 and are dropped), token_rows [T] (where each token lies among the B * L padded queries).

Cost grows with B * L, so a compiler gives it two optimization profiles: decode (any B, L = 1) and prefill (small B, any L).
A session runs a mixed step as two calls; see docs/engine-format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import onnx

from zoo.graph import IndexInput
from zoo.plugins.contract import Lowering
from zoo.plugins.paged_attention.body import FRESH, SINKS, SIZES, SLOPES, VARIANTS, function

GIVEN = ("q", "k", "v", "kv", "block_table", "query_starts", "kv_lengths")
INDEX = ("pool_slots", "query_rows", "token_rows")

GATHER = """
  kv_out = ScatterND (kv, pool_slots, fresh)
  q_rows = Squeeze (q, zero_d)
  q_padded = Gather (q_rows, query_rows)
  BL = Shape (query_rows)
  q_shape = Concat <axis = 0> (BL, rest_d, Dd)
  q_heads = Reshape (q_padded, q_shape)
  queries = Transpose <perm = [0, 2, 1, 3]> (q_heads)

  pages = Gather (kv_out, block_table)
  pages_by_head = Transpose <perm = [2, 0, 4, 1, 3, 5]> (pages)
  B = Shape <start = 0, end = 1> (query_rows)
  context_shape = Concat <axis = 0> (two_d, B, Kd, rest_d, Dd)
  context = Reshape (pages_by_head, context_shape)
"""

# position [B, L] of each padded query, place [N] of each cached token
MASK = """
  int_zero = Cast <to = 6> (zero)
  int_one = Cast <to = 6> (one)
  L = Shape <start = 1, end = 2> (query_rows)
  L_int = Cast <to = 6> (L)
  query_count = Squeeze (L_int)
  nth_query = Range (int_zero, query_count, int_one)
  B1 = Shape (query_starts)
  ends = Slice (query_starts, one_d, B1)
  begins = Slice (query_starts, zero_d, B)
  taken = Sub (ends, begins)
  known = Sub (kv_lengths, taken)
  known_col = Unsqueeze (known, one_d)
  position = Add (known_col, nth_query)
  N = Shape <start = 3, end = 4> (context)
  N_int = Cast <to = 6> (N)
  context_size = Squeeze (N_int)
  place = Range (int_zero, context_size, int_one)
  position_col = Unsqueeze (position, two_d)
  causal = LessOrEqual (place, position_col)
  {window}
  mask = Unsqueeze ({visible}, one_d)

  length_col = Unsqueeze (kv_lengths, one_d)
  stored = Less (place, length_col)
  stored_axes = Constant <value_ints = [0, 2, 4]> ()
  stored_mask = Unsqueeze (stored, stored_axes)
  nought = Constant <value_float = 0.0> ()
  nought_like = CastLike (nought, q)
  clean = Where (stored_mask, context, nought_like)
  keys = Gather (clean, zero)
  values = Gather (clean, one)
"""

WINDOW = """
  window = Constant <value_int: int = @window> ()
  window_int = Cast <to = 6> (window)
  first = Sub (position_col, window_int)
  near = Greater (place, first)
  inside = And (causal, near)
"""

ATTEND = """
  mixed = Attention <scale: float = @scale> (queries, {keys}, {values}, {mask})
"""

# Soft caps step by step: parsers are known to ignore Attention's softcap without a word.
ATTEND_SOFTCAP = """
  groups_shape = Concat <axis = 0> (B, Kd, Gd, L, Dd)
  q_groups = Reshape (queries, groups_shape)
  scale = Constant <value_float: float = @scale> ()
  softcap = Constant <value_float: float = @softcap> ()
  small = Div (scale, softcap)
  small_like = CastLike (small, q)
  cap = CastLike (softcap, q)
  q_small = Mul (q_groups, small_like)
  keys_t = Transpose <perm = [0, 1, 3, 2]> ({keys})
  keys_5d = Unsqueeze (keys_t, two_d)
  values_5d = Unsqueeze ({values}, two_d)
  raw = MatMul (q_small, keys_5d)
  bent = Tanh (raw)
  capped = Mul (bent, cap)
  {masked}
  weight = Softmax <axis = -1> (masked)
  mixed_groups = MatMul (weight, values_5d)
  heads_shape = Concat <axis = 0> (B, rest_d, L, Dd)
  mixed = Reshape (mixed_groups, heads_shape)
"""

MASKED = """
  mask_5d = Unsqueeze (mask, one_d)
  least = Constant <value_float = -inf> ()
  least_like = CastLike (least, q)
  masked = Where (mask_5d, capped, least_like)
"""

MASKED_VARIANT = """
  mask_shape = Concat <axis = 0> (B, Kd, Gd, L, rest_d)
  mask_5d = Reshape (bias, mask_shape)
  masked = Add (capped, mask_5d)
"""

# Variants are float masks, bias [B, H, L, N]. Of slopes: distances in whole numbers, then in float32, as in the reference body.
SLOPES_BIAS = """
  heads_d = Reshape (heads, one_d)
  apart = Sub (place, position_col)
  apart_float = Cast <to = 1> (apart)
  apart_row = Unsqueeze (apart_float, one_d)
  slope_shape = Concat <axis = 0> (heads_d, one_d, one_d)
  slope = Reshape (slopes, slope_shape)
  fall = Mul (apart_row, slope)
  fall_like = CastLike (fall, q)
  unseen = Constant <value_float = -inf> ()
  unseen_like = CastLike (unseen, q)
  bias = Where (mask, fall_like, unseen_like)
"""

# A sink is one more position, whose key and value are zeros and whose score is the mask's.
SINKS_BIAS = """
  heads_d = Reshape (heads, one_d)
  unseen = Constant <value_float = -inf> ()
  unseen_like = CastLike (unseen, q)
  square = Where (mask, nought_like, unseen_like)
  square_shape = Concat <axis = 0> (B, heads_d, L, N)
  squares = Expand (square, square_shape)
  sink_shape = Concat <axis = 0> (heads_d, one_d, one_d)
  sink = Reshape (sinks, sink_shape)
  column_shape = Concat <axis = 0> (B, heads_d, L, one_d)
  column = Expand (sink, column_shape)
  bias = Concat <axis = -1> (squares, column)
  blank_shape = Concat <axis = 0> (B, Kd, one_d, Dd)
  blank = Expand (nought_like, blank_shape)
  sink_keys = Concat <axis = 2> (keys, blank)
  sink_values = Concat <axis = 2> (values, blank)
"""

SCATTER_BACK = """
  mixed_by_query = Transpose <perm = [0, 2, 1, 3]> (mixed)
  mixed_shape = Concat <axis = 0> (rest_d, HDd)
  mixed_rows = Reshape (mixed_by_query, mixed_shape)
  out_rows = Gather (mixed_rows, token_rows)
  out = Unsqueeze (out_rows, zero_d)
"""


def padded(attrs: Mapping[str, Any], variant: str = "") -> onnx.FunctionProto:
    """The function for one node's attributes, in any compute type."""
    window, softcap = attrs["window"] > 0, attrs["softcap"] > 0
    op = "ZooPagedAttentionPadded" + "Window" * window + "Softcap" * softcap + variant
    mask = MASK.format(window=WINDOW if window else "", visible="inside" if window else "causal")
    mask += {"": "", SINKS: SINKS_BIAS, SLOPES: SLOPES_BIAS}[variant]
    attend = (ATTEND_SOFTCAP if softcap else ATTEND).format(
        keys="sink_keys" if variant == SINKS else "keys",
        values="sink_values" if variant == SINKS else "values",
        mask="bias" if variant else "mask",
        masked=MASKED_VARIANT if variant else MASKED,
    )
    return function(op, (*GIVEN, *VARIANTS[variant], *INDEX), SIZES + FRESH + GATHER + mask + attend + SCATTER_BACK)


def padded_lowering(variant: str = "") -> Lowering:
    """The lowering of one variant. Index inputs are the same for all."""
    return Lowering(
        name="padded",
        inputs=(*GIVEN, *VARIANTS[variant], *INDEX),
        function=partial(padded, variant=variant),
        index_inputs=(
            IndexInput("pool_slots", "int64", ("T", 2, 3)),
            IndexInput("query_rows", "int32", ("B", "L")),
            IndexInput("token_rows", "int32", ("T",)),
        ),
    )
