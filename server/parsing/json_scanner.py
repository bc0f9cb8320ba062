"""Where a JSON value ends, in text that comes in pieces, and whether it is one so far."""

from __future__ import annotations

import json
import re
from enum import Enum, auto

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACE = " \t\r\n"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}


class _State(Enum):
    VALUE = auto()
    FIRST_ITEM = auto()  # a value, or the end of an empty array
    FIRST_KEY = auto()  # a key, or the end of an empty object
    KEY = auto()
    COLON = auto()
    NEXT = auto()  # a comma, or the end of what surrounds
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    NUMBER = auto()
    LITERAL = auto()
    DONE = auto()
    FAILED = auto()


_NUMBER = {
    ("-", "0"): "0",
    ("-", "9"): "int",
    ("0", "."): ".",
    ("0", "e"): "e",
    ("int", "0"): "int",
    ("int", "9"): "int",
    ("int", "."): ".",
    ("int", "e"): "e",
    (".", "0"): "fraction",
    (".", "9"): "fraction",
    ("fraction", "0"): "fraction",
    ("fraction", "9"): "fraction",
    ("fraction", "e"): "e",
    ("e", "+"): "sign",
    ("e", "-"): "sign",
    ("e", "0"): "exponent",
    ("e", "9"): "exponent",
    ("sign", "0"): "exponent",
    ("sign", "9"): "exponent",
    ("exponent", "0"): "exponent",
    ("exponent", "9"): "exponent",
}
"""RFC 8259, section 6: (part of the number, class of the next character) → part."""
_NUMBER_MAY_END = frozenset(("0", "int", "fraction", "exponent"))


def _number_class(char: str) -> str:
    return "9" if char in "123456789" else "e" if char == "E" else char


class JsonScanner:
    """Follows one JSON value (RFC 8259) through its text, character by character.

    What it lets through is always the beginning of valid JSON: control characters inside strings,
    which models write for newlines and tabs, come out escaped. A number ends with the character
    behind it, so one at the top level is never `done` by itself.
    """

    def __init__(self) -> None:
        self._state = _State.VALUE
        self._closers: list[str] = []
        self._is_key = False
        self._hex_left = 0
        self._rest = ""
        self._number = ""

    @property
    def done(self) -> bool:
        return self._state is _State.DONE

    @property
    def failed(self) -> bool:
        return self._state is _State.FAILED

    def feed(self, text: str, start: int) -> tuple[int, str]:
        """Read `text` from `start`; the position behind what was taken, and what to show of it.

        Stops before the first character that is not of the value: `done` or `failed` says why.
        """
        shown = []
        at = start
        while at < len(text) and not (self.done or self.failed):
            if self._state is _State.STRING and (plain := _PLAIN.match(text, at)):
                shown.append(plain[0])
                at = plain.end()
                continue
            taken = self._step(text[at])
            if taken is not None:
                shown.append(taken)
                at += 1
        return at, "".join(shown)

    def _step(self, char: str) -> str | None:
        """What to show of a character; None where it was not taken."""
        state = self._state
        if state is _State.STRING:
            return self._in_string(char)
        if state is _State.ESCAPE:
            self._hex_left = 4
            return self._go(_State.HEX if char == "u" else _State.STRING, char, '"\\/bfnrtu')
        if state is _State.HEX:
            self._hex_left -= 1
            following = _State.HEX if self._hex_left else _State.STRING
            return self._go(following, char, "0123456789abcdefABCDEF")
        if state is _State.NUMBER:
            return self._in_number(char)
        if state is _State.LITERAL:
            expected, self._rest = self._rest[0], self._rest[1:]
            return self._go(_State.LITERAL if self._rest else self._after_value(), char, expected)
        if char in _SPACE:
            return char
        return self._at_structure(state, char)

    def _go(self, state: _State, char: str, allowed: str) -> str | None:
        self._state = state if char in allowed else _State.FAILED
        return None if self.failed else char

    def _after_value(self) -> _State:
        return _State.NEXT if self._closers else _State.DONE

    def _in_string(self, char: str) -> str:
        if char == '"':
            self._state = _State.COLON if self._is_key else self._after_value()
        elif char == "\\":
            self._state = _State.ESCAPE
        else:
            return json.dumps(char)[1:-1]
        return char

    def _in_number(self, char: str) -> str | None:
        part = _NUMBER.get((self._number, _number_class(char)))
        if part is not None:
            self._number = part
            return char
        ended = self._number in _NUMBER_MAY_END
        self._state = self._after_value() if ended else _State.FAILED
        return None

    def _at_structure(self, state: _State, char: str) -> str | None:
        closes_empty = state in (_State.FIRST_ITEM, _State.FIRST_KEY)
        if (closes_empty or state is _State.NEXT) and char == self._closers[-1]:
            self._closers.pop()
            self._state = self._after_value()
            return char
        if state is _State.NEXT:
            in_object = self._closers[-1] == "}"
            return self._go(_State.KEY if in_object else _State.VALUE, char, ",")
        if state is _State.COLON:
            return self._go(_State.VALUE, char, ":")
        if state in (_State.FIRST_KEY, _State.KEY):
            self._is_key = True
            return self._go(_State.STRING, char, '"')
        return self._begin_value(char)

    def _begin_value(self, char: str) -> str | None:
        self._is_key = False
        if char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self._state = _State.FIRST_KEY if char == "{" else _State.FIRST_ITEM
        elif char == '"':
            self._state = _State.STRING
        elif char in _LITERALS:
            self._state, self._rest = _State.LITERAL, _LITERALS[char]
        elif char in "-0123456789":
            self._number = char if char in "-0" else "int"
            self._state = _State.NUMBER
        else:
            self._state = _State.FAILED
            return None
        return char
