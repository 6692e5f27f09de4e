"""The demo tokenizer: byte-level BPE, 4096 entries, trained on the training split alone.

    python -m pipelines.demo.tokenizer           # writes tokenizer.json and tokenizer_config.json

Text is cut into identifiers, numbers of at most three digits, punctuation, line ends and runs of blanks before merging.
A word takes the one blank before it along; the rest of an indentation is a token of its own. Line ends never merge with
what stands beside them, so a prompt may end at `:`, at a line end or after a dot and still look like training text.

`encode` puts the end-of-text token, which began every file in training, before a text. Without it the model cannot know
that a prompt's first line is not indented, and often continues it as a method.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipelines.demo import corpus

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "zoo-demo"
VOCABULARY = 4096
CONTEXT = 2048
END_OF_TEXT = "<|endoftext|>"  # id 0: stands before every file in training, so it ends one text and begins the next
END_OF_TEXT_ID = 0
PIECES = "|".join(
    (
        r" ?[\p{L}_]+",  # identifiers and words
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}_]+",  # punctuation
        r"[\r\n]+",
        r"[^\S\r\n]+(?!\S)",  # indentation, all but the blank that the next word takes
        r"[^\S\r\n]+",
    )
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE over `texts`; all 256 bytes are in the vocabulary, so any UTF-8 text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files that `transformers.AutoTokenizer` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the demo tokenizer on the training split.")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="where to write the two files")
    options = parser.parse_args(arguments)
    splits = corpus.load()
    tokenizer = train_tokenizer(document.text for document in splits["train"])
    save_tokenizer(tokenizer, options.folder)
    for name, documents in splits.items():
        encodings = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
        tokens = sum(len(encoding.ids) for encoding in encodings)
        size = sum(len(document.text.encode()) for document in documents)
        print(f"{name}: {size} bytes, {tokens} tokens, {size / tokens:.2f} bytes a token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
