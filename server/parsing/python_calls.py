"""The base of the formats in which calls are written as in Python, `f(a=1, b="x")`."""

from __future__ import annotations

import json

from .answer_parser import Malformed, Reader
from .python_values import literal_as_json
from .tool_parser import ToolParser

_MAX_KEY = 128
"""Maximum characters of the name of an argument."""


class PythonCalls(ToolParser):
    """Reads such a call. Names of arguments may be words that Python reserves, strings in single
    quotation marks may have line breaks, and values are literals (python_values.py)."""

    def _call(self, *, bare: bool = False, printed: bool = False) -> Reader[tuple[str, str]]:
        """Read `name(…)`, and return the name and the arguments as JSON text. Raises Malformed.

        `bare` says that no marker but a bracket announced the call, `printed` that it stands within
        `print(…)`.
        """
        name = yield from self._name()
        if not name or (bare and name not in self._tools):
            raise Malformed
        yield from self._expect("(")
        if name == "print" and not printed and name not in self._tools:
            yield from self._skip_space()
            call = yield from self._call(printed=True)
            yield from self._skip_space()
            yield from self._expect(")")
            return call
        arguments: dict[str, str] = {}
        while True:
            yield from self._skip_space()
            if (yield from self._take(")")):
                break
            key = yield from self._key()
            if key in arguments:
                raise Malformed
            arguments[key] = literal_as_json((yield from self._value_source()))
            if not (yield from self._take(",")):
                yield from self._expect(")")
                break
        members = (f"{json.dumps(key)}: {value}" for key, value in arguments.items())
        return name, "{" + ", ".join(members) + "}"

    def _key(self) -> Reader[str]:
        """Read the name of an argument and the sign after it. Raises Malformed."""
        start = self._at - self._mark
        while (char := (yield from self._peek())).isalnum() or char == "_":
            self._at += 1
            if self._at - self._mark - start > _MAX_KEY:
                raise Malformed
        key = self._text[self._mark + start : self._at]
        yield from self._skip_space()
        yield from self._expect("=")
        if not key:
            raise Malformed
        return key

    def _value_source(self) -> Reader[str]:
        """Take a value up to the comma or parenthesis after it, and return it in Python's own
        notation. Raises Malformed."""
        parts: list[str] = []
        depth = 0
        while True:
            char = yield from self._peek()
            if char in ("'", '"'):
                parts.append((yield from self._quoted(char)))
                continue
            if not char or char == "#":  # a comment could hide anything
                raise Malformed
            if depth == 0 and char in ",)":
                return "".join(parts)
            self._at += 1
            parts.append(char)
            depth += (char in "([{") - (char in ")]}")

    def _quoted(self, quote: str) -> Reader[str]:
        """Take a Python string that begins with `quote`, or with three of them, and return it with
        its line breaks escaped."""
        if (yield from self._take(quote * 3)):
            quote *= 3
        else:
            self._at += 1
        parts = [quote]
        while not (yield from self._take(quote)):
            char = yield from self._peek()
            self._at += 1
            if char == "\\":
                parts.append(char)
                char = yield from self._peek()
                self._at += 1
                parts.append(char)
            else:
                parts.append({"\n": "\\n", "\r": "\\r", "\0": "\\0"}.get(char, char))
            if not char:
                self._at = len(self._text)
                raise Malformed
        return "".join([*parts, quote])
