"""``ZooCachedAttention`` and its variants: attention to each sequence's whole context, which lies in a paged pool already.

    ZooCachedAttention          the pool and the output have the compute type
    ZooCachedAttentionFp8       the pool is float8e4m3, as ``ZooRotaryCacheFp8`` wrote it
    ZooCachedAttentionOut8      the output is float8e4m3: round8(out / out_scale), for an FP8 GEMM behind it
    ZooCachedAttentionFp8Out8   both

and of each of them those of ``ZooPagedAttention``'s variants: ZooCachedAttentionSinks, ZooCachedAttentionSlopesFp8 and so on.

Shape legend: T tokens, B sequences, P blocks a sequence, W prefill tiles, H heads, K key/value heads, D head size.

    q              [1, T, H*D]  T      rotated already
    kv             [blocks, 2, block_size, K, D]   the layer's pool after this step's tokens were written
    block_table    [B, P]  int32       pool block of each sequence's positions; unused entries are 0, the reserved block
    query_starts   [B + 1] int32       cumulative: sequence b has the tokens query_starts[b] to query_starts[b + 1]
    kv_lengths     [B]     int32       tokens of each sequence in the pool
    prefill_tiles  [W, 4]  int32       index input: how the queries of sequences with several new tokens are cut into tiles
    sinks          [H]     T           (only of ...Sinks...)
    slopes         [H]     float32     (only of ...Slopes...)
    kv_scale       [2]     float32     of keys, of values (only of ...Fp8...)
    out_scale      []      float32     (only of ...Out8)
    out            [1, T, H*D]  T, or float8e4m3

Which positions a token sees, windows, soft caps, sinks, slopes and padding are those of ``ZooPagedAttention``, whose reference
body this one is without the write: pools may hold NaN beyond kv_lengths and in block 0. The body of an ``Fp8`` op reads a pool
of the compute type that holds round8(x / scale) * scale, so it needs no kv_scale.
"""

from __future__ import annotations

from itertools import product

from zoo.plugins.contract import Attribute, Plugin, Port
from zoo.plugins.fp8_gemm import quantized, zoo_op
from zoo.plugins.paged_attention import PLUGIN as PAGED
from zoo.plugins.paged_attention import POOL, VARIANT_PORTS
from zoo.plugins.paged_attention.body import SIZES, VARIANTS, body_text

OP = "ZooCachedAttention"
FP8, OUT8 = "Fp8", "Out8"


def op_name(fp8_cache: bool, fp8_out: bool, variant: str = "") -> str:
    """The op type for a layer. ``variant``: of ``zoo.plugins.paged_attention``."""
    return OP + variant + FP8 * fp8_cache + OUT8 * fp8_out


def _reading(variant: str) -> str:
    """``ZooPagedAttention``'s body without the lines that find the new tokens' places and write them."""
    before, found, rest = body_text(variant).partition("  before = Mul (nth, block_size)\n")
    _, written, after = rest.partition("  kv_out = ScatterND (kv, slots, fresh)\n")
    assert found and written and "Gather (kv_out," in after, "the body of ZooPagedAttention has changed"
    return SIZES + before + after.replace("Gather (kv_out,", "Gather (kv,")


def _plugin(fp8: bool, out8: bool, variant: str) -> Plugin:
    text = _reading(variant)
    if out8:
        text = text.replace("  out = Reshape (", "  exact = Reshape (") + f"  out = {quantized('exact', 'out_scale')}\n"
    return zoo_op(
        op_name(fp8, out8, variant),
        (
            Port("q", "T", (1, "T", "H*D")),
            Port("kv", "float8e4m3" if fp8 else "T", POOL),
            Port("block_table", "int32", ("B", "P")),
            Port("query_starts", "int32", ("B+1",)),
            Port("kv_lengths", "int32", ("B",)),
            Port("prefill_tiles", "int32", ("W", 4)),
            *VARIANT_PORTS[variant],
            *((Port("kv_scale", "float32", (2,)),) if fp8 else ()),
            *((Port("out_scale", "float32", ()),) if out8 else ()),
        ),
        (Port("out", "float8e4m3" if out8 else "T", (1, "T", "H*D")),),
        tuple(Attribute(attribute.name, attribute.type, attribute.default) for attribute in PAGED.attributes),
        text,
    )


PLUGINS: dict[str, Plugin] = {
    op_name(fp8, out8, variant): _plugin(fp8, out8, variant)
    for variant, fp8, out8 in product(VARIANTS, (False, True), (False, True))
}
