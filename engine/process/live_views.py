"""The engine's side of the live view: when to send a snapshot, and to whom."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from ..outputs import LiveSnapshot
from . import wire

SHORTEST_INTERVAL = 0.2
"""Seconds between two snapshots."""
LARGEST_SHARE = 0.005
"""The share of the engine thread's time that snapshots may take: expensive ones become rarer."""
LONGEST_WATCH = 60.0
"""Seconds after which a client that watches must ask again."""


class Watchable(Protocol):
    """The part of a core that is watched."""

    def snapshot(self) -> LiveSnapshot: ...

    def end_snapshots(self) -> None: ...


class LiveViews:
    """Sends snapshots of a core to the clients that watch it, with `send`.

    While nobody watches it does nothing; the caller asks `watched` once a step.
    """

    def __init__(
        self,
        send: Callable[[bytes, bytes], None],
        clock: Callable[[], float] = time.monotonic,
        work_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """`work_clock` measures what a snapshot costs. It stands while others have the core, so
        that a busy machine does not make snapshots rarer."""
        self._send = send
        self._clock = clock
        self._work_clock = work_clock
        self._until: dict[bytes, float] = {}
        self._due = 0.0
        self.watched = False
        """Whether `send_if_due` has anything to do: to send, or to end the snapshots."""

    def watch(self, client: bytes, seconds: float) -> None:
        """Send snapshots to `client` for so many seconds, at most LONGEST_WATCH."""
        self._until[client] = self._clock() + min(seconds, LONGEST_WATCH)
        self.watched = True

    def forget(self, client: bytes) -> None:
        """Send nothing more to a client that has died."""
        self._until.pop(client, None)

    def send_if_due(self, core: Watchable) -> None:
        """Send a snapshot if the last one is long enough ago, or end them if nobody watches."""
        now = self._clock()
        if now < self._due:
            return
        self._until = {client: until for client, until in self._until.items() if until > now}
        if not self._until:
            self.watched = False
            core.end_snapshots()
            return
        begin = self._work_clock()
        message = wire.encode(wire.LiveView(core.snapshot()))
        for client in self._until:
            self._send(client, message)
        cost = self._work_clock() - begin
        self._due = now + max(SHORTEST_INTERVAL, cost / LARGEST_SHARE)
