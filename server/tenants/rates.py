"""What each tenant used in this minute and the one before, and what runs and waits of it now.

All HTTP workers share the memory, in which each one writes only its own cells: nothing is locked.
The limits apply to the sums. Requests that arrive at several workers in the same moment may all
take what is left.

Use is counted by minutes of the clock. The rate is that of this minute and the part of the one
before that lies within the last 60 seconds, as if use had been even in it:

    |── minute before ──|── this minute ──▶ now
              └──────── 60 seconds ────────┘
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

MINUTE = 60.0
"""Seconds that a rate is over."""
MAX_SLOTS = 4096
"""Maximum tenants that are counted."""
_FIELDS = 7
_WINDOW, _REQUESTS, _TOKENS, _RUNNING, _WAITING = 0, 1, 3, 5, 6
"""Places in a cell: the minute it counts; requests of this minute and of the one before; tokens of
both; requests that run; sequences that wait for their first token."""


def rates_size(processes: int) -> int:
    """Return the bytes of memory that so many processes need."""
    return processes * MAX_SLOTS * _FIELDS * 8


class Use(NamedTuple):
    """What was used in this minute and in the one before, `elapsed` seconds into this one."""

    now: int
    before: int
    elapsed: float

    @property
    def last_minute(self) -> float:
        """What was used in the last 60 seconds."""
        return self.now + self.before * (1 - self.elapsed / MINUTE)

    def left(self, limit: int) -> int:
        """Return what is left of `limit`, never less than 0."""
        return max(0, math.floor(limit - self.last_minute + 1e-6))

    def wait(self, needed: int, limit: int) -> float:
        """Return the seconds until `needed` more are within `limit`; 0 if they are now.

        What exceeds the limit by itself may be used once nothing has been for a minute.
        """
        needed = min(needed, limit)
        if self.last_minute + needed <= limit + 1e-6:
            return 0.0
        if self.now + needed <= limit:
            return self._decay(self.before, limit - needed - self.now) - self.elapsed
        return MINUTE - self.elapsed + self._decay(self.now, limit - needed)

    def reset(self) -> float:
        """Return the seconds until all of it is forgotten."""
        if self.now:
            return 2 * MINUTE - self.elapsed
        return MINUTE - self.elapsed if self.before else 0.0

    @staticmethod
    def _decay(used: int, wanted: int) -> float:
        """Return how far into the next minute `used` has decayed to `wanted`."""
        return MINUTE * (1 - wanted / used) if used > wanted else 0.0


class Rates:
    """Counts by slot. `memory` has `rates_size` bytes for all processes; `index` is this one's."""

    def __init__(
        self,
        memory: memoryview[int] | None = None,
        index: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if memory is None:
            memory = memoryview(bytearray(rates_size(1))).cast("q")
        self._memory = memory
        self._base = index * MAX_SLOTS * _FIELDS
        self._clock = clock  # the system's monotonic clock, which all processes share

    def requests(self, slot: int) -> Use:
        """Return the requests of a slot, of all processes."""
        return self._use(slot, _REQUESTS)

    def tokens(self, slot: int) -> Use:
        """Return the tokens of a slot, of all processes."""
        return self._use(slot, _TOKENS)

    def running(self, slot: int) -> int:
        """Return the requests of a slot that run, of all processes."""
        return sum(self._memory[slot * _FIELDS + _RUNNING :: MAX_SLOTS * _FIELDS])

    def waiting(self, slot: int) -> int:
        """Return the sequences of a slot that wait, of all processes."""
        return sum(self._memory[slot * _FIELDS + _WAITING :: MAX_SLOTS * _FIELDS])

    def slots_waiting(self) -> set[int]:
        """Return the slots of which sequences wait."""
        memory, size = self._memory, MAX_SLOTS * _FIELDS
        return {
            slot
            for begin in range(0, len(memory), size)
            for slot, count in enumerate(memory[begin + _WAITING : begin + size : _FIELDS])
            if count
        }

    def add_request(self, slot: int) -> None:
        """Count a request."""
        self._memory[self._cell(slot) + _REQUESTS] += 1

    def add_tokens(self, slot: int, count: int) -> None:
        """Count tokens. A negative count gives some back, of this minute only."""
        place = self._cell(slot) + _TOKENS
        self._memory[place] = max(0, self._memory[place] + count)

    def add_running(self, slot: int, count: int) -> None:
        """Count requests that begin to run, or end if `count` is negative."""
        self._memory[self._base + slot * _FIELDS + _RUNNING] += count

    def add_waiting(self, slot: int, count: int) -> None:
        """Count sequences that begin to wait, or no longer do if `count` is negative."""
        self._memory[self._base + slot * _FIELDS + _WAITING] += count

    def forget_running(self, index: int) -> None:
        """Count nothing of the process `index` as running or waiting, since it has died."""
        begin = index * MAX_SLOTS * _FIELDS
        for field in (_RUNNING, _WAITING):
            for place in range(begin + field, begin + MAX_SLOTS * _FIELDS, _FIELDS):
                if self._memory[place]:
                    self._memory[place] = 0

    def _cell(self, slot: int) -> int:
        """Return the place of this process's cell, after moving it on to the present minute."""
        memory, cell = self._memory, self._base + slot * _FIELDS
        window = int(self._clock() // MINUTE)
        past = window - memory[cell]
        if past:
            for field in (_REQUESTS, _TOKENS):
                memory[cell + field + 1] = memory[cell + field] if past == 1 else 0
                memory[cell + field] = 0
            memory[cell] = window
        return cell

    def _use(self, slot: int, field: int) -> Use:
        memory = self._memory
        time = self._clock()
        window = int(time // MINUTE)
        now = before = 0
        for cell in range(slot * _FIELDS, len(memory), MAX_SLOTS * _FIELDS):
            past = window - memory[cell]
            if past == 0:
                now += memory[cell + field]
                before += memory[cell + field + 1]
            elif past == 1:
                before += memory[cell + field]
        return Use(now, before, time - window * MINUTE)
