"""The client's side of the live view: it asks for snapshots while somebody reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from ..outputs import LiveSnapshot

WATCH_SECONDS = 3.0
"""How long the engine sends snapshots after it was asked for them. A client that dies asks no
more."""
SILENCE_SECONDS = 1.0
"""Seconds after which a reader asks again, and is told if there was no snapshot."""


class LiveFeed:
    """Hands the engine's snapshots to any number of readers, on one event loop.

    `watch` asks the engine for snapshots for so many seconds. It is called only while somebody
    reads.
    """

    def __init__(self, watch: Callable[[float], None]) -> None:
        self._watch = watch
        self._readers: set[asyncio.Queue[LiveSnapshot]] = set()

    def deliver(self, snapshot: LiveSnapshot) -> None:
        """Give every reader the snapshot, in the place of one that it has not taken yet."""
        for reader in self._readers:
            if reader.full():
                reader.get_nowait()
            reader.put_nowait(snapshot)

    async def snapshots(self) -> AsyncGenerator[LiveSnapshot | None, None]:
        """Yield snapshots as they come, and None after each second without one."""
        reader: asyncio.Queue[LiveSnapshot] = asyncio.Queue(1)
        self._readers.add(reader)
        loop = asyncio.get_running_loop()
        ask_at = loop.time()
        try:
            while True:
                if loop.time() >= ask_at:
                    self._watch(WATCH_SECONDS)
                    ask_at = loop.time() + SILENCE_SECONDS
                try:
                    yield await asyncio.wait_for(reader.get(), SILENCE_SECONDS)
                except TimeoutError:
                    yield None
        finally:
            self._readers.remove(reader)
