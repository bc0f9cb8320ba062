"""The store below host memory: a BlockStore with two threads, so that no step waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import abc, deque
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from ..errors import one_line
from .block_store import BlockStore
from .sealed_block import HEADER_BYTES, seal, unseal

MAX_WRITES = 1024
"""Blocks that wait to be written."""
WARNING_SECONDS = 60.0
"""Time between two warnings of the same kind."""

logger = logging.getLogger("quire.engine")


class Runner(Protocol):
    """Runs tasks one after the other."""

    def __call__(self, task: abc.Callable[[], None]) -> None: ...


class TaskThread:
    """Implements Runner by a thread that begins with the first task. It does not keep the process
    alive: a store that hangs must not."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: deque[abc.Callable[[], None]] = deque()
        self._ready = threading.Condition()
        self._started = False

    def __call__(self, task: abc.Callable[[], None]) -> None:
        with self._ready:
            self._tasks.append(task)
            self._ready.notify()
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._tasks:
                    self._ready.wait()
                task = self._tasks.popleft()
            task()


class Written(NamedTuple):
    """The end of a write: whether the block is in the store now, and which others gave way."""

    own_hash: bytes
    slot: int
    kept: bool
    lost: list[bytes]


class LowerTier:
    """Moves blocks between host memory and a BlockStore.

    All methods are the engine's thread's. What the store raises is logged, and the block counts as
    not found or not kept.
    """

    def __init__(
        self,
        store: BlockStore,
        fingerprint: bytes,
        block_bytes: int,
        *,
        name: str = "disk",
        read: Runner | None = None,
        write: Runner | None = None,
        clock: abc.Callable[[], float] = time.monotonic,
    ) -> None:
        """`read` and `write` run what waits for the store; by default a thread each."""
        self.name = name
        self._store = store
        self._fingerprint = fingerprint
        self._clock = clock
        self._read: Runner = read or TaskThread("KV block reader")
        self._write: Runner = write or TaskThread("KV block writer")
        self._read_record = memoryview(bytearray(HEADER_BYTES + block_bytes))
        self._write_record = memoryview(bytearray(HEADER_BYTES + block_bytes))
        self._stored: set[bytes] = set()
        """What this process has stored, and not heard that it was given up."""
        self._distrusted: set[bytes] = set()
        """What the store must be expected to have, and must not be used."""
        self._writing: set[bytes] = set()
        self._doomed: set[bytes] = set()
        """Those of `_writing` that must not be used once they are stored."""
        self._trusts_old = True
        """Whether what an earlier process has stored may be used."""
        self._written: deque[Written] = deque()
        self._warned: dict[str, float] = {}
        self._is_over = False
        """Whether the engine ends without waiting for the rest of the writes."""
        self.num_writing = 0
        self.failures = 0
        """Blocks that the store should have had and did not give, or did not give intact, and those
        that it did not take."""

    @property
    def can_write(self) -> bool:
        """Whether there is room for another write."""
        return self.num_writing < MAX_WRITES

    def find(self, hashes: abc.Sequence[bytes]) -> list[bytes]:
        """Return those hashes whose blocks the store probably has."""
        try:
            found = self._store.contains(hashes) if hashes else []
        except Exception as error:
            self._warn("does not say what it has", error)
            return []
        return [
            own_hash
            for own_hash, is_there in zip(hashes, found, strict=False)
            if is_there
            and (self._trusts_old or own_hash in self._stored)
            and own_hash not in self._distrusted
        ]

    def hashes(self) -> abc.Set[bytes]:
        """Return the hashes of the blocks that this process has stored, as far as it knows."""
        return self._stored

    def load(self, own_hash: bytes, into: memoryview) -> Future[float | None]:
        """Begin to load a block. The result is how many seconds it took, or None if the store did
        not have it, whole and intact; then `into` is as before."""
        future: Future[float | None] = Future()

        def task() -> None:
            begin = time.perf_counter()
            content = None
            try:
                if self._store.load(own_hash, self._read_record):
                    content = unseal(self._fingerprint, own_hash, self._read_record)
                    if content is None:
                        self._warn("returned a damaged block, or one of another model")
            except Exception as error:
                self._warn("failed to load a block", error)
            if content is not None:
                into[:] = content
            future.set_result(None if content is None else time.perf_counter() - begin)

        self._read(task)
        return future

    def loaded(self, own_hash: bytes, ok: bool) -> None:
        """Note how a load ended. A block that could not be loaded is discarded."""
        if ok:
            self._stored.add(own_hash)
        else:
            self.failures += 1
            self.discard(own_hash)

    def remember(self, own_hash: bytes) -> None:
        """Note that the store has a block that it was not given by this process."""
        self._stored.add(own_hash)

    def store(self, own_hash: bytes, slot: int, content: memoryview) -> None:
        """Begin to store a block, whose slot nobody changes until `take_written` returns it."""
        self.num_writing += 1
        self._writing.add(own_hash)

        def task() -> None:
            kept, lost = False, []
            if self._is_over:
                return
            try:
                seal(self._fingerprint, own_hash, content, self._write_record)
                lost = list(self._store.store(own_hash, self._write_record))
                kept = True
            except Exception as error:
                self._warn("failed to store a block", error)
            self._written.append(Written(own_hash, slot, kept, lost))

        self._write(task)

    def take_written(self) -> abc.Iterator[Written]:
        """Yield the writes that have ended since the last call."""
        while self._written:
            written = self._written.popleft()
            self.num_writing -= 1
            self._writing.remove(written.own_hash)
            self._stored.difference_update(written.lost)
            if written.own_hash in self._doomed:
                self._doomed.remove(written.own_hash)
            elif written.kept:
                self._stored.add(written.own_hash)
                self._distrusted.discard(written.own_hash)
            else:
                self.failures += 1
            yield written

    def discard(self, own_hash: bytes) -> None:
        """Never use a block again that the store may have, unless it is stored anew."""
        if own_hash not in self._writing and not self.find([own_hash]):
            return
        self._stored.discard(own_hash)
        self._distrusted.add(own_hash)
        if own_hash in self._writing:
            self._doomed.add(own_hash)

        def task() -> None:
            try:
                self._store.store(own_hash, memoryview(b""))
            except Exception as error:
                self._warn("failed to forget a block", error)

        self._write(task)

    def clear(self) -> None:
        """Never use any block again that is in the store now, unless it is stored anew."""
        self._trusts_old = False
        self._stored.clear()
        self._doomed |= self._writing

    def close(self, timeout: float) -> None:
        """Close the store, after the writes that have begun, but after so many seconds in any
        case."""
        closed = threading.Event()

        def task() -> None:
            try:
                self._store.close()
            except Exception as error:
                self._warn("failed to close", error)
            closed.set()

        self._write(task)
        if not closed.wait(timeout):
            self._is_over = True
            logger.warning("the store of KV blocks did not close within %.1f s", timeout)

    def _warn(self, what: str, error: Exception | None = None) -> None:
        """Warn of a fault, but of the same kind only once in a while."""
        now = self._clock()
        if now - self._warned.get(what, -WARNING_SECONDS) < WARNING_SECONDS:
            return
        self._warned[what] = now
        reason = "" if error is None else f": {one_line(error)}"
        logger.warning("the store of KV blocks %s%s", what, reason)
