"""The reference bodies of ``ZooPagedAttention`` and its variants: what they mean, in standard ops. They gather a whole context
for every token.

Written as ONNX text. Shape legend: T tokens, B sequences, P blocks, N = P * block_size, H = K * G heads, D head size.
"""

from __future__ import annotations

import onnx
from onnx import parser

from zoo.graph import OPSET

ATTRIBUTES = ("num_heads", "kv_heads", "head_dim", "block_size", "scale", "window", "softcap")
SINKS, SLOPES = "Sinks", "Slopes"
# What an op's name ends in -> its inputs [H] behind those of the plain op.
VARIANTS: dict[str, tuple[str, ...]] = {"": (), SINKS: ("sinks",), SLOPES: ("slopes",)}

# Sizes as tensors, for every function of this op: Kd, Dd, Gd, BSd are [1], for shapes; zero, one are scalars.
SIZES = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  zero_d = Constant <value_ints = [0]> ()
  one_d = Constant <value_ints = [1]> ()
  two_d = Constant <value_ints = [2]> ()
  rest_d = Constant <value_ints = [-1]> ()
  heads = Constant <value_int: int = @num_heads> ()
  kv_heads = Constant <value_int: int = @kv_heads> ()
  head_dim = Constant <value_int: int = @head_dim> ()
  groups = Div (heads, kv_heads)
  Kd = Reshape (kv_heads, one_d)
  Dd = Reshape (head_dim, one_d)
  Gd = Reshape (groups, one_d)
  width = Mul (heads, head_dim)
  HDd = Reshape (width, one_d)
"""

# This step's keys and values side by side, as the pool stores them: fresh [T, 2, K, D].
FRESH = """
  fresh_shape = Concat <axis = 0> (rest_d, two_d, Kd, Dd)
  k_then_v = Concat <axis = -1> (k, v)
  fresh = Reshape (k_then_v, fresh_shape)
"""

# Queries and contexts to scores: position [T], place [N], visible [T, N], score [T, K, G, N].
_SCORES = """
  block_size = Constant <value_int: int = @block_size> ()
  starts = Cast <to = 7> (query_starts)
  lengths = Cast <to = 7> (kv_lengths)
  table = Cast <to = 7> (block_table)

  T = Shape <start = 1, end = 2> (q)
  count = Squeeze (T)
  token = Range (zero, count, one)
  B1 = Shape (starts)
  ends = Slice (starts, one_d, B1)
  ends_row = Unsqueeze (ends, zero_d)
  token_col = Unsqueeze (token, one_d)
  past = LessOrEqual (ends_row, token_col)
  past_int = Cast <to = 7> (past)
  sequence = ReduceSum <keepdims = 0> (past_int, one_d)

  length = Gather (lengths, sequence)
  end = Gather (ends, sequence)
  left = Sub (end, token)
  signed = Sub (length, left)
  position = Max (signed, zero)

  table_row = Gather (table, sequence)
  nth = Div (position, block_size)
  nth_col = Unsqueeze (nth, one_d)
  block = GatherElements <axis = 1> (table_row, nth_col)
  before = Mul (nth, block_size)
  offset = Sub (position, before)
  offset_col = Unsqueeze (offset, one_d)
  key = Mul (block, zero_d)
  value = Add (key, one_d)
  key_slot = Concat <axis = 1> (block, key, offset_col)
  value_slot = Concat <axis = 1> (block, value, offset_col)
  key_slots = Unsqueeze (key_slot, one_d)
  value_slots = Unsqueeze (value_slot, one_d)
  slots = Concat <axis = 1> (key_slots, value_slots)
  kv_out = ScatterND (kv, slots, fresh)

  pages = Gather (kv_out, table_row)
  pages_by_head = Transpose <perm = [2, 0, 4, 1, 3, 5]> (pages)
  context_shape = Concat <axis = 0> (two_d, T, Kd, rest_d, Dd)
  context = Reshape (pages_by_head, context_shape)
  keys = Gather (context, zero)
  values = Gather (context, one)

  N = Shape <start = 2, end = 3> (keys)
  context_size = Squeeze (N)
  place = Range (zero, context_size, one)
  position_col = Unsqueeze (position, one_d)
  causal = LessOrEqual (place, position_col)
  window = Constant <value_int: int = @window> ()
  unlimited = LessOrEqual (window, zero)
  first = Sub (position_col, window)
  near = Greater (place, first)
  inside = Or (near, unlimited)
  visible = And (causal, inside)

  softmax_axes = Constant <value_ints = [1, 2]> ()
  score_mask = Unsqueeze (visible, softmax_axes)
  value_axes = Constant <value_ints = [1, 3]> ()
  value_mask = Unsqueeze (visible, value_axes)
  none = Constant <value_float = 0.0> ()
  none_like = CastLike (none, q)
  values_seen = Where (value_mask, values, none_like)

  q_shape = Concat <axis = 0> (rest_d, Kd, Gd, Dd)
  q_heads = Reshape (q, q_shape)
  scale = Constant <value_float: float = @scale> ()
  scale_like = CastLike (scale, q)
  q_scaled = Mul (q_heads, scale_like)
  keys_t = Transpose <perm = [0, 1, 3, 2]> (keys)
  raw = MatMul (q_scaled, keys_t)

  softcap = Constant <value_float: float = @softcap> ()
  softcap_like = CastLike (softcap, q)
  capping = Greater (softcap_like, none_like)
  one_like = CastLike (one, q)
  cap = Where (capping, softcap_like, one_like)
  ratio = Div (raw, cap)
  bent = Tanh (ratio)
  capped = Mul (bent, cap)
  score = Where (capping, capped, raw)
