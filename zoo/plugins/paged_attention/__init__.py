"""``ZooPagedAttention`` and its variants: write this step's keys and values into a paged pool, then attend to each sequence's
whole context.

    ZooPagedAttention         softmax over the positions that a token sees
    ZooPagedAttentionSinks    each head has one more score, its sink, which takes weight and gives nothing (Xiao et al. 2023,
                              "Efficient Streaming Language Models with Attention Sinks"; learned ones: gpt-oss)
    ZooPagedAttentionSlopes   the score of a position falls by the head's slope for each position of distance (Press et al. 2022,
                              "Train Short, Test Long": ALiBi)

Shape legend: T tokens, B sequences, P blocks a sequence, H heads, K key/value heads, D head size.

    q             [1, T, H*D]  T     rotated already
    k, v          [1, T, K*D]  T     rotated already; grouped heads when K < H (Ainslie et al. 2023)
    kv            [blocks, 2, block_size, K, D]  T   the layer's pool (Kwon et al. 2023); [:, 0] keys, [:, 1] values
    block_table   [B, P]  int32      pool block of each sequence's positions; unused entries are 0, the reserved block
    query_starts  [B + 1] int32      cumulative: sequence b has the tokens query_starts[b] to query_starts[b + 1]
    kv_lengths    [B]     int32      tokens of each sequence in the pool after this step
    sinks         [H]  T             in units of scaled scores                                  (only of ...Sinks)
    slopes        [H]  float32       in units of scaled scores, more than 0                     (only of ...Slopes)
    out           [1, T, H*D]  T
    kv_out        kv, updated in place where the target can

A token's position follows from kv_lengths: the last token of sequence b stands at kv_lengths[b] - 1. Token at position p sees
positions 0 to p of its sequence; with ``window`` w > 0 only the last w of them, itself included; with ``softcap`` c > 0
scores become c * tanh(score / c) before the softmax. A slope m then adds m * (j - p) to the score of position j; slopes are
float32 for every T, since a slope's own rounding is multiplied by the distance. A sink s adds exp(s) to what the exponentials of
the scores are divided by. A soft cap bends neither.

A pool is undefined beyond kv_lengths and may hold NaN: scores and values are masked. A pool is written by one ScatterND that
sits on the graph input and makes the graph output, so that runtimes can update it in place. Padding tokens form one last
sequence with kv_length 1 and a table row of 0; they write into block 0, which nobody else reads, and their output is
unspecified. Beyond kv_lengths, and in block 0, kv_out is as undefined as kv.
"""

from __future__ import annotations

from zoo.plugins.contract import Attribute, Plugin, Port
from zoo.plugins.paged_attention.body import ATTRIBUTES, SINKS, SLOPES, VARIANTS, body
from zoo.plugins.paged_attention.loop import loop_lowering
from zoo.plugins.paged_attention.padded import padded_lowering

OP = "ZooPagedAttention"
POOL = ("blocks", 2, "block_size", "K", "D")
VARIANT_PORTS: dict[str, tuple[Port, ...]] = {
    "": (),
    SINKS: (Port("sinks", "T", ("H",)),),
    SLOPES: (Port("slopes", "float32", ("H",)),),
}
SHAPE = (
    Attribute("num_heads", int),
    Attribute("kv_heads", int),
    Attribute("head_dim", int),
    Attribute("block_size", int),
    Attribute("scale", float),
    Attribute("window", int, 0),
    Attribute("softcap", float, 0.0),
)


def _plugin(variant: str) -> Plugin:
    return Plugin(
        op=OP + variant,
        version="1",
        inputs=(
            Port("q", "T", (1, "T", "H*D")),
            Port("k", "T", (1, "T", "K*D")),
            Port("v", "T", (1, "T", "K*D")),
            Port("kv", "T", POOL),
            Port("block_table", "int32", ("B", "P")),
            Port("query_starts", "int32", ("B+1",)),
            Port("kv_lengths", "int32", ("B",)),
            *VARIANT_PORTS[variant],
        ),
        outputs=(Port("out", "T", (1, "T", "H*D")), Port("kv_out", "T", POOL, alias="kv")),
        attributes=SHAPE,
        body=body(variant),
        lowerings={"loop": loop_lowering(variant), "padded": padded_lowering(variant)},
    )


PLUGINS: dict[str, Plugin] = {OP + variant: _plugin(variant) for variant in VARIANTS}
PLUGIN = PLUGINS[OP]

assert tuple(attribute.name for attribute in SHAPE) == ATTRIBUTES


def variant_of(op: str) -> str:
    """The variant that an op of this family, or of ``zoo.plugins.cached_attention``, is."""
    return next((variant for variant in (SINKS, SLOPES) if variant in op), "")
