"""The base of the parsers that turn a model's text into events, in one incremental pass.

Theory of operation
-------------------
A parser is a generator (`_parse`) that is written as if the whole text were there. Its readers
descend into the text recursively, and yield whenever a decision needs characters that have not
come yet. `feed` appends a piece of text and resumes the generator; `finish` resumes it for the last
time, and from then on the readers see the end of the text. So the state of a parser is the frame of
its generator and two offsets into the text:

    … emitted, or markup │ examined, held back │ not examined yet …
                         ▲ _mark               ▲ _at

- Text before `_mark` is settled: it was emitted in events, or it is markup and belongs to no event.
  `feed` drops it.
- Text from `_mark` to `_at` has been examined but not emitted, because it may be content or part of
  a call. A reader that remembers a position keeps it relative to `_mark`, since `feed` moves both.

Emitted as soon as it is certain are: content that no marker can begin in; the start of a call, once
its name is known and its arguments have begun; and the arguments while they come, as far as they
are valid JSON. Held back are: the tail of the text that may become a marker, with the white space
before it; markup and names; and the arguments that come before their name.

Text that begins like a call and turns out not to be one raises `Malformed`. The handler reads on
from `_at` without moving `_mark`, which makes all that was held back content. An emitted call
cannot be taken back, so if its arguments break off, the text after their last valid character is
content.

A reader must decide by the text only, never by where the pieces were cut: a prefix that could
still match is a reason to yield, not to fail. Then every cutting gives the same message.
"""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar, TypeVar

from .json_scanner import JsonScanner
from .message_events import Event, ToolCallArguments, ToolCallStart

_T = TypeVar("_T")
Reader = Generator[None, None, _T]
"""A generator that reads from the text, yields when it needs more text, and returns its result."""

TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/\-]{1,128}")
"""The names that tools may have."""
Tools = Mapping[str, Mapping[str, Any]]
"""The tools of a request: the JSON schema of the arguments, by the tool's name."""
_NAME_CHARACTER = re.compile(r"[A-Za-z0-9_.:/\-]")
_MAX_NAME = 128
_SPACE = " \t\r\n"


class Malformed(Exception):
    """The text is not a call. `_at` stands before the character that shows it."""


