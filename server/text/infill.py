"""Fill in the middle: the model writes the text between a prompt and a suffix.

    (begin) PREFIX prompt SUFFIX suffix MIDDLE ─▶ the text between them (END)

The names of the three tokens differ by model family; their order does not. This is the PSM mode of
Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255).
"""

from __future__ import annotations

from typing import NamedTuple

from ...engine.errors import InvalidRequestError
from .tokenizer import Tokenizer


class _Names(NamedTuple):
    """The control tokens of one model family, by their text."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()


_FAMILIES = (
    # Qwen2.5-Coder and CodeGemma, of which the second has an end token of its own.
    _Names(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|file_separator|>"),
    ),
    _Names("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>",)),  # StarCoder
    _Names("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>",)),  # SantaCoder
    _Names("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    _Names("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),  # CodeLlama
)
_NO_SPACE = "\u263a"
"""SentencePiece adds a space before the first word of a text, but not after this character."""


class InfillTokens(NamedTuple):
    """The ids of a model's control tokens for filling in the middle."""

    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]
    """Tokens that end the middle."""


def infill_tokens(tokenizer: Tokenizer) -> InfillTokens:
    """Return the infill tokens of a tokenizer. Raises InvalidRequestError if it has none."""
    find = tokenizer.backend.token_to_id
    for names in _FAMILIES:
        prefix, suffix, middle = find(names.prefix), find(names.suffix), find(names.middle)
        if prefix is not None and suffix is not None and middle is not None:
            ends = tuple(end for name in names.ends if (end := find(name)) is not None)
            return InfillTokens(prefix, suffix, middle, ends)
    raise InvalidRequestError("the model has no fill-in-the-middle tokens", "suffix")


async def encode_infill(
    tokenizer: Tokenizer,
    prompt: str,
    suffix: str,
    *,
    add_special_tokens: bool,
    max_tokens: int | None = None,
) -> list[int]:
    """Return the token ids of the prompt, up to where the middle begins.

    Raises InvalidRequestError, ContextLengthError.
    """
    marks = infill_tokens(tokenizer)
    # 1. Encode both sides. The suffix goes on in the middle of a text, so it must not get the space
    #    that SentencePiece adds at the beginning of one.
    before = await tokenizer.encode(prompt, add_special_tokens=False, max_tokens=max_tokens)
    after = await tokenizer.encode(
        suffix if tokenizer.byte_level else _NO_SPACE + suffix,
        add_special_tokens=False,
        max_tokens=max_tokens,
    )
    if not tokenizer.byte_level:
        skipped = await tokenizer.encode(_NO_SPACE, add_special_tokens=False)
        if after[: len(skipped)] != skipped:
            raise InvalidRequestError("the tokenizer cannot encode this suffix", "suffix")
        after = after[len(skipped) :]
    # 2. Find the tokens that begin a prompt: those before the text of any encoded prompt.
    begin: list[int] = []
    if add_special_tokens:
        bare = await tokenizer.encode("a", add_special_tokens=False)
        whole = await tokenizer.encode("a", add_special_tokens=True)
        begin = whole[: whole.index(bare[0])]
    return [*begin, marks.prefix, *before, marks.suffix, *after, marks.middle]
