"""Bad words: token sequences that an output must not contain."""

from __future__ import annotations

from collections import abc


def banned_tokens(
    bad_words: abc.Sequence[tuple[int, ...]], token_ids: list[int], num_prompt_tokens: int
) -> list[int]:
    """Return the tokens that would complete a bad word after `token_ids`, ascending.

    Only the output counts: a word cannot begin among the first `num_prompt_tokens`.
    """
    longest = max(map(len, bad_words)) - 1
    before = tuple(token_ids[max(num_prompt_tokens, len(token_ids) - longest) :])
    banned = {
        word[-1]
        for word in bad_words
        if len(word) <= len(before) + 1 and before[len(before) - len(word) + 1 :] == word[:-1]
    }
    return sorted(banned)
