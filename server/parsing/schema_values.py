"""Values that a model writes as bare text, converted to JSON by the schema of the tool.

`<parameter=days>5</parameter>` does not say whether 5 is a number or a text; the JSON schema does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .json_scanner import JsonScanner

Types = frozenset[str]
"""JSON types, as schemas name them. An empty set means that any type is allowed."""

ANY: Types = frozenset()
TEXT: Types = frozenset(("string",))
_MAX_SCHEMAS = 100
"""Maximum schemas that are visited to find the types of an argument; with more, it is any type."""


def argument_types(schema: Mapping[str, Any], name: str) -> Types:
    """Return the types that an argument may have by the schema of its tool."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or name not in properties:
        return ANY
    return types_of(properties[name], schema)


def types_of(schema: Any, root: Mapping[str, Any]) -> Types:
    """Return the types that a JSON schema within `root` allows."""
    types: set[str] = set()
    return frozenset(types) if _collect(schema, root, types, set()) else ANY


def _collect(schema: Any, root: Mapping[str, Any], types: set[str], seen: set[int]) -> bool:
    """Add the types that a schema allows to `types`, and return False if it allows any type. `seen`
    are the schemas that were visited; each is visited once, whatever refers to it."""
    if not isinstance(schema, Mapping) or len(seen) > _MAX_SCHEMAS:
        return False
    if id(schema) in seen:
        return True
    seen.add(id(schema))
    # 1. The schema names its types, or the values themselves.
    declared = schema.get("type")
    if isinstance(declared, str | list):
        names = [declared] if isinstance(declared, str) else declared
        types.update(name for name in names if isinstance(name, str))
        types.update(["null"] if schema.get("nullable") is True else [])
        return True
    if "const" in schema:
        types.add(_type_of_value(schema["const"]))
        return True
    if isinstance(schema.get("enum"), list):
        types.update(map(_type_of_value, schema["enum"]))
        return True
    # 2. It refers to another schema, or combines several. Of schemas that must all hold, the first
    #    that restricts the type decides.
    if isinstance(schema.get("$ref"), str):
        return _collect(resolve(schema["$ref"], root), root, types, seen)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return all(_collect(choice, root, types, seen) for choice in schema[key])
    if isinstance(schema.get("allOf"), list):
        return any(_collect(part, root, types, seen) for part in schema["allOf"])
    return False


def resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """Return the schema that a reference within `root` points to, such as "#/$defs/Place", or None
    if there is none."""
    target: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        target = target.get(part) if isinstance(target, Mapping) else None
    return target if reference.startswith("#") else None


def value_as_json(text: str, types: Types) -> str:
    """Return the JSON text of a value that the model wrote as bare `text`.

    It is read as JSON, or as Python's way to write the same, if `types` allow what it is then.
    Otherwise it is a string, which keeps its quotation marks if it has any.
    """
    value = None if types == TEXT else _json_text(text.strip())
    if value is not None:
        kind = _type_of_json(value)
        if kind != "string" and (not types or kind in types):
            return value
        if kind == "integer" and "number" in types:
            return value
        if kind == "number" and "integer" in types and (whole := _whole(value)) is not None:
            return whole
    lowered = text.strip().lower()
    if "boolean" in types and lowered in ("true", "false"):
        return lowered
    return json.dumps(text, ensure_ascii=False)


def _json_text(text: str) -> str | None:
    """Return `text` as valid JSON, or None if it is not a single value."""
    scanner = JsonScanner()
    end, accepted = scanner.feed(text + " ", 0)  # a number ends only before another character
    return accepted if scanner.done and end >= len(text) else None


def _whole(number: str) -> str | None:
    """Return a number such as 3.0 without its fraction, or None if it is not whole."""
    value = float(number)
    return str(int(value)) if value.is_integer() else None


def _type_of_json(text: str) -> str:
    """Return the type of a value by its JSON text."""
    by_first = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean"}
    by_first["n"] = "null"
    number = "number" if set(text) & set(".eE") else "integer"
    return by_first.get(text[0], number)


def _type_of_value(value: Any) -> str:
    return _type_of_json(json.dumps(value))
