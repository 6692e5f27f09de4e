"""``ZooExperts`` in ONNX text: its body, which computes every expert, and lowerings. See ``zoo.plugins.moe`` for the contract.

    dense   every expert for every token, as the body: for compilers that have neither loops nor sparse products
    sparse  ONNX Runtime's own MoE operator, which reads the chosen experts only: for gates of SiLU and of gpt-oss, in float32
    loop    for its other gates: a Loop over the chosen experts, each with the rows of its tokens

On two cores, 32 experts of 2048 x 768 of which a token goes to 8, one and four tokens: sparse 11 and 82 ms, loop 40 and 244.
A Loop copies an expert's matrices before it multiplies by them: ONNX Runtime takes no part of a tensor as it lies.

N tokens, k chosen, X experts, E hidden, F intermediate; P = N * k pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from zoo.plugins.contract import Attribute
from zoo.plugins.gated_activation import GELU, GELU_TANH, RELU, SILU
from zoo.plugins.moe.router import MICROSOFT, function

RELU2, SWIGLU_CLAMPED = RELU + 1, RELU + 2  # attribute kind, behind those of ZooGatedActivation
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
ATTRIBUTES = (Attribute("kind", int), Attribute("top_k", int))
INPUTS = ("x", "chosen", "weights", "gate_up", "down")
BIASES = ("gate_up_bias", "down_bias")

# gate, up -> {p}product, in float32
GATES: dict[int, str] = {
    SILU: """
  {p}half = Sigmoid (gate)
  {p}act = Mul (gate, {p}half)
  {p}product = Mul ({p}act, up)
""",
    GELU: """
  {p}act = Gelu <approximate = "none"> (gate)
  {p}product = Mul ({p}act, up)
""",
    GELU_TANH: """
  {p}act = Gelu <approximate = "tanh"> (gate)
  {p}product = Mul ({p}act, up)
""",
    RELU: """
  {p}act = Relu (gate)
  {p}product = Mul ({p}act, up)
""",
    RELU2: """
  {p}half = Relu (gate)
  {p}act = Mul ({p}half, {p}half)
  {p}product = Mul ({p}act, up)
""",
    SWIGLU_CLAMPED: f"""
  {{p}}most = Constant <value_float = {SWIGLU_LIMIT}> ()
  {{p}}least = Constant <value_float = {-SWIGLU_LIMIT}> ()
  {{p}}alpha = Constant <value_float = {SWIGLU_ALPHA}> ()
  {{p}}unit = Constant <value_float = 1.0> ()
  {{p}}cut = Min (gate, {{p}}most)
  {{p}}up_cut = Clip (up, {{p}}least, {{p}}most)
  {{p}}steep = Mul ({{p}}cut, {{p}}alpha)
  {{p}}half = Sigmoid ({{p}}steep)
  {{p}}act = Mul ({{p}}cut, {{p}}half)
  {{p}}up_one = Add ({{p}}up_cut, {{p}}unit)
  {{p}}product = Mul ({{p}}act, {{p}}up_one)
""",
}
NAMES = {
    SILU: "Silu",
    GELU: "Gelu",
    GELU_TANH: "GeluTanh",
    RELU: "Relu",
    RELU2: "Relu2",
    SWIGLU_CLAMPED: "SwigluClamped",
}
# what ONNX Runtime's MoE calls them: its swiglu is gate * sigmoid(alpha * gate) * (up + beta)
SPARSE_GATES = {
    SILU: "activation_alpha = 1.0, activation_beta = 0.0",
    SWIGLU_CLAMPED: f"activation_alpha = {SWIGLU_ALPHA}, activation_beta = 1.0, swiglu_limit = {SWIGLU_LIMIT}",
}

# rows [N, E], picks [N, k] int64, shares [N, k]
ROWS = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  zero_d = Constant <value_ints = [0]> ()
  one_d = Constant <value_ints = [1]> ()
  last = Constant <value_ints = [-1]> ()
  top_k = Constant <value_int: int = @top_k> ()
  k = Reshape (top_k, one_d)
  whole = Shape (x)
  E = Shape <start = -1> (x)
  X = Shape <start = 0, end = 1> (gate_up)
  rows_shape = Concat <axis = 0> (last, E)
  rows = Reshape (x, rows_shape)
  pairs_shape = Concat <axis = 0> (last, k)
  chosen_rows = Reshape (chosen, pairs_shape)
  picks = Cast <to = 7> (chosen_rows)
  shares = Reshape (weights, pairs_shape)
"""

