"""The reference body of ``ZooPackedAttention``: what it means, in standard ops. It makes scores of all tokens with all tokens.

Written as ONNX text. Shape legend: T tokens, B sequences, H = K * G heads, D head size.
"""

from __future__ import annotations

import onnx
from onnx import parser

from zoo.graph import OPSET
from zoo.plugins.paged_attention.body import SIZES

ATTRIBUTES = ("num_heads", "kv_heads", "head_dim", "scale", "window", "softcap")
GIVEN = ("q", "k", "v", "query_starts")

# visible [T, T], score [K, G, T, T]
_TEXT = """
  starts = Cast <to = 7> (query_starts)
  T = Shape <start = 1, end = 2> (q)
  count = Squeeze (T)
  token = Range (zero, count, one)
  token_col = Unsqueeze (token, one_d)
  B1 = Shape (starts)
  ends = Slice (starts, one_d, B1)
  past = LessOrEqual (ends, token_col)
  past_int = Cast <to = 7> (past)
  sequence = ReduceSum <keepdims = 0> (past_int, one_d)
  sequence_col = Unsqueeze (sequence, one_d)
  same = Equal (sequence_col, sequence)

  window = Constant <value_int: int = @window> ()
  unlimited = LessOrEqual (window, zero)
  two = Constant <value_int = 2> ()
  signed = Sub (token_col, token)
  apart = Abs (signed)
  twice = Mul (apart, two)
  near = LessOrEqual (twice, window)
  inside = Or (near, unlimited)
  visible = And (same, inside)

  q_shape = Concat <axis = 0> (rest_d, Kd, Gd, Dd)
  q_split = Reshape (q, q_shape)
  queries = Transpose <perm = [1, 2, 0, 3]> (q_split)
  k_shape = Concat <axis = 0> (rest_d, Kd, one_d, Dd)
  k_split = Reshape (k, k_shape)
  keys_t = Transpose <perm = [1, 2, 3, 0]> (k_split)
  v_split = Reshape (v, k_shape)
  values = Transpose <perm = [1, 2, 0, 3]> (v_split)
  scale = Constant <value_float: float = @scale> ()
  scale_like = CastLike (scale, q)
  q_scaled = Mul (queries, scale_like)
  raw = MatMul (q_scaled, keys_t)

  none = Constant <value_float = 0.0> ()
  none_like = CastLike (none, q)
  softcap = Constant <value_float: float = @softcap> ()
  softcap_like = CastLike (softcap, q)
  capping = Greater (softcap_like, none_like)
  one_like = CastLike (one, q)
  cap = Where (capping, softcap_like, one_like)
  ratio = Div (raw, cap)
  bent = Tanh (ratio)
  capped = Mul (bent, cap)
  score = Where (capping, capped, raw)

  minus = Constant <value_float = -inf> ()
  minus_like = CastLike (minus, q)
  masked = Where (visible, score, minus_like)
  weight = Softmax <axis = -1> (masked)
  mixed = MatMul (weight, values)
  mixed_by_token = Transpose <perm = [2, 0, 1, 3]> (mixed)
  out_shape = Concat <axis = 0> (one_d, rest_d, HDd)
  out = Reshape (mixed_by_token, out_shape)
"""


def function(op: str, inputs: tuple[str, ...], text: str) -> onnx.FunctionProto:
    """A function of the domain ``zoo`` with this op's attributes and output, from the text of its nodes behind ``SIZES``."""
    declared = ", ".join((*ATTRIBUTES, "plugin_namespace", "plugin_version"))
    head = f'<domain: "zoo", opset_import: ["" : {OPSET}]>\n{op} <{declared}> ({", ".join(inputs)}) => (out)'
    return parser.parse_function(f"{head} {{{SIZES}{text}}}")


def body() -> onnx.FunctionProto:
    """The reference body."""
    return function("ZooPackedAttention", GIVEN, _TEXT)
