"""Streams that outlive their connection: kept events, and clients that come back for the rest.

POST … `x-quire-resumable: 1` ─▶ EventLog ◀─ produce (its own task: runs without readers)
                                   │  events, numbered from 0, each sent with its id
GET /v1/streams/{id} ◀─────────────┘  from the one after Last-Event-ID
                                      no reader for `ttl` seconds: aborted, forgotten
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ...engine.errors import (
    InvalidRequestError,
    QueueFullError,
    QuireError,
    StreamGoneError,
    StreamNotFoundError,
)
from ..errors import error_body
from .outbox import Signal
from .sse import DONE, SseResponse, event, produce

MAX_STREAMS = 1024
MAX_EVENTS = 32_768
MAX_BYTES = 4 * 1024 * 1024
"""Of one stream: beyond these its oldest events are dropped, if a reader was given them."""
MAX_TOTAL_BYTES = 64 * 1024 * 1024
"""Of all streams: beyond it those go that nobody reads, ended ones first, then as above."""
MAX_REMEMBERED = 4096
"""Ids of streams that are gone, to answer 410 and not 404."""


class EventLog:
    """The events of one stream from `first` on, and at most one reader; a Sink for `produce`.

    A stream whose events would be dropped before anybody was given them is aborted instead: no
    client could go on where it stopped.
    """

    def __init__(self, registry: StreamRegistry, owner: bytes) -> None:
        self.id = secrets.token_hex(16) + registry.id_suffix
        self.owner = owner
        self.early_failure: Exception | None = None
        self.ended = False
        self.gone: QuireError | None = None
        self.bug: Exception | None = None
        self.first = 0
        self.size = 0
        self.reader: Reader | None = None
        self.task: asyncio.Task[None]
        self.expiry: asyncio.TimerHandle | None = None
        self._registry = registry
        self._events: deque[bytes] = deque()
        self._sent = 0
        self._room = Signal()

    @property
    def end_number(self) -> int:
        """The number of the next event."""
        return self.first + len(self._events)

    # --- for produce

    def put(self, event: bytes) -> None:
        """Keep what may be several events; each gets its own id."""
        for part in event.split(b"\n\n")[:-1]:
            line = b"id: %b-%d\n%b\n\n" % (self.id.encode(), self.end_number, part)
            self._events.append(line)
            self.size += len(line)
            self._registry.total_bytes += len(line)
        if self._registry.total_bytes > MAX_TOTAL_BYTES:
            self._registry.make_room()
        self._trim()
        if self.reader is not None:
            self.reader.filled.set()

    def _over(self) -> bool:
        crowded = self._registry.total_bytes > MAX_TOTAL_BYTES and self.size > 0
        return self.size > MAX_BYTES or len(self._events) > MAX_EVENTS or crowded

    def _trim(self) -> None:
        while self._over() and self.first < self._sent:
            size = len(self._events.popleft())
            self.first += 1
            self.size -= size
            self._registry.total_bytes -= size

    @property
    def full(self) -> bool:
        return self._over()

    async def room(self) -> None:
        while self._over():
            if self.reader is None:
                self._registry.drop(self, "nobody read it, and its buffer is full")
                await asyncio.sleep(0)  # this very task is cancelled
            await self._room.wait()
            self._trim()

    def end(self, bug: Exception | None) -> None:
        self.ended, self.bug = True, bug
        if self.reader is not None:
            self.reader.filled.set()

    # --- for readers and the registry

    def position_after(self, last_event_id: str | None) -> int:
        """The number of the event after the one named, or of the first where none is.

        Raises InvalidRequestError, or StreamGoneError where that event was dropped.
        """
        position = 0
        if last_event_id is not None:
            stream_id, _, number = last_event_id.rpartition("-")
            known = number.isascii() and number.isdecimal() and len(number) < 20
            if stream_id != self.id or not known or int(number) >= self.end_number:
                raise InvalidRequestError("is no event of this stream", "Last-Event-ID")
            position = int(number) + 1
        if position < self.first:
            raise StreamGoneError(f"events before number {self.first} were dropped")
        return position

    def attach(self, position: int) -> Reader:
        """Read from `position` on; whoever reads now is told that it no longer does."""
        if self.reader is not None:
            self.reader.break_off(StreamGoneError("another connection reads this stream now"))
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        self.reader = Reader(self, position)
        return self.reader

    def detach(self, reader: Reader) -> None:
        if self.reader is reader:
            self.reader = None
            self._room.set()
            self._registry.expire_later(self)

    def read(self, position: int) -> bytes:
        """All events from `position` on."""
        events = self._events
        batch = b"".join(events[i] for i in range(position - self.first, len(events)))
        self._sent = max(self._sent, self.end_number)
        self._room.set()
        return batch

    def clear(self) -> None:
        self._registry.total_bytes -= self.size
        self._events.clear()
        self.size = 0


class Reader:
    """One connection's place in a stream; a Source."""

    def __init__(self, stream: EventLog, position: int) -> None:
        self.stream = stream
        self.position = position
        self.filled = Signal()
        self._broken: QuireError | None = None
        self._last_words = False

    @property
    def early_failure(self) -> Exception | None:
        return self.stream.early_failure

    def break_off(self, error: QuireError) -> None:
        self._broken = error
        self.filled.set()

    async def take(self) -> bytes:
        """See `Source`. A stream that is gone, or taken over, ends with an error event."""
        stream = self.stream
        while True:
            if self._broken is not None:
                if self._last_words:
                    return b""
                self._last_words = True
                return event(error_body(self._broken)) + DONE
            if self.position < stream.end_number:
                batch = stream.read(self.position)
                self.position = stream.end_number
                return batch
            if stream.bug is not None:
                raise stream.bug
            if stream.ended:
                return b""
            await self.filled.wait()


