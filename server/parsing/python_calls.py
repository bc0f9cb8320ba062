"""The base of the formats in which calls are written as in Python, `f(a=1, b="x")`."""

from __future__ import annotations

import ast
import json
import warnings

from .answer_parser import Malformed, Reader
from .tool_parser import ToolParser

_MAX_KEY = 128
"""Maximum characters of the name of an argument."""


class PythonCalls(ToolParser):
    """Reads such a call. Names of arguments may be words that Python reserves, strings in single
    quotation marks may have line breaks, and values are literals,
    of which nothing is evaluated."""

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


_ERRORS = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
"""Errors of `ast` and `json` for text that is no literal, or none that JSON can express."""


def literal_as_json(source: str) -> str:
    """Return the JSON text of a literal: a string, number, True, False or None, or a list, tuple,
    set or dict of such; JSON's true, false and null are accepted too. Tuples and sets become lists.

    Raises Malformed for anything else, such as a name, an operation, bytes, an f-string, or a
    number that JSON cannot express.
    """
    if not source.strip():
        raise Malformed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes such as "\d"
            tree = ast.parse(f"({source}\n)", mode="eval").body
        value = ast.literal_eval(_JsonNames().visit(tree))
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # JSON writes a character outside the basic plane as two escapes, which Python keeps apart.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except _ERRORS as error:
        raise Malformed from error


class _JsonNames(ast.NodeTransformer):
    """Replaces the names `true`, `false` and `null` by Python's constants, and sets by lists, which
    keep their order."""

    _VALUES = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self._VALUES[node.id]) if node.id in self._VALUES else node

    def visit_Set(self, node: ast.Set) -> ast.expr:
        return ast.List([self.visit(item) for item in node.elts], ast.Load())
