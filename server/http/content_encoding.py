"""Request bodies that are compressed, decoded while they are read and never beyond the limit."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine.errors import InvalidRequestError
from ..errors import http_error_response
from .middleware import body_too_large

CODINGS = ("gzip", "deflate")
"""The content codings of requests that are decoded. (Python has no others before 3.14.)"""
_ALIASES = {"x-gzip": "gzip", "identity": ""}
MAX_GZIP_MEMBERS = 100
"""Maximum members of a gzip body: empty ones cost more to decode than to send."""
_PIECE = 256 * 1024
"""Maximum bytes that are decoded before other tasks get their turn: less than a millisecond."""
_GZIP, _ZLIB, _RAW = zlib.MAX_WBITS | 16, zlib.MAX_WBITS, -zlib.MAX_WBITS


class ContentEncodingMiddleware:
    """Decodes bodies with a Content-Encoding.

    Answers 415 to a coding that is not one of CODINGS, with the header Accept-Encoding; 413 once
    the decoded body exceeds `max_bytes`, of which no more is decoded; 400 to bytes that are not
    what the header says.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        coding = ", ".join(Headers(scope=scope).getlist("content-encoding")).strip().lower()
        coding = _ALIASES.get(coding, coding)
        if not coding:
            return await self.app(scope, receive, send)
        if coding not in CODINGS:
            message = f"the content coding {ascii(coding[:64])} is not supported; use gzip"
            response = http_error_response(415, message, scope)
            response.headers["accept-encoding"] = ", ".join(CODINGS)
            return await response(scope, receive, send)
        # What comes after this, and another worker that the request may be passed on to, gets a
        # request that is not encoded.
        encoded = (b"content-encoding", b"content-length")
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in encoded]
        await self.app(scope, _Decoded(receive, coding, self.max_bytes).receive, send)


class _Decoded:
    """The decoded body of a request, in pieces."""

    def __init__(self, receive: Receive, coding: str, max_bytes: int) -> None:
        self._receive = receive
        self._coding = coding
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._encoded = b""
        self._more = True
        self._decoder: Any = None  # zlib has no public name for its type
        self._done = False
        self._members = 1

    async def receive(self) -> Message:
        """Return the next piece of the body; after the last one, what the server sends."""
        if self._done:
            return await self._receive()
        if not self._encoded and self._more:
            part = await self._receive()
            if part["type"] != "http.request":
                return part
            self._encoded, self._more = part.get("body", b""), part.get("more_body", False)
        else:
            await asyncio.sleep(0)
        piece = self._decode()
        self._left -= len(piece)
        if self._left < 0:
            raise body_too_large(f"the decoded body is larger than {self._max_bytes} bytes")
        self._done = not (self._encoded or self._more)
        if self._done and not (self._decoder is not None and self._decoder.eof):
            raise InvalidRequestError(f"the body is not {self._coding}: it ends too early")
        return {"type": "http.request", "body": piece, "more_body": not self._done}

    def _decode(self) -> bytes:
        """Decode up to one piece of what has arrived, and keep the rest."""
        if not self._encoded:
            return b""
        if self._decoder is None:
            self._decoder = zlib.decompressobj(_window(self._coding, self._encoded))
        elif self._decoder.eof and self._coding == "gzip":
            self._members += 1
            if self._members > MAX_GZIP_MEMBERS:
                raise InvalidRequestError(f"the gzip body has more than {MAX_GZIP_MEMBERS} members")
            self._decoder = zlib.decompressobj(_GZIP)
        decoder = self._decoder
        try:
            piece: bytes = decoder.decompress(self._encoded, min(_PIECE, self._left + 1))
        except zlib.error as error:
            raise InvalidRequestError(f"the body is not {self._coding}: {error}") from error
        if decoder.eof and decoder.unused_data and self._coding != "gzip":
            raise InvalidRequestError("the body is not deflate: there are bytes after its end")
        self._encoded = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        return piece


def _window(coding: str, start: bytes) -> int:
    """Return zlib's `wbits`. "deflate" means zlib's format (RFC 9110), but some clients send it
    without zlib's header, which begins with an 8 and is a multiple of 31 (RFC 1950)."""
    if coding == "gzip":
        return _GZIP
    has_header = start[0] & 15 == 8 and int.from_bytes(start[:2], "big") % 31 == 0
    return _ZLIB if len(start) < 2 or has_header else _RAW
