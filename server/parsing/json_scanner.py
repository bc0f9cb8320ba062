"""Finds the end of a JSON value in text that comes in pieces, and checks it on the way.

Theory of operation
-------------------
The scanner is a pushdown automaton for the grammar of RFC 8259. `_state` says what may come next,
and `_closers` is a stack of the brackets that are still to be closed:

    VALUE ─┬─ `"` ─▶ STRING (ESCAPE and HEX within it) ─ `"` ─▶ after the value
           ├─ `-`, digit ─▶ NUMBER (its parts: _NUMBER) ─▶ after the value
           ├─ `t`, `f`, `n` ─▶ LITERAL (the rest of the word) ─▶ after the value
           ├─ `[` ─▶ FIRST_ITEM ─▶ as VALUE, or `]`
           └─ `{` ─▶ FIRST_KEY ─▶ as KEY, or `}`
    KEY ─ `"` ─▶ STRING ─▶ COLON ─ `:` ─▶ VALUE

    after the value:  DONE at the top level, NEXT within brackets
    NEXT ─┬─ `,` ─▶ VALUE in an array, KEY in an object
          └─ the closing bracket ─▶ after the value that it closes

Every character is either accepted, or the scanner ends before it, DONE or FAILED. The text that has
been returned is at any time the beginning of valid JSON, and can be streamed to a client.

Models bend the grammar, and what they mean is plain. So these are accepted and come out as JSON:

    raw control characters in strings     escaped
    a backslash before an apostrophe      the apostrophe
    one before any other letter           the backslash itself, and the letter
    Python's escapes in single quotes     the character
    strings in single quotes              in double quotes
    True, False, None                     true, false, null
    a comma before a closing bracket      dropped

An escape, the letters of None, and a comma with the white space after it are held back until the
text after them shows what they come out as; a comma is the state COMMA between NEXT and the rest.

The end of a number shows only in the character after it, which is not taken: a number at the top
level is never `done` by itself.

jiter and pydantic_core parse partial JSON too, but neither reports where a value ends and that all
before it is a valid beginning.
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto

_PLAIN = {
    '"': re.compile(r'[^"\\\x00-\x1f]+'),
    "'": re.compile(r"""[^"'\\\x00-\x1f]+"""),
}
"""Text of a string that needs no look at single characters, by the string's quotation mark."""
_HEX_DIGITS = {"u": 4, "x": 2, "U": 8}
"""Digits of the escapes that name a character by its number; the last two are Python's."""
_SPACE = " \t\r\n"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull", "T": "rue", "F": "alse", "N": "one"}


class _State(Enum):
    VALUE = auto()
    FIRST_ITEM = auto()  # a value, or the end of an empty array
    FIRST_KEY = auto()  # a key, or the end of an empty object
    KEY = auto()
    COLON = auto()
    NEXT = auto()  # a comma, or the end of the surrounding array or object
    COMMA = auto()  # white space after a comma, which may turn out to be the last
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
"""The parts of a number (RFC 8259, section 6): (part, class of the next character) → next part."""
_NUMBER_MAY_END = frozenset(("0", "int", "fraction", "exponent"))
"""Parts after which a number is complete."""


def _number_class(char: str) -> str:
    """Return the class of a character in _NUMBER: "9" stands for 1 to 9, "e" for E too."""
    return "9" if char in "123456789" else "e" if char == "E" else char


