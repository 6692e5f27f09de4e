"""``ZooRotaryCache`` and its variants: from the fused projection of a layer to rotated queries and a written cache.

    ZooRotaryCache        q, k rotated (Su et al. 2021); k, v written into the pool
    ZooRotaryCacheNorm    q, k RMS normed over each head (Henry et al. 2020, "Query-Key Normalization"), then rotated
    ZooCacheWrite         k, v written as they come, q copied

Each also with the suffix ``Fp8``: its pool is float8e4m3, with a scale for the layer's keys and one for its values.

Shape legend: T tokens, H heads, K key/value heads, D head size, R rotary size (at most D, even); rows of qkv are all heads of
q, then of k, then of v.

    qkv          [1, T, (H+2K)*D]  T
    cos, sin     [positions, R/2]  T      tables of the angles                      (not of ZooCacheWrite)
    positions    [T] int32                rows of the tables                        (not of ZooCacheWrite)
    q_norm, k_norm  [D]  T                weights of the norms                      (only of ZooRotaryCacheNorm)
    kv           [blocks, 2, block_size, K, D]   the layer's pool (Kwon et al. 2023); [:, 0] keys, [:, 1] values
    token_slots  [T] int32                index input: block * block_size + place of each token; a padding token's is in
                                          block 0, which nobody reads
    kv_scale     [2] float32              of keys, of values                        (only of ...Fp8)
    q            [1, T, H*D]  T
    kv_out       kv, updated in place

A head's first R values are rotated: pairs (i, i + R/2), or (2i, 2i + 1) if ``interleaved``; the rest stays. The pool is written
by one ScatterND that sits on the graph input and makes the graph output, so that runtimes can update it in place.

A float8 pool holds round8(x / scale), which is to the nearest even and saturates at ±448. No runtime scatters float8, so the
reference body of an ``Fp8`` op has a pool of the compute type T, which holds the values that those bytes stand for:
round8(x / scale) * scale.
"""

from __future__ import annotations

from zoo.plugins.contract import Attribute, Plugin, Port
from zoo.plugins.fp8_gemm import quantized, zoo_op
from zoo.plugins.paged_attention import POOL
from zoo.plugins.paged_attention.body import FRESH, SIZES

ROTARY, NORM, WRITE = "ZooRotaryCache", "ZooRotaryCacheNorm", "ZooCacheWrite"
FP8 = "Fp8"

QKV = Port("qkv", "T", (1, "T", "(H+2K)*D"))
TABLES = (Port("cos", "T", ("positions", "R/2")), Port("sin", "T", ("positions", "R/2")), Port("positions", "int32", ("T",)))
NORMS = (Port("q_norm", "T", ("D",)), Port("k_norm", "T", ("D",)))
SLOTS = Port("token_slots", "int32", ("T",))
KV_SCALE = Port("kv_scale", "float32", (2,))
Q = Port("q", "T", (1, "T", "H*D"))
SHAPE = tuple(Attribute(name, int) for name in ("num_heads", "kv_heads", "head_dim", "block_size"))
ROTATION = (Attribute("rotary_dim", int), Attribute("interleaved", int, 0))
EPSILON = Attribute("epsilon", float)

# qkv -> q_in, k_in, v_in [1, T, heads * D]
SPLIT = """
  kv_width = Mul (kv_heads, head_dim)
  KDd = Reshape (kv_width, one_d)
  parts = Concat <axis = 0> (HDd, KDd, KDd)
  q_in, k_in, v_in = Split <axis = 2> (qkv, parts)
"""

HEAD_NORM = """
  T = Shape <start = 1, end = 2> (qkv)
  head_shape = Concat <axis = 0> (one_d, T, rest_d, Dd)
  q_heads = Reshape (q_in, head_shape)
  k_heads = Reshape (k_in, head_shape)
  q_heads_normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (q_heads, q_norm)
  k_heads_normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (k_heads, k_norm)
  q_shape = Concat <axis = 0> (one_d, rest_d, HDd)
  k_shape = Concat <axis = 0> (one_d, rest_d, KDd)
  q_normed = Reshape (q_heads_normed, q_shape)
  k_normed = Reshape (k_heads_normed, k_shape)
"""

ROTATE = """
  position_ids = Cast <to = 7> (positions)
  position_row = Unsqueeze (position_ids, zero_d)
  q = RotaryEmbedding <interleaved: int = @interleaved, num_heads: int = @num_heads, rotary_embedding_dim: int = @rotary_dim>
    (q_{source}, cos, sin, position_row)
  k_rotated = RotaryEmbedding
    <interleaved: int = @interleaved, num_heads: int = @kv_heads, rotary_embedding_dim: int = @rotary_dim>
    (k_{source}, cos, sin, position_row)
"""

# What the pool gets: as it is, or what a float8 pool would give back for it.
STORED = """
  k = Identity ({k})
  v = Identity (v_in)
"""
STORED_FP8 = f"""
  k_scale = Gather (kv_scale, zero)
  v_scale = Gather (kv_scale, one)
  k_bytes = {quantized("{k}", "k_scale")}
  v_bytes = {quantized("v_in", "v_scale")}
  k_float = DequantizeLinear (k_bytes, k_scale)
  v_float = DequantizeLinear (v_bytes, v_scale)
  k = CastLike (k_float, qkv)
  v = CastLike (v_float, qkv)
"""

SCATTER = """
  slot = Cast <to = 7> (token_slots)
  block_size = Constant <value_int: int = @block_size> ()
  block = Div (slot, block_size)
  before = Mul (block, block_size)
  place = Sub (slot, before)
  block_col = Unsqueeze (block, one_d)
  place_col = Unsqueeze (place, one_d)
  key = Mul (block_col, zero_d)
  value = Add (key, one_d)
  key_slot = Concat <axis = 1> (block_col, key, place_col)
  value_slot = Concat <axis = 1> (block_col, value, place_col)
  key_slots = Unsqueeze (key_slot, one_d)
  value_slots = Unsqueeze (value_slot, one_d)
  slots = Concat <axis = 1> (key_slots, value_slots)
  kv_out = ScatterND (kv, slots, fresh)
"""


def op_name(rotary: bool, norm: bool, fp8: bool) -> str:
    """The op type for a layer. There is no norm without a rotation."""
    assert rotary or not norm
    return (NORM if norm else ROTARY if rotary else WRITE) + FP8 * fp8


def _text(kind: str, fp8: bool) -> str:
    if kind == WRITE:
        queries = "q = Identity (q_in)"
    else:
        queries = HEAD_NORM * (kind == NORM) + ROTATE.format(source="normed" if kind == NORM else "in")
    stored = (STORED_FP8 if fp8 else STORED).format(k="k_in" if kind == WRITE else "k_rotated")
    return SIZES + SPLIT + queries + stored + FRESH + SCATTER


def _plugin(kind: str, fp8: bool) -> Plugin:
    tables = TABLES if kind != WRITE else ()
    norms = NORMS if kind == NORM else ()
    pool = "float8e4m3" if fp8 else "T"
    return zoo_op(
        kind + FP8 * fp8,
        (QKV, *tables, *norms, Port("kv", pool, POOL), SLOTS, *((KV_SCALE,) if fp8 else ())),
        (Q, Port("kv_out", pool, POOL, alias="kv")),
        (*SHAPE, *(ROTATION if tables else ()), *((EPSILON,) if norms else ())),
        _text(kind, fp8),
    )


PLUGINS: dict[str, Plugin] = {kind + FP8 * fp8: _plugin(kind, fp8) for kind in (ROTARY, NORM, WRITE) for fp8 in (False, True)}
