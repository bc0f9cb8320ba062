"""Converts token ids to text as they come, and finds stop strings in it.

Emitted text is never taken back. A character is held back until all of its bytes have come, and so
is text that may be the beginning of a stop string, until that is decided.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as Encoder
from tokenizers.decoders import DecodeStream

MAX_PENDING = 64
"""Maximum tokens in a row that have given no text (parts of characters, skipped control tokens).
Beyond it they are decoded as they stand, since the library decodes all of them again at every
token."""
MAX_CHARACTER_TOKENS = 4
"""Maximum tokens of one character: it has at most four bytes."""


class Detokenizer:
    """Decodes the tokens of one choice.

    Feeding them one by one or all at once gives the same text. `stop` is the stop string that was
    found, or None; once one is found, nothing more is emitted.
    """

    __slots__ = (
        "_encoder",
        "_held",
        "_hidden",
        "_include_stop",
        "_longest",
        "_pending",
        "_skip_special",
        "_stops",
        "_stream",
        "_unchecked",
        "stop",
    )

    def __init__(
        self,
        encoder: Encoder,
        *,
        skip_special_tokens: bool = True,
        hidden: frozenset[int] = frozenset(),
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        """The tokens of `hidden` give no text. Stop strings are not looked for in the text of the
        first `min_tokens` tokens. `context` holds the last tokens of the prompt, for tokenizers
        that decode a word differently at the very beginning of a text."""
        self._encoder = encoder
        self._skip_special = skip_special_tokens
        self._hidden = hidden
        self._stream = DecodeStream(list(context), skip_special_tokens=skip_special_tokens)
        self._unchecked = min_tokens
        self._pending: list[int] = []
        """Tokens that have given no text yet, which `finish` decodes."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=1) - 1
        self._include_stop = include_stop
        self._held = ""
        self.stop: str | None = None

    def feed(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Decode more tokens. Returns the text that is now certain, and how many tokens were read.

        Tokens after the one that completes a stop string are not read; `stop` is set then.
        """
        if not self._stops:
            return "".join(map(self._step, token_ids)), len(token_ids)
        emitted = ""
        for count, token_id in enumerate(token_ids, 1):
            text = self._step(token_id)
            if self._unchecked > 0:
                self._unchecked -= 1
                emitted += text
            elif text:
                emitted += self._scan(text)
            if self.stop is not None:
                return emitted, count
        return emitted, len(token_ids)

    def finish(self) -> str:
        """Return the text that was held back, once no more tokens come. The bytes of an incomplete
        character become U+FFFD."""
        if self.stop is not None:
            return ""
        rest = ""
        if self._pending:
            rest = self._encoder.decode(self._pending, skip_special_tokens=self._skip_special)
            self._pending = []
        text = self._scan(rest) if self._stops else rest
        if self.stop is None:
            text, self._held = text + self._held, ""
        return text

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

    def _scan(self, text: str) -> str:
        """Return the text up to the stop string that is complete first. If there is none, hold back
        the longest tail that may be the beginning of one."""
        text = self._held + text
        first: tuple[int, str] | None = None
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and (first is None or at + len(stop) < first[0] + len(first[1])):
                first = (at, stop)
        if first is not None:
            at, self.stop = first
            self._held = ""
            return text[: at + len(self.stop)] if self._include_stop else text[:at]
        keep = self._tail(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _tail(self, text: str) -> int:
        """Return the length of the longest tail of `text` that is the beginning of a stop
        string."""
        for length in range(min(self._longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
