"""Answers and events in one piece. Large ones are made beside the event loop, so that streams go
on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from fastapi.responses import JSONResponse, Response

from ...engine.process.heap import trim
from ..json_text import encode_json
from ..requests.generation import Finished

LARGE = 2000
"""Values beyond which an answer counts as large: making so many takes some milliseconds."""
HUGE = 100_000
"""Values beyond which the memory that the answer took is returned to the system."""
_DEPTH = 8
"""Levels that are encoded by themselves: an entry of the log-probabilities in the event of a whole
response lies below event, response, output, item, content, part and logprobs."""
_CHARACTERS = 1024
"""Characters of a text that count as one value."""


def num_values(answers: Iterable[Finished], top: int) -> int:
    """Return the number of values in the choices of an answer with `top` alternatives a token."""
    return sum(len(each.token_ids) + (2 + top) * len(each.logprobs) for each in answers)


async def json_answer(
    build: Callable[[], dict[str, Any]], size: int, headers: dict[str, str]
) -> Response:
    """Return the answer that `build` makes of `size` values.

    A large one is made in a thread, where Python's lock changes hands every few milliseconds, and
    encoded in pieces, since encoding does not let go of it.
    """
    if size <= LARGE:
        return JSONResponse(build(), headers=headers)
    content = await asyncio.to_thread(lambda: encode_large(build()))
    if size > HUGE:
        await asyncio.to_thread(trim)
    return Response(content, headers=headers, media_type="application/json")


async def json_of(value: Any, headers: dict[str, str] | None = None) -> Response:
    """Return an answer that is made already; a large one is encoded in a thread."""
    if not is_large(value):
        return JSONResponse(value, headers=headers)
    content = await asyncio.to_thread(encode_large, value)
    return Response(content, headers=headers, media_type="application/json")


async def size_of(value: Any) -> int:
    """Return the bytes of a value as JSON; those of a large one are counted in a thread."""
    if not is_large(value):
        return len(encode_json(value))
    return await asyncio.to_thread(lambda: sum(map(len, encode_in_pieces(value, _DEPTH))))


def is_large(value: Any) -> bool:
    """Return whether a value of JSON holds more than LARGE values. It takes no longer than to count
    so many."""
    count, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            count += len(one) // _CHARACTERS
        elif isinstance(one, dict | list):
            count += len(one)
            if count <= LARGE:
                left += one.values() if isinstance(one, dict) else one
        if count > LARGE:
            return True
    return False


def encode_large(value: Any) -> bytes:
    """Encode a value in pieces, for use in a thread."""
    return b"".join(encode_in_pieces(value, _DEPTH))


def encode_in_pieces(value: Any, depth: int) -> Iterable[bytes]:
    """Yield a value as compact JSON; what lies `depth` levels deep is encoded in one go."""
    if depth and isinstance(value, dict) and value:
        opening = b"{"
        for key, member in value.items():
            yield opening + encode_json(key) + b":"
            yield from encode_in_pieces(member, depth - 1)
            opening = b","
        yield b"}"
    elif depth and isinstance(value, list) and value:
        opening = b"["
        for item in value:
            yield opening
            yield from encode_in_pieces(item, depth - 1)
            opening = b","
        yield b"]"
    else:
        yield encode_json(value)
