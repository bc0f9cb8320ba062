"""ASGI middleware around every route: the request id, the body limit, the HTTP metrics, HEAD
requests, and the prefix and the end of paths."""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Hashable
from contextvars import ContextVar
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine.errors import QueueFullError
from ..errors import http_error_response
from ..metrics.answer_end import AnswerEnd
from ..metrics.metrics import Metrics
from ..tenants.caller import Caller

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


def is_sane_request_id(value: str) -> bool:
    """Check for 1 to 128 letters, digits and `._:-`, which are safe in headers and log lines."""
    return _SANE_REQUEST_ID.fullmatch(value) is not None


class RequestIdMiddleware:
    """Sets `request.state.request_id` and the answer's header x-request-id.

    A client's own id is kept if it is sane and replaced otherwise. It is only echoed and logged,
    since it need not be unique: the engine gets ids that the server makes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})
        asked = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = asked if is_sane_request_id(asked) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            await send(message)

        await self.app(scope, receive, send_with_id)


def body_too_large(message: str) -> HTTPException:
    """Return the exception that answers 413 and closes the connection."""
    return HTTPException(413, message, {"connection": "close"})


def caller_of(scope: Scope) -> Hashable:
    """Return what tells callers apart: the holder of the request's key, or else its address."""
    caller: Caller | None = scope.get("state", {}).get("caller")
    if caller is not None and caller.tenant.digests:
        return caller.tenant.owner
    return (scope.get("client") or ("",))[0]


BODIES_AT_ONCE = 8
"""Bodies of the maximum size that may be in memory while they are read; smaller ones are more."""
SMALL_BODY = 64 * 1024
"""Bytes of a body that are read whatever the others hold."""


class BodyLimitMiddleware:
    """Answers 413 if Content-Length, or the bytes of a chunked body, exceed the limit.

    Answers 429 if all bodies that are being read hold more than BODIES_AT_ONCE of the maximum size
    would, except to small ones, and to callers that hold less than their share of it: so nobody who
    sends slowly can shut the others out, and all together hold twice as much at most.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self._held: Counter[Hashable] = Counter()
        """Bytes of the bodies that are being read, by their caller."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message = f"the body is larger than {self.max_bytes} bytes"
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            response = http_error_response(413, message, scope)
            response.headers["connection"] = "close"
            return await response(scope, receive, send)
        received = held = 0
        caller: Hashable = None

        def release() -> None:
            nonlocal held
            self._held[caller] -= held
            if not self._held[caller]:
                del self._held[caller]
            held = 0

        async def limited_receive() -> Message:
            nonlocal received, held, caller
            part = await receive()
            if part["type"] == "http.request":
                size = len(part.get("body", b""))
                received += size
                if received > self.max_bytes:
                    raise body_too_large(message)
                if not held:  # the route has checked the key by now
                    caller = caller_of(scope)
                held += size
                self._held[caller] += size
                if received > SMALL_BODY and self._is_crowded_by(caller):
                    raise QueueFullError("too many large bodies are being received", 5.0)
                if not part.get("more_body", False):
                    release()
            return part

        try:
            await self.app(scope, limited_receive, send)
        finally:
            release()

    def _is_crowded_by(self, caller: Hashable) -> bool:
        """Return whether too much is held, and more than its share of it by `caller`."""
        bound = BODIES_AT_ONCE * self.max_bytes
        return self._held.total() > bound and self._held[caller] > bound / len(self._held)


class HttpMetricsMiddleware:
    """Counts requests by their route's path template; a client's path never becomes a label.

    A request whose client leaves before its answer begins counts as 499, whatever became of it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "forwarded" in scope.get("state", ()):
            return await self.app(scope, receive, send)  # the worker that forwarded it counts it
        end, started = AnswerEnd(receive, send), time.monotonic()
        has_failed = True
        try:
            await self.app(scope, end.receive, end.send)
            has_failed = False
        finally:
            status = end.status
            if status is None:  # no application ends without an answer while its client is there
                status = 500 if has_failed and not end.left else 499
            handler = getattr(scope.get("route"), "path", None)
            self.metrics.http_request(handler, scope["method"], status, time.monotonic() - started)


class Connection(NamedTuple):
    """The connection of the request that the present task serves.

    `receive` returns its next message: a disconnect, once the body has been read. `answer_headers`
    may be filled until the answer begins.
    """

    scope: Scope
    receive: Receive
    answer_headers: dict[str, str]

    @property
    def caller(self) -> Hashable:
        """What tells callers apart; see `caller_of`."""
        return caller_of(self.scope)


connection: ContextVar[Connection | None] = ContextVar("connection", default=None)
"""Set for every request by ConnectionMiddleware, so that what waits on behalf of a request can
notice that its client has left."""


class ConnectionMiddleware:
    """Sets `connection`, and adds its headers to the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            added: dict[str, str] = {}
            connection.set(Connection(scope, receive, added))

            async def send_with_headers(message: Message) -> None:
                if added and message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(added)
                await send(message)

            return await self.app(scope, receive, send_with_headers)
        await self.app(scope, receive, send)


class HeadMiddleware:
    """Answers HEAD like GET, without the body, whatever route it is for."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        ended = False

        async def send_head(message: Message) -> None:
            nonlocal ended
            if message["type"] != "http.response.body":
                await send(message)
            elif not ended:  # the end of the answer stops a stream, too
                ended = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        scope["method"] = "GET"
        try:
            await self.app(scope, receive, send_head)
        finally:
            scope["method"] = "HEAD"


class PathMiddleware:
    """Sets the prefix `root_path` of all paths, which a proxy may strip or not, and serves a path
    with one slash at its end as the path without it. (A redirect is not followed with its body by
    every client.)"""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self.root_path
            path = scope["path"]
            if path == self.root_path:
                scope["path"] = f"{path}/"
            elif path.endswith("/") and path not in ("/", f"{self.root_path}/"):
                scope["path"] = path[:-1]
        await self.app(scope, receive, send)
