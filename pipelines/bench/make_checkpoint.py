"""Write a Hugging Face folder of a Llama's shape with random bfloat16 weights, in bounded memory and at disk speed.

    python -m pipelines.bench.make_checkpoint FOLDER [--shape llama-3.2-1b]

Values are uniform over two octaves around +-0.02 with all mantissas and both signs, so that no two matrices are equal.
The tokenizer knows single bytes only: it is there because model builders copy it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {  # 1.24 G parameters
        "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "max_position_embeddings": 131072,
    },
    "quarter": {  # 0.26 G parameters: the same kind of model for a quick look
        "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 4096, "max_position_embeddings": 131072,
    },
}  # fmt: skip
COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
CHUNK = 8 << 20  # elements drawn at once


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the file's order."""
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
        }  # fmt: skip
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)


def random_bits(generator: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """bfloat16 bits of numbers with magnitudes in [2**-7, 2**-5): random sign, mantissa and last exponent bit."""
    bits = np.frombuffer(generator.bytes(2 * count), np.uint16)
    return (bits & np.uint16(0x80FF)) | np.uint16(0x3C00)


def write_checkpoint(folder: Path, shape: str, seed: int = 0) -> int:
    """Write config.json, model.safetensors and a byte tokenizer; gives the number of parameters."""
    config = SHAPES[shape] | COMMON
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors_of(config):
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [end, end + 2 * prod(size)]}
        end += 2 * prod(size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    aside = folder / ".model.safetensors.partial"
    with aside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in tensors_of(config):
            left = prod(size)
            if "norm" in name:
                file.write(np.full(size, 0x3F80, np.uint16).tobytes())
                continue
            while left:
                count = min(left, CHUNK)
                file.write(random_bits(generator, count).tobytes())
                left -= count
    aside.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    write_tokenizer(folder)
    return end // 2


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer without merges: 2 special tokens and the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.2-1b")
    arguments = parser.parse_args()
    started = time.perf_counter()
    count = write_checkpoint(arguments.folder, arguments.shape)
    print(f"{arguments.folder}: {count / 1e9:.3f} G parameters in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