# each [X, N, E]; what an expert gives for a token that did not choose it counts for nothing, infinity and NaN too
DENSE = """
  gate_up_columns = Transpose <perm = [0, 2, 1]> (gate_up)
  both{raw} = MatMul (rows, gate_up_columns)
  {gate_up_bias}
  both_float = Cast <to = 1> (both)
  gate, up = Split <axis = -1, num_outputs = 2> (both_float)
  {gate}
  h = CastLike (product, x)
  down_columns = Transpose <perm = [0, 2, 1]> (down)
  each{raw} = MatMul (h, down_columns)
  {down_bias}
  each_float = Cast <to = 1> (each)

  experts = Squeeze (X)
  numbers = Range (zero, experts, one)
  pick_col = Unsqueeze (picks, last)
  same = Equal (pick_col, numbers)
  same_float = Cast <to = 1> (same)
  share_col = Unsqueeze (shares, last)
  spread = Mul (same_float, share_col)
  by_token = ReduceSum <keepdims = 0> (spread, one_d)
  by_expert = Transpose <perm = [1, 0]> (by_token)
  column = Unsqueeze (by_expert, last)
  weighted = Mul (each_float, column)
  nought = Constant <value_float = 0.0> ()
  unused = Equal (column, nought)
  kept = Where (unused, nought, weighted)
  sum = ReduceSum <keepdims = 0> (kept, zero_d)
  rounded = CastLike (sum, x)
  y = Reshape (rounded, whole)
"""
DENSE_BIASES = {
    "raw": "_raw",
    "gate_up_bias": "gate_up_rows = Unsqueeze (gate_up_bias, one_d)\n  both = Add (both_raw, gate_up_rows)",
    "down_bias": "down_rows = Unsqueeze (down_bias, one_d)\n  each = Add (each_raw, down_rows)",
}

# Pairs in the order of their experts; an iteration takes those of one. The way back is the order of the order.
LOOP = """
  pairs = Reshape (picks, last)
  P = Shape (pairs)
  in_order, order = TopK <axis = 0, largest = 0> (pairs, P)
  experts, firsts, inverse, counts = Unique <sorted = 1> (pairs)
  ends = CumSum (counts, zero)
  starts = Sub (ends, counts)
  token = Div (order, top_k)
  many = Shape (experts)
  trips = Squeeze (many)
  nothing = SequenceEmpty <dtype = 1> ()
  parts = Loop (trips, , nothing) <body = each
    (int64 i, bool going, seq(float[A, B]) done) => (bool still_going, seq(float[A, B]) more) {{
    still_going = Identity (going)
    i_d = Unsqueeze (i, zero_d)
    expert = Gather (experts, i)
    start = Gather (starts, i_d)
    stop = Gather (ends, i_d)
    tokens = Slice (token, start, stop)
    own = Gather (rows, tokens)
    own_gate_up = Gather (gate_up, expert)
    both{raw} = com.microsoft.FusedMatMul <transB = 1> (own, own_gate_up)
    {gate_up_bias}
    gate, up = Split <axis = -1, num_outputs = 2> (both)
    {gate}
    own_down = Gather (down, expert)
    out{raw} = com.microsoft.FusedMatMul <transB = 1> (product, own_down)
    {down_bias}
    more = SequenceInsert (done, out)
  }}>
  sorted = ConcatFromSequence <axis = 0> (parts)
  in_pairs, back = TopK <axis = 0, largest = 0> (order, P)
  by_pair = Gather (sorted, back)
  by_token_shape = Concat <axis = 0> (last, k, E)
  by_token = Reshape (by_pair, by_token_shape)
  share_col = Unsqueeze (shares, last)
  weighted = Mul (by_token, share_col)
  sum = ReduceSum <keepdims = 0> (weighted, one_d)
  y = Reshape (sum, whole)
"""
LOOP_BIASES = {
    "raw": "_raw",
    "gate_up_bias": "own_gate_up_bias = Gather (gate_up_bias, expert)\n    both = Add (both_raw, own_gate_up_bias)",
    "down_bias": "own_down_bias = Gather (down_bias, expert)\n    out = Add (out_raw, own_down_bias)",
}