class JsonScanner:
    """Follows one JSON value through its text, character by character."""

    def __init__(self) -> None:
        self._state = _State.VALUE
        self._closers: list[str] = []
        self._is_key = False
        self._quote = '"'
        self._held = ""
        self._rest = ""
        self._is_none = False
        self._number = ""

    @property
    def done(self) -> bool:
        """The value is complete."""
        return self._state is _State.DONE

    @property
    def failed(self) -> bool:
        """The next character cannot continue the value."""
        return self._state is _State.FAILED

    def feed(self, text: str, start: int) -> tuple[int, str]:
        """Read `text` from `start`. Returns the offset after the accepted characters, and these
        characters as valid JSON.

        Stops before the first character that does not belong to the value; `done` or `failed` says
        why.
        """
        accepted = []
        at = start
        while at < len(text) and not (self.done or self.failed):
            if self._state is _State.STRING and (plain := _PLAIN[self._quote].match(text, at)):
                accepted.append(plain[0])
                at = plain.end()
                continue
            taken = self._step(text[at])
            if taken is not None:
                accepted.append(taken)
                at += 1
        return at, "".join(accepted)

    def _step(self, char: str) -> str | None:
        """Return the JSON text of a character, or None if it was not accepted: because it ended a
        number and must be read again in the new state, or because the scanner has failed."""
        state = self._state
        if state is _State.STRING:
            return self._in_string(char)
        if state is _State.ESCAPE:
            return self._in_escape(char)
        if state is _State.HEX:
            return self._in_hex(char)
        if state is _State.NUMBER:
            return self._in_number(char)
        if state is _State.LITERAL:
            return self._in_literal(char)
        if state is _State.COMMA:
            return self._after_comma(char)
        if char in _SPACE:
            return char
        return self._at_structure(state, char)

    def _go(self, state: _State, char: str, allowed: str) -> str | None:
        """Accept a character of `allowed` and go to `state`, or fail."""
        self._state = state if char in allowed else _State.FAILED
        return None if self.failed else char

    def _after_value(self) -> _State:
        """Return the state after a complete value."""
        return _State.NEXT if self._closers else _State.DONE

    def _in_string(self, char: str) -> str:
        if char == self._quote:
            self._state = _State.COLON if self._is_key else self._after_value()
            return '"'
        if char == "\\":
            self._state = _State.ESCAPE
            return ""
        return json.dumps(char, ensure_ascii=False)[1:-1]  # escaped, unless it is plain text

    def _in_escape(self, char: str) -> str:
        self._state = _State.STRING
        if char == "u" or (char in _HEX_DIGITS and self._quote == "'"):
            self._state, self._held = _State.HEX, char
            return ""
        if char == "'":
            return char
        if char in '"\\/bfnrt':
            return "\\" + char
        return "\\\\" + json.dumps(char, ensure_ascii=False)[1:-1]

    def _in_hex(self, char: str) -> str:
        """Read a digit of an escape. `_held` is its letter and the digits before this one."""
        letter, digits = self._held[0], self._held[1:] + char
        if char not in "0123456789abcdefABCDEF" or (letter == "U" and int(digits, 16) > 0x10FFFF):
            self._state = _State.STRING
            return "\\\\" + self._held + self._in_string(char)
        self._held += char
        if len(digits) < _HEX_DIGITS[letter]:
            return ""
        self._state = _State.STRING
        return f"\\u{digits}" if letter == "u" else json.dumps(chr(int(digits, 16)))[1:-1]

    def _in_literal(self, char: str) -> str | None:
        expected, self._rest = self._rest[0], self._rest[1:]
        text = self._go(_State.LITERAL if self._rest else self._after_value(), char, expected)
        if self._is_none and text is not None:
            return "" if self._rest else "null"
        return text

    def _after_comma(self, char: str) -> str | None:
        """Read the first character after a comma, or white space before it."""
        if char in _SPACE:
            self._held += char
            return ""
        if char == self._closers[-1]:
            self._closers.pop()
            self._state = self._after_value()
            return self._held[1:] + char
        state = _State.KEY if self._closers[-1] == "}" else _State.VALUE
        text = self._at_structure(state, char)
        return None if text is None else self._held + text

    def _in_number(self, char: str) -> str | None:
        part = _NUMBER.get((self._number, _number_class(char)))
        if part is not None:
            self._number = part
            return char
        ended = self._number in _NUMBER_MAY_END
        self._state = self._after_value() if ended else _State.FAILED
        return None

    def _at_structure(self, state: _State, char: str) -> str | None:
        """Read a character between the parts of a value: a bracket, comma, colon or first one."""
        closes_empty = state in (_State.FIRST_ITEM, _State.FIRST_KEY)
        if (closes_empty or state is _State.NEXT) and char == self._closers[-1]:
            self._closers.pop()
            self._state = self._after_value()
            return char
        if state is _State.NEXT:
            self._held = char
            return None if self._go(_State.COMMA, char, ",") is None else ""
        if state is _State.COLON:
            return self._go(_State.VALUE, char, ":")
        if state in (_State.FIRST_KEY, _State.KEY):
            return self._begin_string(char, is_key=True)
        return self._begin_value(char)

    def _begin_value(self, char: str) -> str | None:
        """Read the first character of a value."""
        if char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self._state = _State.FIRST_KEY if char == "{" else _State.FIRST_ITEM
        elif char in _PLAIN:
            return self._begin_string(char, is_key=False)
        elif char in _LITERALS:
            self._state, self._rest = _State.LITERAL, _LITERALS[char]
            self._is_none = char == "N"
            return "" if self._is_none else char.lower()
        elif char in "-0123456789":
            self._number = char if char in "-0" else "int"
            self._state = _State.NUMBER
        else:
            self._state = _State.FAILED
            return None
        return char

    def _begin_string(self, char: str, *, is_key: bool) -> str | None:
        self._quote, self._is_key = char, is_key
        return None if self._go(_State.STRING, char, "\"'") is None else '"'
