"""Tiny random encoders made by transformers, their ModelSpecs written down by hand, and what transformers gives for a text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo_cases
from zoo_cases import Case

from zoo.spec import ModelSpec, RopeSpec, TensorNames

PAD = 1  # of the RoBERTa cases: their positions begin behind it
BERT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
ODD: dict[str, Any] = {"hidden_size": 60, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 3}
TYPES = ["full_attention", "sliding_attention", "sliding_attention"]
MODERN: dict[str, Any] = BERT | {
    "layer_types": TYPES,
    "num_hidden_layers": 3,
    "local_attention": 8,
    "pad_token_id": 259,
    "cls_token_id": 256,
    "sep_token_id": 257,
}
THETAS = {
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
CASES: dict[str, Case] = {
    "bert": Case("bert", BERT | {"pad_token_id": 0}, auto="AutoModel"),
    "bert-masked-odd": Case(
        "bert", BERT | ODD | {"type_vocab_size": 5, "layer_norm_eps": 1e-5, "hidden_act": "relu"}, auto="AutoModelForMaskedLM"
    ),
    "roberta": Case("roberta", BERT | {"pad_token_id": PAD, "max_position_embeddings": 42}, auto="AutoModel"),
    "roberta-masked-odd": Case(
        "roberta",
        BERT | ODD | {"pad_token_id": 3, "type_vocab_size": 1, "max_position_embeddings": 44},
        auto="AutoModelForMaskedLM",
    ),
    "xlm-roberta": Case("xlm-roberta", BERT | {"pad_token_id": PAD, "max_position_embeddings": 42}, auto="AutoModel"),
    "modernbert": Case("modernbert", MODERN | {"rope_parameters": THETAS}, auto="AutoModel"),
    "modernbert-masked-odd": Case(
        "modernbert",
        MODERN
        | ODD
        | {"local_attention": 5, "norm_bias": True, "attention_bias": True, "mlp_bias": True, "hidden_activation": "gelu_new"}
        | {"rope_parameters": THETAS},
        auto="AutoModelForMaskedLM",
    ),
}
LONGEST = 40  # positions of every case


@functools.cache
def model(name: str) -> torch.nn.Module:
    """The case's transformers model."""
    return zoo_cases.random_model(CASES[name])


def folder(root: Path, name: str) -> Path:
    """The case as transformers saves it."""
    return zoo_cases.make_folder(root / name, CASES[name])


def reference(name: str, ids: list[int]) -> np.ndarray:
    """Hidden states [S, E] of one text: the encoder below any head."""
    whole = model(name)
    below = getattr(whole, whole.base_model_prefix, whole) if CASES[name].auto != "AutoModel" else whole
    with torch.no_grad():
        return below(torch.tensor([ids])).last_hidden_state[0].numpy()


def texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random texts; none holds a padding token, which RoBERTa gives a position of its own."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 256, length).tolist() for length in lengths]


def write_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer that adds [CLS] and [SEP], with the truncation and padding of training in its file."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,()[]{}=+-*/_:'\"#!?<>"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{one}" for one in letters),
        "the",
        "of",
        "return",
        "def",
        "##ing",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(9)
    tokenizer.enable_padding(length=9, pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def spec(folder: Path) -> ModelSpec:
    """The ModelSpec of a folder, from its config and by hand: independent of conf/ and of ``zoo add``."""
    c = json.loads((folder / "config.json").read_text())
    common: dict[str, Any] = {
        "name": folder.name,
        "family": c["model_type"],
        "template": "encoder",
        "norm": "layer",
        "embed_norm": True,
        "pooling": "mean",
        "dtype": "float32",
        "checkpoint": str(folder),
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "num_kv_heads": c["num_attention_heads"],
        "head_dim": c["hidden_size"] // c["num_attention_heads"],
        "intermediate_size": c["intermediate_size"],
    }
    masked = c["architectures"][0].endswith("MaskedLM")
    if c["model_type"] == "modernbert":
        kinds = [kind == "sliding_attention" for kind in c["layer_types"]]
        return ModelSpec(
            **common,
            max_positions=c["max_position_embeddings"],
            norm_eps=c["norm_eps"],
            norm_bias=c["norm_bias"],
            first_norm=False,
            activation={"gelu": "gelu", "gelu_new": "gelu_tanh"}[c["hidden_activation"]],
            rope=RopeSpec(theta=c["rope_parameters"]["full_attention"]["rope_theta"]),
            local_rope=RopeSpec(theta=c["rope_parameters"]["sliding_attention"]["rope_theta"]),
            qkv_bias=c["attention_bias"],
            out_bias=c["attention_bias"],
            mlp_bias=c["mlp_bias"],
            window=c["local_attention"],
            window_layers=tuple(i for i, sliding in enumerate(kinds) if sliding),
            tensors=_modern_names("model." * masked),
        )
    offset = 0 if c["model_type"] == "bert" else c["pad_token_id"] + 1
    return ModelSpec(
        **common,
        max_positions=c["max_position_embeddings"] - offset,
        norm_eps=c["layer_norm_eps"],
        norm_place="residual",
        activation=c["hidden_act"],
        mlp="plain",
        position="learned",
        position_offset=offset,
        token_types=c["type_vocab_size"],
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tensors=_bert_names(f"{c['model_type'].removeprefix('xlm-')}." * masked),
    )


def _bert_names(prefix: str) -> TensorNames:
    layer = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    }
    tables = {"embed": "word_embeddings", "pos_embed": "position_embeddings", "type_embed": "token_type_embeddings"}
    return TensorNames(
        model={role: f"{prefix}embeddings.{name}.weight" for role, name in tables.items()}
        | _both("embed_norm", f"{prefix}embeddings.LayerNorm"),
        layer={k: v for role, name in layer.items() for k, v in _both(role, f"{prefix}encoder.layer.{{layer}}.{name}").items()},
    )


def _modern_names(prefix: str) -> TensorNames:
    layer = {
        "norm1": "attn_norm",
        "qkv": "attn.Wqkv",
        "o": "attn.Wo",
        "norm2": "mlp_norm",
        "gate_up": "mlp.Wi",
        "down": "mlp.Wo",
    }
    return TensorNames(
        model={"embed": f"{prefix}embeddings.tok_embeddings.weight"}
        | _both("embed_norm", f"{prefix}embeddings.norm")
        | _both("final_norm", f"{prefix}final_norm"),
        layer={k: v for role, name in layer.items() for k, v in _both(role, f"{prefix}layers.{{layer}}.{name}").items()},
        fused_qkv="concat",
        fused_gate_up=True,
    )


def _both(role: str, name: str) -> dict[str, str]:
    return {role: f"{name}.weight", f"{role}.bias": f"{name}.bias"}