# The operator has a softmax over its k largest inputs: logarithms give the weights again, but for their sum. It must not see NaN.
SPARSE = """
  N = Shape <start = 0, end = 1> (picks)
  logits_shape = Concat <axis = 0> (N, X)
  low = ConstantOfShape <value = float[1] {{-1e30}}> (logits_shape)
  logs = Log (shares)
  unknown = IsNaN (logs)
  nought = Constant <value_float = 0.0> ()
  known = Where (unknown, nought, logs)
  logits = ScatterElements <axis = 1> (low, picks, known)
  total = ReduceSum <keepdims = 1> (shares, last)
  mixed = com.microsoft.MoE
    <k: int = @top_k, activation_type = "swiglu", swiglu_fusion = 1, normalize_routing_weights = 1, {gate}>
    (rows, logits, gate_up, {gate_up_bias}, down, {down_bias})
  sum = Mul (mixed, total)
  y = Reshape (sum, whole)
"""
NO_BIASES = {"raw": "", "gate_up_bias": "", "down_bias": ""}


def body(op: str, bias: bool) -> onnx.FunctionProto:
    """The reference body: one function for all kinds of gates."""
    return _function(op, bias, DENSE.format(gate=_any_gate(), **(DENSE_BIASES if bias else NO_BIASES)))


def dense(bias: bool, attrs: Mapping[str, Any]) -> onnx.FunctionProto:
    """The function for one kind, in any compute type."""
    text = DENSE.format(gate=_gate(attrs["kind"]), **(DENSE_BIASES if bias else NO_BIASES))
    return _function(f"{_op(bias)}Dense{NAMES[attrs['kind']]}", bias, text)


def chosen_only(bias: bool, attrs: Mapping[str, Any]) -> onnx.FunctionProto:
    """The function for one kind, in float32: sparse where ONNX Runtime has it, else a loop."""
    kind, opsets = attrs["kind"], f', "{MICROSOFT}" : 1'
    if takes_turns(attrs):
        names = dict(zip(("gate_up_bias", "down_bias"), BIASES if bias else ("", ""), strict=True))
        text = SPARSE.format(gate=SPARSE_GATES[kind], **names)
        return _function(f"{_op(bias)}Sparse{NAMES[kind]}", bias, text, opsets)
    text = LOOP.format(gate=_gate(kind), **(LOOP_BIASES if bias else NO_BIASES))
    return _function(f"{_op(bias)}Loop{NAMES[kind]}", bias, text, opsets)


def takes_turns(attrs: Mapping[str, Any]) -> bool:
    """Whether ``chosen_only`` wants rows of gate and up in turns: gate 0, up 0, gate 1, ... rather than gate, then up."""
    return attrs["kind"] in SPARSE_GATES


def inputs_of(bias: bool) -> tuple[str, ...]:
    return (*INPUTS, *(BIASES if bias else ()))


def _op(bias: bool) -> str:
    return "ZooExperts" + "Bias" * bias


def _gate(kind: int) -> str:
    return GATES[kind].format(p="")


def _any_gate() -> str:
    lines = [text.format(p=f"k{kind}_") for kind, text in GATES.items()]
    lines.append("kind = Constant <value_int: int = @kind> ()")
    found = f"k{SILU}_product"
    for kind in list(GATES)[1:]:
        lines.append(f"number_{kind} = Constant <value_int = {kind}> ()\n  is_{kind} = Equal (kind, number_{kind})")
        name = "product" if kind == max(GATES) else f"up_to_{kind}"
        lines.append(f"{name} = Where (is_{kind}, k{kind}_product, {found})")
        found = name
    return "\n  ".join(lines)


def _function(op: str, bias: bool, text: str, opsets: str = "") -> onnx.FunctionProto:
    return function(op, ATTRIBUTES, inputs_of(bias), ("y",), ROWS + text, opsets)
