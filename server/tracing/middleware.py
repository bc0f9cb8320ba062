"""ASGI middleware that begins a request's trace and ends it with the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..metrics.answer_end import AnswerEnd
from .attributes import OPERATIONS
from .current import current

if TYPE_CHECKING:
    from .spans import Tracer


class TracingMiddleware:
    """Sets `current` for requests to a path of OPERATIONS, however they end: refused ones included.

    A request whose client leaves before its answer begins has the status 499.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = None
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            operation = OPERATIONS.get(path)
        if operation is None:
            return await self.app(scope, receive, send)
        trace = self.tracer.begin(operation, scope["method"], Headers(scope=scope))
        # A worker that the request is forwarded to continues this trace.
        headers = [pair for pair in scope["headers"] if pair[0] != b"traceparent"]
        scope["headers"] = [*headers, (b"traceparent", trace.traceparent.encode())]
        token = current.set(trace)
        end = AnswerEnd(receive, send)
        error = None
        try:
            await self.app(scope, end.receive, end.send)
        except BaseException as failure:
            error = type(failure).__name__
            raise
        finally:
            current.reset(token)
            status = end.status
            if status is None:
                status = 500 if error is not None and not end.left else 499
            trace.answer_ended(
                scope["state"]["request_id"],
                getattr(scope.get("route"), "path", None),
                status,
                None if end.left else scope["state"].get("error_code", error),
                was_cut=end.left or error is not None,
            )
