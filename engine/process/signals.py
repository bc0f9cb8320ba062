"""A one-waiter event, cheap enough for every token."""

from __future__ import annotations

import asyncio


class Signal:
    """Wake the one task that waits, if one does. For use on one event loop.

    Unlike `asyncio.Event` it keeps no state: a `set` that nobody waits for is lost, so the waiter
    checks its condition first and after each `wait`.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return after the next `set`."""
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def set(self) -> None:
        """Wake the waiter."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
