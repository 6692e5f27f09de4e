"""``ModelSpec``: one model as frozen data, its numbers, the template options of its family, and its checkpoint's names.

Everything that tells one architecture from another is a field here, and a branch in ``zoo/graph_templates``; a family is a
YAML of such fields. ``zoo.spec`` has the other specs and gives these names on.

E hidden, H query heads, K key/value heads, D head size, F intermediate, X experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from zoo.errors import ConfigError

DTYPES = ("float32", "float16", "bfloat16")
TEMPLATE_NAMES = ("decoder", "encoder")
NORMS = ("rms", "layer")
NORM_PLACES = ("before", "after", "both", "residual")
BLOCKS = ("sequential", "parallel", "parallel_norms")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped")
MLPS = ("gated", "plain")
POSITIONS = ("rope", "learned", "alibi", "none")
QK_NORMS = ("none", "head", "heads", "all")
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ALIBI_RULES = ("bloom", "mpt")
SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")
POOLINGS = ("none", "first", "mean")
FUSED_QKV = ("none", "concat", "grouped", "quarters")
FUSED_EXPERTS = ("none", "concat", "interleaved")

# The most that each size may be: far over any model, and small enough that nothing hangs on a number with a digit too many.
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "num_layers": 1024,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 24,
    "max_positions": 1 << 27,
}


def pick(where: str, key: str, value: object, allowed: tuple[str, ...]) -> None:
    """ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{where}: {key} is {value!r}; pick one of {', '.join(allowed)}")


def at_least(where: str, key: str, value: float, least: float) -> None:
    """ConfigError for a number that is too small."""
    if value < least:
        raise ConfigError(f"{where}: {key} is {value}; it must be at least {least}")


def between(where: str, key: str, value: float, least: float, most: float) -> None:
    """ConfigError for a number that is too small or too large."""
    if not least <= value <= most:
        raise ConfigError(
            f"{where}: {key} is {value}; it must be at {'least' if value < least else 'most'} {least if value < least else most}"
        )


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021) and how its frequencies are scaled for contexts beyond training.

    linear    positions divided by ``factor``
    dynamic   a larger base for contexts beyond ``original_max_positions`` (NTK-aware), by the context's length
    yarn      Peng et al. 2023: high frequencies kept, low ones slowed, cosines and sines times ``attention_factor``
    llama3    the Llama 3.1 release: long wavelengths slowed by ``factor``, short ones kept, a linear blend between
    longrope  Ding et al. 2024: a divisor for each frequency, ``short_factor`` for contexts up to
              ``original_max_positions``, ``long_factor`` beyond
    """

    kind: str = "default"
    theta: float = 10000.0
    fraction: float = 1.0  # of head_dim that is rotated
    interleaved: bool = False  # pairs are neighbours (0, 1), (2, 3), rather than (0, D / 2), (1, D / 2 + 1)
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0  # yarn: rotations within the original context above which a frequency is kept
    beta_slow: float = 1.0  # yarn: and below which it is slowed in full
    truncate: bool = True  # yarn: whether the bounds of the blend are whole numbers
    attention_factor: float = 0.0  # yarn, longrope: of cosines and sines; 0: by the kind's own rule
    mscale: float = 0.0  # yarn of DeepSeek: attention_factor is the quotient of the rule for these two
    mscale_all_dim: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the length of a sequence, so that a request's own decides (see zoo/rope_tables.py)."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class AlibiSpec:
    """Linear biases (Press et al. 2022): a score falls by a head's slope for each position of distance."""

    rule: str = "bloom"  # how slopes are made when the number of heads is no power of two
    bias_max: float = 8.0
    scaled: bool = False  # slopes are multiplied by the attention scale (Falcon)