class AnswerParser(ABC):
    """Turns the text of one message into events.

    `tools` are those of the request. With `only_tagged`, bare markers begin no calls.
    """

    markers: ClassVar[tuple[str, ...]]
    """Texts that may begin something other than content."""
    bare_markers: ClassVar[tuple[str, ...]] = ()
    """Those of the markers that ordinary text has too, such as a bracket."""
    control_tokens: ClassVar[tuple[str, ...]] = ()
    """Markup that must be kept in the text even if the vocabulary has it as a control token."""

    def __init__(self, tools: Tools, *, only_tagged: bool = False) -> None:
        self._tools = tools
        bare = self.bare_markers if only_tagged else ()
        self._markers = tuple(marker for marker in self.markers if marker not in bare)
        self._pattern = re.compile("|".join(map(re.escape, self._markers)))
        self._text = ""
        self._mark = 0
        """Text before this offset is settled."""
        self._at = 0
        """Text before this offset has been examined."""
        self._ended = False
        self._after_call = False
        """A call has ended, and no content was emitted after it."""
        self._num_calls = 0
        self._call_ids: set[str] = set()
        self._events: list[Event] = []
        self._reader = self._parse()

    @classmethod
    def has_tags(cls) -> bool:
        """Return whether the format has markers that ordinary text lacks."""
        return set(cls.markers) > set(cls.bare_markers)

    def feed(self, text: str) -> list[Event]:
        """Append `text` and return the events that it makes certain."""
        self._text = self._text[self._mark :] + text
        self._at -= self._mark
        self._mark = 0
        next(self._reader, None)
        return self._take_events()

    def finish(self) -> list[Event]:
        """Return the remaining events, once no more text comes."""
        self._ended = True
        next(self._reader, None)
        return self._take_events()

    @abstractmethod
    def _parse(self) -> Reader[None]:
        """Read the whole text."""

    def new_id(self) -> str:
        """Return a new id for a call."""
        return f"call_{secrets.token_hex(12)}"

    # -- the parts of a message ---------------------------------------------------------------

    def _begin_call(self, name: str, id: str | None = None) -> None:
        """Emit the start of a call and settle its markup. Raises Malformed for a bad name.

        The call gets a new id if it has none, or one that an earlier call has.
        """
        if not TOOL_NAME.fullmatch(name):
            raise Malformed
        if id is None or id in self._call_ids:
            id = self.new_id()
        self._call_ids.add(id)
        self._events.append(ToolCallStart(self._num_calls, id, name))
        self._num_calls += 1
        self._mark = self._at
        self._after_call = False

    def _emit_arguments(self, text: str) -> None:
        """Emit more of the last call's arguments and settle the text that was read."""
        if text:
            self._events.append(ToolCallArguments(self._num_calls - 1, text))
        self._mark = self._at

    def _end_call(self) -> None:
        """Mark the last call as complete and settle its markup."""
        self._mark = self._at
        self._after_call = True

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # -- readers ------------------------------------------------------------------------------

    def _peek(self) -> Reader[str]:
        """Return the next character without taking it, or "" at the end of the text."""
        while self._at >= len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def _skip_space(self) -> Reader[None]:
        while (char := (yield from self._peek())) and char in _SPACE:
            self._at += 1

    def _take(self, expected: str) -> Reader[bool]:
        """Take `expected` if the text goes on with it, and return whether it does."""
        while True:
            there = self._text[self._at : self._at + len(expected)]
            if there == expected:
                self._at += len(expected)
                return True
            if self._ended or not expected.startswith(there):
                return False
            yield

    def _expect(self, expected: str) -> Reader[None]:
        """Take `expected`, or raise Malformed."""
        if not (yield from self._take(expected)):
            raise Malformed

    def _take_last(self, tag: str) -> Reader[bool]:
        """Take the tag that ends calls, or as much of it as there is at the end of the text, and
        return whether it was there."""
        if (yield from self._take(tag)):
            return True
        if self._ended and tag.startswith(self._text[self._at :]):
            self._at = len(self._text)
            return True
        return False

    def _close(self, tag: str) -> Reader[None]:
        """Take white space and the tag that ends calls, or as much of it as there is at the end of
        the text. Raises Malformed if something else follows."""
        yield from self._skip_space()
        if not (yield from self._take_last(tag)):
            raise Malformed
        self._end_call()

    def _name(self) -> Reader[str]:
        """Take a run of characters that names may have. Raises Malformed if it is too long."""
        start = self._at - self._mark
        while _NAME_CHARACTER.match((yield from self._peek())):
            self._at += 1
            if self._at - self._mark - start > _MAX_NAME:
                raise Malformed
        return self._text[self._mark + start : self._at]

    def _scan_json(self, emit: Callable[[str], None]) -> Reader[None]:
        """Take a JSON value and pass its text to `emit` as it comes. Raises Malformed."""
        scanner = JsonScanner()
        while not scanner.done:
            if scanner.failed or not (yield from self._peek()):
                raise Malformed
            self._at, text = scanner.feed(self._text, self._at)
            emit(text)

    def _json(self) -> Reader[str]:
        """Take a JSON value and return its text. Raises Malformed."""
        parts: list[str] = []
        yield from self._scan_json(parts.append)
        return "".join(parts)

    def _stream_arguments(self) -> Reader[None]:
        """Take a JSON value and emit it as arguments as it comes. Raises Malformed."""
        yield from self._scan_json(self._emit_arguments)

    def _buffered_arguments(self) -> Reader[str]:
        """Read arguments that cannot be streamed: an object, the JSON text of one in a string, or
        null or an empty string for no arguments. Returns the text of the object. Raises
        Malformed."""
        first = yield from self._peek()
        text = yield from self._json()
        if first in ("'", '"'):
            inner = str(json.loads(text)).strip() or "null"
            scanner = JsonScanner()
            end, text = scanner.feed(inner, 0)
            if not scanner.done or end < len(inner):
                raise Malformed
        if text == "null":
            return "{}"
        if not text.startswith("{"):
            raise Malformed
        return text

    def _call_with(self, name: str, id: str | None = None) -> Reader[None]:
        """Read the arguments of a call and emit it, streamed if they are an object. Raises
        Malformed."""
        if (yield from self._peek()) == "{":
            self._begin_call(name, id)
            yield from self._stream_arguments()
        else:
            arguments = yield from self._buffered_arguments()
            self._begin_call(name, id)
            self._emit_arguments(arguments)
        self._end_call()

    def _string(self) -> Reader[str]:
        """Take a JSON string and return its value. Raises Malformed."""
        if (yield from self._peek()) not in ("'", '"'):
            raise Malformed
        value: str = json.loads((yield from self._json()))
        return value
