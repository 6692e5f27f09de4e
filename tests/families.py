"""Tiny random checkpoints made by transformers, one recipe a family, and the reference model that reads them.

Every parameter is randomised, norm weights and biases too: a graph that forgets one of them must not pass.
Checkpoints and reference models are made once a session and process. Vocabularies of 260 and more come with a byte-level
tokenizer: token i < 256 is the byte i, 256 begins and 257 ends a text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers

from zoo.graph import ModelGraph
from zoo.spec import ModelSpec, RopeSpec, TensorNames
from zoo.weights.bind import NUMPY, materialize
from zoo.weights.reader import Tensors

torch.set_num_threads(1)
BEGIN, END = 256, 257

BASE: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# family -> (transformers model type, what differs from BASE)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
}
# name -> (family, overrides): what the plain graph is compared on
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "vocab_size": 307}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 3}),
    "llama-three-heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "hidden_size": 60}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {}),
    "mistral-multi-query": ("mistral", {"num_key_value_heads": 1, "head_dim": 24, "sliding_window": 3, "num_hidden_layers": 1}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2-biases": ("qwen2", {}),
    "qwen2-tied-odd": ("qwen2", {"tie_word_embeddings": True, "num_attention_heads": 6, "head_dim": 12, "hidden_size": 60}),
    "qwen2-window-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3-norms": ("qwen3", {}),
    "qwen3-tied-wide": (
        "qwen3",
        {"tie_word_embeddings": True, "head_dim": 40, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-odd": ("gpt2", {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 50}),
}
_MADE: dict[str, Path] = {}


def make_checkpoint(tmp_path: Path, family: str, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """A folder with config.json, model.safetensors and a tokenizer; ``overrides`` are keys of its config.

    The same arguments give the same folder for the rest of the session, wherever it was made first.
    """
    key = json.dumps([family, seed, dtype, overrides], sort_keys=True)
    if key in _MADE and _MADE[key].is_dir():
        return _MADE[key]
    folder = tmp_path / f"{family}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    model = random_model(family, seed, **overrides).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder)
    _write_tokenizer(folder, model.config.vocab_size)
    _MADE[key] = folder
    return folder


def random_model(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A float32 model with every parameter random."""
    kind, defaults = FAMILIES[family]
    values = BASE | defaults | overrides
    if family == "gpt2":
        renamed = {
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        }
        values = {renamed.get(k, k): v for k, v in values.items() if k not in ("num_key_value_heads", "head_dim")}
        values["tie_word_embeddings"] = True
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **values), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:  # a norm's weight
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                fan_in = parameter.shape[0] if ".c_" in name else parameter.shape[1]  # GPT-2 stores [in, out]
                parameter.copy_(noise * (1.5 / math.sqrt(fan_in)))
    return model.eval()


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    if vocab_size < 260:
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = _byte_characters()
    vocab = {character: byte for byte, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<begin>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


@functools.cache
def reference(folder: Path) -> transformers.PreTrainedModel:
    """The checkpoint as transformers runs it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(folder: Path, token_ids: list[int]) -> np.ndarray:
    """Logits [S, V] of one sequence."""
    with torch.no_grad():
        return reference(folder)(torch.tensor([token_ids])).logits[0].numpy()


def reference_greedy(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """The greedy continuation of exactly ``tokens`` tokens through transformers' own cache; end tokens count as any other."""
    model, cache, ids, out = reference(folder), None, prompt, []
    with torch.no_grad():
        for _ in range(tokens):
            step = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache, ids = step.past_key_values, [int(step.logits[0, -1].argmax())]
            out += ids
    return out


def prompt(folder: Path, length: int, seed: int = 0) -> list[int]:
    """Random token ids that the checkpoint knows."""
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


LLAMA_NAMES = TensorNames(
    model={"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"},
    layer={
        "norm1": "model.layers.{layer}.input_layernorm.weight",
        "norm2": "model.layers.{layer}.post_attention_layernorm.weight",
        **{
            f"{r}{b}": f"model.layers.{{layer}}.self_attn.{r}_proj.{s}"
            for r in "qkvo"
            for b, s in (("", "weight"), (".bias", "bias"))
        },
        **{
            f"{r}{b}": f"model.layers.{{layer}}.mlp.{r}_proj.{s}"
            for r in ("gate", "up", "down")
            for b, s in (("", "weight"), (".bias", "bias"))
        },
        "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
        "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    },
)
_GPT2_PARTS = {"norm1": "ln_1", "norm2": "ln_2", "qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
GPT2_NAMES = TensorNames(
    model={
        "embed": "transformer.wte.weight",
        "pos_embed": "transformer.wpe.weight",
        "final_norm": "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
    },
    layer={
        f"{role}{b}": f"transformer.h.{{layer}}.{name}.{s}"
        for role, name in _GPT2_PARTS.items()
        for b, s in (("", "weight"), (".bias", "bias"))
    },
    fused_qkv="concat",
    conv1d=True,
)


def spec(folder: Path) -> ModelSpec:
    """The ModelSpec of a folder, written down by hand from its config: independent of conf/ and of ``zoo add``."""
    c = json.loads((folder / "config.json").read_text())
    common: dict[str, Any] = {
        "name": folder.name,
        "family": c["model_type"],
        "dtype": c.get("dtype") or c["torch_dtype"],
        "checkpoint": str(folder),
    }
    if c["model_type"] == "gpt2":
        return ModelSpec(
            **common,
            vocab_size=c["vocab_size"],
            hidden_size=c["n_embd"],
            num_layers=c["n_layer"],
            num_heads=c["n_head"],
            num_kv_heads=c["n_head"],
            head_dim=c["n_embd"] // c["n_head"],
            intermediate_size=c["n_inner"],
            max_positions=c["n_positions"],
            norm="layer",
            norm_eps=c["layer_norm_epsilon"],
            activation="gelu_tanh",
            mlp="plain",
            position="learned",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
            tensors=GPT2_NAMES,
        )
    rope = c["rope_parameters"]
    kinds = [kind == "sliding_attention" for kind in c.get("layer_types") or []]
    window = (c.get("sliding_window") or 0) if c.get("use_sliding_window", True) else 0
    return ModelSpec(
        **common,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        intermediate_size=c["intermediate_size"],
        max_positions=c["max_position_embeddings"],
        norm_eps=c["rms_norm_eps"],
        rope=RopeSpec(
            kind=rope["rope_type"],
            theta=rope["rope_theta"],
            factor=rope.get("factor", 1.0),
            low_freq_factor=rope.get("low_freq_factor", 1.0),
            high_freq_factor=rope.get("high_freq_factor", 4.0),
            original_max_positions=rope.get("original_max_position_embeddings", 0),
        ),
        qkv_bias=c["model_type"] == "qwen2" or c.get("attention_bias", False),
        out_bias=c["model_type"] == "llama" and c.get("attention_bias", False),
        mlp_bias=c.get("mlp_bias", False),
        qk_norm="head" if c["model_type"] == "qwen3" else "none",
        window=window,
        window_layers=tuple(i for i, sliding in enumerate(kinds) if sliding) if window else (),
        tie_embeddings=c["tie_word_embeddings"],
        tensors=LLAMA_NAMES,
    )


class Plain:
    """A float32 graph with [batch, sequence] inputs in ONNX Runtime, its weights fed as inputs; one thread."""

    def __init__(self, graph: ModelGraph, tensors: Tensors, scales: Mapping[str, float] | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        model = graph.to_onnx()
        onnx.checker.check_model(model, full_check=True)
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.weights = {name: ort_value(materialize(weight, tensors, scales or {})) for name, weight in graph.weights.items()}

    def logits(self, token_ids: Sequence[Sequence[int]], first_row: int = 0) -> np.ndarray:
        """Logits [B, S, V] of rows of equal length; their rotary table begins at ``first_row``."""
        ids = np.asarray(token_ids, dtype=np.int64)
        positions = np.broadcast_to(first_row + np.arange(ids.shape[1], dtype=np.int64), ids.shape)
        feeds = {"token_ids": ort_value(ids), "positions": ort_value(np.ascontiguousarray(positions))}
        wanted = {given.name for given in self.session.get_inputs()}
        feeds = {name: value for name, value in (self.weights | feeds).items() if name in wanted}
        return self.session.run_with_ort_values(["logits"], feeds)[0].numpy()

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The greedy continuation, the whole sequence computed anew for each token."""
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(self.logits([ids])[0, -1].argmax()))
        return ids[len(prompt) :]


def ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    """An array of any dtype, float8 included, as ONNX Runtime holds it."""
    kinds = {NUMPY["float8e4m3"]: onnx.TensorProto.FLOAT8E4M3FN, NUMPY["bfloat16"]: onnx.TensorProto.BFLOAT16}
    if array.dtype in kinds:
        raw = array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, kinds[array.dtype])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
