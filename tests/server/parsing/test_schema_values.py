"""Types of arguments by the schemas of tools, and bare texts read as values of these types."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.parsing.schema_values import ANY, TEXT, argument_types, value_as_json

from .pieces import JSON

DEFINED = {"$defs": {"a/b": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
"""Definitions that schemas of the tests refer to."""


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"type": "number", "nullable": True}, {"number", "null"}),
        ({"const": True}, {"boolean"}),
        ({"enum": ["a", 1, None, 1.5, [], {}]}, {"string", "integer", "null", "number", "array",
                                                 "object"}),
        ({"$ref": "#/$defs/a~1b"}, {"integer"}),
        ({"$ref": "#/$defs/missing"}, set()),
        ({"$ref": "http://x/y"}, set()),
        ({"$ref": "#/$defs/loop"}, set()),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/a~1b"}]}, {"string", "integer"}),
        ({"oneOf": [{"type": "string"}, {}]}, set()),
        ({"allOf": [{"description": "x"}, {"type": "array"}]}, {"array"}),
        ({"description": "x"}, set()),
        (True, set()),
        ({"type": 5}, set()),
    ],
)  # fmt: skip
def test_types_by_the_schema(schema: Any, types: set[str]) -> None:
    assert argument_types({"properties": {"x": schema}, **DEFINED}, "x") == types
    assert argument_types({"properties": {"x": schema}}, "y") == ANY
    assert argument_types({"properties": "x"}, "x") == ANY


def test_schemas_that_refer_to_each_other_take_linear_time() -> None:
    names = [f"d{number}" for number in range(90)]
    refers = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    schema = {"properties": {"x": refers}, "$defs": dict.fromkeys(names, refers)}
    schema["$defs"] = {name: {"anyOf": list(refers["anyOf"])} for name in names}
    began = time.process_time()
    assert argument_types(schema, "x") == ANY
    chain = {f"c{number}": {"$ref": f"#/$defs/c{number + 1}"} for number in range(5000)}
    assert argument_types({"properties": {"x": {"$ref": "#/$defs/c0"}}, "$defs": chain}, "x") == ANY
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("5", TEXT, "5"),
        ("5", {"integer"}, 5),
        (" 5\n", {"integer"}, 5),
        ("5.0", {"integer"}, 5),
        ("5.5", {"integer"}, "5.5"),
        ("1e400", {"integer"}, "1e400"),
        ("5", {"number"}, 5),
        ("five", {"number"}, "five"),
        ("true", {"boolean"}, True),
        ("FALSE", {"boolean"}, False),
        ("null", {"string", "null"}, None),
        ("null", TEXT, "null"),
        ("[1, 'a']", {"array"}, [1, "a"]),
        ("[1", {"array"}, "[1"),
        ("{}", {"array"}, "{}"),
        ('"a"', ANY, '"a"'),
        ("so", ANY, "so"),
        ("", ANY, ""),
        ("-1.5", ANY, -1.5),
        ("01", ANY, "01"),
    ],
)
def test_values_by_their_types(text: str, types: Any, value: Any) -> None:
    read = json.loads(value_as_json(text, frozenset(types)))
    assert (read, type(read)) == (value, type(value))


@given(JSON)
def test_any_value_is_read_back_by_its_type(value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    kind = kinds.get(type(value), "object" if isinstance(value, dict) else "null")
    assert json.loads(value_as_json(text, frozenset((kind,)))) == value


@given(st.text(max_size=12), st.sampled_from([ANY, TEXT, frozenset(("integer", "array"))]))
def test_any_text_gives_valid_json(text: str, types: frozenset[str]) -> None:
    json.loads(value_as_json(text, types))
