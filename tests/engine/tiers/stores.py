"""A store of KV blocks with faults, and runners that do what waits for it when a test says so."""

from __future__ import annotations

import random
from collections import OrderedDict, abc, deque

from quire.engine.tiers.block_store import StoreFacts


class FaultyStore:
    """Implements BlockStore in memory. Each call has one of the faults with a certain chance."""

    def __init__(self, room: int = 1000, seed: int = 0, chance: float = 0.0) -> None:
        self.records: OrderedDict[bytes, bytes] = OrderedDict()
        self.chance = chance
        self.happened: set[str] = set()
        self.num_loads = 0
        self._room = room
        self._rng = random.Random(seed)

    def _happens(self, fault: str) -> bool:
        if self._rng.random() >= self.chance:
            return False
        self.happened.add(fault)
        return True

    def contains(self, hashes: abc.Sequence[bytes]) -> list[bool]:
        if self._happens("contains raises"):
            raise ConnectionError("injected")
        return [own_hash in self.records for own_hash in hashes]

    def load(self, own_hash: bytes, into: memoryview) -> bool:
        self.num_loads += 1
        if self._happens("load raises"):
            raise TimeoutError("injected")
        if own_hash not in self.records or self._happens("load finds nothing"):
            return False
        record = bytearray(self.records[own_hash])
        assert len(record) == len(into)
        if self._happens("garbage"):
            record[-len(record) // 2 :] = self._rng.randbytes(len(record) - len(record) // 2)
        if self._happens("a bit"):
            record[self._rng.randrange(len(record))] ^= 1 << self._rng.randrange(8)
        into[:] = record
        return True

    def store(self, own_hash: bytes, record: memoryview) -> list[bytes]:
        if self._happens("store raises"):
            raise OSError("injected")
        self.records.pop(own_hash, None)
        if record:
            self.records[own_hash] = bytes(record)
        lost = []
        while len(self.records) > self._room:
            lost.append(self.records.popitem(last=False)[0])
        return lost

    def close(self) -> None: ...


class Tasks:
    """Implements Runner: tasks are done when `run` is called, or at once if it is not `slow`."""

    def __init__(self, *, slow: bool = True) -> None:
        self.slow = slow
        self._tasks: deque[abc.Callable[[], None]] = deque()

    def __call__(self, task: abc.Callable[[], None]) -> None:
        if self.slow:
            self._tasks.append(task)
        else:
            task()

    def run(self, count: int | None = None) -> None:
        for _ in range(len(self._tasks) if count is None else min(count, len(self._tasks))):
            self._tasks.popleft()()


def make_store(facts: StoreFacts) -> FaultyStore:
    """Return a store without faults, as `--kv-offloading-connector` does."""
    assert len(facts.fingerprint) == 32 and facts.record_bytes > 0
    return FaultyStore()
