"""The base of the parsers that find tool calls amid content."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from .answer_parser import AnswerParser, Malformed, Reader
from .message_events import ContentText
from .reasoning import before_space, tag_tail, undecided_tail

MAX_TAG_TEXT = 256
"""Maximum characters of a name within a tag."""


class ToolParser(AnswerParser):
    """The base of the formats in which a marker amid the content begins calls."""

    @abstractmethod
    def _calls(self, marker: str) -> Reader[None]:
        """Read the calls after `marker`. Raises Malformed if there are none."""

    def _parse(self) -> Reader[None]:
        while marker := (yield from self._content()):
            try:
                yield from self._calls(marker)
            except Malformed:
                continue  # what was held back is content

    def _content(self) -> Reader[str]:
        """Emit the text up to the next marker as content, and return the marker.

        White space before the marker belongs to the call and is dropped. At the end of the text the
        result is "", and white space that follows a call is dropped too.
        """
        while True:
            # 1. At a marker the content ends.
            if found := self._pattern.search(self._text, self._at):
                self._emit_content(before_space(self._text, found.start()))
                self._at = found.end()
                return found[0]
            # 2. At the end of the text nothing can become a marker any more.
            if self._ended:
                if not (self._after_call and self._text[self._mark :].isspace()):
                    self._emit_content(len(self._text))
                return ""
            # 3. Otherwise hold back only the tail that may become a marker or the space before one.
            keep = undecided_tail(self._text, self._markers, self._at)
            self._emit_content(keep)
            self._at = max(self._at, keep)
            yield

    def _emit_content(self, end: int) -> None:
        """Emit the text from `_mark` to `end`."""
        if end > self._mark:
            self._events.append(ContentText(self._text[self._mark : end]))
            self._mark = end
            self._after_call = False

    # -- readers ------------------------------------------------------------------------------

    def _until(self, stop: str) -> Reader[str]:
        """Take a short text and the literal `stop` after it, and return the text. Raises
        Malformed if `stop` does not come within MAX_TAG_TEXT characters."""
        start = self._at - self._mark
        enough = MAX_TAG_TEXT + len(stop)
        while True:
            begin = self._mark + start
            window = self._text[begin : begin + enough]
            if (found := window.find(stop)) >= 0:
                self._at = begin + found + len(stop)
                return window[:found]
            if self._ended or len(window) == enough:
                raise Malformed
            yield

    def _text_to(
        self, stop: str, emit: Callable[[str], None], *, trim: bool = False
    ) -> Reader[bool]:
        """Take text of any length and the literal `stop` after it, and pass the text to `emit` as
        it comes. Everything is settled as it is read, so a call must have begun.

        `trim` drops one line break at the beginning and one before `stop`. Returns whether `stop`
        came; otherwise the text has ended, and a part of `stop` at its end is dropped.
        """
        if trim:
            yield from self._take("\n")
        self._mark = self._at
        stops = (stop, "\n" + stop) if trim else (stop,)
        while True:
            found = self._text.find(stop, self._mark)
            if found >= 0:
                text = self._text[self._mark : found]
                self._mark = self._at = found + len(stop)
                emit(text.removesuffix("\n") if trim else text)
                return True
            keep = tag_tail(self._text, stops, self._mark)
            text = self._text[self._mark : keep]
            self._mark = self._at = len(self._text) if self._ended else keep
            emit(text)
            if self._ended:
                return False
            yield
