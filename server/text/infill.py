"""Fill in the middle: a prompt and a suffix around the text that is asked for.

    (begin) PREFIX prompt SUFFIX suffix MIDDLE ─▶ what stands between them (END)

The names of the three tokens differ by model family; their order does not. See Bavarian et al.,
"Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255), its PSM mode.
"""

from __future__ import annotations

from typing import NamedTuple

from ...engine.errors import InvalidRequestError
from .tokenizer import Tokenizer


class _Names(NamedTuple):
    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()


_FAMILIES = (
    # Qwen2.5-Coder, CodeGemma; the latter ends with a token of its own.
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
"""SentencePiece puts a space before a text's first word. Behind this character there is none."""


class InfillTokens(NamedTuple):
    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]
    """With which the model says that the middle is complete."""


def infill_tokens(tokenizer: Tokenizer) -> InfillTokens:
    """Raises InvalidRequestError where the tokenizer has none."""
    find = tokenizer.backend.token_to_id
    for names in _FAMILIES:
        prefix, suffix, middle = find(names.prefix), find(names.suffix), find(names.middle)
        if prefix is not None and suffix is not None and middle is not None:
            ends = tuple(end for name in names.ends if (end := find(name)) is not None)
            return InfillTokens(prefix, suffix, middle, ends)
    raise InvalidRequestError("the model has no tokens to fill in the middle with", "suffix")


async def encode_infill(
    tokenizer: Tokenizer,
    prompt: str,
    suffix: str,
    *,
    add_special_tokens: bool,
    max_tokens: int | None = None,
) -> list[int]:
    """Token ids up to where the middle begins. Raises InvalidRequestError, ContextLengthError."""
    marks = infill_tokens(tokenizer)
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
    begin: list[int] = []
    if add_special_tokens:
        bare = await tokenizer.encode("a", add_special_tokens=False)
        whole = await tokenizer.encode("a", add_special_tokens=True)
        begin = whole[: whole.index(bare[0])]
    return [*begin, marks.prefix, *before, marks.suffix, *after, marks.middle]
