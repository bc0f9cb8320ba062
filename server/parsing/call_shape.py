"""How calls are written in a format, so that a grammar can make a model write them.

A shape is data. `call_rules` turns it, and the schema of a tool, into rules in llguidance's
dialect of Lark, for the grammar that server/requests/forced_calls.py writes. Arguments are either
one JSON object, or parameters one by one:

    args_0: head_0_0                               in the order of the schema
    head_0_0: p_0_0 tail_0_1 | head_0_1            the second only if p_0_0 may be left out
    tail_0_1: separator p_0_1 tail_0_2 | tail_0_2
    p_0_0: before "name" between <value> after
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from ...engine.errors import InvalidRequestError
from ...engine.grammar.compile import with_json_options
from .schema_values import TEXT, resolve, types_of

NUMBER = "\0"
"""Stands in a shape for a number that the model chooses, such as a call's index."""
_ROOT_KEYS = frozenset(
    ("type", "properties", "required", "additionalProperties", "description", "title", "$defs")
) | {"definitions", "$schema"}
"""Keys of a tool's schema that parameters written one by one can follow."""
_TEXT_KEYS = frozenset(("type", "description", "title", "default", "examples", "enum", "const"))
"""Keys of a text's schema that are followed if the text is not written as JSON."""
_PLAIN_NAME = re.compile(r"[^\s<>\"'=:{}|,\\]{1,128}")


class ParameterShape(NamedTuple):
    """How an argument is written by itself: `before`, its name, `between`, its value, `after`."""

    before: str
    between: str
    after: str = ""
    separator: str = ""
    """Text between two arguments."""
    text: tuple[str, str, str] | None = None
    """The text before a string value, the text that ends it, and the text after that; then `after`
    is for other values. None if strings are written as in JSON."""
    python: bool = False
    """Booleans are written as Python writes them."""


class CallShape(NamedTuple):
    """How calls are written: each is `before`, name, `between`, arguments, `after`."""

    first: str
    """Text before all calls."""
    before: str
    between: str
    after: str
    separator: str
    """Text between two calls. With the first character of a call after it, it must not be the
    beginning of `last`, since a grammar's lexer would take it for that."""
    last: str
    """Text after all calls."""
    parameters: ParameterShape | None = None
    """How each argument is written; None if the arguments are a JSON object."""


JSON_CALL = '{"name": "', '", "arguments": ', "}"
"""`before`, `between` and `after` of a call as a JSON object."""


def call_rules(
    shape: CallShape, number: int, tool: Mapping[str, Any], literal: Callable[[str], str]
) -> list[str]:
    """Return the rules for calls of one tool; the first defines `call_{number}`.

    `literal` writes a text in Lark. Raises InvalidRequestError if the schema cannot be followed.
    """

    def text(value: str) -> str:
        return " /[0-9]{1,3}/ ".join(map(literal, value.split(NUMBER)))

    before, after = text(shape.before + tool["name"] + shape.between), text(shape.after)
    if shape.parameters is None:
        arguments = _json({**tool["parameters"], "type": "object"})
        return [f"call_{number}: {before} {arguments} {after}"]
    writer = _ParameterRules(shape.parameters, number, tool, literal)
    return [f"call_{number}: {before} args_{number} {after}", *writer.rules()]


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps(with_json_options(schema))


class _ParameterRules:
    """Writes the rules for the arguments of one tool."""

    def __init__(
        self,
        shape: ParameterShape,
        number: int,
        tool: Mapping[str, Any],
        literal: Callable[[str], str],
    ) -> None:
        self._shape = shape
        self._number = number
        self._tool = tool
        self._schema: Mapping[str, Any] = tool["parameters"]
        self._literal = literal

    def rules(self) -> list[str]:
        """Return all rules; the first defines `args_{number}`."""
        # 1. Check that nothing in the schema relates the arguments to each other.
        for key in self._schema.keys() - _ROOT_KEYS:
            self._refuse(f"{key!r}")
        required = self._schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self._refuse("a wrong 'required'")
        properties = {**dict.fromkeys(required, {}), **self._schema.get("properties", {})}
        for name in properties:
            if not _PLAIN_NAME.fullmatch(name):
                self._refuse(f"the name {name[:64]!r}")
        # 2. Write a rule for each argument, and one for those from each place on: `head` if none
        #    has come before, `tail` if a separator must come first.
        n, last = self._number, len(properties)
        rules = [f"args_{n}: head_{n}_0"]
        for index, (name, schema) in enumerate(properties.items()):
            rules += self._argument(f"p_{n}_{index}", name, schema)
            separator = self._literal(self._shape.separator)
            for kind, lead in (("head", ""), ("tail", separator)):
                skip = "" if name in required else f" | {kind}_{n}_{index + 1}"
                rules.append(f"{kind}_{n}_{index}: {lead} p_{n}_{index} tail_{n}_{index + 1}{skip}")
        return [*rules, f'head_{n}_{last}: ""', f'tail_{n}_{last}: ""']

    def _argument(self, rule: str, name: str, schema: Any) -> list[str]:
        """Return the rules for one argument."""
        shape, literal = self._shape, self._literal
        before = literal(shape.before + name + shape.between)
        after = literal(shape.after)
        types = types_of(schema, self._schema)
        if shape.text is None:
            value = self._python(types) if shape.python else None
            return [f"{rule}: {before} {value or self._value(schema)} {after}"]
        # 1. Numbers, lists and the like are JSON.
        if types and "string" not in types:
            return [f"{rule}: {before} {self._value(schema)} {after}"]
        # 2. A text is one of several, or ends with the text that the parser looks for.
        opening, closing, rest = map(literal, shape.text)
        schema = self._resolved(schema)
        if values := self._choices(schema):
            spelt = " | ".join(literal(value) or '""' for value in values)
            ending = f"{closing} {rest}" if opening else after
            return [f"{rule}: {before} {opening} ({spelt}) {ending}"]
        if types == TEXT:
            for key in schema.keys() - _TEXT_KEYS:
                self._refuse(f"{key!r} of {name[:64]!r}")
        # The pattern never matches a control token, so only a closing tag that is text needs the
        # lazy match, which ends the value at the first one.
        lazy = "" if closing.startswith("<[") else "[lazy]"
        return [
            f"{rule}: {before} {opening} {rule}_text {rest}",
            rf"{rule}_text{lazy}: /(.|\n)*/ {closing}",
        ]

    def _python(self, types: frozenset[str]) -> str | None:
        return '("True" | "False")' if types == {"boolean"} else None

    def _value(self, schema: Any) -> str:
        """Return Lark for a JSON value, which may refer to definitions of the tool's schema."""
        defined = {
            key: self._schema[key] for key in ("$defs", "definitions") if key in self._schema
        }
        return _json({**defined, **schema} if isinstance(schema, dict) else {})

    def _resolved(self, schema: Any) -> Mapping[str, Any]:
        if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
            schema = resolve(schema["$ref"], self._schema)
        return schema if isinstance(schema, Mapping) else {}

    def _choices(self, schema: Mapping[str, Any]) -> list[str]:
        """Return the only texts that a value may be, or nothing if there are others."""
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return values
        return []

    def _refuse(self, what: str) -> NoReturn:
        raise InvalidRequestError(
            f"calls of {self._tool['name']!r} cannot be forced in this model's format: its schema "
            f"has {what}, which cannot be enforced there",
            "tool_choice",
        )
