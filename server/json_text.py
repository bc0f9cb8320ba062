"""JSON for answers, encoded by msgspec, which is faster than the standard library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

encode_json: Callable[[Any], bytes] = msgspec.json.Encoder().encode
"""Return a value as compact JSON in UTF-8. NaN and infinity become null."""


def encode_line(value: Any) -> bytes:
    """Return a value as compact JSON that no reader splits into lines.

    JSON needs no escape for U+0085, U+2028 and U+2029, but `str.splitlines` and the readers of
    server-sent events that are built on it take them for line ends.
    """
    return in_one_line(encode_json(value))


def in_one_line(data: bytes) -> bytes:
    """Return JSON with the characters escaped at which readers may split lines."""
    if not data.isascii():
        for character, escape in _LINE_ENDS:
            data = data.replace(character, escape)
    return data


_LINE_ENDS = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))
"""Characters in UTF-8 and their escapes. In JSON they can only be part of a string."""
