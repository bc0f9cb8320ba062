"""Train the demo model's tokenizer on its corpus: byte-level BPE, with one token for each digit.

`python configs/demo_training/build_tokenizer.py` rewrites tokenizer.json and tokenizer_config.json.
The special tokens come first, so the ids in the generation defaults never change.
"""

from __future__ import annotations

import json
from pathlib import Path

from corpus import documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

DEMO = Path(__file__).parents[1] / "demo"
VOCAB_SIZE = 1536
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pieces that no token crosses: contractions, words with one leading sign or space, single digits,
runs of signs, and white space."""


def build(num_documents: int = 30000) -> Tokenizer:
    """Train a tokenizer on the first documents of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts() -> list[str]:
        pieces = (text for d in documents(1, 0, num_documents) for text, _ in d)
        joined = list(pieces)
        for token in SPECIAL_TOKENS:  # matched before the merges, so they must not count for those
            joined = [piece.replace(token, "\n") for piece in joined]
        return joined

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def main() -> None:
    build().save(str(DEMO / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 16384,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    (DEMO / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
