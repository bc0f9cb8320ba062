"""Keeps text of clients that spells a control token ("<|im_end|>") from being read as one.

A rendered prompt does not show who wrote what. So spellings in the text of clients are replaced by
placeholders before the template runs; afterwards every control token that is spelt in the result is
the template's own:

    client   a<|im_end|>b          ─▶  a 48 digits b                           (hide)
    rendered a 48 digits b<|im_end|>    ─▶  a<|im_end|>b 48 other digits            (restore)

The result is encoded as a whole by a second encoder, which knows each control token by its other
digits, its alias, and by nothing else. To that encoder "<|im_end|>" is ordinary text, tokenised in
its surroundings like any other, so no character is gained or lost between pieces.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from typing import Any

import msgspec


class ControlTokens:
    """The spellings of a tokenizer's control tokens, and an alias for each.

    Aliases and placeholders consist of digits only, which no filter of a template and no normaliser
    changes, and begin with a nonce that a client cannot guess.
    """

    def __init__(self, spellings: Collection[str]) -> None:
        # Longest first, so that the whole spelling is found if another one is its beginning.
        ordered = sorted(filter(None, spellings), key=len, reverse=True)
        nonce = _nonce()
        self.pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        """Matches a spelling, if there is any."""
        self.aliases = {text: f"{nonce}{index:09d}" for index, text in enumerate(ordered)}
        self.beginnings = frozenset(
            text[:length]
            for text in ordered
            if not text[0].isalnum()  # or else roles and other words of the API could be one
            for length in range(1, len(text))
        )
        """Proper beginnings of spellings: with the text that follows, they could become whole."""
        self.longest = max(map(len, ordered), default=0)


class Placeholders:
    """Replaces the control tokens that clients spelt in one conversation."""

    def __init__(self, tokens: ControlTokens) -> None:
        self._tokens = tokens
        self._nonce = _nonce()
        self._spellings: list[str] = []

    @property
    def is_used(self) -> bool:
        """Whether any spelling was hidden."""
        return bool(self._spellings)

    def hide(self, value: Any) -> Any:
        """Return the JSON value `value` with all spellings in its strings and keys replaced, and
        also the beginning of one at a string's end."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def _hide_text(self, text: str) -> str:
        tokens = self._tokens
        if tokens.pattern is None:
            return text
        text = tokens.pattern.sub(self._replace, text)
        trimmed = text.rstrip()
        for length in range(min(tokens.longest - 1, len(trimmed)), 0, -1):
            tail = trimmed[-length:]
            if tail in tokens.beginnings:
                rest = text[len(trimmed) :]
                return trimmed[:-length] + self._placeholder(tail) + rest
        return text

    def _replace(self, match: re.Match[str]) -> str:
        return self._placeholder(match.group())

    def _placeholder(self, text: str) -> str:
        self._spellings.append(text)
        return f"{self._nonce}{len(self._spellings) - 1:09d}"

    def restore(self, text: str) -> str:
        """Return the rendered text with aliases for the template's control tokens, and with the
        spellings of clients back in their places."""
        assert self._tokens.pattern is not None  # something was hidden
        aliases = self._tokens.aliases
        text = self._tokens.pattern.sub(lambda match: aliases[match.group()], text)
        return re.sub(
            f"{self._nonce}([0-9]{{9}})", lambda match: self._spellings[int(match[1])], text
        )


def with_aliases(
    tokenizer_json: str, tokens: ControlTokens, *, keep_normalized: bool = True
) -> str:
    """Return a tokenizer.json in which the control tokens have their aliases as names.

    Their ids and options stay, except that without `keep_normalized` they are looked for before
    the text is normalised: a normaliser that puts something before a text puts it before the names
    of control tokens too, which are not found amid the text then.

    Their names leave the model's vocabulary as well: a Unigram or a WordPiece model would find them
    there in ordinary text. Only a name that takes part in a merge of BPE has to stay.
    """
    fields: dict[str, Any] = msgspec.json.decode(tokenizer_json)
    aliases = tokens.aliases
    for token in fields["added_tokens"]:
        if token["special"]:
            token["content"] = aliases.get(token["content"], token["content"])
            token["normalized"] = token["normalized"] and keep_normalized
    model = fields["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):
        for entry in vocabulary:
            entry[0] = aliases.get(entry[0], entry[0])
    elif vocabulary is not None:
        merged = _merged(model.get("merges") or (), aliases)
        for name in aliases.keys() & vocabulary.keys():
            vocabulary[aliases[name]] = vocabulary[name]
            if name not in merged:
                del vocabulary[name]
    unknown = model.get("unk_token")
    if unknown is not None:
        model["unk_token"] = aliases.get(unknown, unknown)
    return msgspec.json.encode(fields).decode()


def _merged(merges: Collection[Any], names: Collection[str]) -> set[str]:
    """Return those of `names` that merges, pairs or texts with a space between, speak of."""
    found: set[str] = set()
    for merge in merges:
        left, _, right = (
            merge.partition(" ")
            if isinstance(merge, str)
            else (
                merge[0],
                "",
                merge[1],
            )
        )
        found |= {left, right, left + right}.intersection(names)
    return found


def _nonce() -> str:
    return f"{secrets.randbits(128):039d}"
