"""Log-probabilities in the three shapes of the API: chat, completion and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...engine.outputs import TokenLogprobs
from ..text.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot express."""


class LogprobFormat:
    """Formats the entries of one request. With `as_ids`, tokens are written as "token_id:17".

    `named` are the request's `logprob_token_ids`, which follow the best alternatives.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, as_ids: bool, named: Sequence[int] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._named = named or ()
        self._as_ids = as_ids

    def chat(self, entries: Sequence[TokenLogprobs], top: int) -> dict[str, Any]:
        """Format `choices[].logprobs` of a chat completion, with `top` alternatives per token."""
        content = []
        for entry in entries:
            alternatives = self._pairs(entry, top).items()
            content.append(
                {
                    **self._chat_token(entry.token_id, entry.logprob),
                    "top_logprobs": [self._chat_token(*pair) for pair in alternatives],
                }
            )
        return {"content": content, "refusal": None}

    def completion(
        self,
        entries: Sequence[TokenLogprobs | None],
        token_ids: Sequence[int],
        top: int,
        offsets: Sequence[int],
    ) -> dict[str, Any]:
        """Format `choices[].logprobs` of a completion.

        `offsets` are the places in the choice's text where the texts of the tokens begin. The entry
        of a prompt's first token is None.
        """
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [entry and _finite(entry.logprob) for entry in entries],
            "top_logprobs": [entry and self._alternatives(entry, top) for entry in entries],
            "text_offset": list(offsets),
        }

    def prompt(self, entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """Format `prompt_logprobs`: a map from token id to logprob, rank and text per position."""
        return [entry and self._by_id(entry) for entry in entries]

    def _pairs(self, entry: TokenLogprobs, top: int) -> dict[int, float]:
        """Return the `top` best alternatives and the named tokens, by token id."""
        pairs = dict(zip(entry.top_token_ids[:top], entry.top_logprobs[:top], strict=True))
        if entry.named_logprobs is not None:
            for token_id, logprob in zip(self._named, entry.named_logprobs, strict=True):
                pairs.setdefault(token_id, logprob)
        return pairs

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        name = self._as_ids and f"token_id:{token_id}"
        return {
            "token": name or self._tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _name(self, token_id: int) -> str:
        """Spell a token for a completion's lists; a part of a character is spelt by its bytes."""
        if self._as_ids:
            return f"token_id:{token_id}"
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _alternatives(self, entry: TokenLogprobs, top: int) -> dict[str, float]:
        # The chosen token comes first, then the likeliest in their order. If two tokens have the
        # same name, the first of them has the key.
        found = {self._name(entry.token_id): _finite(entry.logprob)}
        for token_id, logprob in self._pairs(entry, top).items():
            found.setdefault(self._name(token_id), _finite(logprob))
        return found

    def _by_id(self, entry: TokenLogprobs) -> dict[str, Any]:
        ranked = {
            token_id: (logprob, rank)
            for rank, (token_id, logprob) in enumerate(
                zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1
            )
        }
        ranked[entry.token_id] = (entry.logprob, entry.rank)
        return {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token_id),
            }
            for token_id, (logprob, rank) in ranked.items()
        }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
