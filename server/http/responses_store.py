"""Responses that can be asked for again: those that run in the background, and those that ended.

All of it lives in memory and is gone with the server. What ended is bounded in number, bytes and
age, the oldest leave first; what still runs is bounded by the queue limits.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ..json_text import encode_json
from ..settings import Settings

Key = tuple[bytes, str]
"""Whose it is (see `Keys.owner`), and its id."""


@dataclass(slots=True)
class Stored:
    """A response that ended. `items` is its whole conversation, its own output included."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    num_bytes: int
    expires: float


@dataclass(slots=True)
class Running:
    """A response in the background. `response` grows; `task` ends once it is stored."""

    response: dict[str, Any]
    task: asyncio.Task[None]


class ResponseStore:
    """Only the key that made a response finds it."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_entries = settings.max_stored_responses
        self._max_bytes = int(settings.max_stored_response_bytes)
        self._ttl = settings.stored_response_ttl
        self._clock = clock
        self._ended: OrderedDict[Key, Stored] = OrderedDict()
        self._running: dict[Key, Running] = {}
        self.num_bytes = 0

    @property
    def enabled(self) -> bool:
        return self._max_entries > 0

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, key: Key, response: dict[str, Any], items: list[dict[str, Any]]) -> None:
        """Keep a response that ended, where it alone is within the bounds."""
        num_bytes = len(encode_json(response)) + len(encode_json(items))
        if num_bytes > self._max_bytes:
            return
        self._ended[key] = Stored(response, items, num_bytes, self._clock() + self._ttl)
        self.num_bytes += num_bytes
        while len(self._ended) > self._max_entries or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._ended)))

    def run(self, key: Key, response: dict[str, Any], work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, which adds the response at its end, in the background."""
        task = asyncio.create_task(work)
        self._running[key] = Running(response, task)
        task.add_done_callback(lambda _: self._running.pop(key, None))

    def find(self, key: Key) -> Stored | Running | None:
        self._expire()
        return self._running.get(key) or self._ended.get(key)

    async def remove(self, key: Key) -> bool:
        """Forget a response, which ends if it runs; False where there is none."""
        if await self.cancel(key) is None:
            return False
        if key in self._ended:
            self._drop(key)
        return True

    async def cancel(self, key: Key) -> dict[str, Any] | None:
        """End the response if it still runs; the response, if there is one."""
        found = self.find(key)
        if isinstance(found, Running):
            found.task.cancel()
            await asyncio.wait({found.task})
        return None if found is None else found.response

    async def close(self) -> None:
        """End all that runs."""
        for running in list(self._running.values()):
            running.task.cancel()
            await asyncio.wait({running.task})

    def _expire(self) -> None:
        now = self._clock()
        while self._ended:
            key, stored = next(iter(self._ended.items()))
            if stored.expires > now:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self.num_bytes -= self._ended.pop(key).num_bytes
