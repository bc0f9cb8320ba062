"""The arguments of earlier tool calls, which need not be JSON: an answer may have been cut within
them."""

from __future__ import annotations

from typing import Any

import msgspec

RAW_ARGUMENTS = "raw_arguments"
"""The key under which a template that reads objects finds arguments which are not one."""


def parse_arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a call from their JSON text; an empty text means no arguments.

    A text that is not a JSON object, for instance since max_tokens has cut it, becomes the value of
    RAW_ARGUMENTS, so that the model still sees what it wrote.
    """
    try:
        arguments = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {RAW_ARGUMENTS: text}
