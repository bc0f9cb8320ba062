"""The kept events of one resumable stream, and the one connection that reads them.

              put                          read
    produce ──────▶ EventLog  first … end ──────▶ Reader ──▶ ResumableStream
                       │  size, expiry
                       ▼
                    LogKeeper (the StreamRegistry): bounds of all logs together

`produce` runs to its end whether anyone reads or not. The log keeps a limited number of events;
it drops the oldest once they have been sent, and otherwise makes the producer wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import Protocol

from ...engine.errors import InvalidRequestError, QuireError, StreamGoneError
from ...engine.process.stream import Signal
from ..errors import error_body
from .sse import DONE, event

MAX_EVENTS = 32_768
"""Maximum events that one stream keeps."""
MAX_BYTES = 4 * 1024 * 1024
"""Maximum bytes that one stream keeps."""


class LogKeeper(Protocol):
    """What an EventLog needs from the registry of all logs."""

    total_bytes: int
    """The size of all logs; each log adds and subtracts its own bytes."""

    @property
    def crowded(self) -> bool:
        """Whether all logs together exceed their bound."""

    def make_room(self) -> None:
        """Drop logs without a reader until all logs are within their bound."""

    def drop(self, stream: EventLog, reason: str) -> None:
        """Abort the stream and forget its events."""

    def expire_later(self, stream: EventLog) -> None:
        """Drop the stream after a while unless a reader comes back."""


class EventLog:
    """The events of one stream from number `first` on, with at most one reader; a Sink.

    Events that no reader has received are never dropped, since no client could then continue where
    it stopped. If they exceed the bounds and nobody is reading, the whole stream is aborted.
    """

    def __init__(self, keeper: LogKeeper, stream_id: str, owner: bytes) -> None:
        """`owner` identifies the API key whose requests may read the stream."""
        self.id = stream_id
        self.owner = owner
        self.early_failure: Exception | None = None
        self.ended = False
        self.bug: Exception | None = None
        self.first = 0
        self.size = 0
        self.reader: Reader | None = None
        self.task: asyncio.Task[None]
        self.expiry: asyncio.TimerHandle | None = None
        self._keeper = keeper
        self._events: deque[bytes] = deque()
        self._sent = 0
        self._room = Signal()

    @property
    def end_number(self) -> int:
        """The number that the next event will get."""
        return self.first + len(self._events)

    # --- for produce

    def put(self, event: bytes) -> None:
        """Keep `event`, which may hold several events; each one gets an id of its own."""
        for part in event.split(b"\n\n")[:-1]:
            line = b"id: %b-%d\n%b\n\n" % (self.id.encode(), self.end_number, part)
            self._events.append(line)
            self.size += len(line)
            self._keeper.total_bytes += len(line)
        if self._keeper.crowded:
            self._keeper.make_room()
        self._trim()
        if self.reader is not None:
            self.reader.filled.set()

    def _over(self) -> bool:
        crowded = self._keeper.crowded and self.size > 0
        return self.size > MAX_BYTES or len(self._events) > MAX_EVENTS or crowded

    def _trim(self) -> None:
        """Drop the oldest events that have been sent until the log is within its bounds."""
        while self._over() and self.first < self._sent:
            size = len(self._events.popleft())
            self.first += 1
            self.size -= size
            self._keeper.total_bytes -= size

    @property
    def full(self) -> bool:
        return self._over()

    async def room(self) -> None:
        """Wait until a reader has made room; abort the stream if there is no reader."""
        while self._over():
            if self.reader is None:
                self._keeper.drop(self, "nobody read it, and its buffer is full")
                await asyncio.sleep(0)  # `drop` has cancelled this very task
            await self._room.wait()
            self._trim()

    def end(self, bug: Exception | None) -> None:
        self.ended, self.bug = True, bug
        if self.reader is not None:
            self.reader.filled.set()

    # --- for readers and the registry

    def position_after(self, last_event_id: str | None) -> int:
        """Return the number of the event after `last_event_id`, or 0 if it is None.

        Raises InvalidRequestError for an id of another stream, and StreamGoneError if the event
        has been dropped.
        """
        position = 0
        if last_event_id is not None:
            stream_id, _, number = last_event_id.rpartition("-")
            known = number.isascii() and number.isdecimal() and len(number) < 20
            if stream_id != self.id or not known or int(number) >= self.end_number:
                raise InvalidRequestError(
                    "Last-Event-ID: does not belong to this stream", "Last-Event-ID"
                )
            position = int(number) + 1
        if position < self.first:
            raise StreamGoneError(f"events before number {self.first} are no longer kept")
        return position

    def attach(self, position: int) -> Reader:
        """Start reading at `position`. A connection that was reading gets an error event."""
        if self.reader is not None:
            self.reader.break_off(StreamGoneError("another connection is reading this stream now"))
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        self.reader = Reader(self, position)
        return self.reader

    def detach(self, reader: Reader) -> None:
        """Stop reading, unless another reader has taken over."""
        if self.reader is reader:
            self.reader = None
            self._room.set()
            self._keeper.expire_later(self)

    def read(self, position: int) -> bytes:
        """Return all events from `position` on; from now on they count as sent."""
        batch = b"".join(islice(self._events, position - self.first, None))
        self._sent = max(self._sent, self.end_number)
        self._room.set()
        return batch

    def clear(self) -> None:
        """Forget all events."""
        self._keeper.total_bytes -= self.size
        self._events.clear()
        self.size = 0


class Reader:
    """One connection's position in a stream; a Source."""

    def __init__(self, stream: EventLog, position: int) -> None:
        self.stream = stream
        self.position = position
        self.filled = Signal()
        self._broken: QuireError | None = None
        self._said_why = False

    @property
    def early_failure(self) -> Exception | None:
        return self.stream.early_failure

    def break_off(self, error: QuireError) -> None:
        """End this connection's events with one for `error`."""
        self._broken = error
        self.filled.set()

    async def take(self) -> bytes:
        """See `Source`. A reader that was broken off gets an error event and then the end."""
        stream = self.stream
        while True:
            if self._broken is not None:
                if self._said_why:
                    return b""
                self._said_why = True
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
