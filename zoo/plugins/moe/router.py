"""``ZooRouter`` in ONNX text: which experts a token goes to, and with which weights. See ``zoo.plugins.moe`` for the contract.

X experts, G groups, k chosen; ``...`` any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import parser

from zoo.graph import OPSET
from zoo.plugins.contract import DOMAIN, Attribute, function_attributes

SOFTMAX, SIGMOID = range(2)  # attribute score
MAX, TOP2 = range(2)  # attribute group_score
EPSILON = 1e-20  # added to the sum that weights are divided by
ATTRIBUTES = (
    Attribute("top_k", int),
    Attribute("score", int),
    Attribute("normalize", int),
    Attribute("groups", int, 1),
    Attribute("top_groups", int, 1),
    Attribute("group_score", int, MAX),
    Attribute("scale", float, 1.0),
)
MICROSOFT = "com.microsoft"

NUMBERS = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  one_d = Constant <value_ints = [1]> ()
  two_d = Constant <value_ints = [2]> ()
  last = Constant <value_ints = [-1]> ()
  top_k = Constant <value_int: int = @top_k> ()
  k = Reshape (top_k, one_d)
"""

# products [..., X]
BY_TRANSPOSE = """
  columns = Transpose <perm = [1, 0]> (router)
  product = MatMul (x, columns)
"""
BY_FUSED = "product = com.microsoft.FusedMatMul <transB = 1> (x, router)"

# logits -> scores
SCORES = {
    SOFTMAX: "scores = Softmax <axis = -1> (logits)",
    SIGMOID: "scores = Sigmoid (logits)",
    None: """
  soft = Softmax <axis = -1> (logits)
  bent = Sigmoid (logits)
  score = Constant <value_int: int = @score> ()
  is_bent = Equal (score, one)
  scores = Where (is_bent, bent, soft)
""",
}

# choice [..., X] -> kept [..., X], the lowest number where an expert's group is not among the best
GROUPS = """
  groups = Constant <value_int: int = @groups> ()
  G = Reshape (groups, one_d)
  top_groups = Constant <value_int: int = @top_groups> ()
  most = Reshape (top_groups, one_d)
  whole = Shape (choice)
  leading = Shape <start = 0, end = -1> (choice)
  split = Concat <axis = 0> (leading, G, last)
  by_group = Reshape (choice, split)
  {best}
  best_groups, places_of_groups = TopK <axis = -1> (best, most)
  place_col = Unsqueeze (places_of_groups, last)
  numbers = Range (zero, groups, one)
  same = Equal (place_col, numbers)
  same_float = Cast <to = 1> (same)
  before_last = Constant <value_ints = [-2]> ()
  mask = ReduceMax <keepdims = 0> (same_float, before_last)
  mask_col = Unsqueeze (mask, last)
  inside = Cast <to = 9> (mask_col)
  lowest = Constant <value_float = -3.4028235e38> ()
  masked = Where (inside, by_group, lowest)
  kept = Reshape (masked, whole)
"""
BEST = {
    MAX: "best = ReduceMax <keepdims = 0> (by_group, last)",
    TOP2: """
  two, places_of_two = TopK <axis = -1> (by_group, two_d)
  best = ReduceSum <keepdims = 0> (two, last)
""",
    None: """
  size = Shape <start = -1> (by_group)
  at_most_two = Min (size, two_d)
  two, places_of_two = TopK <axis = -1> (by_group, at_most_two)
  best_two = ReduceSum <keepdims = 0> (two, last)
  best_one = ReduceMax <keepdims = 0> (by_group, last)
  group_score = Constant <value_int: int = @group_score> ()
  is_two = Equal (group_score, one)
  best = Where (is_two, best_two, best_one)
""",
}

TOP = """
  best_scores, places = TopK <axis = -1> ({choice}, k)
  chosen = Cast <to = 6> (places)
  picked = GatherElements <axis = -1> (scores, places)
  scale = Constant <value_float: float = @scale> ()
"""
SHARES = f"""
  total = ReduceSum <keepdims = 1> (picked, last)
  epsilon = Constant <value_float = {EPSILON}> ()
  some = Add (total, epsilon)
  shares = Div (picked, some)
"""
WEIGHTS = {
    1: SHARES + "weights = Mul (shares, scale)",
    0: "weights = Mul (picked, scale)",
    None: SHARES
    + """
  normalize = Constant <value_int: int = @normalize> ()
  is_normal = Cast <to = 9> (normalize)
  parts = Where (is_normal, shares, picked)
  weights = Mul (parts, scale)
""",
}


def inputs_of(bias: bool, select: bool) -> tuple[str, ...]:
    return ("x", "router", *(("router_bias",) if bias else ()), *(("select_bias",) if select else ()))


def body(op: str, bias: bool, select: bool) -> onnx.FunctionProto:
    """The reference body: one function for all attributes."""
    text = SCORES[None], GROUPS.format(best=BEST[None]), WEIGHTS[None]
    return _function(op, bias, select, BY_TRANSPOSE, text)


def lowered(bias: bool, select: bool, fused: bool, attrs: Mapping[str, Any]) -> onnx.FunctionProto:
    """The function for one node's attributes: what they leave out costs nothing. ``fused``: with FusedMatMul."""
    grouped = attrs["top_groups"] < attrs["groups"]
    score, group_score, normalize = attrs["score"], attrs["group_score"], attrs["normalize"]
    op = "ZooRouter" + "Bias" * bias + "Select" * select + ("Sigmoid" if score == SIGMOID else "Softmax")
    op += ("Top2Groups" if group_score == TOP2 else "Groups") * grouped + "Normalize" * normalize + "Fused" * fused
    groups = GROUPS.format(best=BEST[group_score]) if grouped else ""
    return _function(op, bias, select, BY_FUSED if fused else BY_TRANSPOSE, (SCORES[score], groups, WEIGHTS[normalize]))


def _function(op: str, bias: bool, select: bool, product: str, text: tuple[str, str, str]) -> onnx.FunctionProto:
    scores, groups, weights = text
    logits = "sum = Add (product, router_bias)\n  logits = Cast <to = 1> (sum)" if bias else "logits = Cast <to = 1> (product)"
    choice = "choice = Add (scores, select_bias)" if select else "choice = Identity (scores)"
    steps = NUMBERS, product, logits, scores, choice, groups, TOP.format(choice="kept" if groups else "choice"), weights
    opsets = f', "{MICROSOFT}" : 1' if product == BY_FUSED else ""
    return function(op, ATTRIBUTES, inputs_of(bias, select), ("chosen", "weights"), "\n".join(steps), opsets)


def function(
    op: str, attributes: tuple[Attribute, ...], inputs: tuple[str, ...], outputs: tuple[str, ...], text: str, opsets: str = ""
) -> onnx.FunctionProto:
    """A function of the domain ``zoo`` from the text of its nodes."""
    declared, given, made = (", ".join(names) for names in (function_attributes(attributes), inputs, outputs))
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}{opsets}]>\n{op} <{declared}> ({given}) => ({made})'
    return parser.parse_function(f"{head} {{{text}}}")
