"""What stands between the task that makes a stream's events and the connection that sends them."""

from __future__ import annotations

from typing import Protocol

from ...engine.process.signals import Signal

MAX_UNSENT_BYTES = 1024 * 1024
"""Events that wait for such a reader; what is beyond waits unformatted, bounded by max_tokens."""


class Source(Protocol):
    """Where a connection takes its events from."""

    @property
    def early_failure(self) -> Exception | None:
        """What the stream failed with before its first event."""

    async def take(self) -> bytes:
        """All events that are there, at least one; nothing at the end. Raises what broke them."""


class Outbox:
    """Events between the task that makes them and the one connection that sends them.

    One write takes all that a step brought, and all that gathered during the last write.
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
        """Nothing more should be put before `room` has returned."""
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
    """Where `produce` puts events: an Outbox, or what keeps them for later."""

    early_failure: Exception | None

    def put(self, event: bytes) -> None: ...

    @property
    def full(self) -> bool: ...

    async def room(self) -> None: ...

    def end(self, bug: Exception | None) -> None:
        """Nothing more comes; `bug` is an exception that there should not be."""
