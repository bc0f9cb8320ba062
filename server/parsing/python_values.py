"""Values that are written as Python literals, converted to JSON. Nothing is evaluated."""

from __future__ import annotations

import ast
import json
import warnings

from .answer_parser import Malformed

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
