"""``ZooPackedAttention`` for compilers without loops: queries, keys and values padded to [B, L], one Attention or its steps.

Only gathers and standard ops, so that TensorRT-RTX can compile it. Every tensor is [B, L, ...], but for the mask [B, L, L] of
bools, and, where attention goes by steps, what a compiler does not fuse of the scores [B, H, L, L].

Shape legend: T tokens, B sequences, L the longest text of the step, H = K * G heads, D head size.

Index inputs: query_rows [B, L] (which row of the batch is token l of text b; spare places read row 0, are masked and dropped),
token_rows [T] (where each token lies among the B * L padded places).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from zoo.graph import IndexInput
from zoo.plugins.contract import Lowering
from zoo.plugins.packed_attention.body import GIVEN, function

INDEX = ("query_rows", "token_rows")

# Masked places hold zeros: what a spare place reads may be the NaN of another text.
GATHER = """
  int_zero = Cast <to = 6> (zero)
  int_one = Cast <to = 6> (one)
  L = Shape <start = 1, end = 2> (query_rows)
  L_int = Cast <to = 6> (L)
  longest = Squeeze (L_int)
  place = Range (int_zero, longest, int_one)
  B = Shape <start = 0, end = 1> (query_rows)
  B1 = Shape (query_starts)
  ends = Slice (query_starts, one_d, B1)
  begins = Slice (query_starts, zero_d, B)
  lengths = Sub (ends, begins)
  length_col = Unsqueeze (lengths, one_d)
  held = Less (place, length_col)
  held_axes = Constant <value_ints = [2, 3]> ()
  held_mask = Unsqueeze (held, held_axes)

  BL = Shape (query_rows)
  nought = Constant <value_float = 0.0> ()
  nought_like = CastLike (nought, q)
  q_rows = Squeeze (q, zero_d)
  q_padded = Gather (q_rows, query_rows)
  q_shape = Concat <axis = 0> (BL, rest_d, Dd)
  q_split = Reshape (q_padded, q_shape)
  queries = Transpose <perm = [0, 2, 1, 3]> (q_split)
  k_rows = Squeeze (k, zero_d)
  k_padded = Gather (k_rows, query_rows)
  k_split = Reshape (k_padded, q_shape)
  k_clean = Where (held_mask, k_split, nought_like)
  keys = Transpose <perm = [0, 2, 1, 3]> (k_clean)
  v_rows = Squeeze (v, zero_d)
  v_padded = Gather (v_rows, query_rows)
  v_split = Reshape (v_padded, q_shape)
  v_clean = Where (held_mask, v_split, nought_like)
  values = Transpose <perm = [0, 2, 1, 3]> (v_clean)
"""

# seen [B, L, L]
MASK = """
  held_rows = Unsqueeze (held, one_d)
  square = Concat <axis = 0> (B, L, L)
  seen = Expand (held_rows, square)
"""

WINDOW_MASK = """
  window = Constant <value_int: int = @window> ()
  window_int = Cast <to = 6> (window)
  two = Constant <value_int = 2> ()
  two_int = Cast <to = 6> (two)
  place_col = Unsqueeze (place, one_d)
  signed = Sub (place_col, place)
  apart = Abs (signed)
  twice = Mul (apart, two_int)
  near = LessOrEqual (twice, window_int)
  held_rows = Unsqueeze (held, one_d)
  seen = And (held_rows, near)
"""

ATTEND = """
  mask = Unsqueeze (seen, one_d)
  mixed = Attention <scale: float = @scale> (queries, keys, values, mask)
"""

# Soft caps step by step: parsers are known to ignore Attention's softcap without a word.
STEPS = """
  groups_shape = Concat <axis = 0> (B, Kd, Gd, L, Dd)
  q_groups = Reshape (queries, groups_shape)
  scale = Constant <value_float: float = @scale> ()
  softcap = Constant <value_float: float = @softcap> ()
  small = Div (scale, softcap)
  factor = CastLike (small, q)
  q_small = Mul (q_groups, factor)
  keys_t = Transpose <perm = [0, 1, 3, 2]> (keys)
  keys_5d = Unsqueeze (keys_t, two_d)
  values_5d = Unsqueeze (values, two_d)
  raw = MatMul (q_small, keys_5d)
  cap = CastLike (softcap, q)
  bent = Tanh (raw)
  capped = Mul (bent, cap)
  mask_axes = Constant <value_ints = [1, 2]> ()
  mask = Unsqueeze (seen, mask_axes)
  least = Constant <value_float = -inf> ()
  least_like = CastLike (least, q)
  masked = Where (mask, capped, least_like)
  weight = Softmax <axis = -1> (masked)
  mixed_groups = MatMul (weight, values_5d)
  heads_shape = Concat <axis = 0> (B, rest_d, L, Dd)
  mixed = Reshape (mixed_groups, heads_shape)
"""

BACK = """
  mixed_by_place = Transpose <perm = [0, 2, 1, 3]> (mixed)
  mixed_shape = Concat <axis = 0> (rest_d, HDd)
  mixed_rows = Reshape (mixed_by_place, mixed_shape)
  out_rows = Gather (mixed_rows, token_rows)
  out = Unsqueeze (out_rows, zero_d)
"""


def padded(attrs: Mapping[str, Any]) -> onnx.FunctionProto:
    """The function for one node's attributes, in any compute type."""
    window, softcap = attrs["window"] > 0, attrs["softcap"] > 0
    op = "ZooPackedAttentionPadded" + "Window" * window + "Softcap" * softcap
    return function(op, (*GIVEN, *INDEX), GATHER + (WINDOW_MASK if window else MASK) + (STEPS if softcap else ATTEND) + BACK)


def padded_lowering() -> Lowering:
    """The lowering, its index inputs included."""
    return Lowering(
        name="padded",
        inputs=(*GIVEN, *INDEX),
        function=padded,
        index_inputs=(IndexInput("query_rows", "int32", ("B", "L")), IndexInput("token_rows", "int32", ("T",))),
    )
