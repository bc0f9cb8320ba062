"""Streams that outlive their connection: clients may come back for the events they missed.

POST … `x-quire-resumable: 1` ─▶ EventLog ◀─ produce (its own task: runs without readers)
                                   │  events, numbered from 0, each sent with its id
GET /v1/streams/{id} ◀─────────────┘  from the one after Last-Event-ID
                                      no reader for `ttl` seconds: aborted, forgotten
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ...engine.errors import (
    InvalidRequestError,
    QueueFullError,
    StreamGoneError,
    StreamNotFoundError,
)
from .event_log import EventLog, Reader
from .sse import Pace, SseResponse, produce

MAX_STREAMS = 1024
"""Maximum number of resumable streams."""
MAX_TOTAL_BYTES = 64 * 1024 * 1024
"""Maximum bytes of all streams. Beyond it, streams without a reader are dropped, those of the key
that holds most first; if that is not enough, the others drop events as if each had exceeded its
own bound."""
MAX_REMEMBERED = 4096
"""Maximum ids of dropped streams that are remembered, to answer 410 instead of 404."""


def asks_to_resume(request: Request, ttl: float) -> bool:
    """Decide whether the header x-quire-resumable asks for a resumable stream.

    Raises InvalidRequestError for any value but 0 and 1, and for 1 if `ttl` is 0 (disabled).
    """
    value = request.headers.get("x-quire-resumable", "0")
    if value not in ("0", "1"):
        raise InvalidRequestError("x-quire-resumable must be 0 or 1", "x-quire-resumable")
    if value == "1" and not ttl:
        raise InvalidRequestError(
            "x-quire-resumable: resumable streams are disabled on this server",
            "x-quire-resumable",
        )
    return value == "1"


class StreamRegistry:
    """All event logs. A log that nobody has read for `ttl` seconds is aborted and forgotten."""

    def __init__(self, ttl: float, id_suffix: str = "") -> None:
        """`id_suffix` ends every id; see `Siblings.suffix`."""
        self.ttl = ttl
        self.id_suffix = id_suffix
        self.total_bytes = 0
        self._logs: dict[str, EventLog] = {}
        self._idle: OrderedDict[str, EventLog] = OrderedDict()
        """Logs without a reader; the one that has been idle longest comes first."""
        self._remembered: OrderedDict[str, bytes] = OrderedDict()
        """Owners of streams that were dropped, by id."""

    def __len__(self) -> int:
        return len(self._logs)

    @property
    def crowded(self) -> bool:
        return self.total_bytes > MAX_TOTAL_BYTES

    def open(
        self,
        owner: bytes,
        events: AsyncGenerator[bytes, None],
        *,
        on_failure: Callable[[Exception], list[bytes]],
        on_close: Callable[[], None],
        request_id: str,
        deadline: float | None,
    ) -> EventLog:
        """Start producing `events` into a new log.

        Raises QueueFullError if MAX_STREAMS streams are open, of which no key may drop another's
        unless that one has more, and each of those that it may has a reader.
        """
        while len(self._logs) >= MAX_STREAMS:
            held = Counter(stream.owner for stream in self._logs.values())
            held[owner] += 1
            if not self._drop_idle(held, held[owner]):
                raise QueueFullError(f"{MAX_STREAMS} resumable streams are open")
        stream = EventLog(self, secrets.token_hex(16) + self.id_suffix, owner)
        stream.task = asyncio.create_task(
            produce(events, stream, on_failure=on_failure, request_id=request_id, deadline=deadline)
        )
        stream.task.add_done_callback(lambda _: on_close())
        self._logs[stream.id] = stream
        return stream

    def find(self, stream_id: str, owner: bytes) -> EventLog:
        """Return the stream of this id.

        Raises StreamGoneError if it was dropped, and StreamNotFoundError if there has never been
        one or it belongs to another key.
        """
        stream = self._logs.get(stream_id)
        if stream is not None and stream.owner == owner:
            return stream
        if self._remembered.get(stream_id) == owner:
            raise StreamGoneError("the stream was deleted, or nobody read it for too long")
        raise StreamNotFoundError("there is no such stream")

    def attach(self, stream: EventLog, position: int) -> Reader:
        """Start reading `stream` at `position`."""
        self._idle.pop(stream.id, None)
        return stream.attach(position)

    def expire_later(self, stream: EventLog) -> None:
        """Drop `stream` in `ttl` seconds; called when its reader has left."""
        if stream.id in self._logs:
            self._idle[stream.id] = stream
            loop = asyncio.get_running_loop()
            stream.expiry = loop.call_later(
                self.ttl, self.drop, stream, "nobody read it for too long"
            )

    def drop(self, stream: EventLog, reason: str) -> None:
        """Abort the stream if it is still being produced, and forget its events."""
        if self._logs.pop(stream.id, None) is None:
            return
        self._idle.pop(stream.id, None)
        if stream.expiry is not None:
            stream.expiry.cancel()
        stream.task.cancel()
        stream.clear()
        if stream.reader is not None:
            stream.reader.break_off(StreamGoneError(f"the stream was dropped: {reason}"))
        self._remembered[stream.id] = stream.owner
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def make_room(self) -> None:
        """Drop streams without a reader until the rest is within MAX_TOTAL_BYTES."""
        while self.crowded and self._idle:
            held: Counter[bytes] = Counter()
            for stream in self._idle.values():
                held[stream.owner] += stream.size
            self._drop_idle(held, 0)

    def _drop_idle(self, held: Counter[bytes], least: int) -> bool:
        """Drop a stream without a reader, of the key that holds most and at least `least`: the one
        that has been idle longest, ended ones first. Returns False if there is none."""
        idle: list[EventLog] = []
        for owner, amount in held.most_common():
            if amount >= least and not idle:
                idle = [stream for stream in self._idle.values() if stream.owner == owner]
        if not idle:
            return False
        victim = next((stream for stream in idle if stream.ended), idle[0])
        self.drop(victim, "there were too many streams")
        return True

    async def close(self) -> None:
        """Drop all streams; called when the server stops."""
        logs = list(self._logs.values())
        for stream in logs:
            self.drop(stream, "the server is stopping")
        await asyncio.gather(*(stream.task for stream in logs), return_exceptions=True)


class ResumableStream(SseResponse):
    """Sends a stream from `position` on. If the client leaves, the stream goes on without it."""

    def __init__(
        self,
        registry: StreamRegistry,
        stream: EventLog,
        position: int,
        *,
        request_id: str,
        pace: Pace,
        headers: dict[str, str],
        opened: bool = False,
    ) -> None:
        """`opened` says that this request has opened the stream: nobody else knows its id yet."""
        headers = {**headers, "x-quire-stream-id": stream.id}
        super().__init__(request_id=request_id, pace=pace, headers=headers)
        self._registry = registry
        self._opened = opened
        self._reader = registry.attach(stream, position)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = self._reader
        answered = False
        try:
            answered = await self.send_from(reader, scope, receive, send)
        finally:
            reader.stream.detach(reader)
            if self._opened and not answered:
                self._registry.drop(reader.stream, "its client left before it knew the id")
