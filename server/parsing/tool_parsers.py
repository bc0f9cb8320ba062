"""The calls in a model's text: one incremental parser for streamed and whole answers alike.

A parser is a generator over the text so far; it yields where it needs more. What it decides, it
decides by the text alone and never by how that was cut, so every cutting gives the same message.
Text that begins like a call and turns out to be none is content. A call whose arguments have begun
to stream cannot be taken back: what follows their last valid character is content then.
"""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator
from typing import ClassVar, TypeVar

from .json_scanner import JsonScanner
from .message_events import ContentText, Event, ToolCallArguments, ToolCallStart
from .reasoning import before_space, undecided_tail

_T = TypeVar("_T")
Steps = Generator[None, None, _T]
"""Yields where more text is needed."""

TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/\-]{1,128}")
_NAME_CHARACTER = re.compile(r"[A-Za-z0-9_.:/\-]")
_MAX_NAME = 128
_SPACE = " \t\r\n"


class Malformed(Exception):
    """The text is no call; the position stands before the character that shows it."""


class AnswerParser(ABC):
    """Text of one message to events. `tool_names` are those that the request offers."""

    markers: ClassVar[tuple[str, ...]]
    """What may begin something that is no text."""
    control_tokens: ClassVar[tuple[str, ...]] = ()
    """What must be seen in the text although the vocabulary may call it a control token."""

    def __init__(self, tool_names: Collection[str]) -> None:
        self._tool_names = frozenset(tool_names)
        self._pattern = re.compile("|".join(map(re.escape, self.markers)))
        self._text = ""
        self._mark = 0
        """What stands before is told in events."""
        self._at = 0
        """What stands before is looked at."""
        self._ended = False
        self._after_call = False
        self._num_calls = 0
        self._events: list[Event] = []
        self._steps = self._parse()

    def feed(self, text: str) -> list[Event]:
        """What `text` makes certain."""
        self._text = self._text[self._mark :] + text
        self._at -= self._mark
        self._mark = 0
        next(self._steps, None)
        return self._take_events()

    def finish(self) -> list[Event]:
        """The rest, once no more text comes."""
        self._ended = True
        next(self._steps, None)
        return self._take_events()

    @abstractmethod
    def _parse(self) -> Steps[None]:
        """Read all of it."""

    def new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    # -- the parts of a message ---------------------------------------------------------------

    def _begin_call(self, name: str) -> None:
        if not TOOL_NAME.fullmatch(name):
            raise Malformed
        self._events.append(ToolCallStart(self._num_calls, self.new_id(), name))
        self._num_calls += 1
        self._mark = self._at
        self._after_call = False

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(ToolCallArguments(self._num_calls - 1, text))
        self._mark = self._at

    def _settle(self) -> None:
        """A call is whole, and what was read is no content."""
        self._mark = self._at
        self._after_call = True

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # -- reading ------------------------------------------------------------------------------

    def _peek(self) -> Steps[str]:
        """The next character, "" at the end."""
        while self._at >= len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def _space(self) -> Steps[None]:
        while (char := (yield from self._peek())) and char in _SPACE:
            self._at += 1

    def _literal(self, expected: str) -> Steps[bool]:
        """Take `expected` if it stands here."""
        while True:
            there = self._text[self._at : self._at + len(expected)]
            if there == expected:
                self._at += len(expected)
                return True
            if self._ended or not expected.startswith(there):
                return False
            yield

    def _expect(self, expected: str) -> Steps[None]:
        if not (yield from self._literal(expected)):
            raise Malformed

    def _close(self, tag: str) -> Steps[None]:
        """Take `tag`, or as much of it as came before the end."""
        yield from self._space()
        if not (yield from self._literal(tag)):
            if not (self._ended and tag.startswith(self._text[self._at :])):
                raise Malformed
            self._at = len(self._text)
        self._settle()

    def _name(self) -> Steps[str]:
        start = self._at - self._mark
        while _NAME_CHARACTER.match((yield from self._peek())):
            self._at += 1
            if self._at - self._mark - start > _MAX_NAME:
                raise Malformed
        return self._text[self._mark + start : self._at]

    def _json(self, *, tell: bool = False) -> Steps[str]:
        """The text of a JSON value; with `tell` it is told as arguments while it comes."""
        scanner = JsonScanner()
        parts = []
        while not scanner.done:
            if scanner.failed or not (yield from self._peek()):
                raise Malformed
            self._at, shown = scanner.feed(self._text, self._at)
            if tell:
                self._arguments(shown)
            else:
                parts.append(shown)
        return "".join(parts)

    def _string(self) -> Steps[str]:
        if (yield from self._peek()) != '"':
            raise Malformed
        value: str = json.loads((yield from self._json()))
        return value


class ToolParser(AnswerParser):
    """Parsers of calls amid content."""

    @abstractmethod
    def _calls(self, marker: str) -> Steps[None]:
        """Read the calls behind `marker`. Raises Malformed."""

    def _parse(self) -> Steps[None]:
        while marker := (yield from self._content()):
            try:
                yield from self._calls(marker)
            except Malformed:
                continue  # what is not told in events is content

    def _content(self) -> Steps[str]:
        """Tell the text up to a marker, less the space before it. Returns the marker, "" at the
        end."""
        while True:
            if found := self._pattern.search(self._text, self._at):
                self._tell(before_space(self._text, found.start()))
                self._at = found.end()
                return found[0]
            if self._ended:
                if not (self._after_call and self._text[self._mark :].isspace()):
                    self._tell(len(self._text))
                return ""
            keep = undecided_tail(self._text, self.markers, self._at)
            self._tell(keep)
            self._at = max(self._at, keep)
            yield

    def _tell(self, end: int) -> None:
        if end > self._mark:
            self._events.append(ContentText(self._text[self._mark : end]))
            self._mark = end
            self._after_call = False


class JsonCalls(ToolParser):
    """Parsers of calls as JSON objects with a name and arguments."""

    def _call_object(self, *, bare: bool = False) -> Steps[None]:
        """`{"name": …, "arguments": {…}}`, "parameters" being another name of the latter.

        Members come in any order, and others are passed over. `bare`: nothing but the object
        itself says that it is a call, so it must name an offered tool first and have arguments.
        """
        yield from self._expect("{")
        name: str | None = None
        begun = False
        arguments: str | None = None
        while True:
            yield from self._space()
            key = yield from self._string()
            yield from self._space()
            yield from self._expect(":")
            yield from self._space()
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
                    arguments = yield from self._json(tell=True)
                    self._settle()
                else:
                    arguments = yield from self._other_arguments()
            elif bare:
                if key not in ("type", "id"):
                    raise Malformed
                yield from self._string()
            else:
                yield from self._json()
            yield from self._space()
            if (yield from self._literal("}")):
                break
            yield from self._expect(",")
        if name is None or (bare and arguments is None):
            raise Malformed
        if not begun:
            self._begin_call(name)
            self._arguments(arguments or "{}")
        self._settle()

    def _other_arguments(self) -> Steps[str]:
        """Arguments before the name, as a JSON text inside a string, or null."""
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
