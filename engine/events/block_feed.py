"""Tells clients, and subscribers of the publisher, what happens to an engine's known blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .block_events import BlockChanges, BlockEvent, block_key
from .kv_publisher import KVPublisher


class RecordingCore(Protocol):
    """What the feed needs of an engine's core."""

    def record_blocks(self, on: bool) -> None: ...

    def take_block_events(self) -> list[BlockEvent]: ...

    def known_blocks(self) -> list[bytes]: ...


class BlockFeed:
    """Numbers the changes, and asks the core to record them only while somebody follows them."""

    def __init__(
        self,
        send_known: Callable[[bytes, int, bytes], None],
        publisher: KVPublisher | None = None,
    ) -> None:
        """`send_known` sends a client all known blocks, as keys one after the other, and the number
        of the last changes that they include."""
        self._send_known = send_known
        self._publisher = publisher
        self.watchers: set[bytes] = set()
        """The clients that get the changes."""
        self._sequence = 0

    def begin(self, core: RecordingCore) -> None:
        """Begin to publish, if that is asked for."""
        if self._publisher is not None:
            core.record_blocks(True)
            self._publisher.begin()

    def watch(self, core: RecordingCore, client: bytes) -> None:
        """Send a client all known blocks, and the changes from now on.

        Changes that are recorded and not sent yet are in both, which does no harm.
        """
        self.watchers.add(client)
        core.record_blocks(True)
        keys = b"".join(map(block_key, core.known_blocks()))
        self._send_known(client, self._sequence, keys)

    def forget(self, core: RecordingCore, client: bytes) -> None:
        """Note that a client has died."""
        if client in self.watchers:
            self.watchers.remove(client)
            if not self.watchers and self._publisher is None:
                core.record_blocks(False)

    def take(self, core: RecordingCore) -> BlockChanges | None:
        """Publish what was recorded since the last call, and return its effect; None if there is
        nothing or nobody follows it."""
        if not (self.watchers or self._publisher):
            return None
        events = core.take_block_events()
        if not events:
            return None
        if self._publisher is not None:
            self._publisher.publish(events)
        self._sequence += 1
        return BlockChanges.of(self._sequence, events)
