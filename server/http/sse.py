"""Server-sent events, and clients that leave: disconnects, deadlines, clients that stop reading.

    produce ──▶ Sink … Source ──▶ SseResponse.send_from ──▶ client

The Sink and the Source are the two ends of an Outbox here, or of an EventLog in resumption.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...engine.errors import QuireError, RequestTimeoutError
from ..errors import answer_of, error_response
from ..json_text import encode_line
from ..settings import Settings
from .middleware import connection
from .outbox import Outbox, Sink, Source

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams."""
COMMENT = b": keep-alive\n\n"
"""A comment that clients skip, sent to keep silent connections open."""

OnFailure = Callable[[Exception], list[bytes] | Awaitable[list[bytes]]]
"""Makes the last events of a stream that has failed, at once or beside the event loop."""

_Result = TypeVar("_Result")


def event(data: Any) -> bytes:
    """Return a `data:` event with `data` as JSON."""
    return b"data: " + encode_line(data) + b"\n\n"


async def disconnected(receive: Receive) -> None:
    """Wait until the client has disconnected; the body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, _Result], deadline: float | None
) -> _Result | None:
    """Return the result of `work`, or cancel it and return None if the client leaves first.

    `deadline` is in seconds of `time.monotonic()`. Raises RequestTimeoutError when it passes.
    """
    try:
        return await _unless_gone(receive, work, deadline)
    except ClientDisconnect:
        return None


async def while_connected(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of `work`, which is done for the present request. If its client leaves
    first, cancel it and raise ClientDisconnect; the body must have been read before."""
    here = connection.get()
    return await (work if here is None else _unless_gone(here.receive, work, None))


