"""Access from any of several HTTP workers to what lives in one of them.

A stored response or a resumable stream lives in the worker that created it, and its id ends with
that worker's number. A worker that is asked for another's forwards the request over the other's
private unix socket: it sends the ASGI scope and the body, and gets ASGI messages back.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine.errors import EngineNotReadyError
from ..errors import error_response
from ..tenants.rates import Rates
from ..tenants.tenant import Tenant
from .limits import LOAD_FIELDS, no_loads
from .sse import cancel, disconnected
from .worker_link import Link

_FORWARDED_SCOPE = (
    *("type", "method", "path", "raw_path", "query_string", "root_path", "headers"),
    *("http_version", "scheme", "client", "server"),
)

log = structlog.get_logger(__name__)

_Message = dict[str, Any]


class Siblings:
    """This worker's place among all HTTP workers; by default there is only one.

    `index` is its number, `loads` the memory that all workers count in (see limits.py), `rates`
    what they count for each key, and `folder` holds their sockets (None if there is only one
    worker). `tenants` are those that the main process has read, None if there is no other process.
    """

    def __init__(
        self,
        index: int = 0,
        loads: memoryview[int] | None = None,
        folder: Path | None = None,
        rates: Rates | None = None,
        tenants: Sequence[Tenant] | None = None,
    ) -> None:
        self.index = index
        self.loads = no_loads(1) if loads is None else loads
        self.rates = rates or Rates()
        self.tenants = tenants
        self._folder = folder
        self._server: asyncio.Server | None = None

    @property
    def suffix(self) -> str:
        """The end of all ids that this worker gives."""
        return "" if self._folder is None else f"w{self.index}"

    def forward(self, request: Request, thing_id: str) -> Response | None:
        """Return the answer of the worker that owns `thing_id`; None if it is this one or none."""
        match = re.fullmatch(r".*w(\d{1,3})", thing_id)
        if self._folder is None or match is None:
            return None
        owner = int(match[1])
        if owner == self.index or owner >= len(self.loads) // LOAD_FIELDS:
            return None
        return _Forwarded(request, self._folder / str(owner))

    async def listen(self, app: ASGIApp) -> None:
        """Start to answer requests that other workers forward, with `app`."""
        assert self._folder is not None

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _answer(app, Link(reader, writer, _Message))

        path = self._folder / str(self.index)
        path.unlink(missing_ok=True)  # a killed predecessor may have left it
        self._server = await asyncio.start_unix_server(serve, path)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


async def _answer(app: ASGIApp, link: Link[_Message, _Message]) -> None:
    call = await link.receive()
    if call is None:
        return
    body: bytes | None = call["body"]

    async def receive() -> Message:
        nonlocal body
        if body is not None:
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message
        await link.receive()  # nothing more is sent, so this returns when the client has left
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        link.send(dict(message))
        await link.drain()

    scope = {**call["scope"], "asgi": {"version": "3.0"}, "state": {"forwarded": True}}
    try:
        await app(scope, receive, send)
    except ConnectionError:
        pass  # the other worker or its client has left
    except Exception as error:
        log.exception("forwarded_request_failed", exc_info=error)
    finally:
        link.close()


class _Forwarded(Response):
    """The answer of another worker to `request`, or 503 if that worker is not running."""

    def __init__(self, request: Request, path: Path) -> None:
        super().__init__()
        self._request = request
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: _Message = {"scope": {key: scope[key] for key in _FORWARDED_SCOPE if key in scope}}
        request_id = self._request.state.request_id.encode()
        headers = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
        call["scope"]["headers"] = [*headers, (b"x-request-id", request_id)]
        call["body"] = await self._request.body()
        try:
            link: Link[_Message, _Message] = await Link.to_path(self._path, _Message)
        except OSError:
            error = EngineNotReadyError("the HTTP worker that owns it is restarting")
            await error_response(error, scope=scope)(scope, receive, send)
            return
        link.send(call)
        relaying = asyncio.create_task(self._relay(link, send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({relaying, gone}, return_when=asyncio.FIRST_COMPLETED)
            if relaying.done():
                relaying.result()
        finally:
            await cancel(relaying, gone)
            link.close()

    async def _relay(self, link: Link[_Message, _Message], send: Send) -> None:
        more = True
        while more:
            message = await link.receive()
            if message is None:
                raise ConnectionError("the HTTP worker that owns it ended while it answered")
            if message["type"] == "http.response.start":
                # The owner may have taken another request id, from the body.
                for name, value in message["headers"]:
                    if name == b"x-request-id":
                        self._request.state.request_id = value.decode()
            await send(message)
            more = message["type"] == "http.response.start" or message.get("more_body", False)
