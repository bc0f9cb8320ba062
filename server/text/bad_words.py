"""Converts words that must not be generated into the token sequences that spell them."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer


async def encode_bad_words(
    tokenizer: Tokenizer, words: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of each word: at the beginning of a text and, if that differs,
    after a space. (vLLM has both too, but the second only if it is as long as the first.)"""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        spelt = tuple(await tokenizer.encode(bare, add_special_tokens=False))
        spaced = tuple(await tokenizer.encode(" " + bare, add_special_tokens=False))
        found[spelt] = None
        if spaced[-len(spelt) :] != spelt:  # otherwise the first already forbids it
            found[spaced] = None
    return tuple(found)
