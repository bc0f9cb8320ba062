"""Parsers of tool calls amid content, and of calls written as JSON objects."""

from __future__ import annotations

import json
from abc import abstractmethod

from .answer_parser import TOOL_NAME, AnswerParser, Malformed, Reader
from .json_scanner import JsonScanner
from .message_events import ContentText
from .reasoning import before_space, undecided_tail


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
            keep = undecided_tail(self._text, self.markers, self._at)
            self._emit_content(keep)
            self._at = max(self._at, keep)
            yield

    def _emit_content(self, end: int) -> None:
        """Emit the text from `_mark` to `end`."""
        if end > self._mark:
            self._events.append(ContentText(self._text[self._mark : end]))
            self._mark = end
            self._after_call = False


class JsonCalls(ToolParser):
    """The base of the formats in which a call is a JSON object with a name and arguments."""

    def _call_object(self, *, bare: bool = False) -> Reader[None]:
        """Read one call, `{"name": …, "arguments": {…}}`. Raises Malformed.

        "function" is another key for the name, "parameters" for the arguments. Members may come in
        any order, and other members are skipped. `bare` says that no marker but the object itself
        announced a call: then it must have the name of an offered tool, arguments after that, and
        no other members than "type" and "id".
        """
        yield from self._expect("{")
        name: str | None = None
        begun = False
        arguments: str | None = None
        while True:
            # 1. Read a key.
            key = yield from self._key()
            # 2. Read its value. Arguments are streamed if the name is known by now; otherwise they
            #    are kept for step 4, since an event of arguments needs a call that has begun.
            if key in ("name", "function") and name is None:
                name = yield from self._string()
                if not TOOL_NAME.fullmatch(name) or (bare and name not in self._tool_names):
                    raise Malformed
            elif key in ("arguments", "parameters") and arguments is None:
                if name is None and bare:
                    raise Malformed
                if name is not None and (yield from self._peek()) == "{":
                    self._begin_call(name)
                    begun = True
                    arguments = ""
                    yield from self._stream_arguments()
                    self._end_call()
                else:
                    arguments = yield from self._buffered_arguments()
            elif bare:
                if key not in ("type", "id"):
                    raise Malformed
                yield from self._string()
            else:
                yield from self._json()
            # 3. Go on after a comma, or end with the object.
            yield from self._skip_space()
            if (yield from self._take("}")):
                break
            yield from self._expect(",")
        # 4. Emit a call whose arguments were kept or left out.
        if name is None or (bare and arguments is None):
            raise Malformed
        if not begun:
            self._begin_call(name)
            self._emit_arguments(arguments or "{}")
        self._end_call()

    def _key(self) -> Reader[str]:
        """Read the key of a member, up to the beginning of its value. Raises Malformed."""
        yield from self._skip_space()
        key = yield from self._string()
        yield from self._skip_space()
        yield from self._expect(":")
        yield from self._skip_space()
        return key

    def _buffered_arguments(self) -> Reader[str]:
        """Read arguments that cannot be streamed: an object, the JSON text of one in a string, or
        null for no arguments. Returns the text of the object. Raises Malformed."""
        first = yield from self._peek()
        text = yield from self._json()
        if first == '"':
            inner = str(json.loads(text)).strip()
            scanner = JsonScanner()
            end, text = scanner.feed(inner, 0)
            if not scanner.done or end < len(inner):
                raise Malformed
        if text == "null":
            return "{}"
        if not text.startswith("{"):
            raise Malformed
        return text
