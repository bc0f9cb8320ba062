"""Strict reading of JSON bodies.

The following is refused with 400: anything but UTF-8, `NaN`, `Infinity`, numbers beyond a double,
duplicate keys, lone surrogates, nesting deeper than MAX_NESTING, more than MAX_VALUES values or
MAX_MEMBERS object members, and a top level that is not an object. A content type other than JSON
is refused with 415.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import Request

from ...engine.errors import InvalidRequestError

MAX_NESTING = 64
"""Maximum depth of arrays and objects."""
MAX_VALUES = 1_000_000
"""Maximum commas in a body: parsing so many numbers holds the interpreter lock for 70 ms."""
MAX_MEMBERS = 50_000
"""Maximum members of all objects: validating each takes microseconds on the event loop."""
_LARGE_BODY = 64 * 1024  # bytes; parsing more on the event loop would delay other streams
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_json_object(request: Request) -> dict[str, Any]:
    """Read the body of `request`. Raises InvalidRequestError, or HTTPException for 413 and 415."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HTTPException(415, "the content type must be application/json")
    body = await request.body()
    if len(body) > _LARGE_BODY:
        return await asyncio.to_thread(parse_json_object, body)
    return parse_json_object(body)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly. Raises InvalidRequestError."""
    if body.count(b",") > MAX_VALUES:
        raise InvalidRequestError(f"the body has more than {MAX_VALUES} values")
    num_members = 0

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal num_members
        num_members += len(pairs)
        if num_members > MAX_MEMBERS:
            raise InvalidRequestError(f"the body has more than {MAX_MEMBERS} object members")
        return _unique_keys(pairs)

    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=to_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequestError("the body is not UTF-8") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # bad syntax, or an integer of thousands of digits
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object")
    if body.count(b"[") + body.count(b"{") > MAX_NESTING:
        _check_nesting(value)
    if _SURROGATE_ESCAPE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError("the body contains a lone surrogate") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequestError(f"duplicate key {ascii(key[:64])}")
            seen.add(key)
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"the body contains {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise InvalidRequestError(f"the number {text[:32]} is out of range")
    return value


def _check_nesting(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"the body is nested deeper than {MAX_NESTING} levels")
