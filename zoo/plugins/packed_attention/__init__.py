"""``ZooPackedAttention``: attention of an encoder. Every token sees its whole text, or with a window what lies near it.

Shape legend: T tokens, B sequences, H heads, K key/value heads, D head size.

    q             [1, T, H*D]  T     rotated already, where the model rotates
    k, v          [1, T, K*D]  T     the same; grouped heads when K < H (Ainslie et al. 2023)
    query_starts  [B + 1] int32      cumulative: sequence b has the tokens query_starts[b] to query_starts[b + 1]
    out           [1, T, H*D]  T

Token i sees the tokens j of its own sequence, before and behind it; with ``window`` w > 0 those with |i - j| <= w / 2 (Beltagy et
al. 2020, "Longformer": half of a window to either side). With ``softcap`` c > 0 scores become c * tanh(score / c) before the
softmax. There is no cache: a text is one step.

Tokens behind query_starts[B] are padding: their output is unspecified, and nobody else sees them.
"""

from __future__ import annotations

from zoo.plugins.contract import Attribute, Plugin, Port
from zoo.plugins.packed_attention.body import ATTRIBUTES, body
from zoo.plugins.packed_attention.loop import loop_lowering
from zoo.plugins.packed_attention.padded import padded_lowering

OP = "ZooPackedAttention"
SHAPE = (
    Attribute("num_heads", int),
    Attribute("kv_heads", int),
    Attribute("head_dim", int),
    Attribute("scale", float),
    Attribute("window", int, 0),
    Attribute("softcap", float, 0.0),
)

PLUGIN = Plugin(
    op=OP,
    version="1",
    inputs=(
        Port("q", "T", (1, "T", "H*D")),
        Port("k", "T", (1, "T", "K*D")),
        Port("v", "T", (1, "T", "K*D")),
        Port("query_starts", "int32", ("B+1",)),
    ),
    outputs=(Port("out", "T", (1, "T", "H*D")),),
    attributes=SHAPE,
    body=body(),
    lowerings={"loop": loop_lowering(), "padded": padded_lowering()},
)

assert tuple(attribute.name for attribute in SHAPE) == ATTRIBUTES
