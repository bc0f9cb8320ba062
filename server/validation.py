"""What is wrong with a body, in words for the person who sent it.

pydantic describes errors in terms of its own: the branches of a union are parts of a path, and
messages speak of Python's types. Here a path consists of the body's own names and indices, and a
message says what the value must be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

Path = tuple[int | str, ...]
"""The place of a field in a body: names and indices."""

MAX_LISTED = 10
"""Maximum fields that one message names."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_\-]{1,64}")

_MUST_BE = {
    "missing": "is missing",
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "none_required": "must be null",
}
"""By pydantic's type of an error."""
_BOUNDS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be {expected}",
}
"""The same, with the values of the error's context."""


def explain(error: ValidationError, fields: Any, within: Path = ()) -> tuple[str, str]:
    """Return the message about all offending fields, and the path of the first.

    `fields` is what was validated, and `within` the path that leads to it in the body.
    """
    reasons: dict[str, list[str]] = {}
    for one in error.errors(include_url=False, include_input=False):
        path = path_of((*within, *_own_path(one["loc"], fields, one["type"] == "missing")))
        said = reasons.setdefault(path, [])
        if (reason := reason_of(one)) not in said:
            said.append(reason)
    listed = [f"{path}: {_either(said)}" for path, said in reasons.items()]
    more = len(listed) - MAX_LISTED
    message = "; ".join(listed[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
    return message, next(iter(reasons))


def path_of(loc: Path) -> str:
    """Return the path of a field for people to read. Unusual keys of a client are not repeated."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _PLAIN_NAME.fullmatch(part) else "?"
            text += f".{name}" if text else name
    return text


def _own_path(loc: Path, fields: Any, is_missing: bool) -> Path:
    """Return the parts of pydantic's path that are names and indices of the body itself."""
    path: list[int | str] = []
    value = fields
    for number, part in enumerate(loc):
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, dict) and part in value):
            value = value[part]
        elif not (is_missing and number == len(loc) - 1):
            continue  # a branch of a union, or a validator
        path.append(part)
    return tuple(path)


def reason_of(error: Mapping[str, Any]) -> str:
    """Return what the value must be that one of pydantic's errors is about."""
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _MUST_BE:
        return _MUST_BE[kind]
    if kind in ("too_short", "string_too_short") and context["min_length"] == 1:
        return "must not be empty"
    if kind in _BOUNDS:
        return _BOUNDS[kind].format_map(context)
    message = str(error["msg"]).removeprefix("Value error, ")
    return message.replace("Input should be", "must be")


def _either(reasons: Sequence[str]) -> str:
    """Return what a value must be if each reason is one of the ways to be right."""
    first, *others = reasons
    return " or ".join([first, *(reason.removeprefix("must ") for reason in others)])
