"""The buffer between the task that produces a stream's events and its connection."""

from __future__ import annotations

from typing import Protocol

from ...engine.process.stream import Signal

MAX_UNSENT_BYTES = 1024 * 1024
"""Maximum size of the events that wait for a slow reader. Beyond it the producer pauses, and the
rest of its output waits unformatted, limited by max_tokens."""


class Source(Protocol):
    """What a connection takes its events from: an Outbox, or a Reader of an EventLog."""

    @property
    def early_failure(self) -> Exception | None:
        """The failure of the stream, if it failed before its first event."""

    async def take(self) -> bytes:
        """Wait for events and return all that there are; b"" at the end of the stream.

        Raises the exception of a producer that broke.
        """


class Outbox:
    """Events on their way from the producing task to the one connection that sends them.

    One write sends all events of a step, and all that gathered during the previous write.
    """

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._size = 0
        self._filled = Signal()
        self._emptied = Signal()
        self._ended = False
        self._bug: Exception | None = None
        self.early_failure: Exception | None = None

    def put(self, event: bytes) -> None:
        self._events.append(event)
        self._size += len(event)
        self._filled.set()

    @property
    def full(self) -> bool:
        """See `Sink`."""
        return self._size > MAX_UNSENT_BYTES

    async def room(self) -> None:
        while self.full:
            await self._emptied.wait()

    def end(self, bug: Exception | None) -> None:
        self._ended, self._bug = True, bug
        self._filled.set()

    async def take(self) -> bytes:
        """See `Source`."""
        while not self._events:
            if self._bug is not None:
                raise self._bug
            if self._ended:
                return b""
            await self._filled.wait()
        batch = b"".join(self._events)
        self._events.clear()
        self._size = 0
        self._emptied.set()
        return batch


class Sink(Protocol):
    """What `produce` puts its events into: an Outbox, or an EventLog that keeps them."""

    early_failure: Exception | None

    def put(self, event: bytes) -> None:
        """Add an event. Never blocks; see `full`."""

    @property
    def full(self) -> bool:
        """Whether the producer should wait for `room` before it puts anything more."""

    async def room(self) -> None:
        """Wait until the sink is no longer full."""

    def end(self, bug: Exception | None) -> None:
        """End the stream; `bug` is an unforeseen exception of the producer, if there was one."""