@dataclass(frozen=True)
class MoeSpec:
    """Mixture of experts (Shazeer et al. 2017; Fedus et al. 2021): a router chooses ``top_k`` of ``experts`` MLPs a token.

    Scores are the softmax or sigmoid over all experts; the weights of the chosen are their scores, divided by their sum if
    ``normalize`` says so, times ``scale``. With ``groups`` (DeepSeek-V2, V3) only experts of the ``top_groups`` best groups
    can be chosen, a group's score being its best expert's, or the sum of its best two.
    """

    experts: int = 0  # 0: no experts
    top_k: int = 0
    size: int = 0  # intermediate size of an expert; 0: the model's
    score: str = "softmax"
    normalize: bool = True
    select_bias: bool = False  # a bias [X] is added to scores where experts are chosen, not where they are weighed
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0
    shared: int = 0  # intermediate size of the expert that every token goes through; 0: none
    shared_gate: bool = False  # its output is multiplied by sigmoid(x @ shared_gate)
    router_bias: bool = False
    expert_bias: bool = False
    dense_layers: tuple[int, ...] = ()  # layers that have a plain MLP of the model's intermediate_size instead


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2): keys and values of a token are one row of ``kv_rank + rope_dim`` numbers.

    A head's size (``head_dim``) is what is not rotated plus ``rope_dim``; values have ``value_dim``.
    """

    kv_rank: int = 0  # 0: none of this
    q_rank: int = 0  # 0: queries are projected in one step
    rope_dim: int = 64
    value_dim: int = 128
    norm_eps: float = 0.0  # of the norms in the latent spaces; 0: the model's


@dataclass(frozen=True)
class TensorNames:
    """How a checkpoint names its tensors, and how they lie in it. ``{layer}``, ``{expert}`` and ``{head}`` stand for numbers.

    ``model`` and ``layer`` map a weight's role (see docs/adding-a-model.md) to a tensor name. A role that the options do
    not use may be present; a role that they use and that is absent is an error.

    fused_qkv      ``concat``: ``layer.qkv`` holds all of q, then all of k, then all of v. ``grouped``: for each key/value
                   head its queries, its key, its value (K groups of G + 2 heads). ``quarters``: for each quarter of the
                   heads all their queries, all their values, all their keys (CodeGen)
    fused_gate_up  ``layer.gate_up`` holds gate, then up; ``layer.shared.gate_up`` those of the shared expert
    conv1d         linear weights are stored [in, out] rather than [out, in]
    fused_experts  gate and up of experts lie in ``experts.gate_up``: one after the other, or row by row in turns
    stacked_experts  one tensor holds all experts [X, out, in]; else names have ``{expert}``
    conv1d_experts   experts are stored [in, out]
    prefixes       optional heads of names (``"transformer."``) that some exports leave out or add
    ignored        regular expressions for tensors that carry nothing (attention masks, rotary buffers); ``{num_layers}`` in
                   them is the model's number of layers (behind the last one DeepSeek-V3 stores one that is not of the model)
    """

    model: dict[str, str] = field(default_factory=dict)
    layer: dict[str, str] = field(default_factory=dict)
    fused_qkv: str = "none"
    fused_gate_up: bool = False
    conv1d: bool = False
    fused_experts: str = "none"
    stacked_experts: bool = False
    conv1d_experts: bool = False
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """One model: its numbers, the template options of its family, and how its checkpoint names things."""

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    template: str = "decoder"
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_place: str = "before"  # of attention and MLP; after: of what they give; both; residual: of the sum behind each
    norm_bias: bool = True  # whether layer norms have biases
    first_norm: bool = True  # whether the first layer has a norm before its attention (ModernBERT: no)
    norm_offset: float = 0.0  # added to norm weights as they are stored (Gemma: 1)
    block: str = "sequential"  # parallel: attention and MLP read one norm; parallel_norms: a norm each, the same input
    activation: str = "silu"
    mlp: str = "gated"
    position: str = "rope"
    rope: RopeSpec = field(default_factory=RopeSpec)
    local_rope: RopeSpec = field(default_factory=lambda: RopeSpec(theta=0.0))  # of layers with a window; theta 0: as the others
    rope_layers: tuple[int, ...] = ()  # which layers rotate; empty: all of them
    alibi: AlibiSpec = field(default_factory=AlibiSpec)
    position_offset: int = 0  # rows of a learned table that stand before position 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: str = "none"  # head: one weight for all heads; heads: a weight for each; all: over all heads at once
    clip_qkv: float = 0.0  # queries, keys (behind their norms) and values are clamped to +- this; 0: not
    window: int = 0  # 0: full attention; else each token sees this many positions, itself included
    window_layers: tuple[int, ...] = ()  # which layers use the window; empty: all of them
    softcap: float = 0.0  # of attention scores; 0: none
    sinks: bool = False  # each head has one more score that takes weight and gives nothing (gpt-oss)
    attention_scale: float = 0.0  # 0: head_dim ** -0.5
    embed_scale: float = 1.0
    embed_norm: bool = False
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    moe: MoeSpec = field(default_factory=MoeSpec)
    latent: LatentSpec = field(default_factory=LatentSpec)
    token_types: int = 0  # encoder: rows of a table of token types, of which the first is added to every token
    pooling: str = "none"  # encoder: how a text's embedding comes from its tokens'
    tie_embeddings: bool = False
    dtype: str = "bfloat16"  # what the checkpoint holds, and the compute type on a GPU
    tensors: TensorNames = field(default_factory=TensorNames)
    checkpoint: str = ""  # folder, absolute or relative to the project; empty: shapes only
    license: str = ""
    base_model: str = ""

    def __post_init__(self) -> None:
        where = f"model {self.name!r}"
        for key, most in LARGEST.items():
            between(where, key, getattr(self, key), 1, most)
        for key in ("softcap", "attention_scale", "logit_softcap", "clip_qkv", "position_offset", "token_types"):
            at_least(where, key, getattr(self, key), 0)
        for key, allowed in _CHOICES.items():
            pick(where, key, getattr(self, key), allowed)
        for key, rope in (("rope", self.rope), ("local_rope", self.local_rope)):
            pick(where, f"{key}.kind", rope.kind, ROPE_KINDS)
        pick(where, "alibi.rule", self.alibi.rule, ALIBI_RULES)
        pick(where, "tensors.fused_qkv", self.tensors.fused_qkv, FUSED_QKV)
        pick(where, "tensors.fused_experts", self.tensors.fused_experts, FUSED_EXPERTS)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{where}: num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        rotated = self.rotary_dim
        if self.position == "rope" and (self.head_dim % 2 or rotated % 2 or rotated < 2):
            raise ConfigError(
                f"{where}: rotary positions need an even head_dim (here {self.head_dim}), of which rope.fraction "
                f"({self.rope.fraction}) rotates an even number, at least 2 (here {rotated})"
            )
        self._check_combinations(where)
        self._check_moe(where)

    def _check_combinations(self, where: str) -> None:
        """Options that exclude each other, as (there, key and value, why)."""
        latent, parallel = self.latent.kv_rank > 0, self.block != "sequential"
        uneven = self.num_heads % 4 > 0 or self.num_heads != self.num_kv_heads
        excluded = (
            (parallel and self.norm_place != "before", f"norm_place {self.norm_place!r}", f"block is {self.block!r}"),
            (latent and self.qk_norm != "none", f"qk_norm {self.qk_norm!r}", "latent attention has norms of its own"),
            (latent and self.position != "rope", f"position {self.position!r}", "latent attention rotates a part of each head"),
            (latent and self.window > 0, f"window {self.window}", "latent attention has no window"),
            (latent and self.tensors.fused_qkv != "none", "tensors.fused_qkv", "latent attention has no q, k and v"),
            (
                self.tensors.fused_qkv == "quarters" and uneven,
                "tensors.fused_qkv 'quarters'",
                f"num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} are not one multiple of 4",
            ),
            (self.position == "alibi" and self.sinks, "sinks", "position is 'alibi'"),
            (self.activation == "swiglu_clamped" and self.mlp != "gated", "mlp 'plain'", "activation is 'swiglu_clamped'"),
            (self.moe.experts > 0 and self.mlp != "gated", "mlp 'plain'", "experts have gates"),
            (self.local_rope.theta > 0 and not self.window, "local_rope", "no layer has a window"),
            (self.local_rope.by_length, f"local_rope.kind {self.local_rope.kind!r}", "windowed layers never see a long context"),
            (self.template == "encoder" and self.moe.experts > 0, "moe", "the encoder template has no experts"),
            (self.template == "encoder" and latent, "latent", "the encoder template has no latent attention"),
            (self.template == "decoder" and self.pooling != "none", f"pooling {self.pooling!r}", "template is 'decoder'"),
            (self.template == "decoder" and self.token_types > 0, "token_types", "template is 'decoder'"),
        )
        for wrong, what, why in excluded:
            if wrong:
                raise ConfigError(f"{where}: {what} does not go with this: {why}; leave one of the two out")

    def _check_moe(self, where: str) -> None:
        moe = self.moe
        if not moe.experts:
            if moe.top_k or moe.shared:
                raise ConfigError(f"{where}: moe.top_k and moe.shared need moe.experts, which is 0")
            return
        pick(where, "moe.score", moe.score, SCORES)
        pick(where, "moe.group_score", moe.group_score, GROUP_SCORES)
        between(where, "moe.experts", moe.experts, 1, 1 << 16)
        between(where, "moe.top_k", moe.top_k, 1, moe.experts)
        between(where, "moe.groups", moe.groups, 1, moe.experts)
        between(where, "moe.top_groups", moe.top_groups, 1, moe.groups)
        for key in ("size", "shared"):
            between(where, f"moe.{key}", getattr(moe, key), 0, LARGEST["intermediate_size"])
        if moe.experts % moe.groups:
            raise ConfigError(f"{where}: moe.experts {moe.experts} is not divisible by moe.groups {moe.groups}")
        inside = moe.experts // moe.groups
        if moe.top_k > moe.top_groups * inside:
            raise ConfigError(
                f"{where}: moe.top_k is {moe.top_k}, but {moe.top_groups} groups of {inside} experts have only "
                f"{moe.top_groups * inside}; lower it, or raise moe.top_groups"
            )
        if moe.group_score == "top2" and moe.groups > 1 and inside < 2:
            raise ConfigError(f"{where}: moe.group_score top2 needs groups of two experts at least, here {inside}")

    @property
    def scale(self) -> float:
        """The factor on query-key products; DeepSeek's yarn has ``mscale_all_dim`` raise it."""
        scale, rope = self.attention_scale or self.head_dim**-0.5, self.rope
        if self.latent.kv_rank and rope.kind != "default" and rope.mscale_all_dim and rope.factor > 1:
            scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
        return scale

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head are rotated."""
        return self.latent.rope_dim if self.latent.kv_rank else int(self.head_dim * self.rope.fraction + 1e-6)

    @property
    def expert_size(self) -> int:
        """Intermediate size of one expert."""
        return self.moe.size or self.intermediate_size

    @property
    def cache_heads(self) -> int:
        """Key/value heads that a KV pool holds for each token and layer."""
        return 1 if self.latent.kv_rank else self.num_kv_heads

    @property
    def cache_dim(self) -> int:
        """Numbers that a KV pool holds for each key (and as many for each value)."""
        return self.latent.kv_rank + self.latent.rope_dim if self.latent.kv_rank else self.head_dim

    def window_of(self, layer: int) -> int:
        """Attention window of a layer in tokens; 0 means full attention."""
        return self.window if not self.window_layers or layer in self.window_layers else 0

    def rope_of(self, layer: int) -> RopeSpec | None:
        """How a layer rotates; None for one that does not."""
        if self.position != "rope" or (self.rope_layers and layer not in self.rope_layers):
            return None
        return self.local_rope if self.local_rope.theta and self.window_of(layer) else self.rope

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.moe.experts > 0 and layer not in self.moe.dense_layers


_CHOICES = {
    "norm": NORMS,
    "norm_place": NORM_PLACES,
    "block": BLOCKS,
    "activation": ACTIVATIONS,
    "mlp": MLPS,
    "position": POSITIONS,
    "qk_norm": QK_NORMS,
    "pooling": POOLINGS,
    "dtype": DTYPES,
    "template": TEMPLATE_NAMES,
}
