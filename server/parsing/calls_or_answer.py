"""An answer that a grammar makes either calls or a text of a given structure, and never both."""

from __future__ import annotations

from collections.abc import Collection

from .answer_parser import AnswerParser
from .message_events import ContentText, Event


class CallsOrAnswer:
    """Decides by the first characters whether a text is calls, which `calls` reads, or content.

    `openings` are the texts with which calls begin, apart from white space. A structured text may
    well look like a call later on, but if it does not begin like one, all of it is content.
    """

    def __init__(self, calls: AnswerParser, openings: Collection[str]) -> None:
        self._calls = calls
        self._openings = tuple("".join(opening.split()) for opening in openings)
        self._held = ""
        self._has_calls: bool | None = None

    def feed(self, text: str) -> list[Event]:
        """Append `text` and return the events that it makes certain."""
        self._held += text
        if self._has_calls is None:
            begun = "".join(self._held.split())
            if begun.startswith(self._openings):
                self._has_calls = True
            elif not any(opening.startswith(begun) for opening in self._openings):
                self._has_calls = False
        if self._has_calls is None:
            return []
        return self._take()

    def finish(self) -> list[Event]:
        """Return the remaining events, once no more text comes."""
        # An answer that was cut within the opening of a call is content, as far as it came.
        return self._take() + (self._calls.finish() if self._has_calls else [])

    def _take(self) -> list[Event]:
        text, self._held = self._held, ""
        if self._has_calls:
            return self._calls.feed(text)
        return [ContentText(text)] if text else []
