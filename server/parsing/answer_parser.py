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
from collections.abc import Callable, Collection, Generator
from typing import ClassVar, TypeVar

from .json_scanner import JsonScanner
from .message_events import Event, ToolCallArguments, ToolCallStart

_T = TypeVar("_T")
Reader = Generator[None, None, _T]
"""A generator that reads from the text, yields when it needs more text, and returns its result."""

TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/\-]{1,128}")
"""The names that tools may have."""
_NAME_CHARACTER = re.compile(r"[A-Za-z0-9_.:/\-]")
_MAX_NAME = 128
_SPACE = " \t\r\n"


class Malformed(Exception):
    """The text is not a call. `_at` stands before the character that shows it."""


class AnswerParser(ABC):
    """Turns the text of one message into events. `tool_names` are the tools of the request."""

    markers: ClassVar[tuple[str, ...]]
    """Texts that may begin something other than content."""
    control_tokens: ClassVar[tuple[str, ...]] = ()
    """Markup that must be kept in the text even if the vocabulary has it as a control token."""

    def __init__(self, tool_names: Collection[str]) -> None:
        self._tool_names = frozenset(tool_names)
        self._pattern = re.compile("|".join(map(re.escape, self.markers)))
        self._text = ""
        self._mark = 0
        """Text before this offset is settled."""
        self._at = 0
        """Text before this offset has been examined."""
        self._ended = False
        self._after_call = False
        """A call has ended, and no content was emitted after it."""
        self._num_calls = 0
        self._events: list[Event] = []
        self._reader = self._parse()

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

    def _begin_call(self, name: str) -> None:
        """Emit the start of a call and settle its markup. Raises Malformed for a bad name."""
        if not TOOL_NAME.fullmatch(name):
            raise Malformed
        self._events.append(ToolCallStart(self._num_calls, self.new_id(), name))
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

    def _close(self, tag: str) -> Reader[None]:
        """Take the tag that ends calls, or as much of it as there is at the end of the text."""
        yield from self._skip_space()
        if not (yield from self._take(tag)):
            if not (self._ended and tag.startswith(self._text[self._at :])):
                raise Malformed
            self._at = len(self._text)
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

    def _string(self) -> Reader[str]:
        """Take a JSON string and return its value. Raises Malformed."""
        if (yield from self._peek()) != '"':
            raise Malformed
        value: str = json.loads((yield from self._json()))
        return value
