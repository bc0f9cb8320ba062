"""Words that must not be generated, as the token sequences that spell them."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer


async def encode_bad_words(
    tokenizer: Tokenizer, words: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelt at the beginning of a text and, where that differs, behind a space
    (vLLM has both, the second only where it has as many tokens as the first)."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        spelt = tuple(await tokenizer.encode(bare, add_special_tokens=False))
        spaced = tuple(await tokenizer.encode(" " + bare, add_special_tokens=False))
        found[spelt] = None
        if spaced[-len(spelt) :] != spelt:  # else the first forbids it already
            found[spaced] = None
    return tuple(found)