"""

# Distances are counted in whole numbers and multiplied in float32: far from its query, a half precision bias would be coarse.
_BIAS = """
  slope_shape = Concat <axis = 0> (Kd, Gd, one_d)
  slope = Reshape (slopes, slope_shape)
  apart = Sub (place, position_col)
  apart_float = Cast <to = 1> (apart)
  apart_row = Unsqueeze (apart_float, softmax_axes)
  bias = Mul (apart_row, slope)
  bias_like = CastLike (bias, q)
  biased = Add (score, bias_like)
"""

_MASKED = """
  minus = Constant <value_float = -inf> ()
  minus_like = CastLike (minus, q)
  masked = Where (score_mask, {score}, minus_like)
"""

_WEIGHT = """
  weight = Softmax <axis = -1> (masked)
"""

# One more column, which is dropped behind the softmax.
_WEIGHT_SINKS = """
  sink_shape = Concat <axis = 0> (one_d, Kd, Gd, one_d)
  sink = Reshape (sinks, sink_shape)
  sink_rows = Concat <axis = 0> (T, one_d, one_d, one_d)
  sink_column = Expand (sink, sink_rows)
  with_sink = Concat <axis = -1> (masked, sink_column)
  weight_and_sink = Softmax <axis = -1> (with_sink)
  weight = Slice (weight_and_sink, zero_d, rest_d, rest_d)
"""

_OUT = """
  mixed = MatMul (weight, values_seen)
  out_shape = Concat <axis = 0> (one_d, rest_d, HDd)
  out = Reshape (mixed, out_shape)
"""


def body_text(variant: str = "") -> str:
    """The nodes of a variant's body behind ``SIZES`` and ``FRESH``."""
    masked = _MASKED.format(score="biased" if variant == SLOPES else "score")
    return _SCORES + _BIAS * (variant == SLOPES) + masked + (_WEIGHT_SINKS if variant == SINKS else _WEIGHT) + _OUT


def function(op: str, inputs: tuple[str, ...], text: str, opsets: str = "") -> onnx.FunctionProto:
    """A function of the domain ``zoo`` with this op's attributes and outputs, from the text of its nodes."""
    declared = ", ".join((*ATTRIBUTES, "plugin_namespace", "plugin_version"))
    head = f'<domain: "zoo", opset_import: ["" : {OPSET}{opsets}]>\n{op} <{declared}> ({", ".join(inputs)}) => (out, kv_out)'
    return parser.parse_function(f"{head} {{{text}}}")


def body(variant: str = "") -> onnx.FunctionProto:
    """The reference body."""
    inputs = ("q", "k", "v", "kv", "block_table", "query_starts", "kv_lengths")
    return function("ZooPagedAttention" + variant, inputs + VARIANTS[variant], SIZES + FRESH + body_text(variant))
