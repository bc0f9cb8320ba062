"""Converts token ids to text as they come, and finds stop strings in it (stop_strings.py).

Emitted text is never taken back. A character is held back until all of its bytes have come, and so
is text that may be the beginning of a stop string, until that is decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer as Encoder
from tokenizers.decoders import DecodeStream

from .stop_strings import StopStrings

MAX_PENDING = 64
"""Maximum tokens in a row that have given no text (parts of characters, skipped control tokens).
Beyond it they are decoded as they stand, since the library decodes all of them again at every
token."""
MAX_CHARACTER_TOKENS = 4
"""Maximum tokens of one character: it has at most four bytes."""


class Detokenizer:
    """Decodes the tokens of one choice.

    Feeding them one by one or all at once gives the same text. Once a stop string is found, nothing
    more is emitted.
    """

    __slots__ = (
        "_encoder",
        "_hidden",
        "_pending",
        "_skip_special",
        "_stops",
        "_stream",
        "_unchecked",
        "length",
        "offsets",
    )

    def __init__(
        self,
        encoder: Encoder,
        *,
        skip_special_tokens: bool = True,
        hidden: Mapping[int, str] | None = None,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        context: Sequence[int] = (),
        with_offsets: bool = False,
    ) -> None:
        """The tokens of `hidden` give no text, but stop strings may contain their spellings, which
        it maps them to. Stop strings are not looked for in the text of the first `min_tokens`
        tokens. `context` holds the last tokens of the prompt, for tokenizers that decode a word
        differently at the very beginning of a text."""
        self._encoder = encoder
        self._skip_special = skip_special_tokens
        self._hidden = hidden or {}
        begun = [token_id for token_id in context if token_id not in self._hidden]
        self._stream = DecodeStream(begun, skip_special_tokens=skip_special_tokens)
        self._unchecked = min_tokens
        self._pending: list[int] = []
        """Tokens that have given no text yet, which `finish` decodes."""
        self._stops = StopStrings(stops, self._hidden, include_stop=include_stop) if stops else None
        self.length = 0
        """Characters decoded so far, those that are held back included."""
        self.offsets: list[int] | None = [] if with_offsets else None
        """The `length` before each token, if it is asked for: where the text of the token begins.
        All tokens of one character have the same. The caller takes them out."""

    @property
    def stop(self) -> str | None:
        """The stop string that was found, if any."""
        return None if self._stops is None else self._stops.found

    def feed(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Decode more tokens. Returns the text that is now certain, and how many tokens were read.

        Tokens after the one that completes a stop string are not read; `stop` is set then.
        """
        if self._stops is None and self.offsets is None:
            return "".join(map(self._step, token_ids)), len(token_ids)
        emitted = ""
        for count, token_id in enumerate(token_ids, 1):
            text = self._step(token_id)
            if self.offsets is not None:
                self.offsets.append(self.length)
            self.length += len(text)
            if self._stops is None:
                emitted += text
            elif self._unchecked > 0:
                self._unchecked -= 1
                emitted += text
            else:
                emitted += self._scan(token_id, text)
                if self._stops.found is not None:
                    return emitted, count
        return emitted, len(token_ids)

    def end(self, token_id: int) -> str:
        """Take note of the token that ended the choice. It gives no text, but a stop string may end
        with its spelling. Returns the text that is now certain."""
        if self._stops is None or self._unchecked > 0 or token_id not in self._hidden:
            return ""
        return self._scan(token_id, "")

    def _scan(self, token_id: int, text: str) -> str:
        """Look for stop strings in the text of one more token."""
        assert self._stops is not None  # the callers have checked it
        if token_id in self._hidden:
            return self._stops.feed_hidden(token_id)
        return self._stops.feed(text) if text else ""

    def finish(self) -> str:
        """Return the text that was held back, once no more tokens come. The bytes of an incomplete
        character become U+FFFD."""
        if self.stop is not None:
            return ""
        rest = ""
        if self._pending:
            rest = self._encoder.decode(self._pending, skip_special_tokens=self._skip_special)
            self._pending = []
            self.length += len(rest)
        if self._stops is None:
            return rest
        return self._stops.feed(rest) + self._stops.finish()

    def _step(self, token_id: int) -> str:
        """Return the text that one more token completes, before stop strings are looked for."""
        if token_id in self._hidden:
            return ""
        pending = self._pending
        pending.append(token_id)
        try:
            text = self._stream.step(self._encoder, token_id) or ""
        except Exception as error:
            # The library raises a plain Exception only. Its stream cannot go on after tokens whose
            # text changes with the next token (the bytes of an incomplete character).
            if "prefix" not in str(error).lower():
                raise
            return self._restart(len(pending))
        if len(pending) > MAX_PENDING and not text:
            return self._restart(len(pending) - MAX_CHARACTER_TOKENS)
        if text:
            pending.clear()
        return text

    def _restart(self, count: int) -> str:
        """Decode the first `count` pending tokens as they stand, and begin a new stream with the
        rest."""
        now, later = self._pending[:count], self._pending[count:]
        text: str = self._encoder.decode(now, skip_special_tokens=self._skip_special)
        # The last token goes along as context, so that a word after it keeps its space.
        self._stream = DecodeStream(now[-1:], skip_special_tokens=self._skip_special)
        self._pending.clear()
        return text + "".join(map(self._step, later))
