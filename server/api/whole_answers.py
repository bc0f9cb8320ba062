"""Answers and events in one piece. Large ones are made beside the event loop, so that streams go
on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ...engine.process.heap import trim
from ..json_text import encode_json, in_one_line
from ..requests.generation import Finished

LARGE = 2000
"""Values beyond which an answer counts as large: making so many takes some milliseconds."""
HUGE = 100_000
"""Values beyond which the memory that the answer took is returned to the system."""
_DEPTH = 8
"""Levels that are encoded by themselves: the log-probabilities in the event of a whole response lie
below event, response, output, item, content and part."""
_SLICE = 50
"""Items of a long list that are encoded in one go."""
_SENT_AT_ONCE = 256 * 1024
"""Bytes of a large answer that are handed to the connection at once."""
_CHARACTERS = 1024
"""Characters of a text that count as one value."""

_Result = TypeVar("_Result")


def num_values(answers: Iterable[Finished], top: int) -> int:
    """Return the number of values in the choices of an answer with `top` alternatives a token."""
    return sum(len(each.token_ids) + (2 + top) * len(each.logprobs) for each in answers)


async def in_thread_if(large: bool, work: Callable[[], _Result]) -> _Result:
    """Return the result of `work`, which is done in a thread if it is `large`."""
    return await asyncio.to_thread(work) if large else work()


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
    return _LargeAnswer(content, headers)


async def json_of(value: Any, headers: dict[str, str] | None = None) -> Response:
    """Return an answer that is made already; a large one is encoded in a thread."""
    if not is_large(value):
        return JSONResponse(value, headers=headers)
    return _LargeAnswer(await asyncio.to_thread(encode_large, value), headers)


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


def encode_large(value: Any, head: bytes = b"", tail: bytes = b"") -> bytearray:
    """Encode a value in pieces between `head` and `tail`, for use in a thread. No step takes long:
    to join the pieces at the end would hold Python's lock for as long as it takes to copy all of
    them."""
    content = bytearray(head)
    for piece in encode_in_pieces(value, _DEPTH):
        content += in_one_line(piece)
    content += tail
    return content


class _LargeAnswer(Response):
    """An answer that is sent in parts, each of which is copied on its way."""

    media_type = "application/json"

    def __init__(self, content: bytearray, headers: dict[str, str] | None) -> None:
        super().__init__(memoryview(content), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        for begin in range(0, len(self.body), _SENT_AT_ONCE):
            part = bytes(self.body[begin : begin + _SENT_AT_ONCE])
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def encode_in_pieces(value: Any, depth: int) -> Iterable[bytes]:
    """Yield a value as compact JSON; what lies `depth` levels deep, or within a long list, is
    encoded in one go."""
    if depth and isinstance(value, dict) and value:
        opening = b"{"
        for key, member in value.items():
            yield opening + encode_json(key) + b":"
            yield from encode_in_pieces(member, depth - 1)
            opening = b","
        yield b"}"
    elif depth and isinstance(value, list) and value:
        opening = b"["
        if len(value) > LARGE:
            for begin in range(0, len(value), _SLICE):
                yield opening + encode_json(value[begin : begin + _SLICE])[1:-1]
                opening = b","
        else:
            for item in value:
                yield opening
                yield from encode_in_pieces(item, depth - 1)
                opening = b","
        yield b"]"
    else:
        yield encode_json(value)