async def _unless_gone(
    receive: Receive, work: Coroutine[Any, Any, _Result], deadline: float | None
) -> _Result:
    """Return the result of `work`, or cancel it and raise ClientDisconnect or RequestTimeoutError,
    whichever comes first."""
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
    working = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({working, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if gone.done():
            raise ClientDisconnect
        raise RequestTimeoutError("the request took longer than its timeout")
    finally:
        await cancel(working, gone)


async def produce(
    events: AsyncGenerator[bytes, None],
    sink: Sink,
    *,
    on_failure: OnFailure,
    request_id: str,
    deadline: float | None,
    end: bytes = DONE,
) -> None:
    """Put all of `events` into `sink`, close them, and put `end`.

    A failure becomes the events of `on_failure`, since clients take a stream that is merely cut
    for a success. `deadline` is in seconds of `time.monotonic()`.
    """
    failure: Exception | None = None
    begun = False
    try:
        left = None if deadline is None else deadline - time.monotonic()
        async with asyncio.timeout(left), aclosing(events):
            async for chunk in events:
                begun = True
                sink.put(chunk)
                if sink.full:
                    await sink.room()
    except TimeoutError:
        failure = RequestTimeoutError("the request took longer than its timeout")
    except Exception as error:
        failure = error
    bug: Exception | None = None
    try:
        if failure is not None:
            log_failure(failure, request_id)
            if not begun:
                sink.early_failure = failure
            last = on_failure(failure)
            for chunk in last if isinstance(last, list) else await last:
                sink.put(chunk)
        if end:
            sink.put(end)
    except Exception as error:
        log_failure(error, request_id)
        bug = error
    finally:
        sink.end(bug)


def log_failure(failure: Exception, request_id: str) -> None:
    """Log the failure of a request whose status has been sent or that runs in the background."""
    if not isinstance(failure, QuireError):
        log.exception("stream_failed", request_id=request_id, exc_info=failure)
    elif answer_of(failure).status == 500:
        log.warning("request_failed", request_id=request_id, error=repr(failure))


class Pace(NamedTuple):
    """How a stream deals with silence, and with a client that does not read, in seconds."""

    keepalive: float
    """Silence after which a comment is sent; 0 means never."""
    write_timeout: float
    """How long one write may wait for the client to read, before the request is aborted."""

    @classmethod
    def of(cls, settings: Settings) -> Pace:
        """Return the pace that the flags set."""
        return cls(settings.sse_keepalive_interval, settings.stream_stall_timeout)


class SseResponse(Response):
    """The connection's side of a stream.

    The status is held back until the first event or the first keep-alive comment, so that a
    request that fails at once is answered with its true status.
    """

    def __init__(
        self,
        *,
        request_id: str,
        pace: Pace,
        headers: dict[str, str],
        comment: bytes = COMMENT,
    ) -> None:
        """`comment` is what is sent in silence."""
        super().__init__(status_code=200, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # nginx would buffer events otherwise
        self._request_id = request_id
        self._pace = pace
        self._comment = comment

    async def send_from(self, source: Source, scope: Scope, receive: Receive, send: Send) -> bool:
        """Send until the stream ends, the client leaves, or the client stops reading.

        Returns False if the client left before the answer began.
        """
        writer = _Writer(send, self)
        writing = asyncio.create_task(self._write(writer, source, scope, receive, send))
        others = [
            asyncio.create_task(disconnected(receive)),
            asyncio.create_task(writer.watch(self._pace, self._comment)),
        ]
        try:
            await asyncio.wait({writing, *others}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                await writing
        finally:
            await cancel(writing, *others)
        return writer.started

    async def _write(
        self, writer: _Writer, source: Source, scope: Scope, receive: Receive, send: Send
    ) -> None:
        while batch := await source.take():
            if source.early_failure is not None and not writer.started:
                writer.hold()
                response = error_response(source.early_failure, self._request_id, scope)
                return await response(scope, receive, send)
            await writer.send(batch)
        await writer.end()


class EventStream(SseResponse):
    """An SSE answer that lives as long as its connection.

    A failure after the status was sent becomes the events of `on_failure`; `end` is the last event
    in either case. `events` is always closed, which aborts whatever still runs in the engine.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        on_failure: OnFailure,
        on_close: Callable[[], None],
        request_id: str,
        deadline: float | None,
        pace: Pace,
        headers: dict[str, str],
        end: bytes = DONE,
        comment: bytes = COMMENT,
    ) -> None:
        super().__init__(request_id=request_id, pace=pace, headers=headers, comment=comment)
        self._events = events
        self._on_failure = on_failure
        self._on_close = on_close
        self._deadline = deadline
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox = Outbox()
        producing = asyncio.create_task(
            produce(
                self._events,
                outbox,
                on_failure=self._on_failure,
                request_id=self._request_id,
                deadline=self._deadline,
                end=self._end,
            )
        )
        try:
            await self.send_from(outbox, scope, receive, send)
        finally:
            await cancel(producing)
            self._on_close()


class _Writer:
    """Sends the parts of one streamed answer and knows when it last sent one."""

    def __init__(self, send: Send, response: Response) -> None:
        self._send = send
        self._response = response
        self._last = time.monotonic()
        self._sending = False
        self.started = False

    async def send(self, chunk: bytes) -> None:
        if not self.started:
            await self._start()
        self._sending, self._last = True, time.monotonic()
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._sending = False

    def hold(self) -> None:
        """Send no more comments."""
        self.started = self._sending = True

    async def end(self) -> None:
        self.hold()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self) -> None:
        self.started = True
        response = self._response
        await self._send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "headers": response.raw_headers,
            }
        )

    async def watch(self, pace: Pace, comment: bytes) -> None:
        """Send `comment` in silence. Returns when one write has been waiting for too long."""
        keepalive, write_timeout = pace
        tick = min(keepalive or write_timeout, write_timeout) / 2
        while True:
            await asyncio.sleep(tick)
            silent = time.monotonic() - self._last
            if self._sending and silent >= write_timeout:
                return
            if keepalive and not self._sending and silent >= keepalive:
                await self.send(comment)


async def cancel(*tasks: Awaitable[Any]) -> None:
    """Cancel the tasks and wait, so that no generator is running any more when this returns."""
    for task in tasks:
        assert isinstance(task, asyncio.Task)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