def asks_to_resume(request: Request, ttl: float) -> bool:
    """Whether the header x-quire-resumable asks for it. Raises InvalidRequestError where it cannot
    be had."""
    value = request.headers.get("x-quire-resumable", "0")
    if value not in ("0", "1"):
        raise InvalidRequestError("x-quire-resumable must be 0 or 1", "x-quire-resumable")
    if value == "1" and not ttl:
        raise InvalidRequestError("this server resumes no streams", "x-quire-resumable")
    return value == "1"


class StreamRegistry:
    """All logs. One that nobody has read for `ttl` seconds is aborted and forgotten."""

    def __init__(self, ttl: float, id_suffix: str = "") -> None:
        self.ttl = ttl
        self.id_suffix = id_suffix
        self.total_bytes = 0
        self._logs: dict[str, EventLog] = {}
        self._idle: OrderedDict[str, EventLog] = OrderedDict()
        """Those without a reader, longest first."""
        self._remembered: OrderedDict[str, bytes] = OrderedDict()
        """Owners of streams that are gone."""

    def __len__(self) -> int:
        return len(self._logs)

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
        """Start producing. Raises QueueFullError where too many streams are kept and read."""
        while len(self._logs) >= MAX_STREAMS:
            if not self._drop_idle():
                raise QueueFullError(f"{MAX_STREAMS} resumable streams are open")
        stream = EventLog(self, owner)
        stream.task = asyncio.create_task(
            produce(events, stream, on_failure=on_failure, request_id=request_id, deadline=deadline)
        )
        stream.task.add_done_callback(lambda _: on_close())
        self._logs[stream.id] = stream
        return stream

    def find(self, stream_id: str, owner: bytes) -> EventLog:
        """Raises StreamNotFoundError, also for another key's stream, or StreamGoneError."""
        stream = self._logs.get(stream_id)
        if stream is not None and stream.owner == owner:
            return stream
        if self._remembered.get(stream_id) == owner:
            raise StreamGoneError("the stream is gone: nobody read it for too long")
        raise StreamNotFoundError("there is no such stream")

    def attach(self, stream: EventLog, position: int) -> Reader:
        self._idle.pop(stream.id, None)
        return stream.attach(position)

    def expire_later(self, stream: EventLog) -> None:
        """Called when the last reader leaves."""
        if stream.id in self._logs:
            self._idle[stream.id] = stream
            loop = asyncio.get_running_loop()
            stream.expiry = loop.call_later(
                self.ttl, self.drop, stream, "nobody read it for too long"
            )

    def drop(self, stream: EventLog, reason: str) -> None:
        """Abort what still runs and forget the events."""
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
        """Drop idle streams until the rest fits."""
        while self.total_bytes > MAX_TOTAL_BYTES and self._drop_idle():
            pass

    def _drop_idle(self) -> bool:
        ended = (stream for stream in self._idle.values() if stream.ended)
        victim = next(ended, None) or next(iter(self._idle.values()), None)
        if victim is None:
            return False
        self.drop(victim, "there were too many streams")
        return True

    async def close(self) -> None:
        """At the server's end."""
        logs = list(self._logs.values())
        for stream in logs:
            self.drop(stream, "the server ends")
        await asyncio.gather(*(stream.task for stream in logs), return_exceptions=True)


class ResumableStream(SseResponse):
    """Sends a stream from `position` on. The client leaving changes nothing but who reads."""

    def __init__(
        self,
        registry: StreamRegistry,
        stream: EventLog,
        position: int,
        *,
        request_id: str,
        keepalive: float,
        write_timeout: float,
        headers: dict[str, str],
        opened: bool = False,
    ) -> None:
        """`opened` by this very request: nobody else knows the id yet."""
        headers = {**headers, "x-quire-stream-id": stream.id}
        super().__init__(
            request_id=request_id,
            keepalive=keepalive,
            write_timeout=write_timeout,
            headers=headers,
        )
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
