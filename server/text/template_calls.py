"""The arguments of tool calls of earlier turns, which are JSON text."""

from __future__ import annotations

from typing import Any

import msgspec

from ...engine.errors import InvalidRequestError


def parse_arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a call from their JSON text; an empty text means no arguments. Raises
    InvalidRequestError."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(
            "the arguments of a tool call are not JSON", "messages"
        ) from error
    if not isinstance(arguments, dict):
        raise InvalidRequestError("the arguments of a tool call are not a JSON object", "messages")
    return arguments
