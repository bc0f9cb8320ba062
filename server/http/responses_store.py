"""Responses that clients can ask for again, running in the background or ended, and conversations.

They live in memory and are lost when the server stops. Ended responses and conversations are
limited in number, bytes and age; the key that holds most loses its oldest first, so none can drive
out another's. Running responses are limited by the queue limits.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

from ..settings import Settings

Key = tuple[bytes, str]
"""The owner of a response or a conversation (see `Keys.owner`), and its id."""


@dataclass(slots=True)
class Stored:
    """A response that has ended, or a conversation, as its member "object" says. `items` is the
    whole conversation, including the output of the response."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    num_bytes: int
    expires: float


@dataclass(slots=True)
class Running:
    """A response in the background. `response` grows; `task` ends when it has been stored."""

    response: dict[str, Any]
    task: asyncio.Task[None]


class ResponseStore:
    """All responses and conversations that are kept. Only the API key that created one finds it."""

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
        """Whether this server stores responses at all."""
        return self._max_entries > 0

    def __len__(self) -> int:
        return len(self._ended)

    def add(
        self, key: Key, response: dict[str, Any], items: list[dict[str, Any]], num_bytes: int
    ) -> bool:
        """Keep a response that has ended, or a conversation in the place of what it was.

        `num_bytes` are those of both as JSON, which the caller counts, since that may take long.
        Returns False, and keeps what there was, if they alone exceed the bound on bytes.
        """
        if num_bytes > self._max_bytes:
            return False
        if key in self._ended:
            self._drop(key)
        self._ended[key] = Stored(response, items, num_bytes, self._clock() + self._ttl)
        self.num_bytes += num_bytes
        while len(self._ended) > self._max_entries or self.num_bytes > self._max_bytes:
            self._drop_oldest_of_largest(key, by_bytes=self.num_bytes > self._max_bytes)
        return True

    def run(self, key: Key, response: dict[str, Any], work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the background; it must `add` the response when it ends."""
        task = asyncio.create_task(work)
        self._running[key] = Running(response, task)
        task.add_done_callback(lambda _: self._running.pop(key, None))

    def find(self, key: Key) -> Stored | Running | None:
        """Return the response of this owner and id, if it is kept."""
        self._expire()
        return self._running.get(key) or self._ended.get(key)

    def find_items(self, owner: bytes, ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return the items with these ids in the kept conversations of this owner, by their id."""
        self._expire()
        wanted = set(ids)
        found: dict[str, dict[str, Any]] = {}
        for key, stored in reversed(self._ended.items()):
            if not wanted:
                break
            if key[0] == owner:
                here = {
                    name: item
                    for item in stored.items
                    if isinstance(name := item.get("id"), str) and name in wanted
                }
                wanted -= here.keys()
                found |= here
        return found

    async def remove(self, key: Key) -> bool:
        """Forget a response, ending it if it runs; False if there is none."""
        if await self.cancel(key) is None:
            return False
        if key in self._ended:
            self._drop(key)
        return True

    async def cancel(self, key: Key) -> dict[str, Any] | None:
        """End the response if it is running. Returns the response, or None if there is none."""
        found = self.find(key)
        if isinstance(found, Running):
            found.task.cancel()
            await asyncio.wait({found.task})
        return None if found is None else found.response

    async def close(self) -> None:
        """End all running responses."""
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

    def _drop_oldest_of_largest(self, new: Key, *, by_bytes: bool) -> None:
        """Drop the oldest entry of the owner with most entries or bytes, but not `new`."""
        held: Counter[bytes] = Counter()
        for (owner, _), stored in self._ended.items():
            held[owner] += stored.num_bytes if by_bytes else 1
        others = [key for key in self._ended if key != new]
        self._drop(max(others, key=lambda key: held[key[0]]))  # the first of equal ones: the oldest

    def _drop(self, key: Key) -> None:
        self.num_bytes -= self._ended.pop(key).num_bytes
