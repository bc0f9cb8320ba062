"""Small tokenizers of each kind that models have, built without any download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder

from quire.server.text.tokenizer import Tokenizer

from ..fakes import BYTE_VOCABULARY

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>|/_[]:!?.,-'"
CONTROL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = ["▁a", "▁b", "ab", "▁ab", "im", "end", "▁im", "el", "lo", "▁▁"]


def _sentencepiece_bpe() -> Encoder:
    """Return a BPE encoder with byte fallback, as Llama 2 has it, without its white space rules."""
    pieces = [*CONTROL, *_BYTES, "▁", *LETTERS, *_WORDS]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("i", "m"), ("▁", "im"), ("e", "l")]
    merges += [("l", "o"), ("▁", "▁")]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return Encoder(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )


def _space_decoder() -> Any:
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def byte_level() -> Encoder:
    encoder = Encoder(models.BPE(vocab=BYTE_VOCABULARY, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    return encoder


def llama2_legacy() -> Encoder:
    encoder = _sentencepiece_bpe()
    encoder.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    encoder.decoder = _space_decoder()
    return encoder


def metaspace(scheme: str) -> Callable[[], Encoder]:
    def build() -> Encoder:
        encoder = _sentencepiece_bpe()
        encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        encoder.decoder = _space_decoder()
        if scheme == "never":
            encoder.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
        return encoder

    return build


def unigram() -> Encoder:
    pieces = [*CONTROL, "▁", *_BYTES, *LETTERS, *_WORDS]
    vocabulary = [
        (piece, 0.0 if piece in CONTROL else -5.0 - index / 100)
        for index, piece in enumerate(dict.fromkeys(pieces))
    ]
    encoder = Encoder(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    encoder.decoder = _space_decoder()
    return encoder


def wordpiece() -> Encoder:
    pieces = [*CONTROL, *LETTERS, *("##" + letter for letter in LETTERS)]
    encoder = Encoder(
        models.WordPiece(
            vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
            unk_token="<unk>",
        )
    )
    encoder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder.decoder = decoders.WordPiece(cleanup=False)
    return encoder


KINDS: dict[str, Callable[[], Encoder]] = {
    "byte-level": byte_level,
    "llama2-legacy": llama2_legacy,
    "metaspace-always": metaspace("always"),
    "metaspace-first": metaspace("first"),
    "metaspace-never": metaspace("never"),
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def build(
    kind: str, template: str | None = None, *, normalized: bool = False, bos: bool = False
) -> Tokenizer:
    """Build a tokenizer with the control tokens of CONTROL; with `bos` it begins texts with <s>."""
    encoder = KINDS[kind]()
    encoder.add_special_tokens(
        [AddedToken(text, special=True, normalized=normalized) for text in CONTROL]
    )
    if bos:
        begin = encoder.token_to_id("<s>")
        encoder.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", begin)]
        )
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=encoder, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    hf.chat_template = template
    return Tokenizer(hf)
