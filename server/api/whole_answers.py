"""Answers in one piece. Large ones are made beside the event loop, so that streams go on."""

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
_DEPTH = 5
"""Levels that are encoded by themselves: answer, choices, choice, logprobs, content, entry."""


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
    content = await asyncio.to_thread(lambda: b"".join(encode_in_pieces(build(), _DEPTH)))
    if size > HUGE:
        await asyncio.to_thread(trim)
    return Response(content, headers=headers, media_type="application/json")


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
